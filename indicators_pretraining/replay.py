"""The outputs of a network in which one layer changes again and again, computed anew from that layer on."""

import contextlib
from functools import partial

import torch

from quan.func import ExceptedBatchNorm, QuantizedLayer, SwitchableBatchNorm

WHOLE = (QuantizedLayer, SwitchableBatchNorm, ExceptedBatchNorm)  # modules that are computed as one, with what is in them
MEMORY = 2**29  # bytes that recorded outputs may take


class Replay:
    """The outputs of a network's modules on a batch, so that those which end before a changed layer need no computing.

    What the forward pass computes outside of these modules is always computed. The network has to compute the same each time,
    as networks in evaluation mode do.

    Args:
        model: the network, in evaluation mode.
        images: [batch, channels, height, width].

    Attributes:
        output: what the network gives for the images.
    """

    def __init__(self, model, images):
        self.model, self.images = model, images
        self.modules = {name: module for name, module in model.named_modules() if name and not _is_inside_whole(model, name)}
        self.changed_in_place, before = set(), None
        while before != self.changed_in_place:
            before = set(self.changed_in_place)
            self._record()

    def _record(self):
        self.calls, self.first_call = [], {}  # (output or None, number of calls that have begun when it ends) of each call
        versions = []

        def record(name, forward, *args, **kwargs):
            call = len(self.calls)
            self.first_call.setdefault(name, call)
            self.calls.append(None)
            out = forward(*args, **kwargs)
            if isinstance(out, torch.Tensor):
                versions.append((call, out, out._version))
                self.calls[call] = out.clone() if call in self.changed_in_place else out, len(self.calls)
            else:
                self.calls[call] = None, len(self.calls)
            return out

        with _each_forward_as(self.modules, record):
            self.output = self.model(self.images)
        self.changed_in_place |= {call for call, out, version in versions if out._version != version}

    def output_after_change(self, name):
        """The network's output, now that its layer `name` computes differently than when the outputs were recorded."""
        first, call = self.first_call[name], 0

        def replay(_, forward, *args, **kwargs):
            nonlocal call
            own, (known, end) = call, self.calls[call] if call < first else (None, 0)
            if known is None or end > first:
                call += 1
                return forward(*args, **kwargs)
            call = end
            return known.clone() if own in self.changed_in_place else known

        with _each_forward_as(self.modules, replay):
            return self.model(self.images)

    @property
    def bytes_per_image(self):
        outputs = {id(out): out.nbytes for out, _ in self.calls if out is not None}
        return sum(outputs.values()) / len(self.images)


def _is_inside_whole(model, name):
    parts = name.split(".")
    return any(isinstance(model.get_submodule(".".join(parts[:end])), WHOLE) for end in range(1, len(parts)))


@contextlib.contextmanager
def _each_forward_as(modules, call):
    """Within, a module's forward is call(its name, its own forward, *what it is given)."""
    own = {name: vars(module).get("forward") for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.forward = partial(call, name, module.forward)
        yield
    finally:
        for name, module in modules.items():
            del module.forward
            if own[name] is not None:
                module.forward = own[name]
