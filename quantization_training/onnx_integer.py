"""An ONNX model with DequantizeLinear, as onnx_export writes it, made one that multiplies integers, for onnxruntime.

Inputs of layers become uint8, q + Qn with zero point Qn, from 0 to Qn + Qp. Then

- a convolution whose output goes, past its bias and a ReLU, into one quantizer is a QLinearConv, whose output scale is that
  quantizer's step; it saturates at 0, and Min clips to the largest integer that is left;
- another convolution without groups, and a linear layer, is a MatMulIntegerToFloat, an operator of onnxruntime's own that adds
  the bias in float32;
- what is left stays as it is, in float32.

QLinearConv rounds a bias to a multiple of both step sizes. So the weights of a channel are multiplied by an integer, and
their step is divided by it and moved a little, such that each sum of integers is rounded as with the exact bias (fine_biases).
Weights have to fit into 8 bits and sums of two products into 16: kernels for x86 without VNNI saturate these sums where
weights are int8. Where they do not fit, weights are uint8, whose kernels need no such bound.
"""

import copy
import itertools
from dataclasses import dataclass

import numpy as np

from folding import fold
from onnx_export import to_onnx
from util.errors import UserError

PAIR = 2**15 - 1  # what a sum of two products may reach
SUM = 2**31 - 1  # what the sum of all may
CHANGE = 0.02  # of a step, at most, with which sums are rounded alike
UNSIGNED_ZERO = 128  # the zero point of weights that are uint8
FEWEST = 16  # channels of a group; with fewer, float32 is faster, but for depthwise convolutions
LEAST_ROOM = 2e-6  # relative, of a step, since onnxruntime multiplies in float32
MOST_ERROR = 0.1  # of a layer with rounded biases, in steps of the quantizer that it reaches; with more, it is no QLinearConv
MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Entering:
    """A quantized input. raw: the name of a uint8 tensor, (raw - zero) * step its values. largest: what raw may be."""

    raw: str
    step: float
    zero: int
    largest: int


@dataclass(frozen=True)
class Layer:
    """A layer whose weight and input are quantized.

    node: its Conv, Gemm or MatMul. weight: int32 [out, ...]. step, bias: float32 [out]; steps are positive. end: the node that
    adds the bias, where there is one, else `node`.
    """

    node: object
    weight: np.ndarray
    step: np.ndarray
    bias: np.ndarray
    entering: Entering
    end: object


class Graph:
    """The graph of an ONNX model, its nodes and constants found by names, and changed."""

    def __init__(self, model):
        import onnx

        self.onnx, self.proto, self.nodes = onnx, model.graph, list(model.graph.node)
        self.values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self.outputs = {value.name for value in model.graph.output}
        self.maker = {name: node for node in self.nodes for name in node.output}
        self.users = {}
        for node in self.nodes:
            for name in node.input:
                self.users.setdefault(name, []).append(node)
        self.replacements = {}  # by the output of the node whose place they take

    def made_by(self, name, *kinds):
        """The node of one of these kinds that makes a tensor; else None."""
        node = self.maker.get(name)
        return node if node is not None and node.op_type in kinds else None

    def only_user(self, name):
        """The node that alone uses a tensor; None where there are others, or where it is an output of the graph."""
        users = self.users.get(name, [])
        return users[0] if len(users) == 1 and name not in self.outputs else None

    def constant(self, name, value):
        if name not in self.values:
            self.values[name] = np.asarray(value, order="C")
            self.proto.initializer.append(self.onnx.numpy_helper.from_array(self.values[name], name))
        return name

    def replace(self, node, *new):
        """Put nodes in the place of one: (operator, inputs, output, attributes)."""
        for operator, inputs, output, attributes in new:
            domain = {"domain": MICROSOFT} if operator == "MatMulIntegerToFloat" else {}
            made = self.onnx.helper.make_node(operator, inputs, [output], f"{output}/{operator}", **domain, **attributes)
            self.replacements.setdefault(node.output[0], []).append(made)

    def finish(self):
        """Write the nodes back, without those, and the constants, that nothing uses now."""
        nodes = [new for node in self.nodes for new in self.replacements.get(node.output[0], [node])]
        needed, kept = set(self.outputs), []
        for node in reversed(nodes):
            if needed & set(node.output):
                kept.append(node)
                needed |= set(node.input)
        del self.proto.node[:]
        self.proto.node.extend(reversed(kept))
        made = {name for node in kept for name in node.output}
        for entries, names in ((self.proto.initializer, needed), (self.proto.value_info, needed & made)):
            for entry in [entry for entry in entries if entry.name not in names]:
                entries.remove(entry)


