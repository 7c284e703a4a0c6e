"""A quantized layer computed with integers: uint8 inputs times int8 weights, added up in int32, by the operators of oneDNN
that torch ships for CPUs. The sums are exact; what follows them is float32."""

import copy
import functools
import math
import platform

import torch
from torch import nn

from model.layer_table import convolve_pixels
from packed_network import integer_weights, without_integers
from quan.func import QuanConv2d, scale_adjustment
from quan.quantizer import LsqQuan
from quan.quantizer.lsq import integers

OPERATORS = ("qconv_prepack", "qconv2d_pointwise", "qlinear_prepack", "qlinear_pointwise")
LARGEST_INPUT, LARGEST_PAIR = 255, 64  # the most that two products may add up to, 2 * 255 * 64, in CPUs that add them in int16
CHECKED_CHANNELS = 64
GROUP_BLOCK = 4  # the number of channels in a group has to be a multiple, but for depthwise convolutions
CACHED_VALUES = 2**20  # of a residual, at once: a convolution adds to it and returns a copy, which then stays in cache
SUMMED_VALUES = 2**21  # of one, at once, in a linear layer, which takes as much memory again for its sums


class CannotCompute(Exception):
    """Why integers cannot be computed with here."""


@functools.cache
def check_operators():
    """Raise CannotCompute where torch lacks the operators, or where their sums are not exact at the largest integers."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        raise CannotCompute(f"oneDNN has fast integer operators for x86 CPUs, this one is {platform.machine()}")
    operators = getattr(torch.ops, "onednn", None)
    if not torch.backends.mkldnn.is_available() or not all(hasattr(operators, name) for name in OPERATORS):
        raise CannotCompute("this build of torch has no integer operators of oneDNN")
    q = torch.full((2, CHECKED_CHANNELS, 3, 3), LARGEST_INPUT, dtype=torch.uint8)
    weight = torch.full((CHECKED_CHANNELS, CHECKED_CHANNELS, 3, 3), LARGEST_PAIR, dtype=torch.int8)
    unit = InputRange(1.0, 0, LARGEST_INPUT)
    for part in (weight, weight[..., :1, :1], weight[..., 0, 0]):
        geometry = ((1, 1), (0, 0), (1, 1), 1) if part.dim() == 4 else None
        layer = IntegerLayer(part, torch.ones(CHECKED_CHANNELS), None, unit, geometry)
        try:
            found = layer(q if geometry else q[..., 0, 0])
        except RuntimeError as error:
            raise CannotCompute(f"the integer operators of oneDNN fail here ({str(error).splitlines()[0]})") from None
        if not (found == LARGEST_INPUT * LARGEST_PAIR * part[0].numel()).all():
            raise CannotCompute("the integer operators of oneDNN add up wrongly on this CPU")


def why_float(layer):
    """Why integers cannot compute a quantized layer, or ''."""
    why, acts = without_integers(layer).why_float, layer.quan_a_fn
    if why:
        return why
    if not isinstance(layer.quan_w_fn, LsqQuan) or not (acts.step > 0 and acts.step.isfinite()):
        return "the step size of its input is not positive"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "it has hooks"
    if isinstance(layer, QuanConv2d) and _padding(layer) is None:
        return "it pads with something else than zeros, or in a way of its own"
    if isinstance(layer, QuanConv2d) and not _has_kernel(layer):
        return "oneDNN has no fast kernel for groups of so many channels"
    return ""


def _has_kernel(layer):
    """Whether oneDNN computes a convolution otherwise than by its reference loops, which take a hundred times as long."""
    channels = (layer.in_channels // layer.groups, layer.out_channels // layer.groups)
    return layer.groups == 1 or channels == (1, 1) or all(count % GROUP_BLOCK == 0 for count in channels)


def _padding(layer):
    """The zeros that a convolution pads with on both sides, (rows, columns); None where that is not all."""
    own = vars(layer).get("_conv_forward")
    if layer.padding_mode != "zeros" or (own is not None and getattr(own, "__func__", None) is not convolve_pixels):
        return None
    if not isinstance(layer.padding, str):
        return tuple(layer.padding)
    if layer.padding == "valid":
        return (0, 0)
    reach = [dilation * (size - 1) for dilation, size in zip(layer.dilation, layer.kernel_size, strict=True)]
    return None if any(part % 2 for part in reach) else tuple(part // 2 for part in reach)


class InputRange:
    """The integers from -qn to qp, in steps of `step`, that an input is rounded to; uint8 counts them from the lowest."""

    def __init__(self, step, qn, qp):
        self.step, self.qn, self.qp = step, qn, qp
        self.tensor = torch.tensor([step])

    @staticmethod
    def of(quantizer):
        return InputRange(quantizer.step.item(), *quantizer.quantization_range)

    def __eq__(self, other):
        return isinstance(other, InputRange) and (self.step, self.qn, self.qp) == (other.step, other.qn, other.qp)

    __hash__ = None

    @property
    def limits(self):
        """The smallest and the largest value."""
        return -self.qn * self.step, self.qp * self.step

    def integers(self, x):
        return integers(x, self.tensor, self.qn, self.qp)


class IntegerLayer(nn.Module):
    """A convolution, or a linear layer, of integers, and what was fused into it.

    y = activation(sum * step of the input * steps + shift + residual)

    It has no `weight` and no `bias`: a network that asks its layers for them, which may be folded, fails at once.

    Args:
        weight: int8, of the layer's shape. steps: float32 [out_channels], of the weight. shift: its bias, [out_channels] or
            None.
        entering: the InputRange of the input.
        geometry: (stride, padding, dilation, groups) of a convolution; None of a linear layer.

    Attributes:
        activation: "none", "relu" or "hardtanh" (clipped to `limits`).
        leaving: the InputRange of the layer that follows, whose integers are then the output; None where that is float32.
    """

    def __init__(self, weight, steps, shift, entering, geometry):
        super().__init__()
        self.integers, self.entering, self.geometry, self.strides = weight, entering, geometry, (1, 1)
        self.is_pointwise = geometry is not None and weight[0, 0].numel() == 1 and geometry[1] == (0, 0)
        if self.is_pointwise:  # faster where the pixels that are skipped are left out before
            self.strides, self.geometry = geometry[0], ((1, 1), *geometry[1:])
        self.steps, self.shift = (nn.Parameter(tensor, requires_grad=False) for tensor in (
            steps, torch.zeros_like(steps) if shift is None else shift.clone()))
        self.activation, self.limits, self.leaving, self.arguments = "none", (-math.inf, math.inf), None, None

    @staticmethod
    @torch.no_grad()
    def of(layer, name):
        """A quantized layer that why_float() has nothing against; the name is for messages."""
        weight = torch.from_numpy(integer_weights(layer, name)).to(torch.int8)
        steps = layer.quan_w_fn.step.detach()
        if getattr(layer, "sat", False):
            steps = steps * scale_adjustment(layer.quan_w_fn.quantize(layer.weight))
        geometry = None
        if isinstance(layer, QuanConv2d):
            geometry = (tuple(layer.stride), _padding(layer), tuple(layer.dilation), layer.groups)
        bias = None if layer.bias is None else layer.bias.detach()
        return IntegerLayer(weight, steps.expand(len(weight)).clone(), bias, InputRange.of(layer.quan_a_fn), geometry)

    def forward(self, x, residual=None):
        """y of x, float32 or the integers of its range; `residual`, float32 of the shape of y, may be overwritten."""
        if x.dim() == (3 if self.geometry else 1):  # no batch
            return self(x[None], None if residual is None else residual[None])[0]
        if self.arguments is None:
            self._lay_out(residual is not None)
        if self.strides != (1, 1):
            x = x[..., ::self.strides[0], ::self.strides[1]].contiguous(memory_format=torch.channels_last)
        q = x if x.dtype == torch.uint8 else self.entering.integers(x)
        if self.geometry is None:
            return self._multiply(q, residual)
        if residual is None:
            return torch.ops.onednn.qconv2d_pointwise.default(q, *self.arguments)
        if self.by_rows:
            return self._multiply(q.permute(0, 2, 3, 1), residual.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self._add_convolution(q, residual)

    def _lay_out(self, adds):
        """Lay the weight out as oneDNN wants it, and collect the operator's arguments: all but the input and, behind the first
        five, the residual.

        oneDNN's convolution returns a copy of the residual that it adds to. Its linear layer does not, so that it takes a
        residual at every pixel, whose channels are a row, where the kernel is a single pixel.
        """
        self.by_rows = self.geometry is None or (adds and self.is_pointwise and self.geometry[3] == 1)
        step, zero_point = self.entering.step, self.entering.qn
        if self.by_rows:
            packed = torch.ops.onednn.qlinear_prepack(self.integers.flatten(1), None)
        else:
            packed = torch.ops.onednn.qconv_prepack(self.integers, self.steps, step, zero_point, *self.geometry, None)
        zero_points = torch.zeros(len(self.steps), dtype=torch.int64)
        self.arguments = (step, zero_point, packed, self.steps, zero_points, self.shift,
                          *(() if self.by_rows else self.geometry), *self._output(),
                          *((1.0, 0, "sum", 1.0) if adds else ()), *self._post_operation())

    def settle(self):
        """Drop the weight where it has been laid out; what follows the sum may no longer change."""
        if self.arguments is not None:
            self.integers = None

    def _output(self):
        """(scale, zero point, type) of the output."""
        if self.leaving is None:
            return 1.0, 0, torch.float32
        return self.leaving.step, self.leaving.qn, torch.uint8

    def _post_operation(self):
        """(name, numbers, algorithm) of what follows the sum, where the output's range is part of it."""
        low, high = self.limits
        if self.leaving is not None:
            low, high = max(low, self.leaving.limits[0]), min(high, self.leaving.limits[1])
            return "hardtanh", [low, high], ""
        return self.activation, [low, high] if self.activation == "hardtanh" else [], ""

    def _add_convolution(self, q, residual):
        residual = residual.contiguous(memory_format=torch.channels_last)
        count = max(CACHED_VALUES // residual[0].numel(), 1)
        for some, sums in zip(q.split(count), residual.split(count), strict=True):
            torch.ops.onednn.qconv2d_pointwise.binary(some, *self.arguments[:5], sums, *self.arguments[5:])
        return residual

    def _multiply(self, q, residual):
        rows = q.flatten(0, -2)
        if residual is None:
            y = torch.ops.onednn.qlinear_pointwise.default(rows, *self.arguments)
        else:
            y, count = residual.flatten(0, -2), max(SUMMED_VALUES // len(self.steps), 1)
            for some, sums in zip(rows.split(count), y.split(count), strict=True):
                torch.ops.onednn.qlinear_pointwise.binary(some, *self.arguments[:5], sums, *self.arguments[5:])
        return y.view(*q.shape[:-1], len(self.steps))


def frozen(layer):
    """A copy of a quantized layer whose weight is quantized for good, computed in float32."""
    twin = nn.Module.__new__(type(layer))
    vars(twin).update({name: copy.copy(value) if isinstance(value, dict) else value for name, value in vars(layer).items()})
    with torch.no_grad():
        weight = layer.quan_w_fn.quantize(layer.weight)
        if getattr(layer, "sat", False):
            weight = weight * scale_adjustment(weight)
    del twin.weight
    twin.register_buffer("weight", weight)
    twin.quan_w_fn, twin.sat = nn.Identity(), False
    return twin


@torch.no_grad()
def scale(layer, gain, shift):
    """Multiply the output of an IntegerLayer, or of a frozen convolution, by `gain` and add `shift`, both [out_channels]."""
    scaled, shifted = ("steps", "shift") if isinstance(layer, IntegerLayer) else ("weight", "bias")
    factor, before = getattr(layer, scaled), getattr(layer, shifted)
    factor.copy_(factor.double() * gain.view(-1, *[1] * (factor.dim() - 1)))
    total = shift if before is None else before.double() * gain + shift
    setattr(layer, shifted, nn.Parameter(total.float(), requires_grad=False))
