"""What follows integer layers made part of them: BatchNorm, activation, residual addition, and the rounding of the input of
the layer that comes next. It is found in the graph that torch.fx traces; a network that cannot be traced does without."""

import operator
from collections import Counter

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from folding import can_vanish, gain_and_shift, is_plain
from integer_layer import IntegerLayer, scale
from model.attention import SelfAttention
from quan.func import QuanConv2d, QuantizedLayer

ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
# of an activation: what it is called in IntegerLayer, and the range of its values where that is all of it
RELU, RELU6 = ("relu", (0.0, float("inf"))), ("hardtanh", (0.0, 6.0))
ACTIVATIONS = {F.relu: RELU, torch.relu: RELU, "relu": RELU, "relu_": RELU, F.relu6: RELU6, nn.ReLU: RELU, nn.ReLU6: RELU6}
NOTHING = (nn.Identity, nn.Dropout)
READERS = (nn.LayerNorm, nn.BatchNorm2d)  # beside integer layers: these give a new tensor and leave their input alone
NEW = (*READERS, nn.MaxPool2d, nn.AvgPool2d)


class _Tracer(fx.Tracer):
    """Layers, and attention, whose code asks for shapes, are not looked into."""

    def is_leaf_module(self, module, name):
        return isinstance(module, (QuantizedLayer, IntegerLayer, SelfAttention)) or super().is_leaf_module(module, name)