def attribute(node, name, default=None):
    for entry in node.attribute:
        if entry.name == name:
            return list(entry.ints) or entry.i
    return default


def to_integer_onnx(model, images):
    """The ONNX model, computing with integers, of a network on the CPU, and what with_integers returns.

    Args:
        images: [batch, 3, S, S], to fold BatchNorms with, where they can be.
    """
    folded = copy.deepcopy(model)
    try:
        fold(folded, images)
    except UserError:  # the network looks for its BatchNorms
        folded = model
    graph = to_onnx(folded, images.shape[-1])
    return graph, *with_integers(graph)


def with_integers(model):
    """The same model computing with integers where onnxruntime is the faster for it, in place.

    Returns:
        ({operator: how many layers it computes}, the largest error of a layer with rounded biases, of put_convolution).
    """
    graph, counts, worst = Graph(model), {"QLinearConv": 0, "MatMulIntegerToFloat": 0, "float32": 0}, 0.0
    entering = {}  # by the output of the QuantizeLinear, or of the Clip after it
    for node in graph.nodes:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        layer = find_layer(graph, node, entering)
        error = None if layer is None else put_convolution(graph, layer, entering)
        if error is not None:
            counts["QLinearConv"], worst = counts["QLinearConv"] + 1, max(worst, error)
        elif layer is not None and put_product(graph, layer):
            counts["MatMulIntegerToFloat"] += 1
        elif dequantized_weight(graph, node) is not None:
            counts["float32"] += 1
    graph.finish()
    if counts["MatMulIntegerToFloat"]:
        model.opset_import.append(graph.onnx.helper.make_opsetid(MICROSOFT, 1))
    return counts, worst


def find_layer(graph, node, entering):
    """The Layer that a Conv, Gemm or MatMul computes; None where weight or input is not quantized, or it adds a bias."""
    dequantize = dequantized_weight(graph, node) if len(node.input) == 2 else None
    x = None if dequantize is None else find_entering(graph, node.input[0], entering)
    if x is None:
        return None
    weight = graph.values[dequantize.input[0]].astype(np.int32)
    step = np.broadcast_to(graph.values[dequantize.input[1]].astype(np.float32), weight.shape[:1])
    sign = np.where(step < 0, -1, 1).astype(np.int32)  # a folded BatchNorm may turn a channel round
    weight = weight * sign.reshape(-1, *[1] * (weight.ndim - 1))
    end, bias, add = node, np.zeros(len(weight), np.float32), graph.only_user(node.output[0])
    if add is not None and add.op_type == "Add" and add.input[1] in graph.values:
        added = graph.values[add.input[1]]
        if added.shape == (len(weight), *[1] * (weight.ndim - 2)):
            end, bias = add, added.reshape(-1)
    return Layer(node, weight, np.abs(step), bias, x, end)


def dequantized_weight(graph, node):
    """The DequantizeLinear of the weight [out, ...] of a Conv, Gemm or MatMul; None where its second input is none."""
    transpose = graph.made_by(node.input[1], "Transpose")
    found = graph.made_by(node.input[1] if transpose is None else transpose.input[0], "DequantizeLinear")
    is_transposed = node.op_type == "MatMul" or (node.op_type == "Gemm" and not attribute(node, "transB"))
    return found if found is not None and found.input[0] in graph.values and (transpose is not None) == is_transposed else None


def find_entering(graph, name, entering):
    """The Entering whose values a tensor in float32 has, its uint8 tensor put into the graph; None where it has none."""
    last = graph.made_by(name, "DequantizeLinear")
    clip = None if last is None else graph.made_by(last.input[0], "Clip")
    first = None if last is None else graph.made_by(clip.input[0] if clip is not None else last.input[0], "QuantizeLinear")
    if first is None or last.input[0] in entering:
        return entering[last.input[0]] if first is not None else None
    step, low, high = quantizer_of(graph, first)
    raw, zero, largest = f"{last.input[0]}/uint8", graph.constant(f"zero/{-low}", np.uint8(-low)), high - low
    put_rounding(graph, first, ("QuantizeLinear", [first.input[0], first.input[1], zero], raw, {}), largest)
    graph.replace(first, ("QuantizeLinear", list(first.input), first.output[0], {}))
    entering[last.input[0]] = Entering(raw, step, -low, largest)
    return entering[last.input[0]]


