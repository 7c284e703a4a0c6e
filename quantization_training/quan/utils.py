"""Which modules of a network are quantized, by name, and what is done with all quantizers of a network."""

import contextlib
from dataclasses import replace

import torch
from torch import nn

from model.layer_table import QUANTIZABLE, shortened
from model.names import put_modules
from util.config import AUTO
from util.errors import UserError, nearest
from util.exchange import fit_names

from .config import ExceptionConfig
from .cost import FIXED_BIT, FLOAT_BIT
from .func import ExceptedBatchNorm, QuanConv2d, QuanLinear, QuantizedLayer, SwitchableBatchNorm
from .quantizer import IdentityQuan, LsqQuan
from .quantizer.lsq import SMALLEST_STEP

BATCHNORM = nn.modules.batchnorm._BatchNorm


def name_exceptions(config, graph, model=None):
    """A configuration whose quan.excepts names its layers, and a line about those that were found, or have no effect, or ''.

    For `auto`, these are the first convolution (in a network without, the first layer), the BatchNorm after it, and the
    classifier; all of them, where several convolutions see the image or several layers give the output. Those that are named
    have to be layers of the model, where it is given.

    Raises:
        UserError: where no layer is left to be searched, or bits are asked for a layer that cannot be quantized.
    """
    rest = "".join(f"; {line}" for line in graph.describe().splitlines())  # why other layers are not searched
    if config.quan.excepts == AUTO:
        batchnorms = [name for name, before in graph.batchnorms.items() if before in graph.first]
        roles = {**dict.fromkeys(graph.first, "first layer"), **dict.fromkeys(batchnorms, "its BatchNorm"),
                 **dict.fromkeys(graph.classifiers, "classifier")}
        excepts = {name: ExceptionConfig() for name in roles}
        found = ", ".join(f"{name} ({role})" for name, role in roles.items())
        if not searchable_layers(graph, excepts):
            raise UserError(f"arch: no layer is left to be searched: {found} have fixed bits{rest}")
        line = f"exceptions found in the graph: {found}"
    else:
        names = fit_names([*graph.layers, *graph.batchnorms], config.quan.excepts)
        excepts = {names[name]: entry for name, entry in config.quan.excepts.items()}
        if model is not None:
            check_exceptions(model, excepts)
        with_bits = [name for name, entry in excepts.items() if entry.weight.bit or entry.act.bit]
        for name in with_bits:
            if name in graph.unquantizable:
                raise UserError(f"quan.excepts.{name}: asks for bits, but {graph.unquantizable[name]}, so it stays in full "
                                "precision; leave its bits blank")
        if not searchable_layers(graph, excepts):
            raise UserError(f"quan.excepts: {', '.join(excepts)} leave no layer to be searched{rest}")
        idle = ", ".join(name for name in with_bits if name in graph.batchnorms)
        line = f"without effect here: quan.excepts.*.bit of {idle} (a BatchNorm)" if idle else ""
    return replace(config, quan=replace(config.quan, excepts=excepts)), line


def check_exceptions(model, excepts):
    """Refuse an exception that names no convolution, linear layer or BatchNorm of the network."""
    names = [name for name, module in model.named_modules() if isinstance(module, (*QUANTIZABLE, BATCHNORM))]
    for name in excepts:
        if name not in names:
            raise UserError(f"quan.excepts.{name}: the network has no such layer"
                            + (nearest(name, names) or "; what is named under quan.excepts replaces auto"))


def searchable_layers(graph, excepts):
    """Names of the layers whose bits are searched, in network order: all that the graph reaches but the exceptions."""
    return [name for name in graph.layers if name not in excepts]


def quantized_layer(module, config, entry, weight_bits, act_bits, signed, sat=False):
    """The quantized layer that replaces a convolution or a linear layer.

    Args:
        config: the `quan` section.
        entry: that of the layer in quan.excepts, or None.
        weight_bits, act_bits: candidate bit-widths; [] for no quantization.
        signed: whether its activations are signed; None: as the configuration says.
    """
    quan_w_fn, quan_a_fn = IdentityQuan(), IdentityQuan()
    if weight_bits:
        channels = module.weight.shape[0] if config.weight.per_channel else None
        quan_w_fn = LsqQuan(weight_bits, True, config.weight.symmetric, channels, config.weight.init)
    if act_bits:
        if signed is None:
            positive = entry.act.all_positive if entry and entry.act.all_positive is not None else config.act.all_positive
            signed = None if positive == AUTO else not positive
        quan_a_fn = LsqQuan(act_bits, signed, config.act.symmetric)
    if isinstance(module, nn.Linear):
        return QuanLinear(module, quan_w_fn, quan_a_fn, sat)
    return QuanConv2d(module, quan_w_fn, quan_a_fn)


