"""What the graph of a network says about its layers: order, sizes, MACs, and which BatchNorm follows which layer."""

import contextlib
import copy
import math
import os
import random
import traceback
from dataclasses import dataclass, is_dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from util.errors import UserError, reason

from .attention import SelfAttention, attends_to_itself

USUAL_SIZES = (224, 32, 28, 64, 96, 128, 256, 299, 384)  # tried where a network fails, to tell whether the size is why
QUANTIZABLE = (nn.Conv2d, nn.Linear)
OTHER_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


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

    def after(self, earlier):
        """This call and earlier ones of the same layer, counted together."""
        return replace(self, macs_published=earlier.macs_published + self.macs_published,
                       macs_exact=earlier.macs_exact + self.macs_exact,
                       act_elements=earlier.act_elements + self.act_elements)

    def as_row(self):
        """The entry of this layer in the table that an indicators file carries."""
        return {key: value for key, value in vars(self).items() if key != "name"} | {"shape": list(self.shape)}


@dataclass(frozen=True)
class Graph:
    """What trace() found."""

    layers: dict  # {name: LayerCall}, in the order in which they are first called
    batchnorms: dict  # {name: the one layer before it, or None}
    # {name: elements} of matrices outside of these layers, such as position embeddings, attention that cannot be decomposed,
    # and layers that no forward pass reaches; they are not quantized, and count in neither size nor MACs.
    uncounted: dict
    non_layer_macs: dict  # {module: MACs} of other matrix products, as Q K^T in attention; in full precision, in no BitOPs
    output_shape: tuple  # for one image; the name of the output's type where that is no tensor
    first: tuple  # the convolutions that see the image, one in most networks
    classifiers: tuple  # the layers that give the output, one in most networks
    unquantizable: dict  # {name: why} of convolutions and linear layers that a forward pass reaches
    heads: tuple  # what gives the output, quantizable or not: modules, and parameters of the network itself
    indirect: tuple  # BatchNorms between which and the layer before them something happens
    input_size: int  # height and width of the image
    contiguous: str = ""  # why it has to be computed in contiguous memory, '' where convolutions can be channels last
    changes_images: bool = False  # whether its forward pass changes the images in place

    def describe_unquantizable(self, separator="\n"):
        """A line for each reason why layers cannot be quantized, or ''."""
        layers = {}
        for name, why in self.unquantizable.items():
            layers.setdefault(why, []).append(name)
        return separator.join(f"{shortened(names)}: {why}, so it stays in full precision" for why, names in layers.items())

    def describe_layout(self):
        """A line about the memory layout where it is not the usual one, or ''."""
        return f"computed in contiguous memory instead of channels last, as the network needs: {self.contiguous}" \
            if self.contiguous else ""

    def describe(self):
        """Lines about what stays in full precision, and about the memory layout, or ''."""
        lines = [self.describe_unquantizable()]
        if self.uncounted:
            lines.append("left in full precision, counted neither in size nor in BitOPs: "
                         f"{sum(self.uncounted.values()):,} weights ({shortened(list(self.uncounted))})")
        if self.non_layer_macs:
            layers = sum(call.macs_exact for call in self.layers.values())
            lines.append("non-layer MACs, of matrix products as in attention, in full precision and counted in no BitOPs: "
                         f"{sum(self.non_layer_macs.values()) / 1e6:.3f} M MACs per image, beside {layers / 1e6:.3f} M of "
                         "the layers")
        return "\n".join(filter(None, [*lines, self.describe_layout()]))


