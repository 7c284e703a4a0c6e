"""Joint training: one network learns the step sizes of all candidate bit-widths together."""

from functools import partial

import numpy as np
import torch.nn.functional as F
from torch import nn

from engine.loop import Hooks, Training
from engine.metrics import Metrics, describe_accuracy, evaluate, evaluate_best
from engine.monitor import log_start
from engine.passes import Passes
from engine.run_folder import describe_evaluated
from quan.utils import keep_steps_positive
from schema import RANDOM
from taylor import TaylorSums
from util import distributed
from util.sampling import Stream, generator


def random_policy(layers, bits, seed, epoch, step):
    """A bit-width drawn for each layer, {layer: bit}: the same on every rank, new in every step."""
    draws = generator(Stream.POLICY, seed, epoch, step).integers(len(bits), size=len(layers))
    return {layer: bits[draw] for layer, draw in zip(layers, draws, strict=True)}


def joint_gradients(model, switch, images, target, criterion, chosen, in_place_distillation=False, metrics=None, passes=None,
                    taylor=None):
    """Add up the gradients of one pass per candidate and, unless it is None, one at the policy `chosen`.

    Args:
        images, target: a batch, [batch, 3, height, width] and [batch].
        criterion: loss of (logits, target).
        chosen: {layer: bit} for the last pass, or None.
        in_place_distillation: passes after that of the highest bit-width learn from its outputs instead of from the labels: by
            plain cross-entropy, so that one that gives the same outputs has nothing to learn.
        metrics: {bit or "random": Metrics} to add to.
        passes: the Passes of the model; None stands for plain ones.
        taylor: the TaylorSums to add to.
    """
    passes = passes or Passes(model)
    highest, soft_targets = max(switch.bits), None
    first, last = [highest] if in_place_distillation else [], [] if chosen is None else [RANDOM]
    for candidate in [*first, *(bit for bit in switch.bits if bit not in first), *last]:
        if candidate == RANDOM:
            switch.policy(chosen)
        else:
            switch.uniform(candidate)
            if taylor is not None:
                taylor.start_pass()
        logits = passes.logits(images)
        loss = criterion(logits, target) if soft_targets is None else F.cross_entropy(logits, soft_targets)
        loss.backward()
        if taylor is not None and candidate != RANDOM:
            taylor.end_pass(candidate, loss, len(target))
        if metrics is not None:
            metrics[candidate].update(logits.detach(), target, loss.detach())
        if in_place_distillation and candidate == highest:
            soft_targets = logits.detach().softmax(1)


def joint_step(model, switch, images, target, criterion, optimizer, chosen, in_place_distillation=False, metrics=None,
               passes=None, taylor=None):
    """One optimizer step on the gradients of all passes: added up, averaged over ranks, clipped to [-1, 1]."""
    optimizer.zero_grad(set_to_none=True)
    joint_gradients(model, switch, images, target, criterion, chosen, in_place_distillation, metrics, passes, taylor)
    distributed.average_gradients(model.parameters())
    nn.utils.clip_grad_value_(model.parameters(), 1.0)
    optimizer.step()
    keep_steps_positive(model)


def evaluate_candidates(model, switch, loader):
    """{bit: figures} with every searchable layer at that bit-width."""
    figures = {}
    for bit in switch.bits:
        switch.uniform(bit)
        figures[bit] = evaluate(model, loader)
    return figures


def joint_criterion(config):
    return nn.CrossEntropyLoss(label_smoothing=config.smoothing)


