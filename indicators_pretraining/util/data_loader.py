"""Loaders: batches of normalised images on the device, the same for any number of ranks and workers.

Small sets lie on the device as one uint8 tensor; image folders are read by worker processes. Either way the augmentation of
a sample is drawn from (seed, epoch, index) alone.
"""

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F
from torchvision import transforms

from util.datasets import DATASETS, describe_data, read_dataset, read_pixels, read_rgb
from util.errors import UserError
from util.sampling import OrderedSampler, ShuffledSampler, Stream, calibration_sampler, generator, stratified_split

CROP_PADDING = 8  # an eighth of the image on each side: 4 pixels at 32 x 32
RESIZE_RATIO = 256 / 224  # the usual resize before the centre crop in evaluation


class Loader:
    """The batches of one split on this rank: (images float32 [B, 3, S, S], normalised; labels int64 [B]) on the device.

    `len` is the number of batches of a whole epoch on this rank, `images` the number of images of an epoch over all ranks.

    Args:
        batches: yields (images uint8 [B, 1 or 3, S, S], labels), or the UserError that says what cannot be read.
        mean, std: per colour channel, of pixels from 0 to 1.
        transfer: moves batches to the device while it computes, one ahead; None: each is moved when it is asked for.
    """

    def __init__(self, sampler, batches, mean, std, device, transfer=None):
        self.sampler, self.batches, self.device, self.transfer = sampler, batches, device, transfer
        self.images = sampler.images
        mean, std = torch.tensor([mean, std], dtype=torch.float32, device=device).view(2, 1, 3, 1, 1)
        self.scale, self.shift = 1 / (255 * std), -mean / std

    def __len__(self):
        return len(self.sampler)

    def set_epoch(self, epoch, start_step=0):
        """Choose the epoch whose batches the next iteration yields, and the step it starts at (to resume there)."""
        self.sampler.set_epoch(epoch, start_step)

    def __iter__(self):
        if self.transfer is None:
            moved = ([part.to(self.device, non_blocking=True) for part in batch] for batch in map(readable, self.batches))
        else:
            moved = one_ahead(map(readable, self.batches), self.transfer.begin, self.transfer.finish)
        for images, labels in moved:
            yield normalise(images, self.scale, self.shift), labels


def readable(batch):
    """A batch as it is. A UserError in its place is raised."""
    if isinstance(batch, UserError):
        raise batch
    return batch


def one_ahead(batches, begin, finish):
    """finish(begin(batch)) for each batch, where each is begun before the one before it is finished and given out.

    A UserError in place of a batch comes where the batch would have come.
    """
    begun = []
    try:
        for batch in batches:
            begun.append(begin(batch))
            if len(begun) > 1:
                yield finish(begun.pop(0))
    except UserError:
        yield from map(finish, begun)
        raise
    yield from map(finish, begun)


