"""What each level of iterative pruning removes, and when it is enough; rewinding.py trains the levels."""

from dataclasses import replace

from sparsity.ranking import Prunable, sums_of
from util.errors import UserError


class LevelSchedule(Prunable):
    """What each level removes of a DenseNetwork by a PruneConfig; weights are ranked as they are when masks are asked for."""

    def __init__(self, network, prune):
        super().__init__(network, prune)
        self.graph, self.pruned = network.graph, network.pruned

    def masks_for(self, level, masks):
        """The masks of a level (the first is 1), ranked by the weights as they are at the end of the level before."""
        return self.more_masks(masks, self.prune.amount_of(level), self.prune.target)

    def count(self, masks):
        """(all prunable weights or channels, those that are left)."""
        return sums_of(self.groups(masks))

    def is_last(self, level, masks):
        """Whether no level comes after one with these masks."""
        return self._is_last(level, self.groups(masks))

    def _is_last(self, level, groups):
        if self.prune.last_level is not None:
            return level >= self.prune.last_level
        return not any(group.to_remove(1, self.prune.target) for group in groups)

    def forecast(self, level, masks):
        """What the levels after this one will remove in all, [(level, weights or channels)]: they are counted, not ranked.
        A level that would remove nothing, and amounts that end below the target, are refused."""
        groups, ahead = self.groups(masks), []
        while not self._is_last(level, groups):
            level += 1
            counts = [group.to_remove(self.prune.amount_of(level), self.prune.target) for group in groups]
            if not any(counts):
                total, left = sums_of(groups)
                raise UserError(f"prune.amount: level {level} would remove none of the {left} {self.unit} that are left of "
                                f"{total}; give a larger amount, or fewer levels")
            groups = [replace(group, left=group.left - count) for group, count in zip(groups, counts, strict=True)]
            ahead.append((level, sum(group.total - group.left for group in groups)))
        return ahead

    def share_removed(self, masks):
        total, left = self.count(masks)
        return 1 - left / total

    def describe(self, masks):
        total, left = self.count(masks)
        return f"{total - left:,} of {total:,} {self.unit} removed ({100 * self.share_removed(masks):.2f} %)"

    def check(self, level, masks):
        """Refuse a target that lies below what is removed already or out of reach, fewer levels than are there, and levels
        to come that would remove nothing."""
        groups = self.groups(masks)
        if self.prune.target is not None:
            self.check_target(groups, self.prune.target)
        if self.prune.last_level is not None and level > self.prune.last_level:
            raise UserError(f"prune.levels: found {self.prune.last_level}, but level {level} is there already")
        self.forecast(level, masks)