def joint_modules(model, graph, config, bits, signed=None):
    """{name: module to put there} to train a network at all candidate bit-widths together (stage 1).

    An excepted layer whose entry is blank is not replaced.

    Args:
        model, graph: a full-precision network and its Graph.
        config: the `quan` section, its exceptions named.
        bits: candidate bit-widths.
        signed: {layer: whether its activations are signed}, where that is decided already; others follow `config`.
    """
    check_exceptions(model, config.excepts)
    modules, signed, replacements = dict(model.named_modules()), signed or {}, {}
    for name in graph.layers:
        entry, weight_bits, act_bits = config.excepts.get(name), bits, bits
        if entry:
            weight_bits, act_bits = ([part.bit] if part.bit else [] for part in (entry.weight, entry.act))
        if weight_bits or act_bits:
            replacements[name] = quantized_layer(modules[name], config, entry, weight_bits, act_bits, signed.get(name))
    for name in graph.batchnorms:
        shared = name in config.excepts
        replacements[name] = ExceptedBatchNorm(modules[name]) if shared else SwitchableBatchNorm(modules[name], bits)
    return replacements


def policy_modules(model, graph, config, weight_bits, act_bits, signed, scaled=()):
    """{name: module to put there} to quantize a network at a policy's bits (stage 3).

    Blank exceptions get 8 bits in both, but for the input of a convolution that sees the images, which stays as it is.

    Args:
        model, graph, config, signed: as for joint_modules.
        weight_bits, act_bits: {layer: bit} for every searchable layer; an input at 32 bits is not quantized.
        scaled: names of the linear layers with scale-adjusted training.
    """
    check_exceptions(model, config.excepts)
    modules, replacements = dict(model.named_modules()), {}
    for name in graph.layers:
        module, entry = modules[name], config.excepts.get(name)
        if entry:
            weight_bit = entry.weight.bit or FIXED_BIT
            sees_images = name in graph.first and not isinstance(module, nn.Linear)
            act_bit = entry.act.bit or (FLOAT_BIT if sees_images else FIXED_BIT)
        else:
            weight_bit, act_bit = weight_bits[name], act_bits[name]
        replacements[name] = quantized_layer(module, config, entry, [weight_bit], [] if act_bit == FLOAT_BIT else [act_bit],
                                             signed.get(name), name in scaled)
    return replacements


def replace_module_by_names(model, replacements):
    """put_modules; return the network."""
    put_modules(model, replacements)
    return model


def step_quantizers(model):
    """{name: quantizer} of every LSQ quantizer in the network."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LsqQuan)}


def _activation_quantizers(model):
    """{layer: the LSQ quantizer of its input}."""
    return {name.removesuffix(".quan_a_fn"): quantizer for name, quantizer in step_quantizers(model).items()
            if name.endswith(".quan_a_fn")}


@torch.no_grad()
def keep_steps_positive(model):
    """Keep every step size of the network above zero; to be called after each optimizer step."""
    steps = [module.s for module in model.modules() if isinstance(module, LsqQuan)]
    if steps:
        torch._foreach_clamp_min_(steps, SMALLEST_STEP)


def check_all_reached(model):
    """Refuse to go on where no input came to a layer, so that its step sizes have no value from data."""
    names = [name for name, quantizer in _activation_quantizers(model).items()
             if not (quantizer.is_reached or quantizer.is_initialized)]
    if names:
        raise UserError(f"arch: no image of the first epoch reached {shortened(names)}; name what only some images reach in "
                        "quan.excepts, or let all go through it")


def init_weight_steps(model, masks, untrained=lambda name: True):
    """Set initial step sizes from the weights that are not pruned, in those weight quantizers whose names are `untrained`."""
    for name, quantizer in step_quantizers(model).items():
        layer, _, kind = name.rpartition(".")
        if kind == "quan_w_fn" and untrained(name):
            quantizer.init_from_weight(model.get_submodule(layer).weight, masks.get(f"{layer}.weight"))


@contextlib.contextmanager
def weights_quantized_once(model):
    """Within, computing without gradients quantizes each weight once; no weight and no bit-width may change meanwhile."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    try:
        for layer in layers:
            layer.cache_weight(True)
        yield
    finally:
        for layer in layers:
            layer.cache_weight(False)


def set_batch_parts(model, parts):
    """Tell every activation quantizer in how many equal parts a batch is computed: ranks times accumulated batches."""
    for quantizer in _activation_quantizers(model).values():
        quantizer.batch_parts = parts


def signedness_in_use(model):
    """{layer: whether its activations are signed} of the layers whose input is quantized, where it is decided."""
    return {name: bool(quantizer.signed) for name, quantizer in _activation_quantizers(model).items()
            if quantizer.signed is not None}


def bits_in_use(model):
    """({layer: weight bits}, {layer: activation bits}) of the layers that are quantized at one bit-width."""
    used = ({}, {})
    for name, quantizer in step_quantizers(model).items():
        layer, _, kind = name.rpartition(".")
        used[kind == "quan_a_fn"][layer] = quantizer.bits[0]
    return used


def freeze_weights(model):
    """Leave only step sizes and normalization layers to be trained."""
    kinds = (LsqQuan, BATCHNORM, nn.LayerNorm, nn.GroupNorm)
    trained = {parameter for module in model.modules() if isinstance(module, kinds) for parameter in module.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in trained)
