"""BatchNorms folded into the convolutions before them, whose integers stay as they are.

A BatchNorm computes y * g + (beta - mean * g) with g = gamma / sqrt(var + eps) (arXiv 1502.03167, section 3.1). So the step
size of each output channel is multiplied by g, whose sign it takes, and the rest becomes the bias.
"""

import copy
from collections import Counter, defaultdict

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from model.layer_table import tensors_in
from model.names import put_modules
from quan.func import QuanConv2d
from quan.quantizer import LsqQuan
from util.errors import UserError, reason

ROUNDING = 1e-5  # of what the terms of a channel may add up to


def fold(model, images):
    """Fold the BatchNorms of a network, in place, and check what comes of it; return {BatchNorm: convolution}.

    Args:
        model: a network at a policy's bits, on the CPU. images: [batch, 3, height, width] that it is run on.
    """
    folds, before = find_folds(model, images), copy.deepcopy(model)
    fold_batchnorms(model, folds)
    check_folds(before, model, folds, images)
    try:
        with torch.no_grad():
            model(images.clone())
    except Exception as error:  # of a forward of the user's own, which looks for what is gone
        raise UserError(f"--fold-bn: the network does not compute without its BatchNorms ({reason(error)}); export without "
                        "--fold-bn") from None
    return folds


def find_folds(model, images):
    """{BatchNorm: the convolution before it} of those that may be folded.

    These are BatchNorms as torch has them, with statistics, which see, unchanged, the output of one quantized convolution
    that is called once, has its weight for itself, and whose output nothing else uses.

    Args:
        model: a network at a policy's bits, on the CPU. images: [batch, 3, height, width] that it is run on.
    """
    uses, calls, pairs, handles = _Uses(), Counter(), defaultdict(list), []
    names = {module: name for name, module in model.named_modules()}
    owners = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())

    def after_convolution(module, inputs, output):
        calls[names[module]] += 1
        uses.watch(names[module], output)

    def before_batchnorm(module, inputs):
        before = uses.name_of(inputs[0])
        is_changed = before is not None and inputs[0]._version != uses.versions[before]
        pairs[names[module]].append(None if module.training or is_changed else before)

    for module, name in names.items():
        if isinstance(module, QuanConv2d) and is_plain(module) and all(
                owners[id(own)] == 1 for own in (module.weight, module.bias) if own is not None):
            handles.append(module.register_forward_hook(after_convolution))
        elif can_vanish(module):
            handles.append(module.register_forward_pre_hook(before_batchnorm))
            for entry, tensor in module.state_dict(keep_vars=True).items():
                uses.watch(f"{name}.{entry}", tensor)
    with torch.no_grad(), uses:
        model.eval()(images.clone())
    for handle in handles:
        handle.remove()
    return {name: before[0] for name, before in pairs.items()
            if len(before) == 1 and calls[before[0]] == 1 and uses.count[before[0]] == 1
            and all(uses.count[tensor] <= 1 for tensor in uses.count if tensor.rpartition(".")[0] == name)}


def is_plain(module):
    """Whether a module does what its class does, no more."""
    return not module._forward_hooks and not module._forward_pre_hooks and "forward" not in vars(module)


def can_vanish(module):
    """Whether a module is a BatchNorm that multiplies and adds constants: one of a derived class may do more."""
    return (type(module) is nn.BatchNorm2d and is_plain(module) and module.running_mean is not None
            and module.running_var is not None and bool(_gain(module).isfinite().all()))


def _gain(batchnorm):
    """What a BatchNorm multiplies each channel by, [channels]."""
    gain = (batchnorm.running_var + batchnorm.eps).rsqrt()
    return gain if batchnorm.weight is None else gain * batchnorm.weight


def gain_and_shift(batchnorm):
    """(what a BatchNorm multiplies each channel by, what it then adds), both [channels]."""
    gain = _gain(batchnorm)
    return gain, (0 if batchnorm.bias is None else batchnorm.bias) - batchnorm.running_mean * gain


