"""Quantized layers: quantize the weight, quantize the input, operate."""

import copy
import math

import torch
from torch import nn

from .quantizer import LsqQuan


def _take_over(layer, original, quan_w_fn, quan_a_fn):
    """Give a quantized layer the parameters of the original one, and its quantizers."""
    layer.weight, layer.bias = original.weight, original.bias
    layer.quan_w_fn, layer.quan_a_fn = quan_w_fn, quan_a_fn
    if isinstance(quan_w_fn, LsqQuan):
        quan_w_fn.init_from_weight(layer.weight)
    layer.train(original.training)


class _Selectable:
    """A layer whose two quantizers are switched together."""

    def select(self, bit):
        self.quan_w_fn.select(bit)
        self.quan_a_fn.select(bit)


class QuanConv2d(_Selectable, nn.Conv2d):
    """A convolution with quantized weight and input. Takes over stride, padding, padding_mode, dilation, groups, bias.

    Args:
        conv: the nn.Conv2d to replace.
        quan_w_fn, quan_a_fn: quantizers of the weight and of the input.
    """

    def __init__(self, conv, quan_w_fn, quan_a_fn):
        super().__init__(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
                         conv.groups, conv.bias is not None, conv.padding_mode, device="meta")
        _take_over(self, conv, quan_w_fn, quan_a_fn)

    def forward(self, x):
        weight = self.quan_w_fn(self.weight)
        x = self.quan_a_fn(x)
        return self._conv_forward(x, weight, self.bias)


class QuanLinear(_Selectable, nn.Linear):
    """A linear layer with quantized weight and input.

    Args:
        linear: the nn.Linear to replace.
        quan_w_fn, quan_a_fn: quantizers of the weight and of the input.
        sat: scale the quantized weight by 1/(sqrt(out_features) * std) (scale-adjusted training, arXiv 1912.10207).
    """

    def __init__(self, linear, quan_w_fn, quan_a_fn, sat=False):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.sat = sat
        _take_over(self, linear, quan_w_fn, quan_a_fn)

    def forward(self, x):
        weight = self.quan_w_fn(self.weight)
        if self.sat:
            weight = weight * scale_adjustment(weight)
        x = self.quan_a_fn(x)
        return nn.functional.linear(x, weight, self.bias)


def scale_adjustment(weight):
    """1/(sqrt(out_features) * std) of a weight [out_features, in_features], std unbiased, without gradient."""
    return 1 / (math.sqrt(weight.shape[0]) * weight.detach().std().clamp(min=torch.finfo(weight.dtype).tiny))


class SwitchableBatchNorm(nn.Module):
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

    def select(self, bit):
        self.index = self.bits.index(bit)

    def forward(self, x):
        return self.bns[self.index](x)


class ExceptedBatchNorm(nn.Module):
    """A BatchNorm that all bit-widths share (`bn` in a checkpoint)."""

    def __init__(self, bn):
        super().__init__()
        self.bn = bn

    def forward(self, x):
        return self.bn(x)
