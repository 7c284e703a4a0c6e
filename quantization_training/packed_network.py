"""From a network to a packed model and back. The weights that come back are integers times step sizes, which the network's
own quantizers map to themselves: round(clip(k*s / s)) is k in float32, so every later value has the same bits."""

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from engine.checkpoint import is_foreign, load_checkpoint
from engine.resume import check_arch, warn_of_signedness
from engine.serialization import check_entries
from folding import make_room
from model.weights import load_state
from network import build_network, check_not_joint
from packed_file import MAP, PackedLayer, is_packed, read_packed
from packing import pack, pack_sparse, packed_length, unpack, unpack_sparse
from quan.quantizer import LsqQuan
from quan.transfer import normalised_weights
from quan.utils import BATCHNORM
from schema import FinetuneConfig
from util.config import build, load_config, to_plain
from util.datasets import describe_data
from util.errors import UserError, naming, nearest
from util.exchange import FLOAT_BIT, split_arch

CPU = torch.device("cpu")


@torch.no_grad()
def pack_network(network, source):
    """The layers and tensors of a PolicyNetwork on the CPU; `source` says in messages where it comes from.

    Returns:
        ({name: PackedLayer}, {name: numpy array}, {name: the name under which it is stored} of tensors with two names).
    """
    state, shared = _state_once(network.model)
    layers, tensors = {}, {}
    for name, call in network.graph.layers.items():
        layer = network.model.get_submodule(name)
        integers = integer_weights(layer, f"{source}: {name}")
        kept, parts = _packed(integers, layer.quan_w_fn.bits[0], network.pruned.masks.get(f"{name}.weight"))
        layers[name] = replace(without_integers(layer), kind=call.kind, searched=name in network.metadata["weight_bits"],
                               zeros=integers.size - int(np.count_nonzero(integers)), kept=kept)
        tensors.update(zip((f"{name}.weight", f"{name}.weight{MAP}"), parts, strict=False))
        del state[f"{name}.weight"]
    for name, tensor in state.items():  # numpy has no bfloat16, whose values float32 holds exactly
        tensors[name] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return layers, tensors, shared


