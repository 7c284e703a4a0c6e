"""The networks of this stage: full-precision and pruned, or quantized for all candidates and described for later stages."""

import copy
from dataclasses import dataclass

from torch import nn

from engine.checkpoint import is_foreign, load_checkpoint, signedness_of
from engine.passes import Passes, to_device
from engine.resume import create_dense
from engine.schema import describe_defaults
from model.layer_table import Graph
from model.training_pass import check_training
from model.weights import is_step
from quan.bit_switch import BitSwitch
from quan.transfer import clamp_as_limpq
from quan.unchanged import check_unchanged
from quan.utils import (
    freeze_weights,
    init_weight_steps,
    joint_modules,
    name_exceptions,
    replace_module_by_names,
    searchable_layers,
    set_batch_parts,
    signedness_in_use,
)
from schema import IndicatorsConfig
from sparsity.masks import PrunedParameters, weights_left
from util import distributed
from util.config import describe_idle
from util.errors import UserError


@dataclass(frozen=True)
class DenseNetwork:
    """A full-precision network."""

    model: nn.Module
    graph: Graph
    passes: Passes  # in training
    pruned: PrunedParameters


@dataclass(frozen=True)
class JointNetwork:
    """A network with quantized layers for all candidates."""

    model: nn.Module
    switch: BitSwitch
    passes: Passes  # in training
    pruned: PrunedParameters
    description: dict  # what describe_network gives
    remark: str  # on exceptions and on what is left alone, or ''
    config: IndicatorsConfig  # with its exceptions named

    @property
    def metadata(self):
        """What the checkpoint holds besides tensors; the signedness of activations is what is decided by now."""
        signed = signedness_in_use(self.model)
        return {**self.description, "layers": with_signedness(self.description["layers"], signed), "signed": signed}


def build_dense(config, num_classes, input_size, found, device):
    """Build the DenseNetwork of a configuration; the arguments are those of build_network."""
    model, graph, masks = create_dense(config.arch, num_classes, input_size, config.pre_trained, config.init_from, found)
    to_device(model, device, graph)
    distributed.broadcast_model(model)
    return DenseNetwork(model, graph, Passes(model, config.precision, config.cuda_graphs), PrunedParameters(model, masks))


def build_network(config, num_classes, input_size, found, device):
    """Build the JointNetwork of an IndicatorsConfig.

    Args:
        found: the ResumeCheckpoint that is going to be loaded into it, or None; initial weights are then not needed.
        device: where the network is to live.

    Raises:
        UserError: where `found`, which is to be evaluated, was trained at other bit-widths, or at these in another order.
    """
    if config.eval and found.content.get("bits", config.target_bits) != config.target_bits:
        raise UserError(f"target_bits: found {config.target_bits}, but {found.path} was trained at {found.content['bits']}")
    clamped = clamp_external_steps(found, config)
    model, graph, masks = create_dense(config.arch, num_classes, input_size, config.pre_trained, config.init_from, found)
    training = "" if config.eval else check_training(model, graph, input_size, num_classes)
    defaults = "" if found else describe_defaults(config)
    config, exceptions = name_exceptions(config, graph)
    signed = signedness_of(found.content) if found else {}
    plain = copy.deepcopy(model)
    replace_module_by_names(model, joint_modules(model, graph, config.quan, config.target_bits, signed))
    check_unchanged(plain, model, graph, input_size, config.eval)
    del plain
    if masks:
        init_weight_steps(model, masks)
    if config.freeze_weights:
        freeze_weights(model)
    switch = BitSwitch(model, graph, config.quan.excepts, config.target_bits)
    description = describe_network(config, model, graph, num_classes, input_size, masks)
    to_device(model, device, graph)
    distributed.broadcast_model(model)
    set_batch_parts(model, distributed.world_size())
    passes = Passes(model, config.precision, config.cuda_graphs)
    remark = "\n".join(filter(None, [defaults, describe_idle(config), exceptions, clamped, graph.describe(), training]))
    return JointNetwork(model, switch, passes, PrunedParameters(model, masks), description, remark, config)


def load_joint(path):
    """A checkpoint of joint training, as load_checkpoint gives it; that of another kind of training is refused."""
    content = load_checkpoint(path)
    check_not_finetuned(content, path)
    if content["state_dict"] and not is_foreign(content) and not any(map(is_step, content["state_dict"])):
        raise UserError(f"{path}: holds a network in full precision; init_from starts from it")
    return content


def check_not_finetuned(checkpoint, path):
    """Refuse a checkpoint with one bit-width for each layer, of this project or of LIMPQ."""
    steps = [tensor for name, tensor in checkpoint["state_dict"].items() if is_step(name)]
    has_one_each = bool(steps) and all(len(step) == 1 for step in steps if step.dim())
    if "weight_bits" in checkpoint or ("bits" not in checkpoint and has_one_each):
        raise UserError(f"{path}: was fine-tuned in quantization_training, at one bit-width for each layer; expected a "
                        "checkpoint of indicators_pretraining, trained at all of them together")


def clamp_external_steps(found, config):
    """Take the step sizes of LIMPQ's checkpoint as its forward pass does; a line about those it concerns, or ''."""
    if found is None or not is_foreign(found.content):
        return ""
    found.content["state_dict"], line = clamp_as_limpq(found.content["state_dict"])
    if line and config.eval and distributed.is_main():
        print(f"{found.path}: {line}")
    return line


def with_signedness(layers, signed):
    """The table of layers with the signedness of weights and activations; signed: {layer: whether its input is signed}."""
    return {name: {**row, "signed": {"weight": True, "act": signed.get(name, False)}} for name, row in layers.items()}


def describe_network(config, model, graph, num_classes, input_size, masks):
    """What later stages need to know of the network."""
    left = weights_left(graph.layers, masks)
    rows = {name: {**call.as_row(), "sparsity": 1 - left[name] / call.params} for name, call in graph.layers.items()}
    layers = {name: rows.pop(name) for name in searchable_layers(graph, config.quan.excepts)}
    return {"bits": list(config.target_bits), "num_classes": num_classes, "input_size": input_size,
            "layers": layers, "fixed": rows, "products": dict(graph.non_layer_macs), "batchnorms": dict(graph.batchnorms),
            "masks": masks}
