"""The network that is fine-tuned: built from a name, quantized at a policy's bits, with what it costs."""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from engine.checkpoint import is_foreign, load_checkpoint, masks_of, may_lack, signedness_of
from engine.passes import Passes, to_device
from engine.resume import TRAIN_FIRST, check_arch, create_dense
from engine.schema import describe_defaults
from model import create_model, load_weights
from model.layer_table import Graph, trace
from model.names import is_below, second_names
from model.training_pass import check_training
from model.weights import fit, is_step, load_state
from policy import resolve_policy
from quan.cost import full_precision_cost, policy_cost
from quan.func import QuanLinear, scale_adjustment
from quan.transfer import choose_candidates, clamp_as_limpq, names_in_joint_training
from quan.unchanged import check_unchanged
from quan.utils import (
    bits_in_use,
    freeze_weights,
    init_weight_steps,
    name_exceptions,
    policy_modules,
    replace_module_by_names,
    searchable_layers,
    set_batch_parts,
    signedness_in_use,
    step_quantizers,
)
from schema import FinetuneConfig
from sparsity.masks import PrunedParameters, weights_left
from util import distributed
from util.config import describe_idle
from util.errors import UserError, advising, naming, nearest
from util.exchange import read_policy

IMAGENET_CLASSES = 1000
LEAST_VARIATION = 0.1  # standard deviation of a weight in units of its mean magnitude, which is 1.25 for normal ones
LARGEST_FACTOR = 100  # by which scale-adjusted training may multiply outputs; 4 for torch's initial weights at 10 classes


@dataclass(frozen=True)
class PolicyNetwork:
    """A network at a policy's bits, or in full precision."""

    model: nn.Module
    graph: Graph
    passes: Passes  # in training
    pruned: PrunedParameters
    description: dict  # num_classes, input_size, and where it is quantized weight_bits, act_bits and scaled
    remark: str  # on exceptions and on what is left alone, or ''
    config: FinetuneConfig  # with its exceptions named

    @property
    def metadata(self):
        """What the checkpoint holds besides tensors and masks; the signedness of activations is what is decided by now."""
        is_quantized = "weight_bits" in self.description
        return {**self.description, **({"signed": signedness_in_use(self.model)} if is_quantized else {})}

    @property
    def cost(self):
        """Size and BitOPs as quan.cost counts them, sparse where something is pruned."""
        layers, masks = self.graph.layers, self.pruned.masks
        left = weights_left(layers, masks) if masks else None
        if "weight_bits" not in self.description:
            return full_precision_cost(layers, left)
        weight_bits, act_bits = bits_in_use(self.model)
        return policy_cost(layers, weight_bits, self.description["act_bits"] | act_bits, left)


def build_network(config, num_classes, input_size, checkpoint, device):
    """Build the PolicyNetwork of a FinetuneConfig.

    Args:
        checkpoint: what is going to be loaded into it, or None; initial weights are then not needed.
        device: where the network is to live.
    """
    fresh = checkpoint is None
    policy_file, joint = read_files(config, fresh)  # small files that may be wrong come before anything is downloaded
    model, graph, masks = create_dense(config.arch, num_classes, input_size, config.pre_trained if fresh else False)
    if checkpoint is not None:
        masks = masks_of(checkpoint, model, "resume.path")
    elif joint is not None:
        masks = masks_of(joint, model, f"init_from: {config.init_from}")
    training = "" if config.eval else check_training(model, graph, input_size, num_classes)
    description, exceptions, clamped, scaling = {"num_classes": num_classes, "input_size": input_size}, "", "", ""
    defaults = describe_defaults(config) if fresh else ""
    if not config.fp_model:
        config, exceptions = name_exceptions(config, graph, model)
        plain = copy.deepcopy(model)
        policy = resolve_policy(config, searchable_layers(graph, config.quan.excepts), policy_file, checkpoint or joint)
        signed = signedness_of(checkpoint or joint or {}) or policy.signed
        scaled = scaled_layers(graph, config, checkpoint)
        replace_module_by_names(model, policy_modules(model, graph, config.quan, policy.weight_bits, policy.act_bits, signed,
                                                      scaled))
        check_unchanged(plain, model, graph, input_size, config.eval)
        del plain
        description.update(weight_bits=policy.weight_bits, act_bits=policy.act_bits)
        if masks:
            init_weight_steps(model, masks)
        if joint is not None:
            clamped = start_from_joint_training(model, graph, policy, joint, masks, config)
        scaling = check_scaling(model) if fresh else ""
        description["scaled"] = [name for name, module in model.named_modules() if is_scaled(module)]
    if checkpoint is not None:
        check_same_bits(checkpoint, description)
    if config.freeze_weights:
        freeze_weights(model)
    to_device(model, device, graph)
    distributed.broadcast_model(model)
    set_batch_parts(model, distributed.world_size() * config.accumulation)
    passes = Passes(model, config.precision, config.cuda_graphs)
    remark = "\n".join(filter(None, [defaults, describe_idle(config), exceptions, clamped, graph.describe(), training,
                                     scaling]))
    return PolicyNetwork(model, graph, passes, PrunedParameters(model, masks), description, remark, config)


