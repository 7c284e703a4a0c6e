"""The network that is fine-tuned: built from a name, quantized at a policy's bits, with what it costs."""

from dataclasses import dataclass

from torch import nn

from model import create_model, load_weights
from model.layer_table import trace
from model.weights import set_tensors
from policy import Policy, resolve_policy
from quan.cost import full_precision_cost, policy_cost
from quan.quantizer import LsqQuan
from quan.transfer import choose_candidates
from quan.utils import (
    bits_in_use,
    freeze_weights,
    policy_modules,
    replace_module_by_names,
    searchable_layers,
    set_batch_parts,
)
from util import distributed
from util.checkpoint import load_checkpoint
from util.errors import UserError
from util.exchange import read_policy

IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class PolicyNetwork:
    """A network at a policy's bits, or in full precision; the facts about it that travel in its checkpoint; its cost; and
    a remark on what is left alone, or ''."""

    model: nn.Module
    facts: dict
    cost: dict
    remark: str


def build_network(config, num_classes, input_size, checkpoint, device):
    """Build the network of a configuration.

    Args:
        config: the FinetuneConfig.
        num_classes, input_size: of the data.
        checkpoint: what is going to be loaded into it, or None; initial weights are then not needed.
        device: where the network is to live.
    """
    fresh = checkpoint is None
    if config.policy:
        read_policy(config.policy)  # before anything is downloaded for it
    model = create_dense(config.arch, num_classes, config.pre_trained if fresh else False)
    graph = trace(model, input_size)
    facts = {"num_classes": num_classes, "input_size": input_size}
    if config.fp_model:
        cost = full_precision_cost(graph.layers)
    else:
        policy = quantize(model, graph, config, checkpoint)
        cost = policy_cost(graph.layers, *bits_in_use(model))
        facts.update(weight_bits=policy.weight_bits, act_bits=policy.act_bits, signed=policy.signed)
        if fresh and config.init_from:
            start_from_joint_training(model, policy, config)
    if checkpoint is not None:
        check_same_bits(checkpoint, facts)
    if config.freeze_weights:
        freeze_weights(model)
    model.to(device)
    distributed.broadcast_model(model)
    set_batch_parts(model, distributed.world_size() * config.accumulation)
    return PolicyNetwork(model, facts, cost, graph.describe_uncounted())


def create_dense(arch, num_classes, pre_trained):
    """A full-precision network; pre_trained is False, True (torchvision's weights) or the path of a checkpoint."""
    model = create_model(arch, num_classes, pre_trained=pre_trained is True)
    if isinstance(pre_trained, str):
        load_weights(model, load_checkpoint(pre_trained)["state_dict"], pre_trained)
    return model


def quantize(model, graph, config, checkpoint):
    """Put quantized layers at the policy's bits into the network; return the policy, completed by the signs in use."""
    names = searchable_layers(graph, config.quan.excepts)
    policy = resolve_policy(config, names, checkpoint)
    signed = known_signs(config, checkpoint) or policy.signed
    modules = policy_modules(model, graph, config.quan, policy.weight_bits, policy.act_bits, signed, config.sat)
    replace_module_by_names(model, modules)
    return Policy(policy.weight_bits, policy.act_bits,
                  {name: model.get_submodule(name).quan_a_fn.signed for name in names})


def known_signs(config, checkpoint):
    """{layer: whether its activations are signed}, as the checkpoint of this run or of init_from says; {} without one."""
    if checkpoint is not None:
        return checkpoint.get("signed", {})
    if not config.init_from:
        return {}
    return {name: row["signed"]["act"] for name, row in load_checkpoint(config.init_from).get("layers", {}).items()
            if isinstance(row, dict) and isinstance(row.get("signed"), dict)}


def start_from_joint_training(model, policy, config):
    """Load the weights, and the step sizes and BatchNorms of the chosen bits, from a stage-1 checkpoint.

    Quantizers that stage 1 does not have, those of the excepted layers, start from the weights that were loaded.
    """
    source = config.init_from
    checkpoint = load_checkpoint(source)
    if checkpoint.get("arch", config.arch) != config.arch:
        raise UserError(f"{source}: holds {checkpoint['arch']}, but arch is {config.arch}")
    state = choose_candidates(checkpoint, policy.weight_bits, policy.act_bits, source)
    own = model.state_dict()
    for name, tensor in state.items():
        if name not in own or own[name].shape != tensor.shape:
            raise UserError(f"{source}: the tensor {name} does not fit this network")
    for name in own.keys() - state.keys():
        if ".quan_" not in name:
            raise UserError(f"{source}: the tensor {name} of this network is missing in the checkpoint")
    set_tensors(model, state)
    for name, module in model.named_modules():
        quantizer = getattr(module, "quan_w_fn", None)
        if isinstance(quantizer, LsqQuan) and f"{name}.quan_w_fn.s" not in state:
            quantizer.init_from_weight(module.weight)


def check_same_bits(checkpoint, facts):
    """Refuse a checkpoint that was trained at other bits than the configuration asks for."""
    for key in ("weight_bits", "act_bits"):
        trained, wanted = checkpoint.get(key), facts.get(key)
        if "bits" in checkpoint:
            raise UserError("resume.path: it is a checkpoint of indicators_pretraining, which init_from takes")
        if trained is None and wanted is None:
            continue
        if trained is None and "version" not in checkpoint:  # a checkpoint of LIMPQ does not say its bits
            continue
        if trained is None or wanted is None:
            kinds = ("in full precision", "quantized")
            raise UserError(f"resume.path: the checkpoint is {kinds[trained is not None]}, "
                            f"the configuration asks for a network {kinds[wanted is not None]}")
        for layer, bit in wanted.items():
            if trained.get(layer) != bit:
                raise UserError(f"{key}: {layer}: the checkpoint was trained at {trained.get(layer)} bits, "
                                f"the configuration asks for {bit}")


def create_teacher(config, num_classes, device):
    """The full-precision network to learn from, which only gives answers; None where none is configured."""
    teacher = config.distillation.teacher
    if teacher is None or config.eval:
        return None
    if teacher == "pre_trained":
        if num_classes != IMAGENET_CLASSES:
            raise UserError(f"distillation.teacher: torchvision's networks know {IMAGENET_CLASSES} classes, the data have "
                            f"{num_classes}; give a checkpoint that was trained on them")
        model = create_model(config.arch, num_classes, pre_trained=True)
    else:
        model = create_model(config.arch, num_classes)
        if not load_weights(model, load_checkpoint(teacher)["state_dict"], teacher):
            raise UserError(f"distillation.teacher: {teacher} has another number of classes than the data ({num_classes})")
    return model.eval().requires_grad_(False).to(device)