def pretrain(network, loaders, optimizer, config, monitor, folder, start, found=None):
    """Train a JointNetwork from a ResumeState, and the ResumeCheckpoint that it is of or None, to the last epoch, validating
    every candidate at each val_cycle; write a checkpoint after each epoch."""
    model, switch, last = network.model, network.switch, config.last_epoch
    criterion, layers = joint_criterion(config), list(network.switch.layers)
    log_start(monitor, start, network.remark)
    network.passes.log_to(monitor.log)

    # A student learns from other targets in each pass, whose losses and gradients cannot be compared.
    taylor = None if config.in_place_distillation else TaylorSums(switch)
    if taylor and found and start.inside:
        taylor.restore(found)

    def take_step(batches, epoch, step, metrics):
        [(images, target)] = batches
        if taylor and not step:
            taylor.start_epoch()
        chosen = random_policy(layers, switch.bits, config.seed, epoch, step) if config.random_pass else None
        joint_step(model, switch, images, target, criterion, optimizer, chosen, config.in_place_distillation, metrics,
                   network.passes, taylor)

    def validate_where_due(epoch):
        if (epoch + 1) % config.val_cycle == 0 or epoch + 1 == last:
            return validate(model, switch, loaders.val, epoch + 1, monitor)
        return None

    def write(state, is_best):
        sums = {"taylor": taylor.as_plain()} if taylor else {}
        distributed.on_main(folder.save, {**state, **network.metadata, **sums}, is_best, config.log.keep_checkpoints)

    hooks = Hooks(take_step, validate_where_due, write, config.passes, max(switch.bits))
    Training(model, optimizer, loaders.train, config, monitor, hooks).run(start, last)


def validate(model, switch, loader, epoch, monitor):
    """Validate every candidate and log it; return the mean top-1 and top-5 over candidates."""
    figures = evaluate_candidates(model, switch, loader)
    for bit, row in figures.items():
        monitor.epoch(epoch, "val", row, bits=bit)
    top1, top5 = (float(np.mean([row[key] for row in figures.values()])) for key in ("top1", "top5"))
    monitor.scores(epoch, top1, top5)
    return top1, top5


def final_evaluation(network, loaders, config, monitor, folder):
    """Evaluate every candidate on the test set, in the last epoch's network and in the best checkpoint's, unless final_test
    is off; log it, and write summary.yaml."""
    figures, best = {}, {}
    if config.final_test:
        test = partial(evaluate_candidates, network.model, network.switch, loaders.test)
        figures = test()
        for bit, row in figures.items():
            monitor.epoch(config.last_epoch, "test", row, bits=bit)
        found = evaluate_best(network.model, folder, config.last_epoch, test, figures, monitor)
        if found:
            epoch, reached = found
            best = {"best": {"epoch": epoch, "candidates": {bit: dict(row) for bit, row in reached.items()}}}
            for bit, row in reached.items():
                monitor.log(f"best on validation (epoch {epoch}) on the test set at {bit} bits: {describe_accuracy(row)}")
    distributed.on_main(folder.summarise, {"name": config.name, "arch": config.arch, "epochs": config.last_epoch,
                                           "candidates": figures, **best})


def evaluate_only(network, loaders, found):
    """Print what every candidate reaches on the test set."""
    if distributed.is_main():
        print(describe_evaluated(found.path, found.content))
    for bit, row in evaluate_candidates(network.model, network.switch, loaders.test).items():
        distributed.on_main(print, f"{found.path} at {bit} bits: {describe_accuracy(row)}")


def dry_run(network, loaders, optimizer, config):
    """Compute one batch and report sizes; nothing is written."""
    network.model.train()
    switch, metadata = network.switch, network.metadata
    images, target = next(iter(loaders.train))
    metrics = {candidate: Metrics(images.device) for candidate in config.passes}
    chosen = random_policy(list(switch.layers), switch.bits, config.seed, 0, 0) if config.random_pass else None
    joint_step(network.model, switch, images, target, joint_criterion(config), optimizer, chosen,
               config.in_place_distillation, metrics, network.passes)
    layers, size = [*metadata["layers"].values(), *metadata["fixed"].values()], metadata["input_size"]
    report = [f"{config.arch}: {len(metadata['layers'])} searchable layers, {len(metadata['fixed'])} fixed; "
              f"{sum(row['params'] for row in layers) / 1e6:.3f} M weights, "
              f"{sum(row['macs_exact'] for row in layers) / 1e6:.1f} M MACs at {size}x{size}",
              f"{loaders.train.images} training images in {len(loaders.train)} batches of {list(images.shape)}, "
              f"{loaders.val.images} validation images",
              *(f"loss at {candidate} bits: {value.result()['loss']:.4f}" for candidate, value in metrics.items())]
    distributed.on_main(print, "\n".join([*report, *filter(None, [network.remark]), "dry run: nothing was written"]))
