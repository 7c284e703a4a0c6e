"""What the graph of a network says about its layers: order, sizes, MACs, and which BatchNorm follows which layer."""

import copy
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from util.errors import UserError, reason

QUANTIZABLE = (nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class LayerCall:
    """One layer as it was reached in a forward pass of one image.

    macs_exact counts multiply-accumulates from the true output size; macs_published is LIMPQ's count,
    cin * cout * k * k * int(h * w) / groups with h and w the output size before each is rounded down.
    """

    name: str
    kind: str
    shape: tuple
    groups: int
    macs_published: int
    macs_exact: int
    params: int
    act_elements: int

    def as_row(self):
        """The entry of this layer in the table that an indicators file carries."""
        row = dict(vars(self), shape=list(self.shape))
        del row["name"]
        return row


@dataclass(frozen=True)
class Graph:
    """What trace() found.

    layers: {name: LayerCall} in the order in which they are first called. batchnorms: {name: the one layer before it,
    or None}. uncounted: {name: elements} of matrices that belong to neither, such as the projections inside attention
    and layers that no forward pass reaches; they are not quantized, and count in neither size nor MACs.
    """

    layers: dict
    batchnorms: dict
    uncounted: dict

    def describe_uncounted(self):
        """A line about what is left alone, or '' where there is nothing."""
        if not self.uncounted:
            return ""
        names = list(self.uncounted)
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return (f"left in full precision, counted neither in size nor in BitOPs: {sum(self.uncounted.values()):,} weights "
                f"({shown})")


class _Lineage(TorchFunctionMode):
    """Follows, through any function, from which layers' outputs a tensor was computed."""

    def __init__(self):
        super().__init__()
        self.sources = {}
        self.alive = []  # a tensor that is freed could give its id to another one

    def of(self, values):
        return frozenset().union(*(self.sources.get(id(tensor), frozenset()) for tensor in _tensors(values)))

    def mark(self, values, sources):
        for tensor in _tensors(values):
            self.sources[id(tensor)] = sources
            self.alive.append(tensor)

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        sources = self.of((args, kwargs or {}))
        result = function(*args, **(kwargs or {}))
        if sources:
            self.mark(result, sources)
        return result


def _tensors(values):
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


def trace(model, input_size):
    """Run one image of shape [3, input_size, input_size] through the network, without data, and note what it meets.

    Args:
        model: an unquantized network; it is left as it is.
        input_size: height and width of the image.

    Returns:
        a Graph. A BatchNorm is paired with a layer when its input was computed from the output of that layer alone.

    Raises:
        UserError: when the network cannot take such an image.
    """
    twin = copy.deepcopy(model).to("meta", torch.float32).eval()
    lineage = _Lineage()
    calls, batchnorms = {}, {}
    for name, module in twin.named_modules():
        if type(module) in QUANTIZABLE:
            module.register_forward_hook(_note_layer(name, calls, lineage))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(_note_batchnorm(name, batchnorms, lineage))
    with torch.no_grad(), lineage:
        try:
            twin(torch.empty(1, 3, input_size, input_size, device="meta"))
        except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
            raise UserError(f"the network does not take images of {input_size}x{input_size} ({reason(error)}); "
                            "change arch or dataloader.input_size") from None
    uncounted = {name: parameter.numel() for name, parameter in twin.named_parameters()
                 if parameter.dim() >= 2 and name.rpartition(".")[0] not in calls}
    return Graph(calls, batchnorms, uncounted)


def _note_layer(name, calls, lineage):
    def hook(module, inputs, output):
        call = _layer_call(name, module, inputs[0], output)
        if name in calls:  # a module used twice works twice as much
            first = calls[name]
            call = LayerCall(name, call.kind, call.shape, call.groups, first.macs_published + call.macs_published,
                             first.macs_exact + call.macs_exact, call.params, first.act_elements + call.act_elements)
        calls[name] = call
        lineage.mark(output, frozenset([name]))
    return hook


def _note_batchnorm(name, batchnorms, lineage):
    def hook(module, inputs):
        sources = lineage.of(inputs)
        batchnorms[name] = next(iter(sources)) if len(sources) == 1 else None
    return hook


def _layer_call(name, module, entering, leaving):
    weight = module.weight
    if isinstance(module, nn.Linear):
        macs = weight.numel() * (leaving.numel() // module.out_features)
        return LayerCall(name, "linear", tuple(weight.shape), 1, macs, macs, weight.numel(), entering.numel())
    height, width = (_unrounded_output(module, entering, axis) for axis in (0, 1))
    published = weight.numel() * int(height * width)
    exact = weight.numel() * leaving.shape[-2] * leaving.shape[-1]
    return LayerCall(name, "conv", tuple(weight.shape), module.groups, published, exact, weight.numel(), entering.numel())


def _unrounded_output(conv, entering, axis):
    """Output size of a convolution along one axis, before it is rounded down."""
    kernel, stride, dilation = conv.kernel_size[axis], conv.stride[axis], conv.dilation[axis]
    if isinstance(conv.padding, str):
        padding = dilation * (kernel - 1) if conv.padding == "same" else 0
    else:
        padding = 2 * conv.padding[axis]
    size = entering.shape[-2:][axis]
    return max((size + padding - dilation * (kernel - 1) - 1) / stride + 1, math.ulp(1.0))
