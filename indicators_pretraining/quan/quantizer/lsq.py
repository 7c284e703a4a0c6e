"""Learned step size quantization (Esser et al., ICLR 2020, arXiv 1902.08153), one step size per candidate bit-width."""

import math

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from util.distributed import largest_over_ranks, mean_over_ranks

from . import kernel
from .quantizer import Quantizer, integer_range

SMALLEST_STEP = 1e-5


class _Lsq(torch.autograd.Function):
    """round(clip(v/s, -Qn, Qp)) * s, keeping only v and s for the backward pass."""

    @staticmethod
    def forward(ctx, v, s, qn, qp, scale, changes):
        ctx.save_for_backward(v, s)
        ctx.range, ctx.changes = (qn, qp, scale), changes
        return quantized(v, s, qn, qp)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        v, s = ctx.saved_tensors
        qn, qp, scale = ctx.range
        return *gradients(grad, v, s, qn, qp, scale, ctx.needs_input_grad[0], changes=ctx.changes), None, None, None, None


def lsq(v, s, qn, qp, scale=1.0, changes=None):
    """Quantize v with step size s to the integers [-qn, qp], in units of s (arXiv 1902.08153, eq. 1 to 3).

    Values: round(clip(v/s, -qn, qp)) * s, ties rounded to even. Gradients: dq/dv is 1 inside the range (bounds
    included) and 0 outside; dq/ds is round(v/s) - v/s inside, -qn below and qp above, times `scale`.

    Args:
        v: tensor of any shape; in bfloat16 its arithmetic is done in float32.
        s: positive step sizes, of a shape that broadcasts to v's.
        qn, qp: the range of integers, as integer_range gives it.
        scale: factor on the gradient of s; LSQ takes 1/sqrt(N * qp), with N the number of values that share a step.
        changes: a list that the backward pass appends to, as gradients() says.

    Returns:
        a tensor of v's shape and type.

    Examples:
        >>> lsq(torch.tensor([-0.9, 0.26, 0.74, 9.0]), torch.tensor(0.5), 2, 1).tolist()
        [-1.0, 0.5, 0.5, 0.5]
    """
    return _Lsq.apply(v, s, qn, qp, scale, changes)


def quantized(v, s, qn, qp, dtype=None):
    """The values of lsq(), without gradients, in `dtype` (by default v's)."""
    dtype = dtype or v.dtype
    q = kernel.quantize(v, s, qn, qp, dtype) if kernel.takes(v, s) else None
    return (v.to(s.dtype) / s).clamp_(-qn, qp).round_().mul_(s).to(dtype) if q is None else q


def integers(v, s, qn, qp):
    """What quantized(v, s, qn, qp) is in units of s, counted from the lowest: round(clip(v/s, -qn, qp)) + qn as uint8.

    Args:
        v: float32. s: one step size. qn, qp: a range of at most 256 integers.
    """
    found = kernel.integers(v, s, qn, qp) if kernel.takes(v, s) else None
    return (v / s).clamp_(-qn, qp).round_().add_(qn).to(torch.uint8) if found is None else found


def gradients(grad, v, s, qn, qp, scale=1.0, needs_v=True, may_overwrite=False, changes=None):
    """The gradients of lsq() from the gradient of its result.

    Args:
        grad: of v's shape; its memory may be taken for the result where `may_overwrite` is set.
        needs_v: whether the gradient of v is wanted.
        changes: a list to which sum(grad * (lsq(v) - v)) is appended, by how much the loss changes to first order where v is
            quantized: a float64 tensor without dimensions.

    Returns:
        (gradient of v, in its type, or None; gradient of s, of its shape).
    """
    found = kernel.differentiate(grad, v, s, qn, qp, scale, needs_v, may_overwrite, changes) if kernel.takes(v, s) else None
    if found is not None:
        return found
    scaled = v.to(s.dtype) / s
    inside, integers = (scaled >= -qn) & (scaled <= qp), scaled.clamp(-qn, qp).round_()
    if changes is not None:
        changes.append((integers * s).sub_(v).mul_(grad).sum(dtype=torch.float64))
    slope = integers.sub_(scaled.mul_(inside))
    return (grad * inside).to(v.dtype) if needs_v else None, slope.mul_(grad).sum_to_size(s.shape) * scale


def _statistics(values, kept):
    """Mean, mean of the absolute values, and unbiased standard deviation of each row; `kept` says which values count."""
    if kept is None:
        # One value deviates by nothing, of which the unbiased estimate knows nothing.
        return values.mean(1), values.abs().mean(1), values.std(1) if values.shape[1] > 1 else torch.zeros_like(values[:, 0])
    count = kept.sum(1)
    mean = (values * kept).sum(1) / count.clamp(min=1)
    deviation = ((values - mean[:, None]).square() * kept).sum(1) / (count - 1).clamp(min=1)
    return mean, (values.abs() * kept).sum(1) / count.clamp(min=1), deviation.sqrt()


