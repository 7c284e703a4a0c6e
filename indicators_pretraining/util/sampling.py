"""Which images, in which order: seeded streams, class-balanced splits, and the batches of an epoch on one rank.

Every draw comes from a stream of its own, keyed by what it may depend on and by nothing else, so that neither ranks nor
workers nor a resume change it.
"""

import enum
import math
from fractions import Fraction

import numpy as np


class Stream(enum.IntEnum):
    """What a random draw is for. The number leads the key of its generator, so purposes never share a stream."""

    VALIDATION_SPLIT = 1
    DATA_FRACTION = 2
    SHUFFLE = 3
    AUGMENTATION = 4
    CALIBRATION = 5
    DIGITS_TEST = 6
    POLICY = 7


def generator(stream, *numbers):
    """The generator of one purpose; `numbers` (seed, epoch, index: not negative) say which draw of it."""
    return np.random.default_rng([int(stream), *(int(number) for number in numbers)])


def stratified_split(labels, fraction, seed):
    """Split image indices in two, with the same fraction of every class on the first side.

    Of a class with n images, round(fraction * n) are taken (halves up, computed exactly); for 0 < fraction at least
    one is taken and one left, and a class of a single image is left.

    Args:
        labels: class of each image, int [N].
        fraction: a number or a Fraction from 0 to 1.
        seed: a whole number or a sequence of them.

    Returns:
        (taken, rest): int64 index arrays in ascending order, disjoint, together 0..N-1.
    """
    labels = np.asarray(labels)
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # class by class, each in random order
    counts = np.unique(labels, return_counts=True)[1]
    taken = [members[:count_taken(len(members), fraction)] for members in np.split(order, np.cumsum(counts))]
    taken = np.sort(np.concatenate(taken))
    return taken, np.setdiff1d(np.arange(len(labels)), taken)


def count_taken(members, fraction):
    """How many of a class with `members` images stratified_split takes."""
    exact = Fraction(str(fraction))  # 0.29 is meant, not the binary number just below it
    rounded = math.floor(exact * members + Fraction(1, 2))
    return max(0, min(max(rounded, 1), members - 1)) if exact else 0


class Sampler:
    """Iterating yields (epoch, int64 indices [up to batch_size]) for the batches of one rank, from start_step on."""

    epoch = start_step = 0

    def set_epoch(self, epoch, start_step=0):
        self.epoch, self.start_step = epoch, start_step


class ShuffledSampler(Sampler):
    """Batches over a new permutation of `indices` in each epoch; what does not fill the last step is left out.

    Batch t of all ranks together is permutation[t * G : (t + 1) * G] with G = batch_size * world_size, and rank r
    takes the r-th slice of it: N ranks with batches of B see just what one rank with batches of N * B sees.
    """

    def __init__(self, indices, stream, seed, batch_size, steps, rank, world_size):
        self.indices, self.stream, self.seed = indices, stream, seed
        self.batch_size, self.steps, self.rank, self.world_size = batch_size, steps, rank, world_size
        self.images = steps * batch_size * world_size

    def __len__(self):
        return self.steps

    def __iter__(self):
        epoch, start_step = self.epoch, self.start_step
        order = self.indices[generator(self.stream, self.seed, epoch).permutation(len(self.indices))]
        for step in range(start_step, self.steps):
            first = (step * self.world_size + self.rank) * self.batch_size
            yield epoch, order[first:first + self.batch_size]


class OrderedSampler(Sampler):
    """Batches over `indices` in their order, the same in every epoch: rank r takes indices[r::world_size], all of
    them, so the last batch may be smaller and ranks may differ by one image."""

    def __init__(self, indices, batch_size, rank, world_size):
        self.images, self.mine, self.batch_size = len(indices), indices[rank::world_size], batch_size

    def __len__(self):
        return math.ceil(len(self.mine) / self.batch_size)

    def __iter__(self):
        epoch = self.epoch
        for first in range(self.start_step * self.batch_size, len(self.mine), self.batch_size):
            yield epoch, self.mine[first:first + self.batch_size]


def calibration_sampler(indices, samples, seed, batch_size, rank, world_size):
    """A sampler of a random `samples` of `indices` (all, if they are fewer), drawn anew in each epoch.

    Batches have one size, at most `batch_size`, so that each weighs the same in an average over batches; never more
    than `samples` images are used, and at most one per rank and step fewer.
    """
    per_rank = min(samples, len(indices)) // world_size
    steps = math.ceil(per_rank / batch_size)
    return ShuffledSampler(indices, Stream.CALIBRATION, seed, per_rank // steps, steps, rank, world_size)
