"""The bit switch: a jointly trained network at one bit-width, or at a policy's."""

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

    def uniform(self, bit):
        """Every searchable layer at `bit` bits, every BatchNorm on its own copy for it."""
        for layer in self.layers.values():
            layer.select(bit)
        for batchnorm, _ in self.batchnorms.values():
            batchnorm.select(bit)

    def policy(self, chosen, acts=None):
        """Each searchable layer at its own bits, {layer: bit}; `acts` are those of activations where they differ.

        A BatchNorm takes the copy for the weight bits of the one searchable layer before it, without one that of the highest
        bit-width.
        """
        for name, layer in self.layers.items():
            layer.select(chosen[name], (acts or chosen)[name])
        for batchnorm, before in self.batchnorms.values():
            batchnorm.select(chosen.get(before, max(self.bits)))
