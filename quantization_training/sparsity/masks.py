"""Pruning masks: {parameter name: bool tensor of its shape, True where it stays}; a parameter without one is whole.

The names are those of the full-precision network in every stage.
"""

import torch

from util.errors import UserError, nearest


class PrunedParameters:
    """Holds the pruned parameters of a network, full-precision or quantized, at zero; `masks`, on the CPU, say which."""

    def __init__(self, model, masks):
        self.model = model
        self.set(masks)

    def set(self, masks):
        """Put other masks into force."""
        self.masks, self._removed = masks, []
        for name, mask in masks.items():
            layer, _, entry = name.rpartition(".")
            for module in self.model.get_submodule(layer).modules():  # one, or each copy of a BatchNorm
                if module._parameters.get(entry) is not None:
                    self._removed.append((module._parameters[entry], ~mask.to(module._parameters[entry].device)))

    @torch.no_grad()
    def apply(self):
        """Set every removed parameter to zero."""
        for parameter, removed in self._removed:
            parameter.masked_fill_(removed, 0)

    def hold(self, optimizer):
        """Apply the masks now and after each step of an optimizer, whatever momentum and weight decay did."""
        self.apply()
        optimizer.register_step_post_hook(lambda *_: self.apply())


def checked_masks(model, masks, source):
    """The masks of a checkpoint; a UserError names the first that does not fit the full-precision network `model`."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, mask in masks.items():
        if name not in shapes:
            raise UserError(f"{source}: masks: {name} is not part of this network{nearest(name, shapes)}")
        if not is_mask(mask):
            raise UserError(f"{source}: masks: {name} is not a mask")
        if mask.shape != shapes[name]:
            raise UserError(f"{source}: masks: {name} has shape {list(mask.shape)}, this network's is {list(shapes[name])}")
    return masks


def is_mask(value):
    """Whether a value is a dense bool tensor with data."""
    return (isinstance(value, torch.Tensor) and value.dtype == torch.bool and value.layout == torch.strided
            and not value.is_meta)


def weights_left(layers, masks):
    """{layer: number of weights that stay} of layers {name: LayerCall}."""
    return {name: int(masks[f"{name}.weight"].sum()) if f"{name}.weight" in masks else call.params
            for name, call in layers.items()}


def mask_of(masks, name, like):
    return masks[name] if name in masks else torch.ones(like.shape, dtype=torch.bool)