def shortened(names, most=3):
    """The first of some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# Functions that multiply matrices, by name: with a parameter among their arguments they are a layer, whoever calls them.
PRODUCTS = {"linear", "bilinear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
            "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "addmv", "baddbmm", "einsum", "tensordot",
            "inner", "cdist", "cosine_similarity"}


class _Lineage(TorchFunctionMode):
    """Follows, through any function, from which layers' outputs a tensor was computed.

    Args:
        matrices: {name: parameter} of the network's matrices.

    Attributes:
        sources: {tensor: the layers}. Its keys are compared by identity, and kept alive.
        makers: the same, but a product with a matrix outside of layers counts as a layer, under the name of the matrix.
        feeding: makers whose output another one gets.
    """

    def __init__(self, matrices):
        super().__init__()
        self.sources, self.makers, self.feeding = {}, {}, frozenset()
        self.matrices = {parameter: frozenset([name]) for name, parameter in matrices.items()}

    def of(self, values, known=None):
        """The names under which tensors stand in one of the dicts, sources by default."""
        known = self.sources if known is None else known
        return frozenset().union(*(known.get(tensor, ()) for tensor in tensors_in(values)))

    def mark(self, values, sources, makers=None):
        for tensor in tensors_in(values):
            self.sources[tensor], self.makers[tensor] = sources, makers or sources

    def enter(self, inputs):
        """Note that a layer gets these; return from which layers they come."""
        self.feeding |= self.of(inputs, self.makers)
        return self.of(inputs)

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        everything = (args, kwargs or {})
        sources, makers, matrices = (self.of(everything, known) for known in (self.sources, self.makers, self.matrices))
        result = function(*args, **(kwargs or {}))
        if sources and matrices and getattr(function, "__name__", "") in PRODUCTS:
            self.feeding |= makers - matrices
            makers = matrices
        if sources:
            self.mark(result, sources, makers)
        elif matrices:
            self.matrices.update(dict.fromkeys(tensors_in(result), matrices))
        return result


def tensors_in(values):
    """Every tensor in a nest of dicts, lists, tuples and dataclasses."""
    if isinstance(values, torch.Tensor):
        yield values
        return
    if is_dataclass(values) and not isinstance(values, type):
        values = vars(values)
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors_in(value)


ATEN = torch.ops.aten
MATRIX_PRODUCTS = {ATEN.mm: 0, ATEN.bmm: 0, ATEN.mv: 0, ATEN.dot: 0, ATEN.addmm: 1, ATEN.baddbmm: 1, ATEN.addmv: 1}


class ModuleMode(TorchDispatchMode):
    """Knows in which modules of a network an operation of torch happens: `modules` are their names, the innermost last."""

    def __init__(self, model):
        super().__init__()
        self.modules = [""]
        for name, module in model.named_modules():
            module.register_forward_pre_hook(partial(self._enter, name))
            module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, name, *_):
        self.modules.append(name)

    def _leave(self, *_):
        self.modules.pop()


class _Products(ModuleMode):
    """Counts the MACs of matrix products and convolutions outside of layers, {module: MACs}; see Graph for `contiguous`."""

    def __init__(self, model):
        super().__init__(model)
        self.macs, self.contiguous = {}, ""
        self.layers = {name for name, module in model.named_modules() if not why_unquantizable(module)}

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if self.layers.isdisjoint(self.modules):
            operation = getattr(function, "overloadpacket", None)
            macs = _macs_of_operation(operation, args, result)
            if macs:
                self.macs[self.modules[-1]] = self.macs.get(self.modules[-1], 0) + macs
            if operation is ATEN.as_strided:  # which gives other values in another layout
                self.contiguous = f"{self.modules[-1] or 'forward'} calls as_strided"
            elif operation is ATEN.convolution and skips_pixels(args[1].shape[2:], args[3], args[8], args[1].shape[1]):
                self.contiguous = f"{self.modules[-1] or 'forward'} calls a strided 1x1 convolution of few channels"
        return result


def _macs_of_operation(operation, args, result):
    """MACs of one of torch's operations that multiply matrices, 0 of any other."""
    if operation in MATRIX_PRODUCTS:
        return result.numel() * args[MATRIX_PRODUCTS[operation]].shape[-1]
    if operation is ATEN.convolution:  # a transposed one, args[6], has its sizes the other way round
        return (args[0] if args[6] else result).numel() * args[1][0].numel()
    if "scaled_dot_product" in str(operation):
        query, key, value = args[:3]
        return query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    return 0


def skips_pixels(kernel, stride, groups, channels):
    """Whether a convolution is a strided 1x1 one of fewer channels than a vector register of the CPU holds.

    Channels last, torch 2.14's backward pass of it (oneDNN 3.12) writes past the end of its result: to_device sees to them.
    """
    lanes = 16 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 8
    return tuple(kernel) == (1, 1) and max(stride) > 1 and groups == 1 and channels < lanes


