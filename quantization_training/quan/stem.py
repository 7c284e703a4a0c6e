"""The modules at the beginning of a network that know nothing of bit-widths: computed once for all passes of a joint step."""

import contextlib

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from model.layer_table import is_quantizable, skip_batchnorms, tensors_in, twin_of

from .func import ExceptedBatchNorm, QuantizedLayer, SwitchableBatchNorm
from .quantizer import LsqQuan
from .utils import BATCHNORM

# What gives the same output whenever it gets the same input; a module that draws random numbers does not.
SHAREABLE = (nn.Conv2d, nn.Linear, BATCHNORM, ExceptedBatchNorm, nn.LayerNorm, nn.GroupNorm, nn.Identity, nn.ReLU, nn.ReLU6,
             nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
DEVICE = torch.Tensor.device.__get__  # what is asked of any tensor of the chain with the same output


class _Chain(TorchFunctionMode):
    """Notes the chain of modules that a forward pass begins with, and what uses their outputs besides the next module.

    Args:
        images: what the pass begins with.
        shareable: {module: its name} of those that may stand in the chain.
    """

    def __init__(self, images, shareable):
        super().__init__()
        self.outputs = [images]
        self.shareable, self.names, self.versions, self.met = shareable, [], [], set()
        self.inside = None  # the module of the chain that is being computed
        self.used_at = []  # indices into the outputs

    def index(self, value):
        """Where a tensor stands in the chain (the last place, for one that was changed in place), or None."""
        return next((index for index in reversed(range(len(self.outputs))) if self.outputs[index] is value), None)

    def use(self, values):
        self.used_at += [index for index in map(self.index, tensors_in(values)) if index is not None]

    def enter(self, module, inputs):
        """A forward pre-hook of the network's modules."""
        if self.inside is not None:
            return
        if module in self.shareable and module not in self.met and len(inputs) == 1 and inputs[0] is self.outputs[-1]:
            self.inside = module
        else:
            self.use(inputs)
            if module in self.met and self.shareable.get(module) in self.names:  # one used twice is no part of the stem
                self.used_at.append(self.names.index(self.shareable[module]))
        self.met.add(module)

    def leave(self, module, inputs, output):
        """A forward hook of the network's modules."""
        if self.inside is module:
            self.outputs.append(output)
            self.names.append(self.shareable[module])
            self.versions.append(output._version)
            self.inside = None  # from here on, what is asked of the output is asked by others

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        # Asking for a shape is a use, too: with the output of the stem in their place, images have another one.
        if self.inside is None and function != DEVICE:
            self.use((args, kwargs or {}))
        return function(*args, **(kwargs or {}))

    def stem(self):
        """Names of the modules whose outputs nothing but the next module uses, or changes in place."""
        length = min([len(self.names), *(index for index in self.used_at if index < len(self.names))])
        while length and self.outputs[length]._version != self.versions[length - 1]:
            length -= 1
        return self.names[:length]


def find_stem(model, input_size):
    """Names of the modules that a network begins with, one after the other, until one that depends on bit-widths.

    Args:
        model: a network with the modules of joint_modules.
        input_size: height and width of the images.

    Returns:
        a list in the order of computation. What lies between two of these modules is used by nothing else, and nothing
        changes the output of the last one in place. It is empty where a network cannot be followed in training.
    """
    twin = twin_of(model).to("meta").train()  # in evaluation there is no dropout, say, that works in place
    for module in twin.modules():
        if isinstance(module, BATCHNORM):
            module.eval()  # it would ask for values
        if isinstance(module, LsqQuan):
            module.forward = _pass_through  # which says as much of what uses what
    switched = {module for switch in twin.modules() if isinstance(switch, SwitchableBatchNorm) for module in switch.modules()}
    shareable = {module: name for name, module in twin.named_modules() if _is_shareable(module) and module not in switched}
    skip_batchnorms(twin)
    chain = _Chain(torch.empty(1, 3, input_size, input_size, device="meta"), shareable)
    for module in twin.modules():
        if module in shareable or isinstance(module, QuantizedLayer) or not any(True for _ in module.children()):
            module.register_forward_pre_hook(chain.enter)
            module.register_forward_hook(chain.leave)
    try:
        with torch.no_grad(), chain:
            twin(chain.outputs[0])
    except Exception:  # such as one that decides by values, which are not there; what it raises may be anything
        return []
    return chain.stem()


def _is_shareable(module):
    if any("forward" in vars(part) or part._forward_hooks or part._forward_pre_hooks for part in module.modules()):
        return False  # it computes something else than its type says
    if isinstance(module, ExceptedBatchNorm):
        return module.bn.momentum is not None
    if isinstance(module, BATCHNORM):
        return module.momentum is not None and all(type(part) in SHAREABLE for part in module.children())
    return type(module) in SHAREABLE or is_quantizable(module)


class SharedStem:
    """Computes the stem of a jointly trained network once for several passes.

    Args:
        model: the network.
        names: what find_stem gave.
        passes: how many passes there are in a step.
    """

    def __init__(self, model, names, passes):
        self.modules = [model.get_submodule(name) for name in names]
        self.batchnorms = [module for stem in self.modules for module in stem.modules() if isinstance(module, BATCHNORM)]
        self.passes = passes

    @contextlib.contextmanager
    def computed_once(self, images, numbers):
        """Compute the stem, and give its output; within, the network takes that in place of `images`.

        `numbers` is the context in which the stem is computed, such as autocast.

        On leaving, the gradients that the passes added up are carried through the stem, and its BatchNorm statistics are
        as if each pass had computed it.
        """
        if not self.modules:
            yield images
            return
        tracking = [module for module in self.batchnorms if module.training and module.track_running_stats]
        before = [(module.running_mean.clone(), module.running_var.clone()) for module in tracking]
        output = images
        with numbers:
            for module in self.modules:
                output = module(output)
        boundary = output.detach().requires_grad_(output.requires_grad)
        try:
            for module in self.modules:
                module.forward = _pass_through
            yield boundary
        finally:
            for module in self.modules:
                vars(module).pop("forward", None)  # the one of its class shows again
        if boundary.grad is not None:
            output.backward(boundary.grad)
        for module, statistics in zip(tracking, before, strict=True):  # the backward pass needs them unchanged
            repeat_update(module, statistics, self.passes)


def repeat_update(batchnorm, before, times):
    """Make a BatchNorm's running statistics those after `times` updates by the batch that they took one update from.

    An update with momentum m moves r towards the statistic b of the batch: r + m(b - r). After n of them by the same batch
    that is r + (1 - (1 - m)^n)(b - r).

    Args:
        before: its (running mean, running variance) before the one update.
    """
    share = (1 - (1 - batchnorm.momentum) ** times) / batchnorm.momentum if batchnorm.momentum else 0
    for buffer, start in zip((batchnorm.running_mean, batchnorm.running_var), before, strict=True):
        buffer.copy_(torch.lerp(start, buffer, share))
    batchnorm.num_batches_tracked += times - 1


def _pass_through(x):
    return x
