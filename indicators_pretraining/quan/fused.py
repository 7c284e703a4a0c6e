"""Quantization and the operation that follows it as one function, which keeps what a layer without quantizers keeps.

The quantized tensors are computed again in the backward pass instead of being kept, which costs less than writing and reading
them; the input of the layer mostly lies in memory anyway, kept by what computed it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .quantizer.lsq import gradients, quantized


@dataclass(frozen=True)
class Operation:
    """A convolution, or a linear layer, of quantized tensors."""

    x_range: tuple  # (Qn, Qp, scale of the gradient of the step size)
    weight_range: tuple  # the same
    dtype: torch.dtype  # of the quantized tensors
    changes: tuple  # (of x, of the weight), lists or None, as quantizer.lsq.gradients takes them
    geometry: tuple | None  # (stride, padding, dilation, groups) of the convolution; None for a linear layer

    def of(self, q, weight, bias):
        if self.geometry is None:
            out = F.linear(q, weight, bias)
            # Of more than two dimensions it may be a view, which nothing could change in place behind a Function.
            return torch.ops.aten._unsafe_view(out, out.shape) if out._is_view() else out
        return F.conv2d(q, weight, bias, *self.geometry)

    def gradients(self, grad, q, weight, has_bias):
        """The gradients of q, weight and bias from the gradient of of(q, weight, bias)."""
        if self.geometry is not None:
            *geometry, groups = self.geometry
            is_small = (q.device.type == "cpu" and groups == q.shape[1] == weight.shape[0]
                        and (q.shape[2] < weight.shape[2] or q.shape[3] < weight.shape[3]))
            grad_q, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
                grad, q, weight, [weight.shape[0]] if has_bias else None, *geometry, False, [0, 0], groups,
                [True, not is_small, has_bias])
            return grad_q, _of_depthwise_weight(grad, q, weight, *geometry) if is_small else grad_weight, grad_bias
        flat = grad.reshape(-1, grad.shape[-1])
        return grad @ weight, flat.T @ q.reshape(-1, q.shape[-1]), flat.sum(0) if has_bias else None


def _of_depthwise_weight(grad, x, weight, strides, paddings, dilations):
    """The gradient of a depthwise weight, tap by tap; oneDNN has no fast way for maps smaller than the kernel.

    d/dw[c, 0, i, j] = sum over n, h, w of grad[n, c, h, w] x[n, c, h stride - padding + i dilation, ...], x = 0 outside.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    grad, x = (map_.to(dtype, memory_format=torch.channels_last) for map_ in (grad, x))
    x = F.pad(x, (paddings[1], paddings[1], paddings[0], paddings[0]))
    rows, columns = ((out - 1) * stride + 1 for out, stride in zip(grad.shape[2:], strides, strict=True))
    gradient = torch.empty_like(weight)
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            top, left = i * dilations[0], j * dilations[1]
            gradient[:, 0, i, j] = (x[:, :, top:top + rows:strides[0], left:left + columns:strides[1]] * grad).sum((0, 2, 3))
    return gradient


class _QuantizedOperation(torch.autograd.Function):
    """operation(lsq(x), lsq(weight)) + bias; keeps x and the parameters, and a quantized weight of half their size."""

    @staticmethod
    def forward(ctx, x, weight, bias, x_step, weight_step, operation):
        ctx.operation, ctx.bias_type = operation, None if bias is None else bias.dtype
        q = quantized(x, x_step, *operation.x_range[:2], operation.dtype)
        quantized_weight = quantized(weight, weight_step, *operation.weight_range[:2], operation.dtype)
        kept = quantized_weight if operation.dtype.itemsize < weight.dtype.itemsize else None
        ctx.save_for_backward(x, weight, x_step, weight_step, kept)
        return operation.of(q, quantized_weight, None if bias is None else bias.to(operation.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, x_step, weight_step, quantized_weight = ctx.saved_tensors
        operation = ctx.operation
        q = quantized(x, x_step, *operation.x_range[:2], operation.dtype)
        if quantized_weight is None:
            quantized_weight = quantized(weight, weight_step, *operation.weight_range[:2], operation.dtype)
        grad_q, grad_weight, grad_bias = operation.gradients(grad, q, quantized_weight, ctx.bias_type is not None)
        del q, quantized_weight
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        grad_x, grad_x_step = gradients(grad_q, x, x_step, *operation.x_range, needs_x, True, operation.changes[0])
        grad_weight, grad_weight_step = gradients(grad_weight, weight, weight_step, *operation.weight_range, needs_weight,
                                                  True, operation.changes[1])
        return (grad_x, grad_weight, None if grad_bias is None else grad_bias.to(ctx.bias_type), grad_x_step,
                grad_weight_step, None)


def quantized_operation(x, weight, bias, quan_a_fn, quan_w_fn, geometry=None):
    """Quantize x and weight and convolve them, or multiply them; values and gradients are those of doing so one by one.

    Args:
        x: input of the layer, [batch, channels, height, width], or [..., in_features].
        weight, bias: of the layer; bias may be None.
        quan_a_fn, quan_w_fn: the LsqQuan of input and weight.
        geometry: as Operation has it, of a convolution with zero padding.
    """
    quan_a_fn.observe(x)
    quan_w_fn.observe(weight)
    x_step, *x_range = quan_a_fn.quantization_parameters(x)
    weight_step, *weight_range = quan_w_fn.quantization_parameters(weight)
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return _QuantizedOperation.apply(x, weight, bias, x_step, weight_step,
                                     Operation(tuple(x_range), tuple(weight_range), dtype,
                                               (quan_a_fn.changes, quan_w_fn.changes), geometry))
