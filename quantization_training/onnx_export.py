"""A network at a policy's bits as ONNX: integer weights with DequantizeLinear; inputs through QuantizeLinear, Clip where the
range is narrower than the type, and DequantizeLinear. Needs requirements-export.txt."""

import contextlib
import copy
import importlib.util
import io
import logging
import re
import warnings

import torch
from torch import nn

from model.names import put_modules
from packed_network import integer_weights
from packing import pack
from quan.func import QuanConv2d, scale_adjustment, stand_in
from quan.quantizer import LsqQuan
from util.errors import UserError, reason

NEEDED = {"--onnx": ("onnx", "onnxscript", "onnxruntime"), "--qonnx": ("onnx", "onnxscript", "onnxruntime", "qonnx")}
OPSET = 21
NARROW = ((2, 25), (4, 21))  # bits of types narrower than 8 bits, and the first opset that has them
EXAMPLE_IMAGES = 2  # one would be taken for a number that never varies


def check_installed(flag):
    """Refuse to go on where a package that a flag needs is missing, with the command that installs it."""
    missing = [name for name in NEEDED[flag] if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{flag} needs {', '.join(missing)}: pip install -r requirements-export.txt")


def symbolic(operator, inputs, shape, dtype, version=OPSET, **attributes):
    """An operator of ONNX in a network that is going to be exported."""
    return torch.onnx.ops.symbolic(operator, inputs, attributes, dtype=dtype, shape=shape, version=version)


class OnnxQuantizer(nn.Module):
    """An LsqQuan with one step size, of an input, in operators of ONNX: round(x/s), clipped to [-Qn, Qp], times s.

    Rounding first gives the same integers, because the bounds are integers.
    """

    def __init__(self, quantizer):
        super().__init__()
        qn, qp = quantizer.quantization_range
        self.dtype = torch.int8 if quantizer.signed else torch.uint8
        limits = torch.iinfo(self.dtype)
        self.is_narrow = (-qn, qp) != (limits.min, limits.max)
        self.register_buffer("step", quantizer.step.detach().clone())
        for name, value in (("zero", 0), ("low", -qn), ("high", qp)):
            self.register_buffer(name, torch.tensor(value, dtype=self.dtype))

    def forward(self, x):
        q = symbolic("QuantizeLinear", (x, self.step, self.zero), x.shape, self.dtype)
        if self.is_narrow:
            q = symbolic("Clip", (q, self.low, self.high), x.shape, self.dtype, version=13)
        return symbolic("DequantizeLinear", (q, self.step, self.zero), x.shape, torch.float32)


class OnnxLayer(nn.Module):
    """A quantized convolution or linear layer with its weight as integers; its name is for messages.

    The bias is added by an operator of its own: where the layer has it, onnxruntime rounds it to multiples of the product of
    both step sizes, which are wide at few bits.
    """

    quantizer = OnnxQuantizer

    def __init__(self, layer, name):
        super().__init__()
        stand_in(self, layer)
        del self.weight, self.bias, self.quan_w_fn
        self.operate = layer._conv_forward if isinstance(layer, QuanConv2d) else nn.functional.linear
        self.quan_a_fn = self.quantizer(layer.quan_a_fn) if isinstance(layer.quan_a_fn, LsqQuan) else nn.Identity()
        step = layer.quan_w_fn.step.detach()
        if getattr(layer, "sat", False):
            step = step * scale_adjustment(layer.quan_w_fn.quantize(layer.weight.detach()))
        self.register_buffer("weight", torch.from_numpy(integer_weights(layer, name)))
        self.register_buffer("step", step.clone())
        column = (-1, *[1] * (layer.weight.dim() - 2))  # [batch, channels, height, width], or [..., out_features]
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().view(column))

    def forward(self, x):
        if x.dim() == self.weight.dim() - 1:  # no batch, which onnxruntime does not load between quantizer and layer
            return self.forward(x.unsqueeze(0)).squeeze(0)
        out = self.operate(self.quan_a_fn(x), self.dequantized_weight(), None)
        return out if self.bias is None else out + self.bias

    def dequantized_weight(self):
        axis = {"axis": 0} if self.step.dim() else {}
        return symbolic("DequantizeLinear", (self.weight, self.step), self.weight.shape, torch.float32, **axis)


