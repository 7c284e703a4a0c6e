"""Which weights or channels are pruned, and which of them go next: the smallest by magnitude."""

import copy
import itertools
import math
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import torch

from util.errors import UserError, nearest

from .masks import mask_of


def prunable_layers(graph, excepts=None):
    """Names of the layers that are pruned, in network order: all but `excepts`; of None, all but the convolutions that see the
    image and the classifiers."""
    names = list(graph.layers)
    if excepts is None:
        excepts = [*(name for name in graph.first if graph.layers[name].kind == "conv"), *graph.classifiers]
    for name in excepts:
        if name not in names:
            raise UserError(f"prune.excepts: {name} is not a layer of this network{nearest(name, names)}")
    chosen = [name for name in names if name not in excepts]
    if not chosen:
        raise UserError("prune.excepts: leaves no layer to prune")
    return chosen


def coupled_parameters(model, graph, layer):
    """Names of the parameters that go with an output channel: the layer's bias, weight and bias of the BatchNorms after it."""
    names = [f"{layer}.bias", *(f"{batchnorm}.{entry}" for batchnorm, before in graph.batchnorms.items()
                                if before == layer for entry in ("weight", "bias"))]
    parameters = dict(model.named_parameters())
    return [name for name in names if name in parameters]


@torch.no_grad()
def mixed_channels(model, graph, layers):
    """{layer: the BatchNorm after it} of those layers whose channels do not reach that BatchNorm one by one and in order.

    Channels that some function splits, joins, shuffles or mixes before the BatchNorm (GLU, pixel shuffle, ...) are not those
    of the BatchNorm. It is tried on a copy of the network, full-precision or at a policy's bits: NaN takes the place of some
    channels, and has to come out at just these. Every two channels differ in one of the choices, in both directions.
    """
    pairs = {name: graph.batchnorms[name] for name in graph.indirect if graph.batchnorms[name] in layers}
    if not pairs:
        return {}
    twin, mixed = copy.deepcopy(model).cpu().float().eval(), {}
    spoiled = dict.fromkeys(pairs.values())  # which channels are NaN

    def replace_output(layer, module, inputs, output):
        axis = 1 if graph.layers[layer].kind == "conv" else -1
        values = torch.ones_like(output).movedim(axis, 0)
        values[spoiled[layer]] = math.nan
        return values.movedim(0, axis)

    def compare(batchnorm, layer, module, inputs):
        found = inputs[0].isnan().transpose(0, 1).flatten(1).any(1)
        if not torch.equal(found, spoiled[layer]):
            mixed[layer] = batchnorm

    for layer in spoiled:
        twin.get_submodule(layer).register_forward_hook(partial(replace_output, layer))
    for batchnorm, layer in pairs.items():
        twin.get_submodule(batchnorm).register_forward_pre_hook(partial(compare, batchnorm, layer))
    most = max(graph.layers[layer].shape[0] for layer in spoiled)
    for bit, wanted in itertools.product(range(max(most - 1, 1).bit_length()), (0, 1)):
        for layer in spoiled:
            spoiled[layer] = (torch.arange(graph.layers[layer].shape[0]) >> bit) % 2 == wanted
        twin(torch.zeros(1, 3, graph.input_size, graph.input_size))
    return mixed


@dataclass(frozen=True)
class Group:
    """Numbers of weights or channels that are compared with each other: of all, of those left, of those that have to stay."""

    layers: tuple
    total: int
    left: int
    spared: int

    def due(self, target):
        """How many are removed in all where the target, a share, is reached."""
        return rounded(Fraction(str(target)) * self.total)

    def to_remove(self, amount, target):
        """How many a step removes; arguments as for count_to_remove."""
        return min(count_to_remove(self.total, self.left, amount, target), self.left - self.spared)


def groups_of(left, kind, scope):
    """A Group of all layers together, or of each, as the scope says; left: {layer: which weights or channels are left}."""
    return [Group(tuple(names), sum(left[name].numel() for name in names), sum(int(left[name].sum()) for name in names),
                  sum(bool(left[name].any()) for name in names) if kind == "structured" else 0)
            for names in ([list(left)] if scope == "global" else [[name] for name in left])]


def sums_of(groups):
    """(all weights or channels of some groups, those that are left)."""
    return sum(group.total for group in groups), sum(group.left for group in groups)


