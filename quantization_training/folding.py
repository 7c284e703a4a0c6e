"""BatchNorms folded into the convolutions before them, whose integers stay as they are.

A BatchNorm computes y * g + (beta - mean * g) with g = gamma / sqrt(var + eps) (arXiv 1502.03167, section 3.1). So the step
size of each output channel is multiplied by g, whose sign it takes, and the rest becomes the bias.
"""

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from model.names import put_modules
from quan.func import QuanConv2d
from quan.quantizer import LsqQuan


def find_folds(model, input_size):
    """{BatchNorm: the convolution before it} of those that may be folded.

    These see the output of one quantized convolution, which is called once and whose output nothing else uses.

    Args:
        model: a network at a policy's bits, on the CPU.
        input_size: height and width of its images.
    """
    uses, calls, pairs = _Uses(), {}, {}

    def after_convolution(name):
        def hook(module, inputs, output):
            calls[name] = calls.get(name, 0) + 1
            uses.watch(name, output)
        return hook

    def before_batchnorm(name):
        def hook(module, inputs):
            pairs.setdefault(name, []).append(uses.name_of(inputs[0]))
        return hook

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, QuanConv2d):
            handles.append(module.register_forward_hook(after_convolution(name)))
        elif isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            handles.append(module.register_forward_pre_hook(before_batchnorm(name)))
    with torch.no_grad(), uses:
        model.eval()(torch.zeros(1, 3, input_size, input_size))
    for handle in handles:
        handle.remove()
    return {name: before[0] for name, before in pairs.items()
            if len(before) == 1 and calls.get(before[0]) == 1 and uses.count[before[0]] == 1}


class _Uses(TorchFunctionMode):
    """Counts how many functions use each tensor that is watched."""

    def __init__(self):
        super().__init__()
        self.watched, self.count = {}, {}

    def watch(self, name, tensor):
        self.watched[id(tensor)] = (name, tensor)  # a tensor that is freed could give its id to another one
        self.count[name] = 0

    def name_of(self, value):
        return self.watched.get(id(value), (None, None))[0]

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if any(True for _ in _tensors(result)):  # asking for a shape uses nothing
            for tensor in _tensors((args, kwargs or {})):
                name = self.name_of(tensor)
                if name is not None:
                    self.count[name] += 1
        return result


def _tensors(values):
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (dict, list, tuple)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _tensors(value)


@torch.no_grad()
def fold_batchnorms(model, folds):
    """Fold BatchNorms, in place; values stay the same but for rounding.

    A channel that its BatchNorm multiplies by zero keeps its step size, and its weights become zero.

    Args:
        folds: {BatchNorm: convolution}, as find_folds gives them.
    """
    statistics = {name: model.get_submodule(name) for name in folds}
    make_room(model, folds)
    for name, convolution in folds.items():
        batchnorm, layer = statistics[name], model.get_submodule(convolution)
        gain = (batchnorm.running_var + batchnorm.eps).rsqrt() * (1 if batchnorm.weight is None else batchnorm.weight)
        shift = (0 if batchnorm.bias is None else batchnorm.bias) - batchnorm.running_mean * gain
        layer.bias.copy_(layer.bias * gain + shift)
        old, column = layer.quan_w_fn.step.clone(), (-1, *[1] * (layer.weight.dim() - 1))
        vanishes = old * gain == 0
        new = torch.where(vanishes, old, old * gain)
        integers = (layer.quan_w_fn.quantize(layer.weight) / old.view(column)).round()
        layer.weight.copy_(integers * (new * ~vanishes).view(column))
        layer.quan_w_fn.s.copy_(new[None])


def make_room(model, folds):
    """Give a network the shape that folding leaves: no such BatchNorms, and biases and a step size per channel instead.

    Args:
        folds: {BatchNorm: convolution}.
    """
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