def fused(model, images):
    """A network with integer layers as one of the same values in which what follows them is a part of them where that can be;
    as it is where it cannot be traced. The layers are changed.

    Args:
        images: [batch, 3, height, width] that the network takes.
    """
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules() if module is not model):
        return model
    try:
        graph = _Tracer().trace(model)
        whole = fx.GraphModule(model, graph)
        owners = {node.target.rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
        if any(isinstance(model.get_submodule(name), QuantizedLayer) for name in owners):
            return model  # it asks a layer for its weight, which is not to be folded
        if any(node.op == "get_attr" and node.target.startswith("_tensor_constant") for node in graph.nodes):
            return model  # made by the forward pass, perhaps at random, or for one batch size
        ShapeProp(whole).propagate(images)
    except Exception:  # of any network's own forward pass, which fx may not be able to follow
        return model
    Fusion(whole).run()
    for layer in whole.modules():
        if isinstance(layer, IntegerLayer):
            layer.arguments = None  # what it had collected for a first call
    graph.lint()
    whole.recompile()
    whole.delete_all_unused_submodules()
    vars(whole).update({name: value for name, value in vars(model).items() if name.startswith("_forward")})  # its hooks
    return whole


def called(node):
    """The function, or the name of the method, that a node calls; None where it calls a module, or nothing, of any name."""
    return node.target if node.op in ("call_function", "call_method") else None


def is_convolution(layer):
    """Whether channels are the second dimension of a layer's output, as a BatchNorm2d takes them."""
    return layer.geometry is not None if isinstance(layer, IntegerLayer) else isinstance(layer, QuanConv2d)


class Fusion:
    """Rewrites a graph, in place."""

    def __init__(self, whole):
        self.graph, self.modules = whole.graph, dict(whole.named_modules())
        self.calls = Counter(id(self.module(node)) for node in self.graph.nodes if node.op == "call_module")
        self.place = {node: index for index, node in enumerate(self.graph.nodes)}

    def run(self):
        for node in list(self.graph.nodes):
            if type(self.module(node)) in NOTHING and len(node.args) == 1:
                self.absorb(node, node.args[0])
        layers = [node for node in self.graph.nodes if self.is_layer(node)]
        for node in layers:
            self.take_batchnorm(node)
        for node in layers:
            if isinstance(self.module(node), IntegerLayer):
                self.take_activation(node)
                self.take_residual(node)
        for node in layers:
            if isinstance(self.module(node), IntegerLayer):
                self.take_rounding(node)
                self.take_gelu(node)

    def module(self, node):
        return self.modules[node.target] if node.op == "call_module" else None

    def is_layer(self, node):
        """Whether a node is the only call of a layer that may be changed."""
        module = self.module(node)
        return isinstance(module, (IntegerLayer, QuantizedLayer)) and self.calls[id(module)] == 1 and len(node.args) == 1 \
            and not node.kwargs

    def only_user(self, node):
        """The node that alone uses another one, as its first argument; else None."""
        users = list(node.users)
        return users[0] if len(users) == 1 and users[0].args and users[0].args[0] is node else None

    def absorb(self, node, source):
        """Let `source` stand for a node, which goes."""
        node.replace_all_uses_with(source)
        self.graph.erase_node(node)

    def take_batchnorm(self, node):
        after, layer = self.only_user(node), self.module(node)
        batchnorm = after and self.module(after)
        if batchnorm is None or not can_vanish(batchnorm) or not is_convolution(layer):
            return
        scale(layer, *gain_and_shift(batchnorm))
        self.absorb(after, node)

    def activation(self, node):
        """What a node does, as ACTIVATIONS has it; None where that is something else."""
        module = self.module(node)
        kind = ACTIVATIONS.get(called(node) if module is None else type(module))
        return kind if len(node.args) == 1 and (module is None or is_plain(module)) else None

    def take_activation(self, node):
        after, layer = self.only_user(node), self.module(node)
        if after is None or layer.activation != "none":
            return
        kind = self.activation(after)
        if kind is not None:
            layer.activation, layer.limits = kind
            self.absorb(after, node)

    def take_residual(self, node):
        """An addition to the output, and a ReLU after it; what is added is overwritten, so nothing may need it later."""
        users, layer = list(node.users), self.module(node)
        if len(users) != 1 or called(users[0]) not in ADDITIONS or len(users[0].args) != 2 or users[0].kwargs \
                or layer.activation != "none":
            return
        addition = users[0]
        other = addition.args[addition.args[0] is node]
        if not isinstance(other, fx.Node) or other is node or self.place[other] > self.place[node] or not self.is_new(other) \
                or not all(user is addition or (self.only_reads(user) and self.place[user] <= self.place[node])
                           for user in other.users):
            return
        one, two = (part.meta["tensor_meta"] for part in (node, other))
        if one.shape != two.shape or two.dtype != torch.float32:
            return
        node.args = (*node.args, other)
        self.absorb(addition, node)
        after = self.only_user(node)
        if after is not None and self.activation(after) is RELU:
            layer.activation, layer.limits = RELU
            self.absorb(after, node)

    def only_reads(self, node):
        module = self.module(node)
        return len(node.args) == 1 and (isinstance(module, IntegerLayer) or type(module) in READERS)

    def is_new(self, node):
        """Whether the value of a node lies in memory of its own."""
        module = self.module(node)
        if self.activation(node):  # it may be computed in place
            return isinstance(node.args[0], fx.Node) and self.is_new(node.args[0]) and len(node.args[0].users) == 1
        return isinstance(module, (IntegerLayer, QuantizedLayer)) or type(module) in NEW \
            or called(node) in (operator.add, torch.add, "add")

    def take_rounding(self, node):
        """Give out integers where all that follows are layers which round their input to the same ones."""
        layer, users = self.module(node), [self.module(user) for user in node.users]
        if len(node.args) == 1 and users and all(isinstance(user, IntegerLayer) for user in users) \
                and all(user.args[0] is node and node not in user.args[1:] for user in node.users) \
                and all(user.entering == users[0].entering for user in users):
            layer.leaving = users[0].entering

    def take_gelu(self, node):
        """Compute a GELU in the memory of the layer's output, where nothing else needs that."""
        after = self.only_user(node)
        gelu = after and self.module(after)
        if type(gelu) is nn.GELU and is_plain(gelu) and len(after.args) == 1:
            with self.graph.inserting_before(after):
                self.absorb(after, self.graph.call_function(torch.ops.aten.gelu_.default, (node,),
                                                            {"approximate": gelu.approximate}))
