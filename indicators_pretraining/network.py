"""The jointly trained network: built from a name, quantized for all candidates, described for later stages."""

from dataclasses import dataclass

from torch import nn

from model import create_model, load_weights
from model.layer_table import trace
from quan.utils import (
    BitSwitch,
    freeze_weights,
    joint_modules,
    replace_module_by_names,
    searchable_layers,
    set_batch_parts,
)
from util import distributed
from util.checkpoint import load_checkpoint


@dataclass(frozen=True)
class JointNetwork:
    """A network with quantized layers for all candidates, the switch between them, the facts about it that travel in
    its checkpoint (bits, num_classes, input_size, layers, fixed, batchnorms), and a remark on what is left alone, or ''."""

    model: nn.Module
    switch: BitSwitch
    facts: dict
    remark: str


def build_network(config, num_classes, input_size, fresh, device):
    """Build the network of a configuration.

    Args:
        config: the IndicatorsConfig.
        num_classes, input_size: of the data.
        fresh: take pre-trained weights, if configured; False where a checkpoint replaces them anyway.
        device: where the network is to live.
    """
    model = create_model(config.arch, num_classes, pre_trained=fresh and config.pre_trained is True)
    if fresh and isinstance(config.pre_trained, str):
        load_weights(model, load_checkpoint(config.pre_trained)["state_dict"], config.pre_trained)
    graph = trace(model, input_size)
    replace_module_by_names(model, joint_modules(model, graph, config.quan, config.target_bits))
    if config.freeze_weights:
        freeze_weights(model)
    switch = BitSwitch(model, graph, config.quan.excepts, config.target_bits)
    facts = describe_network(config, model, graph, num_classes, input_size)
    model.to(device)
    distributed.broadcast_model(model)
    set_batch_parts(model, distributed.world_size())
    return JointNetwork(model, switch, facts, graph.describe_uncounted())


def describe_network(config, model, graph, num_classes, input_size):
    """What later stages need to know of the network."""
    rows = {name: call.as_row() for name, call in graph.layers.items()}
    layers = {}
    for name in searchable_layers(graph, config.quan.excepts):
        signed = {"weight": True, "act": model.get_submodule(name).quan_a_fn.signed}
        layers[name] = {**rows.pop(name), "signed": signed, "sparsity": 0.0}
    return {"bits": list(config.target_bits), "num_classes": num_classes, "input_size": input_size,
            "layers": layers, "fixed": rows, "batchnorms": dict(graph.batchnorms)}
