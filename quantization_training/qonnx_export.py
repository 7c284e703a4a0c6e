"""A network at a policy's bits as QONNX, which FINN and hls4ml read: a Quant node says the bits of each weight and input, any
from 2 to 8. Needs requirements-export.txt."""

import numpy as np
import torch
from torch import nn

from onnx_export import OnnxLayer, silence, symbolic, to_onnx
from quan.cost import FIXED_BIT
from util.errors import UserError, reason

DOMAIN = "qonnx.custom_op.general"


def quantize(x, step, bits, signed, symmetric):
    """The operator Quant: round(clip(x/step, -Qn, Qp)) * step, ties rounded to even."""
    inputs = x, step, torch.zeros(()), torch.tensor(float(bits))
    return symbolic(f"{DOMAIN}::Quant", inputs, x.shape, torch.float32, version=1, signed=int(signed),
                    narrow=int(signed and symmetric), rounding_mode="ROUND")


class QonnxQuantizer(nn.Module):
    """An LsqQuan with one step size, of an input."""

    def __init__(self, quantizer):
        super().__init__()
        self.range = quantizer.bits[quantizer.index], quantizer.signed, quantizer.symmetric
        self.register_buffer("step", quantizer.step.detach().clone())

    def forward(self, x):
        return quantize(x, self.step, *self.range)


class QonnxLayer(OnnxLayer):
    """A quantized convolution or linear layer, its weight stored as integers times step sizes, which Quant keeps."""

    quantizer = QonnxQuantizer

    def __init__(self, layer, name):
        quantizer = layer.quan_w_fn
        super().__init__(layer, name)
        self.range = quantizer.bits[quantizer.index], quantizer.signed, quantizer.symmetric
        if self.step.dim():
            self.step = self.step.view(-1, *[1] * (self.weight.dim() - 1))
        self.weight = self.weight * self.step

    def dequantized_weight(self):
        return quantize(self.weight, self.step, *self.range)


def to_qonnx(model, input_size):
    """The QONNX model of a network on the CPU: `images` float32 [1, 3, S, S] to `logits` [1, classes]."""
    return to_onnx(model, input_size, QonnxLayer, batch=1)


def logits_of_qonnx(model, images):
    """What the package qonnx computes from images [batch, 3, S, S] with a QONNX model, one by one: logits [batch, classes]."""
    try:
        from qonnx.core.onnx_exec import execute_onnx

        whole = wrapped(model)
        rows = [execute_onnx(whole, {"images": image[None].numpy()})["logits"] for image in images]
    except Exception as error:  # of any operator of the network
        raise UserError(f"the package qonnx cannot compute this network ({reason(error)[:200]}); nothing was "
                        "written") from None
    return torch.from_numpy(np.concatenate(rows))


def gbitops_of_qonnx(model):
    """1e9 BitOPs of one image as the package qonnx counts them, zeros too, images at 8 bits as pixels are.

    Products of two inputs, as of attention, which the search does not count, are left out: they are FLOAT32.
    """
    from qonnx.core.datatype import DataType
    from qonnx.util.inference_cost import compute_bops_and_macs, inference_cost

    whole = wrapped(model)
    whole.set_tensor_datatype("images", DataType[f"SCALEDINT<{FIXED_BIT}>"])
    with silence():
        counted = inference_cost(whole, discount_sparsity=False)["total_cost"]
    return compute_bops_and_macs({key: macs for key, macs in counted.items() if "FLOAT32_FLOAT32" not in key})[0] / 1e9


def wrapped(model):
    """An ONNX model as the package qonnx takes it, with the shapes of all tensors."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.infer_shapes import InferShapes

    return ModelWrapper(model, make_deepcopy=True).transform(InferShapes())