def read_files(config, fresh):
    """(the content of config.policy or None, that of config.init_from where a run begins from it or None)."""
    with naming("policy"):
        policy = read_policy(config.policy) if config.policy else None
    with naming("init_from"), advising(config.init_from, "main.py of indicators_pretraining trains one"):
        return policy, load_checkpoint(config.init_from) if fresh and config.init_from else None


def start_from_joint_training(model, graph, policy, checkpoint, masks, config):
    """Load the weights, and the step sizes and BatchNorms of the chosen bits, from a stage-1 checkpoint. Quantizers that it
    lacks, those of the excepted layers, start from the loaded weights that are not pruned.

    Returns:
        a line about step sizes that were taken otherwise than they stand in the checkpoint, or ''.
    """
    source, remark = f"init_from: {config.init_from}", ""
    check_arch(checkpoint, config.arch, source)
    if is_foreign(checkpoint):
        checkpoint, remark = joint_from_elsewhere(checkpoint, graph, config)
    known = names_in_joint_training(model.state_dict(), graph.batchnorms, checkpoint.get("bits") or ())
    checkpoint = {**checkpoint, "state_dict": fit(known, checkpoint["state_dict"])}
    second = second_names(model)
    state = choose_candidates(checkpoint, policy.weight_bits, policy.act_bits, source, second)
    quantizers = step_quantizers(model)
    load_state(model, state, source,
               lambda name: name.rpartition(".")[0] in quantizers or is_below(name, second) or may_lack(checkpoint, name))
    init_weight_steps(model, masks, untrained=lambda name: f"{name}.s" not in state)
    return remark


def joint_from_elsewhere(checkpoint, graph, config):
    """(a stage-1 checkpoint of LIMPQ's with what it lacks, target_bits and the graph's BatchNorms; line of clamp_as_limpq)"""
    state = checkpoint["state_dict"]
    counts = {len(tensor) if tensor.dim() else 0 for name, tensor in state.items() if is_step(name)}
    bits = checkpoint.get("bits") or config.target_bits
    if not counts:
        raise UserError(f"init_from: {config.init_from} holds no step sizes; pre_trained takes weights in full precision")
    if 1 in counts and len(bits) > 1:
        raise UserError(f"init_from: {config.init_from} was fine-tuned at one bit-width per layer; resume.path takes it, with "
                        "resume.lean: true for its weights only")
    if max(counts) != len(bits):
        raise UserError(f"target_bits: found {bits}, but {config.init_from} was trained at {max(counts)} bit-widths; give "
                        "these, in the order of training")
    state, remark = clamp_as_limpq(state)
    return {**checkpoint, "bits": bits, "batchnorms": dict(graph.batchnorms), "state_dict": state}, remark


def scaled_layers(graph, config, checkpoint):
    """Names of the linear layers that are to have scale-adjusted training: the classifiers, or those of a checkpoint of this
    stage; of one that does not say, the linear layer that is called last."""
    linear = [name for name, call in graph.layers.items() if call.kind == "linear"]
    if not config.sat:
        return []
    if checkpoint is None:
        return [name for name in linear if name in graph.classifiers]
    scaled = checkpoint.get("scaled", linear[-1:])
    for name in scaled:
        if name not in linear:
            raise UserError(f"resume.path: scaled: {name} is no linear layer of this network{nearest(name, linear)}")
    return scaled


