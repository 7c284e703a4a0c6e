"""Quantized layers: quantize the weight, quantize the input, operate."""

import copy
import functools
import math

import torch
from torch import nn

from .fused import quantized_operation
from .quantizer import LsqQuan


def _take_over(layer, original, quan_w_fn, quan_a_fn):
    """Give a quantized layer all that the original one has, and its quantizers."""
    stand_in(layer, original)
    layer.quan_w_fn, layer.quan_a_fn = quan_w_fn, quan_a_fn
    if isinstance(quan_w_fn, LsqQuan):
        quan_w_fn.init_from_weight(layer.weight)


def stand_in(layer, original):
    """Give a new module the parameters, options and hooks of the one in whose place it comes, and the methods and the type
    that the network may know that one by, where its own class lacks them."""
    for name, value in vars(original).items():
        vars(layer)[name] = copy.copy(value) if isinstance(value, dict) else value
    if not isinstance(layer, type(original)):
        layer.__class__ = _mixed(type(layer), type(original))


@functools.cache
def _mixed(one, other):
    """A subclass of two classes of modules, whose methods are those of the first where both have them."""
    return type(f"{one.__name__}_{other.__name__}", (one, other), {})


KINDS = {"weight": "quan_w_fn", "act": "quan_a_fn"}  # what a layer quantizes: the attribute with its quantizer


class QuantizedLayer:
    """What quantized layers share: two quantizers that are switched together, and a weight that can be kept quantized.

    Attributes:
        cached_weight: the quantized weight, while weights_quantized_once is in force and the layer has been computed.
    """

    is_fused = True  # whether a pass that learns may compute quantizers and operation as one function
    caches_weight = False
    cached_weight = None

    def select(self, bit, act_bit=None):
        """The weight at `bit` bits, and the input at `act_bit`, where that is given, else at the same."""
        self.quan_w_fn.select(bit)
        self.quan_a_fn.select(act_bit or bit)
        self.cached_weight = None

    def cache_weight(self, keeps):
        """Begin, or end, to quantize the weight only once."""
        self.caches_weight, self.cached_weight = keeps, None

    def quantized_weight(self):
        if not self.caches_weight or torch.is_grad_enabled():
            return self.quan_w_fn(self.weight)
        if self.cached_weight is None:
            self.cached_weight = self.quan_w_fn(self.weight)
        return self.cached_weight

    @property
    def learns_both(self):
        """Whether weight and input are quantized by learned steps, and gradients are wanted."""
        return (self.is_fused and isinstance(self.quan_w_fn, LsqQuan) and isinstance(self.quan_a_fn, LsqQuan)
                and torch.is_grad_enabled())


class QuanConv2d(QuantizedLayer, nn.Conv2d):
    """A convolution with quantized weight and input; all else is that of the convolution that it replaces.

    Args:
        conv: the nn.Conv2d to replace.
        quan_w_fn, quan_a_fn: quantizers of the weight and of the input.
    """

    def __init__(self, conv, quan_w_fn, quan_a_fn):
        nn.Module.__init__(self)
        _take_over(self, conv, quan_w_fn, quan_a_fn)

    def forward(self, x):
        is_plain = self.padding_mode == "zeros" and not isinstance(self.padding, str) and "_conv_forward" not in vars(self)
        if self.learns_both and is_plain and x.dim() == 4:
            geometry = (self.stride, self.padding, self.dilation, self.groups)
            return quantized_operation(x, self.weight, self.bias, self.quan_a_fn, self.quan_w_fn, geometry)
        weight = self.quantized_weight()
        x = self.quan_a_fn(x)
        return self._conv_forward(x, weight, self.bias)


class QuanLinear(QuantizedLayer, nn.Linear):
    """A linear layer with quantized weight and input.

    Args:
        linear: the nn.Linear to replace.
        quan_w_fn, quan_a_fn: quantizers of the weight and of the input.
        sat: scale the quantized weight by 1/(sqrt(out_features) * std) (scale-adjusted training, arXiv 1912.10207).
    """

    def __init__(self, linear, quan_w_fn, quan_a_fn, sat=False):
        nn.Module.__init__(self)
        _take_over(self, linear, quan_w_fn, quan_a_fn)
        self.sat = sat

    def forward(self, x):
        if self.learns_both and not self.sat:
            return quantized_operation(x, self.weight, self.bias, self.quan_a_fn, self.quan_w_fn)
        weight = self.quantized_weight()
        if self.sat:
            weight = weight * scale_adjustment(weight)
        x = self.quan_a_fn(x)
        return nn.functional.linear(x, weight, self.bias)


def scale_adjustment(weight):
    """1/(sqrt(out_features) * std) of a weight [out_features, in_features], std unbiased, without gradient."""
    return 1 / (math.sqrt(weight.shape[0]) * weight.detach().std().clamp(min=torch.finfo(weight.dtype).tiny))


class _InPlaceOfBatchNorm(nn.Module):
    """What a forward pass may ask of a BatchNorm, such as `weight` or `eps`, is that of the one in use."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not self._modules:
                raise
            return getattr(self.in_use(), name)

    def forward(self, x):
        return self.in_use()(x)


class SwitchableBatchNorm(_InPlaceOfBatchNorm):
    """One copy of a BatchNorm per candidate bit-width (`bns.i` in a checkpoint); only the selected one works.

    Args:
        bn: the BatchNorm to copy.
        bits: candidate bit-widths, in the order of the copies.
    """

    def __init__(self, bn, bits):
        super().__init__()
        self.bits = tuple(bits)
        self.bns = nn.ModuleList(copy.deepcopy(bn) for _ in self.bits)
        self.index = 0

    def in_use(self):
        return self.bns[self.index]

    def select(self, bit):
        self.index = self.bits.index(bit)


class ExceptedBatchNorm(_InPlaceOfBatchNorm):
    """A BatchNorm that all bit-widths share (`bn` in a checkpoint)."""

    def __init__(self, bn):
        super().__init__()
        self.bn = bn

    def in_use(self):
        return self.bn