def _state_once(model):
    """({name: tensor} of a network, each tensor once; {second name: first name}), without what only training needs."""
    first, shared, state, left_out = {}, {}, {}, _training_only(model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in left_out:
            continue
        if first.setdefault(id(tensor), name) == name:
            state[name] = tensor.detach()
        else:
            shared[name] = first[id(tensor)]
    return state, shared


def _training_only(model):
    """Names of tensors that a file leaves out."""
    entries = {LsqQuan: "init_state", BATCHNORM: "num_batches_tracked"}
    return {f"{name}.{entry}" for name, module in model.named_modules(remove_duplicate=False)
            for kind, entry in entries.items() if isinstance(module, kind)}


def without_integers(layer):
    """The PackedLayer of a quantized layer, but for what its network and its weights say."""
    acts = layer.quan_a_fn if isinstance(layer.quan_a_fn, LsqQuan) else None
    return PackedLayer("", tuple(layer.weight.shape), layer.quan_w_fn.bits[0], layer.quan_w_fn.signed, acts and acts.bits[0],
                       acts and bool(acts.signed), False, 0)


def integer_weights(layer, where):
    """The integers that the quantizer of a layer maps its weight to: int8 (uint8 where unsigned) of the weight's shape.

    A UserError, beginning with `where`, says that a weight or a step size is no finite number, or a step size is zero.
    """
    quantizer, weight = layer.quan_w_fn, layer.weight.detach()
    step = quantizer.quantization_parameters(weight)[0].detach()
    if not step.isfinite().all() or not step.all():
        raise UserError(f"{where}: a step size is zero or no finite number; train it again")
    if not torch.stack(weight.aminmax()).isfinite().all():
        raise UserError(f"{where}: a weight is no finite number; train it again")
    quantized = quantizer.quantize(weight)
    integers = (quantized / step).round_()
    if not torch.equal(integers * step, quantized):
        raise UserError(f"{where}: its quantized weight is not made of integers times a step size; export it on a CPU")
    return integers.to(torch.int8 if quantizer.signed else torch.uint8).numpy()


def _packed(integers, bits, mask):
    """(how many integers are stored or None, [their bytes, their map]): with the map of a pruned layer where it is smaller."""
    dense = packed_length(integers.size, bits)
    left = integers.size if mask is None else int(mask.sum())
    if packed_length(integers.size, 1) + packed_length(left, bits) >= dense:
        return None, [pack(integers, bits)]
    chart, stream = pack_sparse(integers, mask.numpy(), bits)
    return left, [stream, chart]


def load_any(path):
    """What load_checkpoint gives, of a checkpoint or of a packed model."""
    if is_packed(path):
        return as_checkpoint(read_packed(path))
    content = load_checkpoint(path)
    if is_foreign(content):
        content["state_dict"], is_other = normalised_weights(content["state_dict"])
        if is_other:
            print(f"{path}: act_rescale_p shows LIMPQ's first code, which normalised the weights of convolutions; they are "
                  "taken as normalised")
    return content


def load_finetuned(path):
    """What load_any gives; a checkpoint of joint training is refused."""
    content = load_any(path)
    check_not_joint(content, path)
    return content


def as_checkpoint(packed):
    """A PackedFile as a checkpoint, its weights integers times step sizes; a UserError where they are not as its header says.

    Masks are those that are stored; a pruned layer that is smaller without a map, and any other, has none.
    """
    state, masks = {name: torch.from_numpy(tensor.copy()) for name, tensor in packed.tensors.items()}, {}
    for name, layer in packed.layers.items():
        integers, kept = _unpacked(name, layer, packed)
        column = (-1, *[1] * (len(layer.shape) - 1))
        state[f"{name}.weight"] = integers.float() * state[f"{name}.quan_w_fn.s"][0].view(column)
        state.pop(f"{name}.weight{MAP}", None)
        if kept is not None:
            masks[f"{name}.weight"] = kept
    for name, first in packed.header["shared"].items():
        if first not in state:
            raise UserError(f"{packed.path}: shared: there is no tensor {first}{nearest(first, state)}")
        state[name] = state[first]
    content = {key: packed.header[key] for key in ("arch", "config", "num_classes", "input_size", "scaled")
               if key in packed.header}
    searched = {name: layer for name, layer in packed.layers.items() if layer.searched}
    content |= {"state_dict": state, "masks": masks, "weight_bits": {name: layer.bits for name, layer in searched.items()},
                "act_bits": {name: layer.act_bits or FLOAT_BIT for name, layer in searched.items()},
                "signed": {name: layer.act_signed for name, layer in packed.layers.items() if layer.act_bits}}
    with naming(packed.path):
        check_entries(content)
    return {**content, "packed": packed}


def _unpacked(name, layer, packed):
    """(integers as a tensor of the weight's shape, bool tensor of those that are stored, or None)."""
    stream, chart, kept = packed.tensors[f"{name}.weight"], packed.tensors.get(f"{name}.weight{MAP}"), None
    try:
        if chart is None:
            integers = unpack(stream, layer.bits, layer.signed, layer.count)
        else:
            integers, kept = unpack_sparse(chart, stream, layer.bits, layer.signed, layer.count)
    except ValueError as error:
        raise UserError(f"{packed.path}: header and tensors disagree ({name}: {error})") from None
    zeros = layer.count - int(np.count_nonzero(integers))
    if zeros != layer.zeros:
        raise UserError(f"{packed.path}: header and tensors disagree ({name}: {layer.zeros} zeros, found {zeros})")
    return (torch.from_numpy(integers).view(layer.shape),
            None if kept is None else torch.from_numpy(kept).view(layer.shape))


def fit_packed(model, content):
    """Give a network the shape of a packed model that is going to be loaded into it; nothing where `content` is none.

    Raises:
        UserError: where the header says other layers, bits or signs than the network has.
    """
    if "packed" not in content:
        return
    packed = content["packed"]
    quantized = {name: module for name, module in model.named_modules() if hasattr(module, "quan_w_fn")}
    for name in [*packed.layers, *quantized]:
        if name not in quantized or name not in packed.layers:
            raise UserError(f"{packed.path}: header and network disagree on which layers are quantized ({name})")
        if without_integers(quantized[name]) != replace(packed.layers[name], kind="", searched=False, zeros=0, kept=None):
            raise UserError(f"{packed.path}: header and network disagree on shape, bits or signs of {name}")
    modules = dict(model.named_modules())
    for name, convolution in packed.header["folded"].items():
        if not isinstance(modules.get(name), nn.BatchNorm2d) or not isinstance(modules.get(convolution), nn.Conv2d):
            raise UserError(f"{packed.path}: folded: the network has no BatchNorm {name} after a convolution {convolution}")
    make_room(model, packed.header["folded"])
    state = model.state_dict()
    for name in _training_only(model) & state.keys():
        content["state_dict"].setdefault(name, torch.ones_like(state[name]))


def rebuild(content, path, arch=None):
    """The PolicyNetwork of what load_any gives, loaded with it and in evaluation mode.

    A network of the user's own is a UserError unless they let it run, by `arch`: path/to/file.py:factory.
    """
    config = recorded_config(content, path, arch)
    try:
        network = build_network(config, content["num_classes"], content["input_size"], content, CPU)
    except UserError as error:  # which speaks of keys of a configuration
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    fit_packed(network.model, content)
    load_state(network.model, content["state_dict"], path)
    network.model.eval()
    return network


def with_configuration(content, path, config_path, arch=None):
    """A checkpoint without configuration, such as LIMPQ's, with the one in a YAML file and the bits that this asks for.

    Args:
        content: as load_any gives it. arch: what takes the place of the file's `arch`, or None.
    """
    if "config" in content:
        raise UserError(f"--config: {path} carries its own configuration; leave --config out")
    config = load_config(FinetuneConfig, [config_path])
    if config.fp_model:
        raise UserError(f"{config_path}: fp_model: the network is in full precision; export.py packs one at a policy's bits")
    config = replace(config, arch=arch or config.arch, eval=True, init_from=None, pre_trained=False)
    num_classes, input_size = describe_data(config.dataloader)
    try:
        network = build_network(config, num_classes, input_size, content, CPU)
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix('resume.path: ')}") from None
    warn_of_signedness(content, config, path)
    return {**content, **network.metadata, "arch": config.arch, "config": to_plain(network.config)}


