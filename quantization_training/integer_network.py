"""A packed network computed with integers on the CPU, by the operators of oneDNN in torch: inputs as uint8 times weights as
int8, added up exactly in int32, then scaled in float32. Layers that do not fit stay in float32.

from integer_network import load
logits = load("model.safetensors")(images)      # float32 [batch, 3, S, S] to [batch, classes], for evaluation only
"""

import copy

import torch

from integer_graph import fused
from integer_layer import CannotCompute, IntegerLayer, check_operators, frozen, why_float
from model.names import put_modules
from packed_file import read_packed
from packed_network import as_checkpoint, rebuild
from quan.func import QuantizedLayer
from quan.quantizer import kernel
from util.errors import UserError, reason

ARITHMETIC = ("auto", "integer", "float")


def load(path, arithmetic="auto", arch=None):
    """The network in a packed file, in evaluation mode; errors are those of read_packed.

    Args:
        arithmetic: "auto" (integers where operators are there and a layer fits, float elsewhere), "integer" (a UserError where
            no layer can be computed so) or "float" (the checkpoint's values, bit for bit).
        arch: path/to/file.py:factory of a network of your own, which is run.
    """
    kernel.use("auto")
    return computed(rebuild(as_checkpoint(read_packed(path)), path, arch), arithmetic, path)[0]


def computed(network, arithmetic, source):
    """(A PolicyNetwork's model, computed as `arithmetic` says, which load() explains; a line about that).

    The model that comes shares tensors with the network's, which is not changed. source: what messages call it.
    """
    if arithmetic not in ARITHMETIC:
        raise UserError(f"arithmetic: found {arithmetic}, allowed are {', '.join(ARITHMETIC)}")
    model = network.model.eval()
    if arithmetic == "float":
        return model, "float arithmetic"
    try:
        if any(tensor.device.type != "cpu" for tensor in model.state_dict().values()):
            raise CannotCompute("integers are computed on CPUs only; training_device: cpu")
        check_operators()
        integer, floats = to_integers(model, network.description["input_size"])
    except CannotCompute as error:
        if arithmetic == "integer":
            raise UserError(f"arithmetic: found integer, but {error}; auto or float computes in float") from None
        return model, f"float arithmetic ({error})"
    layers = len(layers_of(model))
    return integer, (f"integer arithmetic in {layers - len(floats)} of {layers} layers"
                     + ("; in float: " if floats else "") + "; ".join(f"{name} ({why})" for name, why in floats.items()))


def to_integers(model, size):
    """(a quantized network with integer layers, {layer in float: why}). Raises CannotCompute where that cannot be.

    Args:
        size: height and width of an image.
    """
    layers = layers_of(model)
    floats = {name: why for name, why in ((name, why_float(layer)) for name, layer in layers.items()) if why}
    if len(floats) == len(layers):
        raise CannotCompute("no layer fits: " + "; ".join(f"{name} ({why})" for name, why in floats.items()))
    return for_good(model, size, floats), floats


def layers_of(model):
    """{name: quantized layer}"""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def for_good(model, size, floats):
    """A quantized network whose weights are quantized once and for all, those named in `floats` as float32, others as
    integers, with what follows a layer made part of it; errors are those of to_integers()."""
    images = torch.zeros(2, 3, size, size).to(memory_format=torch.channels_last)
    try:
        with torch.no_grad():
            whole = fused(_replaced(model, layers_of(model), floats), images)
            whole(images)  # which also lays out the weights
        for layer in whole.modules():
            if isinstance(layer, IntegerLayer):
                layer.settle()
    except Exception as error:  # of the user's own network, which may ask for what integer layers lack
        raise CannotCompute(f"the network fails once its layers are integer ({reason(error)})") from None
    return whole.requires_grad_(False)


def _replaced(model, layers, floats):
    """A copy of a network with integer layers, those named in `floats` frozen; tensors are shared."""
    twin = shared_copy(model)
    put_modules(twin, {name: frozen(layer) if name in floats else IntegerLayer.of(layer, name)
                       for name, layer in layers.items()})
    return twin.eval()


def shared_copy(model):
    """A copy of a network whose tensors are those of the network."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
