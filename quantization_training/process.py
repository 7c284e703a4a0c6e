"""Fine-tuning at a policy's bits: training, BatchNorm calibration, validation, the final evaluation."""

import time
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from quan.utils import BATCHNORM, keep_steps_positive
from util import distributed
from util.checkpoint import training_state
from util.errors import UserError
from util.metrics import Metrics, evaluate, evaluation_mode
from util.monitor import log_start
from util.optim import learning_rate, set_learning_rate

ALWAYS_VALIDATED = 15  # the last epochs, each of which is validated


def create_criterion(config, teacher=None):
    """Loss of (logits, images, target): label-smoothed cross-entropy, mixed with distillation where there is a teacher.

    With weight w and temperature T: (1 - w) * CE + w * T^2 * KL(teacher / T, student / T) (arXiv 1503.02531).
    """
    weight, temperature = config.distillation.weight, config.distillation.temperature

    def criterion(logits, images, target):
        loss = F.cross_entropy(logits, target, label_smoothing=config.smoothing)
        if teacher is None:
            return loss
        with torch.no_grad():
            wanted = F.log_softmax(teacher(images) / temperature, dim=1)
        answer = F.log_softmax(logits / temperature, dim=1)
        distance = F.kl_div(answer, wanted, reduction="batchmean", log_target=True)
        return (1 - weight) * loss + weight * temperature**2 * distance

    return criterion


def training_step(model, batches, criterion, optimizer, metrics):
    """One optimizer step on the mean loss over batches of equal size, and over ranks.

    Args:
        batches: [(images, target), ...], as many as config.accumulation.
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


def train_one_epoch(model, loader, criterion, optimizer, config, epoch, monitor):
    """Train for one epoch (the first is 0) and log what it reached."""
    begun = time.time()
    model.train()
    loader.set_epoch(epoch)
    metrics = Metrics(next(model.parameters()).device)
    steps = len(loader) // config.accumulation
    images_per_step = loader.images // len(loader) * config.accumulation
    batches = grouped(loader, config.accumulation)
    for step, group in enumerate(monitor.progress(batches, f"epoch {epoch + 1}", images_per_step, steps)):
        set_learning_rate(optimizer, learning_rate(config, epoch + step / steps))
        training_step(model, group, criterion, optimizer, metrics)
        if (step + 1) % config.log.print_freq == 0:
            figures = metrics.result()
            monitor.step(epoch + 1, step + 1, steps, loss=figures["loss"], top1=figures["top1"])
    distributed.average_batchnorm_statistics(model)
    monitor.epoch(epoch + 1, "train", {**metrics.checked_result(epoch), "lr": optimizer.param_groups[0]["lr"],
                                       "seconds": time.time() - begun})


@contextmanager
def batchnorms_estimating_anew(model):
    """BatchNorms in training mode, averaging all batches with equal weight from zero; mode and momentum are put back."""
    batchnorms = [module for module in model.modules() if isinstance(module, BATCHNORM) and module.track_running_stats]
    momenta = [module.momentum for module in batchnorms]
    with evaluation_mode(model):
        try:
            for module in batchnorms:
                module.train()
                module.reset_running_stats()
                module.momentum = None
            yield
        finally:
            for module, momentum in zip(batchnorms, momenta, strict=True):
                module.momentum = momentum


@torch.no_grad()
def calibrate_batchnorm(model, loader):
    """Re-estimate the BatchNorm statistics of a quantized network on a loader's images and over ranks."""
    with batchnorms_estimating_anew(model):
        for images, _ in loader:
            model(images)
    distributed.average_batchnorm_statistics(model)


def check_accumulation(loaders, config):
    """Refuse to accumulate more batches than an epoch has."""
    if not config.eval and len(loaders.train) < config.accumulation:
        raise UserError(f"accumulation: found {config.accumulation}, an epoch has {len(loaders.train)} batches only")