class SideStream:
    """Moves batches to a GPU on a stream of their own, beside what is computed there."""

    def __init__(self, device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def begin(self, batch):
        with torch.cuda.stream(self.stream):
            parts = [part.to(self.device, non_blocking=True) for part in batch]
        return parts, self.stream.record_event()

    def finish(self, begun):
        parts, moved = begun
        computing = torch.cuda.current_stream(self.device)
        computing.wait_event(moved)
        for part in parts:
            part.record_stream(computing)  # so that its memory is not taken for another batch while it is used
        return parts


def normalise(images, scale, shift):
    """uint8 [B, 1 or 3, S, S] to contiguous float32 [B, 3, S, S]; a grey channel is repeated by the broadcast."""
    return (images.float(memory_format=torch.contiguous_format) * scale).add_(shift)


@dataclass(frozen=True)
class Loaders:
    """What a training run reads. Where no images are held out, `val` is the test loader.
    `calibration(samples)` gives a loader over random training images, not augmented, which set_epoch draws anew."""

    train: Loader
    val: Loader
    test: Loader
    calibration: Callable[[int], Loader]
    num_classes: int
    mean: tuple
    std: tuple
    class_names: tuple


def create_loaders(config, seed, rank, world_size, device, barrier=lambda: None, downloads=None, evaluation_only=False):
    """Read the dataset of a DataConfig and build its Loaders.

    Args:
        barrier, downloads: see read_dataset; by default rank 0 downloads.
        evaluation_only: nothing is going to be trained, so too few images for a training batch do no harm.
    """
    num_classes, input_size = describe_data(config)
    config = replace(config, num_classes=num_classes, input_size=input_size)
    data = read_dataset(config, rank == 0 if downloads is None else downloads, barrier)
    train_set, test_set = data.train.to(device), data.test.to(device)
    train, val = split_training_images(data.train.labels, config, seed)
    steps = 0 if evaluation_only else count_training_steps(len(train), config.batch_size, world_size)
    are_files = isinstance(train_set.images, np.ndarray)
    transfer = SideStream(device) if device.type == "cuda" and are_files else None

    def loader(images, sampler, augment=False, keep_workers=True):
        if are_files:
            source = folder_batches(config, images, sampler, seed, device, augment, keep_workers)
        else:
            padding, flip = input_size // CROP_PADDING, DATASETS[config.dataset].flip
            crop = CropAndFlip(seed, len(images.labels), padding, flip, device) if augment else None
            source = MemoryBatches(images, sampler, crop)
        return Loader(sampler, source, data.mean, data.std, device, transfer)

    def evaluation(images, indices):
        return loader(images, OrderedSampler(indices, config.batch_size, rank, world_size))

    def calibration(samples):
        sampler = calibration_sampler(train, samples, seed, config.batch_size, rank, world_size)
        return loader(train_set, sampler, keep_workers=False)

    training_sampler = ShuffledSampler(train, Stream.SHUFFLE, seed, config.batch_size, steps, rank, world_size)
    test_loader = evaluation(test_set, np.arange(len(test_set.labels)))
    return Loaders(train=loader(train_set, training_sampler, augment=True),
                   val=evaluation(train_set, val) if len(val) else test_loader, test=test_loader, calibration=calibration,
                   num_classes=num_classes, mean=data.mean, std=data.std, class_names=data.class_names)


def split_training_images(labels, config, seed):
    """(indices of training, of validation images): val_split of all are held out, of the others data_fraction is kept; both
    balanced over the classes."""
    val, train = stratified_split(labels, config.val_split, [Stream.VALIDATION_SPLIT, seed])
    if config.val_split and not len(val):
        raise UserError(f"dataloader.val_split: found {config.val_split}, but no class has two training images, one of "
                        "which could be held out; leave it 0")
    if config.data_fraction < 1:
        left_out = 1 - Fraction(str(config.data_fraction))
        train = train[stratified_split(labels[train], left_out, [Stream.DATA_FRACTION, seed])[1]]
    return train, val


def count_training_steps(images, batch_size, world_size):
    """How many full batches over all ranks an epoch has; at least one."""
    steps = images // (batch_size * world_size)
    if not steps:
        processes = f"{world_size} processes x {batch_size}" if world_size > 1 else str(batch_size)
        raise UserError(f"dataloader.batch_size: found {processes}, but only {images} images are left for training; "
                        f"take at most {images // world_size}")
    return steps


class MemoryBatches:
    """Batches of images held as one uint8 tensor [N, C, S, S]; iterating yields uint8 images and labels."""

    def __init__(self, image_set, sampler, augment):
        self.images, self.labels = image_set.images, torch.from_numpy(image_set.labels).to(image_set.images.device)
        self.sampler, self.augment = sampler, augment

    def __iter__(self):
        for epoch, indices in self.sampler:
            indices = torch.from_numpy(indices).to(self.images.device, non_blocking=True)
            images = self.images[indices]
            yield (self.augment(images, epoch, indices) if self.augment else images), self.labels[indices]


class CropAndFlip:
    """Random crops of `count` zero-padded images, and horizontal flips; sample i of an epoch always gets the same."""

    def __init__(self, seed, count, padding, flip, device):
        self.seed, self.count, self.padding, self.flip, self.device = seed, count, padding, flip, device
        self.epoch = None

    def __call__(self, images, epoch, indices):
        if epoch != self.epoch:
            draws = draw_crops(self.seed, epoch, self.count, self.padding, self.flip)
            self.epoch, self.draws = epoch, torch.from_numpy(draws).to(self.device)
        return crop_and_flip(images, *self.draws[:, indices], self.padding)


def draw_crops(seed, epoch, count, padding, flip):
    """Where to crop each of `count` samples and whether to flip it: int64 [3, count] (top, left, flipped)."""
    rng = generator(Stream.AUGMENTATION, seed, epoch)
    offsets = rng.integers(0, 2 * padding + 1, size=(2, count))
    flipped = rng.integers(0, 2, size=(1, count))
    return np.concatenate([offsets, flipped if flip else np.zeros_like(flipped)])


def crop_and_flip(images, top, left, flipped, padding):
    """Pad uint8 images [B, C, S, S] with zeros, crop each back to its size at (top, left) of the padded one, and mirror it
    left to right where `flipped` is 1. top, left, flipped: int64 [B], the first two from 0 to 2 * padding."""
    batch, channels, size, _ = images.shape
    padded_size = size + 2 * padding
    padded = F.pad(images, (padding,) * 4).view(batch, channels, padded_size ** 2)
    steps = torch.arange(size, device=images.device)
    rows = top[:, None] + steps
    columns = left[:, None] + torch.where(flipped[:, None] > 0, size - 1 - steps, steps)
    pixels = (rows[:, :, None] * padded_size + columns[:, None, :]).view(batch, 1, size ** 2)
    return padded.gather(2, pixels.expand(-1, channels, -1)).view(images.shape)


def folder_batches(config, image_set, sampler, seed, device, augment, keep_workers):
    """Batches of `image_set` by `sampler`, read ahead by config.workers processes, which stay between epochs if wanted."""
    size = config.input_size
    if augment:
        steps = [read_pixels, RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    else:
        resize = transforms.Resize(int(size * RESIZE_RATIO))
        steps = [read_rgb, resize, transforms.CenterCrop(size), transforms.PILToTensor()]
    return torch.utils.data.DataLoader(
        FileBatches(image_set, transforms.Compose(steps), seed),
        sampler=sampler, batch_size=None, num_workers=config.workers,
        persistent_workers=keep_workers and config.workers > 0, pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_main,
        generator=torch.Generator())  # its own, so that iterating draws nothing from the global one


class RandomResizedCrop(transforms.RandomResizedCrop):
    """torchvision's, the same crop of uint8 tensors [3, H, W] with an eighth of the time of Pillow's resizing, from which some
    values differ by one. Only channels last is torch that fast."""

    def forward(self, pixels):
        top, left, height, width = self.get_params(pixels, self.scale, self.ratio)
        crop = pixels[None, :, top:top + height, left:left + width].contiguous(memory_format=torch.channels_last)
        return F.interpolate(crop, self.size, mode="bilinear", antialias=True)[0]


class FileBatches(torch.utils.data.Dataset):
    """Whole batches of image files: [(epoch, indices)] gives uint8 images [B, 3, S, S] and labels [B]. `transform` makes
    an image [3, S, S] of a file's name. The colours of a pixel lie side by side, as decoded; the device moves them apart.

    A file that cannot be read gives the UserError itself: raised in a worker, it would come out wrapped in a traceback.
    """

    def __init__(self, image_set, transform, seed):
        self.files, self.labels = image_set.images, image_set.labels
        self.transform, self.seed = transform, seed

    def __getitem__(self, key):
        epoch, indices = key
        try:
            images = [self.read(epoch, index).permute(1, 2, 0) for index in indices]
        except UserError as error:
            return error
        return torch.stack(images).permute(0, 3, 1, 2), torch.from_numpy(self.labels[indices])

    def read(self, epoch, index):
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would reseed the accelerators too, which fork_rng does not put back here.
            own = generator(Stream.AUGMENTATION, self.seed, epoch, index)
            torch.default_generator.manual_seed(int(own.integers(2**63)))
            return self.transform(os.fsdecode(self.files[index]))


def leave_signals_to_main(worker):
    """Leave Ctrl-C and SIGTERM to the main process, which saves first and then stops its workers with a SIGTERM of its own. A
    worker that ended before would take the run along."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=end_for, args=(os.getppid(),), daemon=True).start()
    elif hasattr(os, "setpgrp"):  # who sent a signal is not told here
        os.setpgrp()


def end_for(sender):
    """End this process as soon as another one, by its number, sends SIGTERM."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != sender:
        pass
    os._exit(0)
