"""Gradual magnitude pruning during training (Zhu & Gupta, arXiv 1710.01878)."""

from sparsity.ranking import Prunable, sums_of
from util import distributed


def sparsity_at(time, start, end, initial, final):
    """The sparsity due at a time, in epochs: initial up to `start`, final from `end` on, between them (eq. 1 there)

    final + (initial - final) * (1 - (time - start) / (end - start))^3.
    """
    if time >= end:
        return final
    if time <= start:
        return initial
    return final + (initial - final) * (1 - (time - start) / (end - start)) ** 3


def create_pruning(network, config, found):
    """The GradualPruning that a configuration asks for, or None.

    Args:
        found: the ResumeCheckpoint that the run goes on from, which knows the sparsity it began with, or None.
    """
    if config.prune.target_sparsity is None or config.eval:
        return None
    known = found.content.get("initial_sparsity") if found and not found.lean else None
    pruning = GradualPruning(network, config, known)
    network.description["initial_sparsity"] = pruning.initial
    return pruning


class GradualPruning(Prunable):
    """Removes the smallest weights, more and more, while a network is trained; a UserError where the target is out of reach.

    Args:
        network: the PolicyNetwork; its PrunedParameters get the new masks. config: the FinetuneConfig.
        initial: the share that was removed when the run began; None where it begins now.
    """

    def __init__(self, network, config, initial=None):
        super().__init__(network, config.prune)
        self.pruned, self.start, self.end = network.pruned, config.prune.start_epoch, config.prune_until
        groups = self.groups(self.pruned.masks)
        self.check_target(groups, self.prune.target_sparsity)
        total, left = sums_of(groups)
        self.initial = 1 - left / total if initial is None else initial

    def after_step(self, epoch, step, steps):
        """Prune where it is due: every `frequency` steps, at the end of each epoch, and when the end is reached.

        Args:
            epoch, step: those of the step just made; the first are 0. steps: per epoch.
        """
        before, now = epoch + step / steps, epoch + (step + 1) / steps
        if now <= self.start or before >= self.end:
            return
        if (epoch * steps + step + 1) % self.prune.frequency and step + 1 < steps and now < self.end:
            return
        share = sparsity_at(now, self.start, self.end, self.initial, self.prune.target_sparsity)
        self.pruned.set(distributed.on_main(self.more_masks, self.pruned.masks, 1, share))
        self.pruned.apply()