def convolve_pixels(conv, x, weight, bias):
    """A strided 1x1 convolution of x [..., channels, height, width] as one without stride of every stride-th pixel."""
    padding = conv._reversed_padding_repeated_twice
    if any(padding):
        x = F.pad(x, padding, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    return F.conv2d(x[..., ::conv.stride[0], ::conv.stride[1]], weight, bias)


@contextlib.contextmanager
def generators_put_back():
    """Seed torch, numpy and Python on the CPU within; afterwards each goes on as if nothing had been drawn."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            random.seed(0)
            np.random.seed(0)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@generators_put_back()
def trace(model, input_size, num_classes=None):
    """The Graph of an unquantized network, from a forward pass of one image [3, input_size, input_size] without data.

    A BatchNorm is paired with a layer when its input was computed from the output of that layer alone.

    Args:
        num_classes: outputs that the network has to have; None for any number.

    Raises:
        UserError: when the network cannot be copied, cannot take such an image, gives no logits, or has layers that cannot be
            told apart or that only some images reach.
    """
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise UserError(f"arch: the shape of {name} is open until the network is called; call it once in the function "
                            "that builds it")
    try:
        graph = _dry_pass(model, input_size, "meta")
    except UserError:
        raise
    except Exception:  # a network of the user's own may look at values, which are not there
        try:
            graph = _dry_pass(model, input_size, "cpu")
            _check_reached(model, graph, input_size)
        except Exception as error:
            raise error if isinstance(error, UserError) else UserError(_why_it_fails(model, input_size, error)) from None
    _check_graph(model, graph, num_classes)
    contiguous, changes_images = _in_both_modes(model, input_size)
    return replace(graph, contiguous=graph.contiguous or contiguous, changes_images=changes_images)


def _why_it_fails(model, input_size, error):
    """What to say of an error in the forward pass: the size is to blame only where the network takes another one."""
    for size in USUAL_SIZES:
        for device in ("meta", "cpu"):
            with contextlib.suppress(Exception):
                _dry_pass(model, size, device)
                return (f"the network does not take images of {input_size}x{input_size} ({reason(error)}), but of "
                        f"{size}x{size}; change arch or dataloader.input_size")
    folders = (os.path.dirname(torch.__file__), os.path.dirname(os.path.abspath(__file__)))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if not frame.filename.startswith(folders) and "site-packages" not in frame.filename]
    place = f" in line {frames[-1].lineno} of {os.path.basename(frames[-1].filename)}" if frames else ""
    return (f"arch: the network fails on an image of {input_size}x{input_size}{place} "
            f"({type(error).__name__}: {reason(error)})")


def _twin(model, device):
    """A copy in evaluation mode; a network that cannot be copied, or whose modules take no hooks, is refused."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UserError(f"arch: {name or 'the network'} is compiled by torch.jit, which hides its layers; do without")
    try:
        twin = copy.deepcopy(model)
    except Exception as error:  # of the network's own attributes, which may be anything
        computed = [f"{name}.{key}" for name, module in model.named_modules() for key, value in vars(module).items()
                    if isinstance(value, torch.Tensor) and not value.is_leaf]
        if computed:
            raise UserError(f"arch: {shortened(computed)}: computed from other tensors and kept, as by torch.nn.utils."
                            "weight_norm and prune; take parametrizations.weight_norm, or prune.remove") from None
        raise UserError(f"arch: the network cannot be copied, which this project has to do ({reason(error)})") from None
    return twin.to(device).eval()


@torch.no_grad()
def _check_reached(model, graph, input_size):
    """Refuse layers that only some of a few images of many kinds reach: their step sizes may get no value."""
    twin, reached = _twin(model, "cpu"), set()
    for name, module in twin.named_modules():
        if not why_unquantizable(module):
            module.register_forward_hook(lambda *_, name=name: reached.add(name))
    draws = torch.Generator().manual_seed(0)
    light, contrast = (torch.randn(8, 3, 1, 1, generator=draws) for _ in range(2))
    twin(torch.randn(8, 3, input_size, input_size, generator=draws) * contrast.exp() + light)
    some = sorted(reached ^ graph.layers.keys())
    if some:
        raise UserError(f"arch: only some images reach the layers {shortened(some)}, so no bits can be searched for them; "
                        "let each image reach every layer")


def _dry_pass(model, input_size, device):
    twin = _twin(model, device)
    notes, products = Notes(twin), _Products(twin)
    with torch.no_grad(), notes.lineage, products:
        output = twin(torch.zeros(1, 3, input_size, input_size, device=device))
    uncounted = {name: parameter.numel() for name, parameter in notes.matrices.items()
                 if name.rpartition(".")[0] not in notes.calls}
    shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    classifiers, heads = notes.ends(output)
    return Graph(notes.calls, notes.batchnorms, uncounted, products.macs, shape, notes.first(), classifiers,
                 notes.unquantizable, heads, tuple(notes.indirect), input_size, products.contiguous)


def _in_both_modes(model, input_size):
    """(contiguous, changes_images) of a Graph, in evaluation and in training.

    It takes a batch of two, since of one image some dimensions can be merged in any layout, and values, since without them
    convolutions do not lay out their results as they do in training.
    """
    contiguous, changes_images = "", False
    for training in (False, True):
        error, changes = _real_pass(model, input_size, training, torch.channels_last)
        if error:
            other_error, changes = _real_pass(model, input_size, training, torch.preserve_format)
            contiguous = contiguous or ("" if other_error else reason(error))
        changes_images |= changes
    return contiguous, changes_images


def _real_pass(model, input_size, training, layout):
    """(What a forward pass of two images raises, None where nothing; whether it changed the images)."""
    twin = copy.deepcopy(model)
    images = torch.linspace(-1, 1, 6 * input_size**2).view(2, 3, input_size, input_size)
    before, error = images.clone(), None
    try:
        with torch.no_grad():
            twin.to("cpu", torch.float32, memory_format=layout).train(training)
            twin(images)
    except Exception as raised:  # of the user's own network, which may be anything
        error = raised
    return error, bool(images._version) or not torch.equal(images, before)


def why_unquantizable(module):
    """Why a module cannot be quantized, or '' for a convolution or linear layer that computes as torch's does, with a weight
    of its own. A subclass that leaves the computation alone counts as the layer that it comes from."""
    kind, name = next((kind for kind in QUANTIZABLE if isinstance(module, kind)), None), type(module).__name__
    if kind is None:
        return f"its class {name} is neither a Conv2d nor a Linear"
    if hasattr(module, "parametrizations") or not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weight is computed from other tensors"
    for method in ("forward", "_conv_forward", "__call__"):
        if method in vars(module) and getattr(vars(module)[method], "__func__", None) is not convolve_pixels:
            return f"it was given a {method} of its own"
        if getattr(type(module), method, None) is not getattr(kind, method, None):
            return f"its class {name} has a {method} of its own"
    return ""


def _check_graph(model, graph, num_classes):
    """Refuse a network without layers, without logits, or with two layers of one weight, which each would quantize its way."""
    if not graph.layers:
        if not graph.unquantizable:
            raise UserError("arch: the network has no convolution and no linear layer that a forward pass reaches")
        raise UserError(f"arch: no layer can be quantized; {graph.describe_unquantizable('; ')}")
    shape = graph.output_shape
    if isinstance(shape, str) or len(shape) != 2 or shape[0] != 1:
        found = f"a {shape}" if isinstance(shape, str) else f"a tensor of shape {list(shape)}"
        raise UserError(f"arch: the network gives {found} for one image, expected logits of shape [1, classes]")
    if num_classes is not None and shape[1] != num_classes:
        raise UserError(f"arch: the network has {shape[1]} outputs, the data have {num_classes} classes")
    owners = {}
    for name in graph.layers:
        other = owners.setdefault(model.get_submodule(name).weight, name)
        if other != name:
            raise UserError(f"arch: the layers {other} and {name} share one weight; give each a weight of its own, or call "
                            "one module twice")


class Notes:
    """Notes, by hooks in a network, its layers in the order of their calls, BatchNorms, attention, and what feeds what."""

    def __init__(self, model):
        self.matrices = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() >= 2}
        self.lineage = _Lineage(self.matrices)
        self.calls, self.unquantizable, self.batchnorms, self.kinds_of_attention = {}, {}, {}, {}
        self.outputs = {}  # of each layer, when it was called last, and its version
        self.indirect = {}  # BatchNorms that get something else than such an output, in order
        self.sources = {}  # of the input of each layer, when it is called first
        for name, module in model.named_modules():
            if not why_unquantizable(module):
                module.register_forward_hook(partial(self._layer, name))
            elif isinstance(module, OTHER_LAYERS):
                module.register_forward_hook(partial(self._other_layer, name))
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.register_forward_pre_hook(partial(self._batchnorm, name))
            elif isinstance(module, SelfAttention):
                module.register_forward_pre_hook(partial(self._attention, name), with_kwargs=True)

    def first(self):
        """Names of the convolutions that no layer comes before; in a network without, of such linear layers."""
        found = [name for name in self.calls if not self.sources[name]]
        return tuple(name for name in found if self.calls[name].kind == "conv") or tuple(found)

    def ends(self, output):
        """(classifiers, heads) of a Graph: what the output comes from and feeds no layer; else the layer called last."""
        makers = self.lineage.of(output, self.lineage.makers) - self.lineage.feeding or set(list(self.calls)[-1:])
        layers = self.calls.keys() | self.unquantizable.keys()
        heads = {name if name in layers else name.rpartition(".")[0] or name for name in makers}
        return tuple(name for name in self.calls if name in makers), tuple(sorted(heads))

    def _layer(self, name, module, inputs, output):
        if not inputs:
            raise UserError(f"arch: the layer {name} gets its input by keyword; call it with the input alone")
        call = _layer_call(name, module, inputs[0], output)
        self.sources.setdefault(name, self.lineage.enter(inputs))
        self.calls[name] = call.after(self.calls[name]) if name in self.calls else call
        self.lineage.mark(output, frozenset([name]))
        self.outputs[name] = (output, output._version)

    def _other_layer(self, name, module, inputs, output):
        self.lineage.enter(inputs)
        self.unquantizable[name] = why_unquantizable(module)
        self.lineage.mark(output, frozenset([name]))

    def _batchnorm(self, name, module, inputs):
        sources = self.lineage.of(inputs)
        before = next(iter(sources)) if len(sources) == 1 and sources <= self.calls.keys() else None
        output, version = self.outputs.get(before, (None, None))
        if output is not inputs[0] or output._version != version:
            self.indirect[name] = True
        self.batchnorms[name] = before if self.batchnorms.setdefault(name, before) == before else None

    def _attention(self, name, module, args, kwargs):
        inputs = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        is_own = attends_to_itself(inputs["query"], inputs["key"], inputs["value"])
        if self.kinds_of_attention.setdefault(name, is_own) != is_own:
            raise UserError(f"arch: the attention {name} is used within one input and between two; make it two modules")


def _layer_call(name, module, entering, leaving):
    shape, params = tuple(module.weight.shape), module.weight.numel()
    if isinstance(module, nn.Linear):
        macs = params * (leaving.numel() // module.out_features)
        return LayerCall(name, "linear", shape, 1, macs, macs, params, entering.numel())
    published = params * int(_unrounded_output(module, entering, 0) * _unrounded_output(module, entering, 1))
    exact = params * leaving.shape[-2] * leaving.shape[-1]
    return LayerCall(name, "conv", shape, module.groups, published, exact, params, entering.numel())


def _unrounded_output(conv, entering, axis):
    """Output size of a convolution along one axis, before it is rounded down."""
    reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
    padding = {"same": reach, "valid": 0}[conv.padding] if isinstance(conv.padding, str) else 2 * conv.padding[axis]
    return max((entering.shape[-2:][axis] + padding - reach - 1) / conv.stride[axis] + 1, math.ulp(1.0))
