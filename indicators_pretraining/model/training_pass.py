"""What a network does in training that it does not do in evaluation, found out before anything is trained."""

import copy

import torch
from torch import nn

from util.errors import SINGLE_VALUE, UserError, reason

from .layer_table import Notes, generators_put_back, shortened

FEW_MACS = 10**8
PASSES = 20  # in which every layer that training may skip at random is reached but for one time in a million


def devices_for(graph):
    """Where to run a pass that only shows what is called: on meta, without data; on the CPU where that fails, because values
    are asked for, and at once where the network is so small that this is faster."""
    return ["cpu"] if sum(call.macs_exact for call in graph.layers.values()) < FEW_MACS else ["meta", "cpu"]


def check_training(model, graph, input_size, num_classes):
    """Compare a pass in training with the one in evaluation that `graph` was found in.

    Args:
        model: the unquantized network; it is left as it is.

    Returns:
        lines for the log about outputs and layers that only training has, or ''.

    Raises:
        UserError: where the network fails in training or gives no logits there, or those of another head than in evaluation,
            or where evaluation reaches layers that training does not.
    """
    reached, kind, shape, heads = _reached_in_training(model, graph, input_size)
    if reached is None:
        return ""
    if shape != (2, num_classes):
        found = f"a {kind}" + (f" with a first tensor of shape {list(shape)}" if shape else " without a tensor")
        raise UserError(f"arch: in training the network gives {found} for two images, expected logits of shape "
                        f"[2, {num_classes}], alone or first among its outputs")
    if heads and not heads.intersection(graph.heads):
        raise UserError(f"arch: in training the logits come from {shortened(sorted(heads))}, in evaluation from "
                        f"{shortened(graph.heads)}; give the same, alone or first among the outputs")
    missed = [name for name in (*graph.layers, *graph.batchnorms) if name not in reached]
    if missed:
        raise UserError(f"arch: evaluation reaches {shortened(missed)}, which training does not, so that nothing would "
                        "train it; let both go the same way")
    modules = dict(model.named_modules())
    extra = [name for name in reached if name not in graph.layers and name not in graph.unquantizable
             and isinstance(modules[name], (nn.Conv2d, nn.Linear))]
    lines = [f"in training the network gives a {kind}; it is trained on the first tensor in it"] if kind != "Tensor" else []
    if extra:
        lines.append(f"reached in training only, and left in full precision: {shortened(extra)}")
    return "\n".join(lines)


def _reached_in_training(model, graph, input_size):
    """What _pass gives; (None, ...) where only a larger batch can tell."""
    for device in devices_for(graph):
        try:
            return _pass(model, graph, input_size, device)
        except Exception as raised:  # on meta, of a network that looks at values, which are not there
            error = raised
    if SINGLE_VALUE in str(error):
        return None, "", (), frozenset()
    raise UserError(f"arch: the network fails in training, on two images of {input_size}x{input_size} "
                    f"({type(error).__name__}: {reason(error)})")


def _pass(model, graph, input_size, device):
    """(names of the modules reached, name of the output's type, shape of the first tensor in it or (), what that comes from
    as far as it can be followed), in training."""
    twin = copy.deepcopy(model).to(device, torch.float32).train()
    reached, kinds, notes = {}, [], Notes(twin)
    for name, module in twin.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: reached.setdefault(name))
    twin.register_forward_hook(lambda module, inputs, output: kinds.append(type(output).__name__), prepend=True)
    with torch.no_grad(), generators_put_back(), notes.lineage:
        for _ in range(PASSES):
            output = twin(torch.randn(2, 3, input_size, input_size, device=device))
            if all(name in reached for name in (*graph.layers, *graph.batchnorms)):
                break
    heads = frozenset(notes.ends(output)[1]) if notes.lineage.of(output, notes.lineage.makers) else frozenset()
    return reached, kinds[0], tuple(output.shape) if isinstance(output, torch.Tensor) else (), heads