def put_rounding(graph, place, node, largest):
    """Put a node, as Graph.replace takes it, that gives uint8, and a Min after it where not all of them may come."""
    operator, inputs, raw, attributes = node
    if largest == 255:
        graph.replace(place, node)
        return
    graph.replace(place, (operator, inputs, f"{raw}/wide", attributes),
                  ("Min", [f"{raw}/wide", graph.constant(f"largest/{largest}", np.uint8(largest))], raw, {}))


def quantizer_of(graph, quantize):
    """(step, -Qn, Qp) of a quantizer, whose QuantizeLinear is given."""
    clip, limits = graph.only_user(quantize.output[0]), np.iinfo(graph.values[quantize.input[2]].dtype)
    low, high = limits.min, limits.max
    if clip is not None and clip.op_type == "Clip":
        low, high = (int(graph.values[bound]) for bound in clip.input[1:])
    return np.float32(graph.values[quantize.input[1]]), low, high


def put_convolution(graph, layer, entering):
    """Put a QLinearConv in the place of a convolution, where it goes into one quantizer and its integers fit.

    Returns:
        how far from an edge an output may be that is rounded to the other integer, in steps of that quantizer; None where
        nothing was put.
    """
    target = find_target(graph, layer) if is_plain_convolution(layer) and groups_are_fast(layer) else None
    if target is None:
        return None
    quantize, step, low, high = target
    integers = scaled_integers(layer, (np.arange(low, high) + 0.5) * np.float64(step))
    if integers is None:
        return None
    (weight, weight_step, bias, error), name, x = integers, layer.end.output[0], layer.entering
    error = float(error.max() / step)
    if error > MOST_ERROR:
        return None
    weight_zero = weight.dtype.type(0 if weight.dtype == np.int8 else UNSIGNED_ZERO)
    inputs = [x.raw, *(graph.constant(key, value) for key, value in (
        (f"{name}/x_scale", x.step), (f"zero/{x.zero}", np.uint8(x.zero)), (f"{name}/weight", weight),
        (f"{name}/weight_scale", weight_step), (f"{name}/weight_zero", weight_zero), (f"{name}/y_scale", step),
        (f"zero/{-low}", np.uint8(-low)), (f"{name}/bias", bias)))]
    geometry = {key: attribute(layer.node, key) for key in ("dilations", "group", "kernel_shape", "pads", "strides")}
    raw, largest = f"{name}/uint8", high - low
    put_rounding(graph, layer.end, ("QLinearConv", inputs, raw, geometry), largest)
    clip = graph.only_user(quantize.output[0])
    quantized = (clip if clip is not None and clip.op_type == "Clip" else quantize).output[0]
    entering[quantized] = Entering(raw, step, -low, largest)
    for last in graph.users[quantized]:  # layers that stay in float32 read it, too
        graph.replace(last, ("DequantizeLinear", [raw, inputs[6], inputs[7]], last.output[0], {}))
    return error


def is_plain_convolution(layer):
    """Whether a layer is a convolution of two dimensions that says its padding in numbers."""
    return layer.node.op_type == "Conv" and layer.weight.ndim == 4 and all(
        entry.s in (b"", b"NOTSET") for entry in layer.node.attribute if entry.name == "auto_pad")


def groups_are_fast(layer):
    """Whether QLinearConv is fast for the groups of a convolution: one, groups of many channels, or one channel in and out."""
    groups, (outputs, inputs) = attribute(layer.node, "group", 1), layer.weight.shape[:2]
    return groups == 1 or inputs >= FEWEST or (inputs == 1 and outputs == groups)


