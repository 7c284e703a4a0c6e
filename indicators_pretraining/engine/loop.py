"""The loops that every training shares: the steps of an epoch, and the epochs of a run, with its checkpoints."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from quan.utils import check_all_reached, keep_steps_positive, step_quantizers
from util import distributed
from util.errors import Interrupted, UserError

from . import interruption
from .metrics import Metrics
from .optim import learning_rate
from .passes import Passes
from .training_state import MidEpochState, training_state


def training_step(model, batches, criterion, optimizer, metrics, passes=None):
    """One optimizer step on the mean loss over batches of equal size, and over ranks.

    Args:
        batches: [(images, target), ...].
        criterion: loss of (logits, images, target).
        metrics: the Metrics to add to.
        passes: the Passes of the model; None stands for plain ones.
    """
    passes = passes or Passes(model)
    optimizer.zero_grad(set_to_none=True)
    for images, target in batches:
        logits = passes.logits(images)
        loss = criterion(logits, images, target)
        (loss / len(batches)).backward()
        metrics.update(logits.detach(), target, loss.detach())
    distributed.average_gradients(model.parameters())
    optimizer.step()
    keep_steps_positive(model)


def grouped(iterable, size):
    """Tuples of `size` elements; an incomplete last one is left out."""
    return zip(*[iter(iterable)] * size, strict=False)


@dataclass(frozen=True)
class Hooks:
    """What a stage does in each step and after each epoch.

    Attributes:
        take_step: called with (batches, epoch, step, {label: Metrics}); makes one optimizer step.
        validate: called with the number of an epoch (the first is 0); (top-1, top-5), or None where they do not count.
        write: called with what a checkpoint holds, and whether it is the best one; on every rank.
        labels: what there are Metrics for: None for the model as it is, or candidates.
        shown: the label whose figures are shown while an epoch runs.
        batches_per_step: how many batches take_step gets.
        epochs_before: epochs that the run had before this training began, for the log.
    """

    take_step: Callable
    validate: Callable
    write: Callable
    labels: tuple = (None,)
    shown: int | None = None
    batches_per_step: int = 1
    epochs_before: int = 0


class Training:
    """Trains a network epoch by epoch, writing what an exact resume needs, and stopping where a signal asks for it."""

    def __init__(self, model, optimizer, loader, config, monitor, hooks):
        self.model, self.optimizer, self.loader, self.config, self.monitor = model, optimizer, loader, config, monitor
        self.hooks = hooks
        self.steps = len(loader) // hooks.batches_per_step
        self.images_per_step = loader.images // len(loader) * hooks.batches_per_step
        self.device = next(model.parameters()).device
        self.has_checkpoint = False  # whether this run, or the one that it goes on from, has left any

    def run(self, start, last):
        """Train the epochs from `start` to last - 1, with a checkpoint after each; a signal raises Interrupted on all ranks,
        with a checkpoint written."""
        self.best = start.best
        self.has_checkpoint = bool(self.hooks.epochs_before or start.epoch or start.inside)
        for epoch in range(start.epoch, last):
            inside = start.inside if epoch == start.epoch else None
            if inside is None or not inside.is_trained:
                self.train(epoch, inside)
                if self.number(epoch) == 1:
                    check_all_reached(self.model)
                    self.log_waiting_steps()
            scores = self.validate_or_save(epoch)
            is_best = scores is not None and scores[0] > self.best[0]
            self.best = scores if is_best else self.best
            self.save(epoch + 1, is_best=is_best)
            interruption.check(self.place(epoch, self.steps))

    def train(self, epoch, inside=None):
        """Train for one epoch, from where a checkpoint was written inside it, and log what it reached."""
        number = self.number(epoch)
        metrics = {label: Metrics(self.device) for label in self.hooks.labels}
        first, seconds = self.continue_inside(inside, metrics)
        begun = time.time() - seconds
        self.model.train()
        self.loader.set_epoch(epoch, first * self.hooks.batches_per_step)
        self.asked = interruption.ask()
        batches = self.monitor.progress(grouped(self.loader, self.hooks.batches_per_step), f"epoch {number}",
                                        self.images_per_step, self.steps, first)
        for step, group in enumerate(batches, first):
            for parameters in self.optimizer.param_groups:
                parameters["lr"] = learning_rate(self.config, epoch + step / self.steps)
            # Before the step, which would spread what is not finite over the whole network.
            check = self.optimizer.register_step_pre_hook(lambda *_, done=step + 1: self.check_finite(epoch, done, metrics))
            try:
                self.hooks.take_step(group, epoch, step, metrics)
            finally:
                check.remove()
            self.after_step(epoch, step + 1, metrics, begun)
        distributed.average_batchnorm_statistics(self.model)
        for label, value in metrics.items():
            self.monitor.epoch(number, "train", {**value.result(), "lr": self.optimizer.param_groups[0]["lr"],
                                                 "seconds": time.time() - begun}, bits=label)

    def log_waiting_steps(self):
        """Name the step sizes that have no value from data yet."""
        waiting = [name for name, quantizer in step_quantizers(self.model).items() if not quantizer.is_initialized]
        if waiting:
            self.monitor.log(f"step sizes without a value, as all that they met was zero: {', '.join(waiting)}")

    def continue_inside(self, inside, metrics):
        """(the step to go on with, seconds spent), and the sums of the epoch so far put into `metrics`."""
        if inside is None:
            return 0, 0.0
        for value, sums in zip(metrics.values(), inside.own_sums(), strict=True):
            value.sums.copy_(sums)
        return min(inside.step * inside.images_per_step // self.images_per_step, self.steps), inside.seconds

    def after_step(self, epoch, done, metrics, begun):
        """Show figures, and write a checkpoint or stop where it is due, after `done` steps of an epoch."""
        log, is_last = self.config.log, done == self.steps
        if done % log.print_freq == 0:
            figures = metrics[self.hooks.shown].result()
            self.monitor.step(self.number(epoch), done, self.steps, loss=figures["loss"], top1=figures["top1"])
        number = self.asked()
        if is_last:
            return  # what follows the epoch ends in a checkpoint, or in one that says it is trained
        self.asked = interruption.ask()
        if number or (log.checkpoint_steps and done % log.checkpoint_steps == 0):
            self.save(epoch, MidEpochState(done, time.time() - begun, self.images_per_step, False,
                                           [value.sums for value in metrics.values()]))
        if number:
            raise Interrupted(number, self.place(epoch, done))

    def validate_or_save(self, epoch):
        """Validate; a signal that comes meanwhile leaves a checkpoint of the epoch that is trained but not validated."""
        try:
            return self.hooks.validate(epoch)
        except Interrupted as stop:
            self.save(epoch, MidEpochState(self.steps, 0.0, self.images_per_step, True, []))
            raise Interrupted(stop.number, self.place(epoch, self.steps)) from None

    def number(self, epoch):
        """The number that an epoch of this training has in the run; the first is 1."""
        return self.hooks.epochs_before + epoch + 1

    def place(self, epoch, done):
        where = f" in epoch {self.number(epoch)}, after {done} of {self.steps} steps"
        return f" after epoch {self.number(epoch)}" if done == self.steps else where

    def save(self, epochs, inside=None, is_best=False):
        """Write a checkpoint after `epochs` completed epochs, or inside the one that follows."""
        culprit = not_finite(self.model)
        if culprit:
            place = self.place(epochs - 1, self.steps) if inside is None else self.place(epochs, inside.step)
            raise UserError(f"{culprit} is not finite{place}; {self.remedy()}")
        state = training_state(self.model, self.optimizer, epochs, self.best, self.config, self.monitor)
        if inside is not None:
            state["inside"] = replace(inside, sums=distributed.gather_objects([sums.cpu() for sums in inside.sums]),
                                      batchnorms=distributed.batchnorm_statistics(self.model)).as_plain()
        self.hooks.write(state, is_best)
        self.has_checkpoint = True

    def check_finite(self, epoch, done, metrics):
        """Stop all ranks where the loss of one is not finite. On a GPU, where reading a number holds a step up, and with
        several ranks, which would wait for each other, only steps that are shown and the last are checked."""
        is_cheap = self.device.type == "cpu" and distributed.world_size() == 1
        if not is_cheap and done % self.config.log.print_freq and done != self.steps:
            return
        sums = torch.stack([value.sums for value in metrics.values()])
        if not distributed.largest_over_ranks(0 if torch.isfinite(sums).all() else 1):
            return
        culprit = not_finite(self.model)
        what = f"{culprit} is not finite" if culprit else "all weights and step sizes are finite, the activations are not"
        raise UserError(f"the loss is not finite in epoch {self.number(epoch)}, step {done} of {self.steps}: "
                        f"{what}; {self.remedy()}")

    def remedy(self):
        """What to do where numbers are not finite."""
        return "lower lr, or add warmup_epochs" + (" (a checkpoint from before is kept)" if self.has_checkpoint else "")


def not_finite(model):
    """The first weight or step size of a network, in its order, with a value that is not finite; '' where there is none."""
    finite = [torch.isfinite(parameter).all() for parameter in model.parameters()]
    if torch.stack(finite).all():
        return ""
    name = next(name for (name, _), fine in zip(model.named_parameters(), finite, strict=True) if not fine)
    return f"the step size {name}" if name.endswith(".s") else f"the parameter {name}"