def is_validated(epoch, config):
    """Whether the epoch (the first is 0) ends with a validation."""
    last = config.epochs + config.cooldown_epochs
    return epoch == 0 or (epoch + 1) % config.val_cycle == 0 or epoch >= last - ALWAYS_VALIDATED


def finetune(network, loaders, criterion, optimizer, config, monitor, folder, start):
    """Train to the last epoch, calibrating and validating where due; write a checkpoint after each epoch."""
    model, best = network.model, start.best
    log_start(monitor, start, network.remark)
    for epoch in range(start.epoch, config.epochs + config.cooldown_epochs):
        train_one_epoch(model, loaders.train, criterion, optimizer, config, epoch, monitor)
        is_best = False
        if is_validated(epoch, config):
            scores = validate(model, loaders, config, epoch, monitor)
            is_best, best = scores[0] > best[0], max(best, scores, key=lambda pair: pair[0])
        state = training_state(model, optimizer, epoch + 1, best, config, monitor)
        if distributed.is_main():
            folder.save({**state, **network.facts}, is_best)


def validate(model, loaders, config, epoch, monitor):
    """Calibrate a quantized network, validate it and log it; return top-1 and top-5."""
    if config.calibration_images and not config.fp_model:
        calibration = loaders.calibration(max(config.calibration_images, distributed.world_size()))
        calibration.set_epoch(epoch)
        calibrate_batchnorm(model, calibration)
    figures = evaluate(model, loaders.val)
    monitor.epoch(epoch + 1, "val", figures)
    monitor.scores(epoch + 1, figures["top1"], figures["top5"])
    monitor.save_plots()
    return figures["top1"], figures["top5"]


def final_evaluation(network, loaders, config, monitor, folder):
    """Evaluate the final model on the test set, log it with what it costs, and write summary.yaml."""
    figures = evaluate(network.model, loaders.test)
    epochs = config.epochs + config.cooldown_epochs
    monitor.epoch(epochs, "test", figures)
    monitor.log(f"final model on the test set: {report(figures, network.cost)}")
    if distributed.is_main():
        folder.summarise({"name": config.name, "arch": config.arch, "epochs": epochs, **figures, **network.cost})


def report(figures, cost):
    """Accuracy, size and BitOPs on one line."""
    return (f"loss {figures['loss']:.4f}  top-1 {figures['top1']:.3f}  top-5 {figures['top5']:.3f}  "
            f"size {cost['size_mb']:.4f} MB ({cost['ratio']:.2f}x smaller than 32 bits)  "
            f"BitOPs {cost['gbitops']:.3f} G ({cost['gbitops_exact']:.3f} G by exact output sizes)")


def evaluate_only(network, loaders, path):
    """Print what a checkpoint reaches on the test set."""
    figures = evaluate(network.model, loaders.test)
    if distributed.is_main():
        print(f"{path}: {report(figures, network.cost)}")


def dry_run(network, loaders, criterion, optimizer, config):
    """Compute one step and report sizes; nothing is written."""
    network.model.train()
    metrics = Metrics(next(network.model.parameters()).device)
    batches = next(grouped(loaders.train, config.accumulation))
    training_step(network.model, batches, criterion, optimizer, metrics)
    cost, parameters = network.cost, sum(p.numel() for p in network.model.parameters())
    if distributed.is_main():
        print(f"{config.arch}: {len(network.facts.get('weight_bits', {}))} searched layers, {parameters / 1e6:.3f} M "
              f"parameters; size {cost['size_mb']:.4f} MB ({cost['ratio']:.2f}x smaller than 32 bits), "
              f"BitOPs {cost['gbitops']:.3f} G ({cost['gbitops_exact']:.3f} G by exact output sizes)\n"
              f"{loaders.train.images} training images in {len(loaders.train)} batches of {list(batches[0][0].shape)}, "
              f"{loaders.val.images} validation and {loaders.test.images} test images\n"
              f"loss of the first step: {metrics.result()['loss']:.4f}\n"
              f"{network.remark + chr(10) if network.remark else ''}dry run: nothing was written")