def recorded_config(content, path, arch=None):
    """The FinetuneConfig that a checkpoint was trained with, made one that only evaluates it."""
    if "bits" in content:
        raise UserError(f"{path}: is a checkpoint of indicators_pretraining, at all bits together; fine-tune it at a policy's")
    if not {"arch", "config", "num_classes", "input_size"} <= content.keys():
        raise UserError(f"{path}: does not say how it was trained; give the YAML file that evaluates it as --config")
    if "weight_bits" not in content:
        raise UserError(f"{path}: holds a network in full precision; fine-tune it at a policy's bits first")
    check_own(content, path, arch)
    settings = {**content["config"], "arch": arch or content["arch"], "eval": True, "policy": None, "weight_bits": None,
                "act_bits": None, "init_from": None, "pre_trained": False}
    return build(FinetuneConfig, settings, {"": path})


def check_own(content, path, arch):
    """Refuse a network of the user's own unless `arch` lets it run, and an `arch` that is another network."""
    own = split_arch(content["arch"])
    if own and arch is None:
        raise UserError(f"{path}: holds {content['arch']}, a network of a file of your own, which is not run unasked; give "
                        f"--arch path/to/{own[0].rsplit('/', 1)[-1]}:{own[1]}")
    check_arch(content, arch or content["arch"], path)


def header_of(network, content, preprocessing, class_names, folds, shared):
    """What the header of a packed model says, besides its layers.

    Args:
        content: the checkpoint that the PolicyNetwork was rebuilt from. preprocessing, class_names: as preprocessing.py gives.
        folds: {BatchNorm: convolution} of those that were folded. shared: {second name: first name} of tensors.
    """
    plain = to_plain(network.config)
    return {"arch": content["arch"], "num_classes": content["num_classes"], "input_size": content["input_size"],
            "class_names": class_names, "preprocessing": preprocessing,
            "config": {"sat": plain["sat"], "quan": plain["quan"]}, "cost": network.cost, "folded": folds, "shared": shared,
            "scaled": network.metadata["scaled"]}
