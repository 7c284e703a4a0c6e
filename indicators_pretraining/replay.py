"""The outputs of a network in which one layer changes again and again, computed anew from that layer on."""

import contextlib

import torch

from quan.func import ExceptedBatchNorm, QuantizedLayer, SwitchableBatchNorm

WHOLE = (QuantizedLayer, SwitchableBatchNorm, ExceptedBatchNorm)  # computed as one, though they have modules inside
MEMORY = 2**29  # bytes that recorded outputs may take


class Replay:
    """The outputs of a network's innermost modules on a batch, so that those before a changed layer need no computing.

    What the forward pass computes between modules is always computed. The network has to compute the same each time, as
    networks in evaluation mode do.

    Args:
        model: the network, in evaluation mode.
        images: [batch, channels, height, width].

    Attributes:
        output: what the network gives for the images.
    """

    def __init__(self, model, images):
        self.model, self.images = model, images
        self.units = {name: module for name, module in model.named_modules() if _is_unit(model, name, module)}
        self.changed_in_place, before = set(), None
        while before != self.changed_in_place:
            before = set(self.changed_in_place)
            self._record()

    def _record(self):
        self.calls, self.first_call = [], {}
        versions = []

        def record(name, forward, *args, **kwargs):
            self.first_call.setdefault(name, len(self.calls))
            out = forward(*args, **kwargs)
            is_tensor = isinstance(out, torch.Tensor)
            kept = out.clone() if len(self.calls) in self.changed_in_place else out
            self.calls.append(kept if is_tensor else None)
            versions.append((out, out._version) if is_tensor else None)
            return out

        with _each_forward_as(self.units, record):
            self.output = self.model(self.images)
        self.changed_in_place |= {call for call, seen in enumerate(versions) if seen and seen[0]._version != seen[1]}

    def output_after_change(self, name):
        """The network's output, now that its layer `name` computes differently than when the outputs were recorded."""
        first, call = self.first_call[name], 0

        def replay(_, forward, *args, **kwargs):
            nonlocal call
            call += 1
            known = self.calls[call - 1] if call <= first else None
            if known is None:
                return forward(*args, **kwargs)
            return known.clone() if call - 1 in self.changed_in_place else known

        with _each_forward_as(self.units, replay):
            return self.model(self.images)

    @property
    def bytes_per_image(self):
        return sum(out.nbytes for out in self.calls if out is not None) / len(self.images)


def _is_unit(model, name, module):
    if not isinstance(module, WHOLE) and next(module.children(), None) is not None:
        return False
    parts = name.split(".")
    return not any(isinstance(model.get_submodule(".".join(parts[:end])), WHOLE) for end in range(len(parts)))


@contextlib.contextmanager
def _each_forward_as(units, call):
    """Within, a unit's forward is call(its name, its own forward, *what it is given)."""
    own = {name: vars(module).get("forward") for name, module in units.items()}
    try:
        for name, module in units.items():
            module.forward = _bound(call, name, module.forward)
        yield
    finally:
        for name, module in units.items():
            del module.forward
            if own[name] is not None:
                module.forward = own[name]


def _bound(call, name, forward):
    return lambda *args, **kwargs: call(name, forward, *args, **kwargs)
