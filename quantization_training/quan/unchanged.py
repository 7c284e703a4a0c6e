"""Whether a network computes the same once its layers are replaced: a forward pass may ask for their types and attributes."""

import copy
import itertools

import torch
from torch.utils._pytree import tree_map

from model.layer_table import ModuleMode, generators_put_back
from model.training_pass import devices_for
from util.errors import UserError, reason

from .quantizer import LsqQuan


def check_unchanged(plain, model, graph, input_size, evaluation_only=False):
    """Compare the operations of a network, its quantizers left out, with those of the one that it was made from.

    Args:
        plain: the unquantized network, which is of no use afterwards.
        model: the quantized one, with the same parameters; it is left as it is.
        evaluation_only: nothing is going to be trained.

    Raises:
        UserError: naming the module in which they begin to differ.
    """
    quantized = copy.deepcopy(model)
    for module in quantized.modules():
        if isinstance(module, LsqQuan):
            module.forward = lambda v: v
        if getattr(module, "sat", False):
            module.sat = False
    modes = (False,) if evaluation_only else (False, True)
    for device in devices_for(graph):
        pair = copy.deepcopy((plain, quantized)) if device == "meta" else (plain, quantized)
        try:
            wanted = _operations(pair[0], modes, input_size, device)
        except Exception:  # on meta, of a network that looks at values; on the CPU it is reported where it is met
            continue
        try:
            found = _operations(pair[1], modes, input_size, device)
        except Exception as error:
            raise UserError(f"arch: the network fails once its layers are quantized ({type(error).__name__}: "
                            f"{reason(error)}); its forward pass may not ask for what quantized layers lack") from None
        for is_training, *operations in zip(modes, wanted, found, strict=True):
            _compare(*operations, "training" if is_training else "evaluation")
        return


@torch.no_grad()
def _operations(model, modes, input_size, device):
    """For each mode [(name of a module, an operation in it, its arguments as _described)], in order."""
    recorder, found = _Operations(model.to(device)), []
    for is_training in modes:
        recorder.seen = []
        with generators_put_back(), recorder:
            model.train(is_training)(torch.randn(2, 3, input_size, input_size, device=device))
        found.append(recorder.seen)
    return found


class _Operations(ModuleMode):
    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        self.seen.append((self.modules[-1], str(function), tree_map(_described, (args, kwargs or {}))))
        return function(*args, **(kwargs or {}))


def _described(value):
    """Shape and type of a tensor; of anything else what it says of itself."""
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else repr(value)


def _compare(expected, found, mode):
    for (name, *wanted), (_, *operation) in itertools.zip_longest(expected, found, fillvalue=("",)):
        if wanted != operation:
            raise UserError(f"arch: once its layers are quantized, the network computes something else in {mode}, beginning "
                            f"in {name or 'its own forward pass'}; that may not depend on types of layers or on which "
                            "parameters there are, which change")
