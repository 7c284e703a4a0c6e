"""Optimizer and learning rate, as configured."""

import math
import operator

import torch

from util.errors import UserError

ADAMS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def create_optimizer(model, config):
    """The optimizer of `opt`, over the parameters that are trained. The names mean what they mean in timm, as in LIMPQ.

    sgd is SGD with Nesterov momentum, momentum is SGD with plain momentum; adam adds weight decay to the gradient, adamw
    takes it from the weights. Step sizes, biases and normalization parameters get no weight decay.
    """
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.dim() <= 1 or name.endswith((".quan_w_fn.s", ".quan_a_fn.s"))
            (plain if exempt else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if config.opt in ADAMS:
        return ADAMS[config.opt](groups, lr=config.lr)
    nesterov = config.opt == "sgd" and config.momentum > 0  # without momentum the two are the same
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov)


def check_schedule(config):
    """Refuse a schedule that cannot be followed. Messages begin with the key."""
    if config.warmup_epochs >= config.epochs:
        raise UserError(f"warmup_epochs: found {config.warmup_epochs:g}, allowed is less than epochs ({config.epochs})")
    if config.min_lr > config.lr:
        raise UserError(f"min_lr: found {config.min_lr:g}, allowed is at most lr ({config.lr:g})")
    epochs = config.decay_epochs
    if (config.sched == "multistep") != isinstance(epochs, list):
        raise UserError(f"decay_epochs: found {epochs}; sched: multistep takes a list of epochs such as [30, 60], "
                        "the others take one number")
    if isinstance(epochs, list) and not (epochs and epochs[0] > 0 and all(map(operator.lt, epochs, epochs[1:]))):
        raise UserError(f"decay_epochs: found {epochs}, expected epochs above 0 in ascending order, such as [30, 60]")


def learning_rate(config, time):
    """The learning rate at a point in time, in epochs (3.5: half-way through the fourth).

    Linear from warmup_lr to lr over warmup_epochs; then by `sched` a half cosine to min_lr at `epochs`; decay_rate every
    decay_epochs (step) or at each of them (multistep), not below min_lr; or constant. Cool-down epochs keep the rate reached
    at `epochs`. With `lr_per: epoch` the rates are those of timm's schedules, as in LIMPQ: an epoch keeps the rate of its
    beginning, and the cosine goes on during warm-up, unseen.
    """
    is_timm = config.lr_per == "epoch"
    time = min(math.floor(time) if is_timm else time, config.epochs)
    if time < config.warmup_epochs:
        return config.warmup_lr + (config.lr - config.warmup_lr) * time / config.warmup_epochs
    if config.sched == "cosine":
        begin = 0 if is_timm else config.warmup_epochs
        progress = (time - begin) / (config.epochs - begin)
        return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress))
    if config.sched == "step":
        return max(config.min_lr, config.lr * config.decay_rate ** math.floor(time / config.decay_epochs))
    if config.sched == "multistep":
        return max(config.min_lr, config.lr * config.decay_rate ** sum(epoch <= time for epoch in config.decay_epochs))
    return config.lr