def find_target(graph, layer):
    """(QuantizeLinear, its step, lowest, highest integer) of the one quantizer that a layer's output goes into; else None.

    A ReLU, or what else clips, on the way narrows the range: rounding keeps order, so that it may come first.
    """
    low, high, after = -np.inf, np.inf, graph.only_user(layer.end.output[0])
    while after is not None and after.op_type in ("Relu", "Clip"):
        bounds = [0] if after.op_type == "Relu" else [graph.values.get(name) for name in after.input[1:]]
        if any(bound is None for bound in bounds):
            return None
        low, high = max(low, float(bounds[0])), min(high, *map(float, bounds[1:])) if bounds[1:] else high
        after = graph.only_user(after.output[0])
    if after is None or after.op_type != "QuantizeLinear":
        return None
    step, lowest, highest = quantizer_of(graph, after)
    low, high = (int(np.clip(np.round(np.float32(bound) / step), lowest, highest)) for bound in (low, high))
    return (after, step, low, high) if low <= 0 < high else None


def scaled_integers(layer, edges):
    """What QLinearConv takes for a layer; None where it does not fit.

    Args:
        edges: [edges], where its output is rounded to the next integer, in the output's unit.

    Returns:
        (weight int8, or uint8 with UNSIGNED_ZERO, [out, ...]; its step [out]; bias int32 [out], in units of both steps; the
        errors [out]: how far from an edge, in the output's unit, what is rounded to the other integer may be).
    """
    rows, largest = layer.weight.reshape(len(layer.weight), -1).astype(np.int64), layer.entering.largest
    unit = np.float64(layer.entering.step) * layer.step.astype(np.float64)
    bias, size = layer.bias / unit, np.maximum(np.abs(rows).max(1), 1)
    if rows.min() < -128 or rows.max() > 127 or not np.isfinite(bias).all():
        return None
    zero = 0 if 2 * largest * size.max() <= PAIR else UNSIGNED_ZERO
    room = SUM - 2.0 * largest * zero * rows.shape[1]
    most = np.minimum(np.maximum(127 // size, 1), room // (2.0 * largest * np.abs(rows).sum(1) + np.abs(bias) + 1))
    if zero == 0:
        most = np.minimum(most, PAIR // (2 * largest * size))
    if most.min() < 1:
        return None
    factor, rounded, unit, error = fine_biases(bias, unit, edges, most, sums_between(layer, rows))
    weight = (rows * factor[:, None] + zero).astype(np.uint8 if zero else np.int8).reshape(layer.weight.shape)
    return weight, (unit / factor / layer.entering.step).astype(np.float32), rounded.astype(np.int32), error


def sums_between(layer, rows):
    """(least, largest) sum of weights times inputs that can come, [out, 1] each."""
    low, high = -layer.entering.zero, layer.entering.largest - layer.entering.zero
    positive, negative = (part.sum(1, keepdims=True) for part in (np.maximum(rows, 0), np.minimum(rows, 0)))
    return positive * low + negative * high, positive * high + negative * low


def fine_biases(bias, unit, edges, most, sums):
    """Multiples of 1 / factor in place of biases, with which sums are rounded as with the biases, or nearly so.

    A sum k, an integer, is rounded up past an edge where (k + bias) * unit > edge. All is rounded alike where each
    edge / unit - bias lies between the same two k. With few bits there are few edges, and that leaves room: of all factors and
    the multiples beside a bias, those are taken that leave the widest room for 1 / unit, and the middle of it. Where none
    leaves room, as with many edges, the unit stays and the nearest multiple is taken.

    Args:
        bias: [out]. unit: [out], in the output's unit, as edges [edges] are. most: [out], the largest factors.
        sums: (least, largest) k that can come, [out, 1] each.

    Returns:
        (factor int64 [out], bias * factor rounded [out], unit [out], error [out] as of scaled_integers).
    """
    (least, last), exact = sums, edges / unit[:, None] - bias[:, None]
    first = np.clip(np.ceil(exact), least, last + 1)  # the least k that is rounded up; last + 1: none
    ends = np.where(first > least, first - 1, -np.inf), np.where(first <= last, first, np.inf)
    lows, highs = np.sort([end / edges for end in ends], 0)
    best, chosen = np.full(len(bias), -np.inf), np.empty((3, len(bias)))
    for factor, moved in itertools.product(range(1, int(most.max()) + 1), (0, -1, 1)):
        multiple = np.round(bias * factor) + moved
        shift = (multiple / factor)[:, None] / edges
        low = (shift + lows).max(1, initial=-np.inf).clip((1 - CHANGE) / unit)  # 1 / unit may lie between low and high
        high = (shift + highs).min(1, initial=np.inf).clip(max=(1 + CHANGE) / unit)
        has_room = (high - low) * unit > LEAST_ROOM
        score = np.where(has_room, (high - low) * unit, -np.abs(multiple / factor - bias))
        better = (score > best) & (factor <= most)
        best[better] = score[better]
        inverse = np.where(has_room, (low + high) / 2, 1 / unit)
        chosen[:, better] = np.stack(np.broadcast_arrays(factor, multiple, inverse))[:, better]
    factor, multiple, inverse = chosen
    found = np.clip(np.ceil(edges * inverse[:, None] - (multiple / factor)[:, None]), least, last + 1)
    farthest = np.where(found > first, found - 1, found)  # of the k that are rounded to the other integer
    error = np.where(found == first, 0, np.abs(farthest - exact) * unit[:, None]).max(1, initial=0)
    return factor.astype(np.int64), multiple, 1 / inverse, error


def put_product(graph, layer):
    """Put a MatMulIntegerToFloat in the place of a linear layer or of a convolution; return whether that could be."""
    x, name, weight = layer.entering, layer.end.output[0], layer.weight
    is_convolution = layer.node.op_type == "Conv"
    if is_convolution and not (is_plain_convolution(layer) and attribute(layer.node, "group", 1) == 1):
        return False
    rows = (weight.transpose(0, 2, 3, 1) if is_convolution else weight).reshape(len(weight), -1)  # channels are read last
    fits_16_bits = 2 * x.largest * int(np.abs(rows).max()) <= PAIR
    if rows.min() < -128 or rows.max() > 127 or 2 * x.largest * 255 * rows.shape[1] > SUM:
        return False
    zero, kind = (0, np.int8) if fits_16_bits else (UNSIGNED_ZERO, np.uint8)
    inputs = [patches(graph, layer) if is_convolution else x.raw, *(graph.constant(key, value) for key, value in (
        (f"{name}/weight", (rows + zero).T.astype(kind)), (f"{name}/x_scale", x.step), (f"{name}/weight_scale", layer.step),
        (f"zero/{x.zero}", np.uint8(x.zero)), (f"{name}/weight_zero", kind(zero)), (f"{name}/bias", layer.bias)))]
    product = f"{name}/product" if is_convolution else name
    graph.replace(layer.end, ("MatMulIntegerToFloat", inputs, product, {}))
    if is_convolution:
        graph.replace(layer.end, ("Transpose", [product], name, {"perm": [0, 3, 1, 2]}))
    return True


def patches(graph, layer):
    """Put what gathers the inputs of each output of a convolution: [batch, height, width, kernel's size * channels]."""
    name, last, x = layer.end.output[0], layer.end, layer.entering
    before = f"{name}/channels_last"
    graph.replace(last, ("Transpose", [x.raw], before, {"perm": [0, 2, 3, 1]}))
    top, left, bottom, right = attribute(layer.node, "pads", [0] * 4)
    if top or left or bottom or right:
        pads = graph.constant(f"{name}/pads", np.array([0, top, left, 0, 0, bottom, right, 0]))
        graph.replace(last, ("Pad", [before, pads, graph.constant(f"zero/{x.zero}", np.uint8(x.zero))], f"{name}/padded", {}))
        before = f"{name}/padded"
    for axis in (2, 1):
        size, stride, dilation = (layer.weight.shape[axis + 1], *(attribute(layer.node, key, [1, 1])[axis - 1]
                                                                  for key in ("strides", "dilations")))
        if (size, stride) == (1, 1):
            continue
        parts = [f"{name}/axis{axis}/{index}" for index in range(size)]
        for index, part in enumerate(parts):
            end = -(size - 1 - index) * dilation or 2**62
            where = [graph.constant(f"integer/{value}", np.array([value])) for value in (index * dilation, end, axis, stride)]
            graph.replace(last, ("Slice", [before, *where], part, {}))
        before = parts[0]
        if size > 1:
            before = f"{name}/axis{axis}"
            graph.replace(last, ("Concat", parts, before, {"axis": 3}))
    return before
