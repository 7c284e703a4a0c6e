"""Whether a network computes the same once its layers are replaced: a forward pass may ask for their types and attributes."""

import copy
import itertools

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.layer_table import generators_put_back
from model.training_pass import devices_for
from util.errors import UserError, reason

from .quantizer import LsqQuan


def check_unchanged(plain, model, graph, input_size, evaluation_only=False):
    """Compare the operations of a network, its quantizers left out, with those of the one that it was made from, in
    evaluation and in training.

    Args:
        plain: the unquantized network, which is of no use afterwards.
        model: the quantized one, with the same parameters; it is left as it is.
        graph, input_size: its Graph, and the height and width of its images.
        evaluation_only: nothing is going to be trained.

    Raises:
        UserError: naming the module in which they begin to differ.
    """
    quantized = copy.deepcopy(model)
    for module in quantized.modules():
        if isinstance(module, LsqQuan):
            module.forward = _as_it_is
        if getattr(module, "sat", False):
            module.sat = False
    modes = (False,) if evaluation_only else (False, True)
    for device in devices_for(graph):
        pair = [copy.deepcopy(network) if device == "meta" else network for network in (plain, quantized)]
        try:
            wanted = [_operations(pair[0], is_training, input_size, device) for is_training in modes]
        except Exception:  # on meta, of a network that looks at values; on the CPU it is reported where it is met
            continue
        try:
            found = [_operations(pair[1], is_training, input_size, device) for is_training in modes]
        except Exception as error:
            raise UserError(f"arch: the network fails once its layers are quantized ({type(error).__name__}: "
                            f"{reason(error)}); its forward pass may not ask for what quantized layers lack") from None
        for mode, *operations in zip(("evaluation", "training"), wanted, found, strict=False):
            _compare(*operations, mode)
        return


def _as_it_is(v):
    return v


@torch.no_grad()
def _operations(model, is_training, input_size, device):
    """[(name of a module, an operation of torch in it with the shapes and numbers that it takes)], in order."""
    operations, handles = _Operations(), []
    for name, module in model.to(device).train(is_training).named_modules():
        handles += [module.register_forward_pre_hook(operations.entering(name)),
                    module.register_forward_hook(operations.leaving, always_call=True)]
    with generators_put_back(), operations:
        model(torch.randn(2, 3, input_size, input_size, device=device))
    for handle in handles:
        handle.remove()
    return operations.seen


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen, self.inside = [], [""]

    def entering(self, name):
        return lambda *_: self.inside.append(name)

    def leaving(self, *_):
        self.inside.pop()

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        self.seen.append((self.inside[-1], str(function), _described((args, kwargs or {}))))
        return function(*args, **(kwargs or {}))


def _described(value):
    """Arguments of an operation: of tensors their shapes and types, of anything else what it says of itself."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return {key: _described(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_described(inner) for inner in value]
    return repr(value)


def _compare(expected, found, mode):
    for (name, *wanted), (_, *operation) in itertools.zip_longest(expected, found, fillvalue=("",)):
        if wanted != operation:
            raise UserError(f"arch: once its layers are quantized, the network computes something else in {mode}, beginning "
                            f"in {name or 'its own forward pass'}; that may not depend on types of layers or on which "
                            "parameters there are, which change")