def is_scaled(module):
    return isinstance(module, QuanLinear) and module.sat


@torch.no_grad()
def check_scaling(model):
    """Switch scale-adjusted training off where the factor makes no sense; return lines about that, and about classifiers whose
    outputs it makes more than twice as large or small.

    It divides by the weight's standard deviation: of a weight that is nearly constant this enlarges the rounding, and a weight
    much smaller than what the first steps change it by is clipped at once.
    """
    lines = []
    for name, module in model.named_modules():
        if not is_scaled(module):
            continue
        weight = module.quantized_weight()
        factor, largest = float(scale_adjustment(module.weight)), float(scale_adjustment(weight))
        if not (weight.std() > LEAST_VARIATION * weight.abs().mean() and largest < LARGEST_FACTOR):
            module.sat = False
            lines.append(f"warning: no scale-adjusted training of {name}: its weight is nearly constant, or so small that its "
                         f"outputs would be multiplied by {largest:.3g}")
        elif not 1 / 2 <= factor <= 2:
            lines.append(f"scale-adjusted training multiplies the outputs of {name} by {factor:.3g}; sat: false leaves them "
                         "alone")
    return "\n".join(lines)


def check_not_joint(checkpoint, where):
    """Refuse a checkpoint with several bit-widths for each layer, of this project or of LIMPQ, which does not say them."""
    steps = [tensor for name, tensor in checkpoint.get("state_dict", {}).items() if is_step(name)]
    is_silent = is_foreign(checkpoint) and "weight_bits" not in checkpoint
    if "bits" in checkpoint or (is_silent and any(tensor.dim() and len(tensor) > 1 for tensor in steps)):
        raise UserError(f"{where}: it is a checkpoint of indicators_pretraining, at all bits together; init_from starts "
                        "fine-tuning from it, and eval: true there evaluates it")


def check_same_bits(checkpoint, description):
    """Refuse a checkpoint that was trained at other bits than the configuration asks for."""
    steps = [tensor for name, tensor in checkpoint.get("state_dict", {}).items() if is_step(name)]
    says_bits = not is_foreign(checkpoint) or "weight_bits" in checkpoint  # one of LIMPQ does not
    check_not_joint(checkpoint, "resume.path")
    trained, wanted = "weight_bits" in checkpoint if says_bits else bool(steps), "weight_bits" in description
    if trained != wanted:
        kinds, remedies = ("in full precision", "quantized"), ("pre_trained takes it", "fp_model: false evaluates it")
        raise UserError(f"resume.path: the checkpoint is {kinds[trained]}, the configuration asks for a network "
                        f"{kinds[wanted]}" + ("" if says_bits else f"; {remedies[trained]}"))
    for key in ("weight_bits", "act_bits") if says_bits and wanted else ():
        for layer, bit in description[key].items():
            if checkpoint[key].get(layer) != bit:
                raise UserError(f"{key}: {layer}: the checkpoint was trained at {checkpoint[key].get(layer)} bits, the "
                                f"configuration asks for {bit}")


def create_teacher(config, num_classes, device, input_size):
    """The full-precision network to learn from, which only gives soft targets; None where none is configured."""
    teacher = config.distillation.teacher
    if teacher is None or config.eval:
        return None
    if teacher == "pre_trained":
        if num_classes != IMAGENET_CLASSES:
            raise UserError(f"distillation.teacher: torchvision's networks know {IMAGENET_CLASSES} classes, the data have "
                            f"{num_classes}; give a checkpoint that was trained on them")
        model = create_model(config.arch, num_classes, pre_trained=True, input_size=input_size)
    else:
        model = create_model(config.arch, num_classes, input_size=input_size)
        with naming("distillation.teacher"), advising(teacher, TRAIN_FIRST):
            if not load_weights(model, load_checkpoint(teacher)["state_dict"], teacher):
                raise UserError(f"{teacher} has another number of classes than the data ({num_classes})")
    return to_device(model.eval().requires_grad_(False), device, trace(model, input_size, num_classes))