def to_onnx(model, input_size, layer=OnnxLayer, batch=None):
    """The ONNX model of a network on the CPU: `images` float32 [batch, 3, S, S] to `logits` [batch, classes], weights as int8.

    Args:
        layer: what takes the place of each quantized layer. batch: the only batch size that it takes; None: any.

    Raises:
        UserError: where PyTorch cannot write it.
    """
    images = torch.zeros(batch or EXAMPLE_IMAGES, 3, input_size, input_size)
    shapes = None if batch else ({0: torch.export.Dim("batch")},)
    try:
        twin = copy.deepcopy(model).eval()
        put_modules(twin, {name: layer(module, name) for name, module in twin.named_modules()
                           if hasattr(module, "quan_w_fn")})
        with silence():
            program = torch.onnx.export(twin.requires_grad_(False), (images,), dynamo=True, dynamic_shapes=shapes,
                                        opset_version=OPSET, input_names=["images"], output_names=["logits"], verbose=False)
    except Exception as error:  # of the tracing of any network: many types
        raise UserError(f"PyTorch cannot write this network as ONNX ({cause(error)})") from None
    return program.model_proto


def cause(error):
    """The first line of the innermost cause of an exception, and the operation of the network where one is named."""
    operation = None
    while error.__cause__ is not None:
        error = error.__cause__
        operation = operation or re.search(r"translating node %(\w+)", str(error))
    return reason(error)[:200] + (f", in {operation[1]}" if operation else "")


def checked(model):
    """The bytes of an ONNX model that passes the checks of the package onnx.

    Raises:
        UserError: where it does not.
    """
    import onnx

    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # of its own classes
        raise UserError(f"what PyTorch wrote is no valid ONNX ({reason(error)[:200]}); nothing was written") from None
    return model.SerializeToString()


def narrowest_that_loads(model):
    """An ONNX model, its weights int8, with them in the narrowest types that onnxruntime loads; else a UserError.

    Returns:
        (onnx.ModelProto, {bits of a type: how many weights are stored in it}).
    """
    for types in (NARROW, NARROW[1:], ()):
        candidate, counts = with_narrow_weights(model, types)
        try:
            session(candidate.SerializeToString())
            return candidate, counts
        except Exception as error:  # of its own classes, for what it does not know
            failure = reason(error)
    raise UserError(f"the installed onnxruntime does not load what PyTorch wrote ({failure[:200]})")


def with_narrow_weights(model, types):
    """The same, not loaded: each weight in the narrowest of these types, as in NARROW, that holds its integers."""
    import onnx

    model = copy.deepcopy(model)
    dequantized = {node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    counts, opset = {}, OPSET
    for tensor in model.graph.initializer:
        if tensor.name not in dequantized or tensor.data_type != onnx.TensorProto.INT8:
            continue
        integers = onnx.numpy_helper.to_array(tensor)
        low, high = integers.min(), integers.max()
        bits, needed = next(((bits, first) for bits, first in types if -2 ** (bits - 1) <= low and high < 2 ** (bits - 1)),
                            (8, OPSET))
        if bits < 8:
            tensor.ClearField("int32_data")
            tensor.data_type = getattr(onnx.TensorProto, f"INT{bits}")
            tensor.raw_data = pack(integers, bits).tobytes()  # ONNX packs like this, too
        counts[bits], opset = counts.get(bits, 0) + 1, max(opset, needed)
    _declare(model, opset)
    return model, counts


def _declare(model, opset):
    """Say in an ONNX model that it is of an opset; the operators that it uses mean the same in all that are asked for."""
    import onnx

    for entry in model.opset_import:
        if not entry.domain:
            entry.version = opset
    model.ir_version = max(model.ir_version, onnx.helper.find_min_ir_version_for(model.opset_import))
    names = {name for node in model.graph.node for name in node.output}  # weights say their types themselves, as changed
    for value in [value for value in model.graph.value_info if value.name not in names]:
        model.graph.value_info.remove(value)


def session(data):
    """The bytes of an ONNX model, loaded into onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # threads that wait leave the cores to others
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def logits_of_onnxruntime(data, images):
    """What onnxruntime computes from images [batch, 3, S, S] with the bytes of an ONNX model: logits [batch, classes].

    Raises:
        UserError: where it does not load or compute the model.
    """
    try:
        return torch.from_numpy(session(data).run(None, {"images": images.numpy()})[0])
    except Exception as error:  # of its own classes
        raise UserError(f"the installed onnxruntime does not compute this network ({reason(error)[:200]})") from None


@contextlib.contextmanager
def silence():
    """Without what the exporter prints and warns about."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()),
              contextlib.redirect_stderr(io.StringIO())):
            yield
    finally:
        logging.disable(before)
