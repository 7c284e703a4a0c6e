"""Tensors that are loaded into a network by name."""

import torch
from torch import nn

from util.errors import UserError, nearest
from util.exchange import fit_names

from .attention import name_of_projection
from .names import is_below

STEPS = (".quan_w_fn.s", ".quan_a_fn.s")


def is_step(name):
    """Whether a tensor of a state_dict holds the step sizes of a quantizer, by its name."""
    return name.endswith(STEPS)


def redraw_zero_classifiers(model, graph):
    """Draw the weights of classifiers that begin at zero, which have no step size and no deviation to be scaled by."""
    for name in graph.classifiers:
        weight = model.get_submodule(name).weight
        if not weight.any():
            nn.init.trunc_normal_(weight, std=0.02)


def fit(own, state_dict):
    """The tensors of a state_dict under a network's own names; see fit_names and name_of_projection."""
    fitted = fit_names(own, state_dict)
    return {name_of_projection(own, fitted[name]): tensor for name, tensor in state_dict.items()}


def load_state(model, state_dict, source, may_lack=lambda name: False):
    """Load a state_dict whose names and shapes have to be just those of the model. Step sizes count as initialised.

    Args:
        may_lack: whether the state_dict may lack a name of the model, which then keeps what it holds.

    Raises:
        UserError: naming the source and the first tensor that is missing, extra or of another shape.
    """
    own = model.state_dict()
    state_dict = fit(own, state_dict)
    _check_tensors(own, state_dict, source, may_lack)
    marks = {f"{name.removesuffix('.s')}.init_state" for name in state_dict if is_step(name)} - state_dict.keys()
    own.update(state_dict | {mark: torch.ones_like(own[mark]) for mark in marks})
    model.load_state_dict(own)  # own brings the version marks that some modules ask for


def load_weights(model, state_dict, source, heads=None):
    """Load full-precision weights into a full-precision model, by name; return whether its classifiers were loaded too.

    A classifier may have another number of outputs; it then keeps its fresh parameters. Auxiliary classifiers in
    the file, `aux...`, are passed over where the network has none of that name. Everything else has to fit.

    Args:
        heads: names of the classifiers, as a Graph has them; None stands for the last convolution or linear layer.

    Raises:
        UserError: naming the source and the first tensor that is missing, extra or of another shape.
    """
    own = model.state_dict()
    fitted = fit(own, state_dict)
    steps = [name for name in fitted if is_step(name) and name not in own]
    if steps:
        raise UserError(f"{source}: it is a quantized checkpoint ({steps[0]}), but weights in full precision are needed here; "
                        "joint training goes on from its checkpoints by resume.path, and fine-tuning starts from them by "
                        "init_from and goes on from its own by resume.path")
    heads = heads or [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))][-1:]
    head = {name for name in own if is_below(name, heads)}
    parts = {name.split(".")[0] for name in own}
    extra = {name for name in fitted if name.lower().startswith("aux") and name.split(".")[0] not in parts}
    resized = {name for name in fitted if name in head and own[name].shape != fitted[name].shape}
    taken = {name: tensor for name, tensor in fitted.items() if name not in extra | resized}
    _check_tensors(own, taken, source, lambda name: name in head or name.endswith("num_batches_tracked"))
    own.update(taken)
    model.load_state_dict(own)
    return head <= taken.keys()


def _check_tensors(own, tensors, source, may_lack):
    for name, tensor in tensors.items():
        if name not in own:
            raise UserError(f"{source}: the tensor {name} is not part of this network{nearest(name, own)}")
        if own[name].shape != tensor.shape:
            raise UserError(f"{source}: {name} has shape {list(tensor.shape)}, this network's is {list(own[name].shape)}")
    for name in own:
        if name not in tensors and not may_lack(name):
            raise UserError(f"{source}: the tensor {name} of this network is missing in the file")
