"""The bit switch: a jointly trained network at one bit-width, or at a policy's."""

import torch

from .func import SwitchableBatchNorm
from .utils import searchable_layers


class BitSwitch:
    """Switches a network with the modules of joint_modules between the candidates `bits`.

    Args:
        graph: the Graph of the full-precision network.
        excepts: names that are not searched.
    """

    def __init__(self, model, graph, excepts, bits):
        modules = dict(model.named_modules())
        self.bits = tuple(bits)
        self.layers = {name: modules[name] for name in searchable_layers(graph, excepts)}
        self.batchnorms = {name: (modules[name], graph.batchnorms.get(name)) for name in modules
                           if isinstance(modules[name], SwitchableBatchNorm)}
        self.bit_indices = None

    def keep_as_data(self, device):
        """Keep the indices of the selected bit-widths in tensors, too, so that a network is compiled once for all of them."""
        switched = self.switched()
        self.bit_indices = torch.zeros(len(switched), dtype=torch.long, device=device)
        for bit_index, module in zip(self.bit_indices.split(1), switched, strict=True):
            if not isinstance(module, SwitchableBatchNorm) or module.can_be_chosen_by_data:
                module.bit_index = bit_index

    def switched(self):
        """The quantizers and BatchNorms that have an index."""
        return [*(quantizer for layer in self.layers.values() for quantizer in (layer.quan_w_fn, layer.quan_a_fn)),
                *(batchnorm for batchnorm, _ in self.batchnorms.values())]

    def note_bit_indices(self):
        if self.bit_indices is not None:
            self.bit_indices.copy_(torch.tensor([module.index for module in self.switched()]), non_blocking=True)

    def uniform(self, bit):
        """Every searchable layer at `bit` bits, every BatchNorm on its own copy for it."""
        for layer in self.layers.values():
            layer.select(bit)
        for batchnorm, _ in self.batchnorms.values():
            batchnorm.select(bit)
        self.note_bit_indices()

    def policy(self, chosen, acts=None):
        """Each searchable layer at its own bits, {layer: bit}; `acts` are those of activations where they differ.

        A BatchNorm takes the copy for the weight bits of the one searchable layer before it, without one that of the highest
        bit-width.
        """
        for name, layer in self.layers.items():
            layer.select(chosen[name], (acts or chosen)[name])
        for batchnorm, before in self.batchnorms.values():
            batchnorm.select(chosen.get(before, max(self.bits)))
        self.note_bit_indices()