class LsqQuan(Quantizer):
    """LSQ with one learned step size per candidate bit-width.

    Parameters in a checkpoint: `s` [n_bits], or [n_bits, out_channels] per channel; `init_state` [n_bits], 1 where a
    step size has its initial value from data. As long as all data are zero, whatever the step size, so is the result, and
    the gradient passes (dq/dv = 1, dq/ds = 0): sign and step sizes wait for the first that are not.

    Args:
        bits: candidate bit-widths, in the order of the entries of s.
        signed: whether the range reaches below zero; None: as the first batch in training that is not all zero shows,
            signed where any value of it is negative on any rank. Until then it counts as unsigned.
        symmetric: leave out the lowest integer of a signed range.
        channels: number of output channels for one step size each; None for one step size per tensor.
        init: "lsq", 2*mean|v|/sqrt(Qp), or "three_sigma", LIMPQ's max|mean -+ 3 std| / 2^(b-1).
    """

    def __init__(self, bits, signed, symmetric=False, channels=None, init="lsq"):
        super().__init__()
        self.bits = tuple(bits)
        self.signed = signed
        self.symmetric = symmetric
        self.init = init
        self.is_of_weight, self.kept = False, None  # the second: what of a weight is not pruned, until its steps have a value
        self.changes = None  # a list, where the backward pass is to append what quantization changes in the loss
        self.batch_parts = 1  # the number of equal parts a batch is computed in: ranks times accumulated batches
        shape = (len(self.bits),) if channels is None else (len(self.bits), channels)
        self.s = nn.Parameter(torch.ones(shape))
        self.register_buffer("init_state", torch.zeros(len(self.bits)))
        self._initialized = [False] * len(self.bits)  # init_state, to be asked without reading from the device
        self.is_reached = False  # whether anything was to be quantized yet
        self.index = 0

    def select(self, bit):
        self.index = self.bits.index(bit)

    @property
    def quantization_range(self):
        """(Qn, Qp) of the selected bit-width."""
        return integer_range(self.bits[self.index], self.signed, self.symmetric)

    @property
    def step(self):
        """The selected step size: a scalar, or [out_channels]."""
        return self.s[self.index]

    def forward(self, x):
        self.observe(x)
        return self.quantize(x)

    @property
    def is_initialized(self):
        """Whether the sign is decided, and every step size has its initial value from data."""
        return self.signed is not None and all(self._initialized)

    def observe(self, x):
        """Take sign and initial step size from x, where it is the first in training that is not all zero, over all
        ranks."""
        self.is_reached = True
        if not self.training:
            return
        if self.signed is None:
            self._decide_sign(x)
        if self.signed is not None and not self._initialized[self.index]:
            if self.is_of_weight:
                self.init_from_weight(x, self.kept)
            else:
                self.init_from_activation(x.detach())

    def _decide_sign(self, x):
        seen = largest_over_ranks(2 if (x < 0).any() else int(x.any()))
        if seen:
            self.signed = seen == 2

    def quantize(self, v):
        """Quantize an activation, or a weight of shape [out_channels, ...], at the selected bit-width."""
        return lsq(v, *self.quantization_parameters(v), self.changes)

    def quantization_parameters(self, v):
        """What lsq() takes besides v: (s in a shape that broadcasts to v's, Qn, Qp, scale of the gradient of s)."""
        step, (qn, qp) = self.step, self.quantization_range
        if step.dim():
            step = step.view(-1, *[1] * (v.dim() - 1))
        shared = max(v.numel(), 1) * self.batch_parts / step.numel()
        return step, qn, qp, (shared * qp) ** -0.5

    @torch.no_grad()
    def init_from_activation(self, x):
        """Set the selected step size to 2*mean|x|/sqrt(Qp), the mean taken over the batch of all ranks, unless it is zero."""
        _, qp = self.quantization_range
        mean = mean_over_ranks(x.abs().mean(dtype=torch.float32))
        if mean != 0:
            self.s[self.index] = (2 * mean / math.sqrt(qp)).clamp(min=SMALLEST_STEP)
            self._mark(self.index)

    @torch.no_grad()
    def init_from_weight(self, weight, kept=None):
        """Set every step size from a weight of shape [out_channels, ...], as `init` says, unless it is all zero.

        A channel that is all zero, and not pruned, takes the mean step size of those that are not: it may grow.

        Args:
            kept: bool tensor of the same shape, True where the weight is not pruned; the others do not count. None: all.
        """
        rows = (lambda tensor: tensor.flatten(1)) if self.s.dim() == 2 else (lambda tensor: tensor.reshape(1, -1))
        values, kept_rows = rows(weight.detach()), None if kept is None else rows(kept.to(weight.device))
        mean, mean_size, deviation = _statistics(values, kept_rows)
        may_grow = (mean_size == 0) & (True if kept is None else kept_rows.any(1))
        waits = bool(may_grow.any() and not mean_size.any())
        self.is_of_weight, self.kept = True, kept if waits else None
        for index, bit in enumerate(self.bits):
            self._mark(index, not waits)
            if waits:
                continue
            _, qp = integer_range(bit, self.signed, self.symmetric)
            if self.init == "lsq":
                step = 2 * mean_size / math.sqrt(qp)
            else:
                step = torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs()) / 2 ** (bit - 1)
            step = torch.where(may_grow, step[mean_size > 0].mean(), step)
            self.s[index] = step.clamp(min=SMALLEST_STEP).reshape(self.s[index].shape)

    def _mark(self, index, is_initialized=True):
        self.init_state[index] = is_initialized
        self._initialized[index] = is_initialized

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._initialized = [bool(state) for state in self.init_state.tolist()]
