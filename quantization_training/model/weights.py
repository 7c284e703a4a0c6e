"""Tensors that are loaded into a network by name."""

from torch import nn

from util.errors import UserError, nearest

from .attention import rename_projections


def classifier_name(model):
    """The name of the last convolution or linear layer, which gives the outputs."""
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))][-1]


def set_tensors(model, tensors):
    """Put {name: tensor} into a model; names that the model has and `tensors` lacks keep what they hold."""
    state = model.state_dict()  # brings the version marks that some modules ask for when they are loaded
    state.update(tensors)
    model.load_state_dict(state)


def load_state(model, state_dict, source, may_lack=lambda name: False):
    """Load a state_dict whose names and shapes have to be just those of the model.

    Args:
        may_lack: which names of the model the state_dict may lack; these keep what they hold.

    Raises:
        UserError: naming the source and the first tensor that is missing, extra or of another shape.
    """
    own = model.state_dict()
    state_dict = rename_projections(own, state_dict)
    for name in own:
        if name not in state_dict and not may_lack(name):
            raise UserError(f"{source}: the tensor {name} of this network is missing in the checkpoint")
    for name, tensor in state_dict.items():
        _check_tensor(own, name, tensor, source)
    set_tensors(model, state_dict)


def load_weights(model, state_dict, source):
    """Load full-precision weights into a full-precision model, by name; torch's names of attention's projections are known.

    The classifier may have another number of outputs; it then keeps its fresh parameters. Auxiliary classifiers in
    the file are passed over. Everything else has to fit.

    Returns:
        whether the classifier was taken too.

    Raises:
        UserError: naming the source and the first tensor that is missing, extra or of another shape.
    """
    own = model.state_dict()
    head = [f"{classifier_name(model)}.{entry}" for entry in ("weight", "bias")]
    taken = {}
    for name, tensor in rename_projections(own, state_dict).items():
        if name.split(".")[0].lower().startswith("aux"):
            continue
        if "quan_w_fn" in name and name not in own:
            raise UserError(f"{source}: it is a quantized checkpoint ({name}), which init_from takes")
        if name not in head or name not in own or own[name].shape == tensor.shape:
            _check_tensor(own, name, tensor, source)
            taken[name] = tensor
    for name in own:
        if name not in taken and name not in head and not name.endswith("num_batches_tracked"):
            raise UserError(f"{source}: the tensor {name} of this network is missing in the file")
    set_tensors(model, taken)
    return all(name in taken for name in head if name in own)


def _check_tensor(own, name, tensor, source):
    if name not in own:
        raise UserError(f"{source}: the tensor {name} is not part of this network{nearest(name, own)}")
    if own[name].shape != tensor.shape:
        raise UserError(f"{source}: {name} has shape {list(tensor.shape)}, this network's is {list(own[name].shape)}")
