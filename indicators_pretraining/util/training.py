"""The loops that every training shares: the steps of an epoch, and the epochs of a run."""

import time

from quan.utils import keep_steps_positive
from util import distributed
from util.optim import learning_rate, set_learning_rate


def training_step(model, batches, criterion, optimizer, metrics):
    """One optimizer step on the mean loss over batches of equal size, and over ranks.

    Args:
        batches: [(images, target), ...].
        criterion: loss of (logits, images, target).
        metrics: the Metrics to add to.
    """
    optimizer.zero_grad(set_to_none=True)
    for images, target in batches:
        logits = model(images)
        loss = criterion(logits, images, target)
        (loss / len(batches)).backward()
        metrics.update(logits.detach(), target, loss.detach())
    distributed.average_gradients(model.parameters())
    optimizer.step()
    keep_steps_positive(model)


def grouped(iterable, size):
    """Lists of `size` elements; an incomplete last one is left out."""
    group = []
    for element in iterable:
        group.append(element)
        if len(group) == size:
            yield group
            group = []


def train_one_epoch(model, loader, optimizer, config, epoch, monitor, metrics, take_step, batches_per_step=1, shown=None,
                    epochs_before=0):
    """Train for one epoch and log what it reached.

    Args:
        epoch: the first is 0; decides learning rate, order and augmentation.
        metrics: {label: Metrics} to be filled; the label is None for the model as it is, or a candidate.
        take_step: called with a list of batches and the number of the step; makes one optimizer step.
        batches_per_step: length of that list.
        shown: the label whose figures are shown while the epoch runs.
        epochs_before: epochs that the run had before this training began, for the log.
    """
    begun, number = time.time(), epochs_before + epoch + 1
    model.train()
    loader.set_epoch(epoch)
    steps = len(loader) // batches_per_step
    images_per_step = loader.images // len(loader) * batches_per_step
    batches = monitor.progress(grouped(loader, batches_per_step), f"epoch {number}", images_per_step, steps)
    for step, group in enumerate(batches):
        set_learning_rate(optimizer, learning_rate(config, epoch + step / steps))
        take_step(group, step)
        if (step + 1) % config.log.print_freq == 0:
            figures = metrics[shown].result()
            monitor.step(number, step + 1, steps, loss=figures["loss"], top1=figures["top1"])
    distributed.average_batchnorm_statistics(model)
    for label, value in metrics.items():
        monitor.epoch(number, "train", {**value.checked_result(number), "lr": optimizer.param_groups[0]["lr"],
                                        "seconds": time.time() - begun}, bits=label)


def train_epochs(first, last, best, run_epoch, validate, save):
    """Train the epochs first to last - 1, validating and saving after each.

    Args:
        best: (top-1, top-5) of the best epoch so far.
        run_epoch: trains the epoch of a number.
        validate: (top-1, top-5) after the epoch of a number, or None where it does not count.
        save: called with the epochs completed, the best scores so far, and whether they are this epoch's.
    """
    for epoch in range(first, last):
        run_epoch(epoch)
        scores = validate(epoch)
        is_best = scores is not None and scores[0] > best[0]
        best = scores if is_best else best
        save(epoch + 1, best, is_best)