class _Uses(TorchFunctionMode):
    """Counts how many functions use each tensor that is watched."""

    def __init__(self):
        super().__init__()
        self.watched, self.count, self.versions = {}, {}, {}

    def watch(self, name, tensor):
        self.watched[id(tensor)] = (name, tensor)  # a tensor that is freed could give its id to another one
        self.count[name], self.versions[name] = 0, tensor._version

    def name_of(self, value):
        return self.watched.get(id(value), (None, None))[0]

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if any(True for _ in tensors_in(result)):  # asking for a shape uses nothing
            for tensor in tensors_in((args, kwargs or {})):
                name = self.name_of(tensor)
                if name is not None:
                    self.count[name] += 1
        return result


@torch.no_grad()
def fold_batchnorms(model, folds):
    """Fold BatchNorms, {BatchNorm: convolution}, in place; values stay the same but for rounding.

    A channel that its BatchNorm multiplies by zero keeps its step size, and its weights become zero.
    """
    statistics = {name: model.get_submodule(name) for name in folds}
    make_room(model, folds)
    for name, convolution in folds.items():
        layer, (gain, shift) = model.get_submodule(convolution), gain_and_shift(statistics[name])
        layer.bias.copy_(layer.bias * gain + shift)
        old, column = layer.quan_w_fn.step.clone(), (-1, *[1] * (layer.weight.dim() - 1))
        vanishes = old * gain == 0
        new = torch.where(vanishes, old, old * gain)
        integers = (layer.quan_w_fn.quantize(layer.weight) / old.view(column)).round()
        layer.weight.copy_(integers * (new * ~vanishes).view(column))
        layer.quan_w_fn.s.copy_(new[None])


@torch.no_grad()
def check_folds(before, after, folds, images):
    """Compare each folded convolution of `after` with convolution and BatchNorm of `before`, on the inputs that this has.

    A UserError names a BatchNorm whose convolution gives something else, by more than rounding.

    Args:
        folds: {BatchNorm: convolution}. images: [batch, 3, height, width].
    """
    handles, found = [], {}
    names = {module: name for name, module in before.named_modules()}

    def after_convolution(module, inputs, output):
        layer = after.get_submodule(names[module])
        largest = layer.quan_a_fn(inputs[0]).abs().max()
        found[names[module]] = layer(inputs[0]), largest * layer.quan_w_fn(layer.weight).abs().flatten(1).sum(1)

    def after_batchnorm(module, inputs, output):
        name = names[module]
        folded, terms = found.pop(folds[name])  # sums may be small where what is added up is not
        terms = terms + (_gain(module) * module.running_mean).abs() + output.abs().amax((0, 2, 3))
        if not ((folded - output).abs().amax((0, 2, 3)) <= ROUNDING * terms).all():
            raise UserError(f"--fold-bn: {name} cannot be folded into {folds[name]}: the convolution then gives other "
                            "values by more than rounding; export without --fold-bn")

    for name, convolution in folds.items():
        handles.append(before.get_submodule(convolution).register_forward_hook(after_convolution))
        handles.append(before.get_submodule(name).register_forward_hook(after_batchnorm))
    try:
        before(images.clone())
    finally:
        for handle in handles:
            handle.remove()


def make_room(model, folds):
    """Give a network the shape that folding leaves: no such BatchNorms, and biases and a step size per channel instead."""
    put_modules(model, {name: nn.Identity() for name in folds})
    for convolution in folds.values():
        layer = model.get_submodule(convolution)
        quantizer, channels = layer.quan_w_fn, layer.weight.shape[0]
        finer = LsqQuan(quantizer.bits, quantizer.signed, quantizer.symmetric, channels, quantizer.init)
        finer.s.data.copy_(quantizer.s.data.view(1, -1).expand(1, channels))
        finer.init_state.fill_(1)
        layer.quan_w_fn = finer.train(quantizer.training)
        if layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros(channels))