class Prunable:
    """The weights of a network that may be pruned; `remark` is a line about layers that cannot be pruned by channel, or ''.

    Args:
        network: has a model and its graph.
        prune: a configuration with type, scope and excepts.
    """

    def __init__(self, network, prune):
        self.model, self.prune = network.model, prune
        self.layers = prunable_layers(network.graph, prune.excepts)
        mixed = mixed_channels(network.model, network.graph, self.layers) if prune.type == "structured" else {}
        self.layers = [name for name in self.layers if name not in mixed]
        self.remark = f"not pruned: {', '.join(f'{name} (before {batchnorm})' for name, batchnorm in mixed.items())}, whose " \
                      "channels are not those of the BatchNorm after it" if mixed else ""
        if not self.layers:
            raise UserError(f"prune.type: structured leaves no layer to prune; {self.remark}")
        self.coupled = {name: coupled_parameters(network.model, network.graph, name) for name in self.layers}

    @property
    def unit(self):
        """What is removed as one, in the plural."""
        return "channels" if self.prune.type == "structured" else "weights"

    def weights(self):
        return {name: self.model.get_submodule(name).weight.detach().cpu() for name in self.layers}

    def more_masks(self, masks, amount, target):
        """next_masks of the weights as they are now."""
        return next_masks(self.weights(), masks, self.coupled, self.prune.type, self.prune.scope, amount, target)

    def groups(self, masks):
        return groups_of(units(self.weights(), masks, self.prune.type)[1], self.prune.type, self.prune.scope)

    def check_target(self, groups, target):
        """Refuse a target share that is out of reach because one channel of each layer stays, or below what is removed."""
        for group in groups:
            most = group.total - group.spared
            if group.due(target) > most:
                where = "all layers" if self.prune.scope == "global" else group.layers[0]
                raise UserError(f"prune.target_sparsity: found {float(target):g}, but one channel of each layer stays; "
                                f"{most} of {group.total} channels of {where} can go "
                                f"({math.floor(1e4 * most / group.total) / 1e4:g})")
        total, left = sums_of(groups)
        if sum(group.due(target) for group in groups) < total - left:
            raise UserError(f"prune.target_sparsity: found {float(target):g}, but {100 * (1 - left / total):.2f} % of the "
                            f"{self.unit} are removed already")


def count_to_remove(total, left, amount, target=None):
    """How many of `left` units go: round(amount * left), but no more than makes round(target * total) removed in all.

    Halves are rounded up, and amounts are taken as they are written (0.2 is 1/5).
    """
    count = rounded(Fraction(str(amount)) * left)
    if target is not None:
        count = min(count, rounded(Fraction(str(target)) * total) - (total - left))
    return max(count, 0)


def rounded(exact):
    return math.floor(exact + Fraction(1, 2))


def next_masks(weights, masks, coupled, kind, scope, amount, target=None):
    """Masks that remove more: the smallest weights by magnitude, or whole output channels by L2 norm.

    Of equal ones the earlier goes. At least one channel of each layer stays, and nothing that is removed comes back.

    Args:
        weights: {layer: weight tensor [out_channels, ...]} of the layers to prune, on the CPU.
        masks: those in force; they are not changed.
        coupled: {layer: names of the parameters [out_channels] that go with its channels}, for "structured".
        kind: "unstructured" (single weights) or "structured" (whole output channels).
        scope: "global" compares all layers with each other, "layer" takes the same share of each.
        amount: share of what is left, in (0, 1]; in weights or in channels, as `kind` says.
        target: share of all that is removed at most.
    """
    scores, left = units(weights, masks, kind)
    for group in groups_of(left, kind, scope):
        of_group = ({name: tensors[name] for name in group.layers} for tensors in (scores, left))
        left.update(without_smallest(*of_group, group.to_remove(amount, target), spare_one=kind == "structured"))
    grown = dict(masks)
    for name, kept in left.items():
        if kind == "unstructured":
            grown[f"{name}.weight"] = kept
            continue
        whole = mask_of(masks, f"{name}.weight", weights[name])
        grown[f"{name}.weight"] = whole & kept.view(-1, *[1] * (whole.dim() - 1))
        for parameter in coupled[name]:
            grown[parameter] = kept & mask_of(masks, parameter, kept)
    return grown


def units(weights, masks, kind):
    """({layer: scores}, {layer: which are left}) of what is removed as one, weights or channels."""
    kept = {name: mask_of(masks, f"{name}.weight", weight) for name, weight in weights.items()}
    if kind == "unstructured":
        return {name: weight.detach().abs() for name, weight in weights.items()}, kept
    scores = {name: weight.detach().double().flatten(1).norm(dim=1) for name, weight in weights.items()}
    return scores, {name: mask.flatten(1).any(1) for name, mask in kept.items()}


def without_smallest(scores, left, count, spare_one):
    """`left` without the `count` units of the smallest score, over all layers given.

    Args:
        scores, left: {layer: tensor}, of equal shapes.
        spare_one: keep the largest unit of each layer, even if fewer than `count` go.
    """
    may_go = {name: kept.clone() for name, kept in left.items()}
    if spare_one:
        for name, candidates in may_go.items():
            if candidates.any():  # the last of equal ones, since earlier ones go first
                ranked = scores[name].masked_fill(~candidates, -1)
                candidates.view(-1)[int((ranked == ranked.max()).nonzero().max())] = False
    flat = torch.cat([candidates.flatten() for candidates in may_go.values()])
    positions = flat.nonzero().flatten()
    order = torch.cat([score.flatten() for score in scores.values()])[positions].sort(stable=True).indices
    kept = torch.cat([mask.flatten() for mask in left.values()])
    kept[positions[order[:count]]] = False
    pieces = kept.split([mask.numel() for mask in left.values()])
    return {name: piece.clone().view_as(left[name]) for name, piece in zip(left, pieces, strict=True)}
