"""What the dry pass finds: MACs and elements against independent counts, shared and tied modules, the ends of the network."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from model import create_model
from model.layer_table import trace
from model.names import second_names
from quan.config import ActQuantizerConfig, ExceptedQuantizerConfig, ExceptionConfig, QuanConfig
from quan.func import QuanConv2d, QuanLinear
from quan.utils import joint_modules, name_exceptions, policy_modules, replace_module_by_names
from schema import IndicatorsConfig
from util.errors import UserError

SIZES = {"resnet18": 64, "resnet20": 32, "resnet50": 64, "mobilenetv1": 64, "mobilenet_v2": 64, "efficientnet_b0": 64,
         "regnet_y_400mf": 64, "convnext_tiny": 64, "vit_tiny_patch16_224": 48, "vit_tiny_patch4_32": 32, "swin_t": 72}


class Counted(FlopCounterMode):
    """torch's own count of floating point operations, two for each MAC."""

    def __init__(self):
        super().__init__(display=False)

    @property
    def macs(self):
        return self.get_total_flops() / 2


def counted(model, size):
    """torch's count of the MACs of one image, and the elements that go into each layer, {id of its weight: elements}."""
    elements, model = {}, model.eval().to("meta")

    def note(module, inputs, output):
        elements[module] = elements.get(module, 0) + math.prod(inputs[0].shape)

    hooks = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    with torch.no_grad(), Counted() as count:
        model(torch.empty(1, 3, size, size, device="meta"))
    for hook in hooks:
        hook.remove()
    return count.macs, {name: elements[module] for name, module in model.named_modules() if module in elements}


@pytest.mark.parametrize("arch", SIZES)
def test_macs_and_elements_of_every_built_in_network_are_those_of_an_independent_count(arch):
    size = SIZES[arch]
    model = create_model(arch, 10, input_size=size)
    graph = trace(model, size, 10)
    macs, elements = counted(model, size)
    assert sum(call.macs_exact for call in graph.layers.values()) + sum(graph.non_layer_macs.values()) == macs
    assert {name: call.act_elements for name, call in graph.layers.items()} == elements
    assert bool(graph.non_layer_macs) == arch.startswith(("vit", "swin"))


@given(st.tuples(st.integers(1, 4), st.integers(1, 4)), st.tuples(st.integers(1, 3), st.integers(1, 3)),
       st.tuples(st.integers(1, 2), st.integers(1, 2)), st.tuples(st.integers(0, 2), st.integers(0, 2)),
       st.sampled_from([1, 3]), st.integers(8, 12))
def test_any_convolution_is_counted_as_torch_counts_it(kernel, stride, dilation, padding, groups, size):
    conv = nn.Conv2d(3, 6, kernel, stride, padding, dilation, groups)
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
    call = trace(model, size).layers["0"]
    assert call.macs_exact == counted(model, size)[0] - 12
    height, width = ((size + 2 * p - d * (k - 1) - 1) / s + 1
                     for k, s, d, p in zip(kernel, stride, dilation, padding, strict=True))
    assert call.macs_published == 6 * (3 // groups) * kernel[0] * kernel[1] * int(height * width)
    assert call.params == conv.weight.numel() and call.act_elements == 3 * size * size


class Products(nn.Module):
    """Every way to write the products of attention, and a matrix that is no layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(12, 8)
        self.fused = Fused()
        self.matrix = nn.Parameter(torch.randn(8, 6))
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = self.embed(F.unfold(x, 2, stride=2).transpose(1, 2))
        x = torch.einsum("bij,bjk->bik", (x @ x.transpose(1, 2)).softmax(-1), x)
        x = torch.baddbmm(x, torch.bmm(x, x.transpose(1, 2)), x)
        return self.fc(self.fused(x).mean(1) @ self.matrix)


class Fused(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


def test_products_outside_of_layers_are_counted_by_the_module_they_happen_in():
    graph = trace(Products(), 8)
    one = 16 * 16 * 8  # sixteen patches, eight channels
    assert graph.non_layer_macs == {"": 4 * one + 8 * 6, "fused": 2 * one}
    assert sum(graph.non_layer_macs.values()) + 16 * 12 * 8 + 6 * 3 == counted(Products(), 8)[0]
    assert graph.uncounted == {"matrix": 48} and "matrix" in graph.describe()
    assert f"{(6 * one + 48) / 1e6:.3f} M MACs per image" in graph.describe()


class Shared(nn.Module):
    """A module under two names, one of which is a block that stands in a list twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.blocks = nn.ModuleList([self.block, self.block, nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))])
        self.again = self.block[0]
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(self.again(x).mean((2, 3)))


def test_a_module_under_several_names_is_one_layer_and_is_replaced_under_all_of_them():
    model = Shared()
    graph = trace(model, 8)
    assert list(graph.layers) == ["stem", "block.0", "blocks.2.0", "fc"]
    assert graph.layers["block.0"].macs_exact == 3 * 16 * 36 and graph.layers["block.0"].params == 16
    assert graph.batchnorms == {"block.1": "block.0", "blocks.2.1": "blocks.2.0"}
    quan = QuanConfig(excepts={"stem": ExceptionConfig(), "fc": ExceptionConfig()})
    replace_module_by_names(model, joint_modules(model, graph, quan, [4, 2]))
    assert model.again is model.block[0] is model.blocks[1][0] and isinstance(model.again, QuanConv2d)
    assert model.blocks[0] is model.blocks[1]
    assert {"blocks.0", "blocks.1", "again", "blocks.1.0.quan_w_fn"} <= second_names(model)
    assert not {"block", "block.0", "blocks.2", "blocks.2.0.quan_w_fn"} & second_names(model)


class Norms(nn.Module):
    """One BatchNorm after two layers."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.norm = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(self.norm(self.two(self.norm(self.one(x)))).mean((2, 3)))


def test_a_batchnorm_after_two_layers_follows_neither():
    assert trace(Norms(), 8).batchnorms == {"norm": None}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.deep, self.fc = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 2)
        self.deep.weight = self.embed.weight

    def forward(self, x):
        return self.fc(self.deep(self.embed(x.flatten(1))))


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 2)

    def forward(self, x):
        return self.fc(input=x.flatten(1))


class Answers(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.fc, self.head = nn.Linear(12, 2), head

    def forward(self, x):
        return self.head(self.fc(x.flatten(1)))


@pytest.mark.parametrize(("model", "message"), [
    (Tied(), "the layers embed and deep share one weight"), (ByKeyword(), "the layer fc gets its input by keyword"),
    (Answers(lambda x: {"logits": x}), "gives a dict for one image, expected logits"),
    (Answers(lambda x: x[:, None]), r"a tensor of shape \[1, 1, 2\] for one image, expected logits"),
    (nn.Flatten(), "no convolution and no linear layer"),
    (Answers(lambda x: 1 / 0),
     r"fails on an image of 2x2 in line \d+ of test_graph.py \(ZeroDivisionError: division by zero\)$"),
    (nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, 2)), "does not take images of 2x2 .*, but of 28x28; change arch or")])
def test_what_cannot_be_told_apart_or_gives_no_logits_is_refused(model, message):
    with pytest.raises(UserError, match=message):
        trace(model, 2)


@pytest.mark.parametrize(("batchnorm", "message"), [
    (nn.BatchNorm2d(4), r"running_mean should contain 8 elements not 4"), (nn.BatchNorm1d(8), r"expected 2D or 3D input"),
    (nn.BatchNorm2d(8, track_running_stats=False), r"more than 1 value per channel")])
def test_a_batchnorm_that_does_not_fit_is_refused_as_torch_says_it(batchnorm, message):
    network = nn.Sequential(nn.Conv2d(3, 8, 8), batchnorm, nn.Flatten(), nn.Linear(8, 10))
    with pytest.raises(UserError, match=f"the network fails on an image of 8x8 .*{message}"):
        trace(network, 8)


class Gated(nn.BatchNorm2d):
    """A BatchNorm with a layer of its own."""

    def __init__(self, channels):
        super().__init__(channels)
        self.gate = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return super().forward(x) * self.gate(x).sigmoid()


def test_layers_inside_of_a_batchnorm_with_a_forward_of_its_own_are_found():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Gated(4), nn.Flatten(), nn.Linear(144, 2))
    graph = trace(model, 8)
    assert list(graph.layers) == ["0", "1.gate", "3"] and graph.batchnorms == {"1": "0"}


def test_another_number_of_outputs_than_classes_is_refused():
    with pytest.raises(UserError, match="the network has 10 outputs, the data have 7 classes"):
        trace(create_model("resnet20", 10), 8, 7)


def test_a_network_that_looks_at_values_is_traced_on_the_cpu():
    model = Answers(lambda x: x if x.sum() < 1e9 else -x)
    assert trace(model, 2).layers["fc"].macs_exact == 24


class Experts(nn.Module):
    """Two layers, of which each image reaches the one that its brightness names."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 10)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        chosen, x = (x.mean((1, 2, 3)) > 0.1).long(), self.stem(x).mean((2, 3))
        y = torch.zeros_like(x)
        for index in chosen.unique().tolist():
            y[chosen == index] = self.experts[index](x[chosen == index])
        return self.head(x + y)


def test_layers_that_only_some_images_reach_are_refused():
    with pytest.raises(UserError, match="^arch: only some images reach the layers experts.1, so no bits"):
        trace(Experts(), 8, 10)


class Uncopied(nn.Flatten):
    def __init__(self):
        super().__init__()
        self.numbers = (number for number in range(3))


def test_a_network_that_cannot_be_copied_or_hooked_is_refused_by_that_reason():
    for model, message in (
            (nn.Sequential(torch.nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.Flatten(), nn.LazyLinear(10)), "is open until"),
            (nn.Sequential(torch.nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), nn.Flatten()),
             "^arch: 0.weight: computed from other tensors and kept, as by torch.nn.utils.weight_norm and prune; take"),
            (nn.Sequential(nn.Conv2d(3, 4, 3), Uncopied()), r"^arch: the network cannot be copied.*\(cannot pickle"),
            (nn.Sequential(nn.Conv2d(3, 4, 3), torch.jit.script(nn.ReLU())), "^arch: 1 is compiled by torch.jit")):
        with pytest.raises(UserError, match=message):
            trace(model, 8, 10)


def test_layers_whose_weight_is_computed_are_left_and_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    graph = trace(model, 4)
    assert list(graph.layers) == ["0", "4"] and any(name.startswith("3.") for name in graph.uncounted)


# ---------------------------------------------------------------------------------------------------------------------
# excepts: auto


def found(model, size):
    config, line = name_exceptions(IndicatorsConfig(), trace(model, size))
    return list(config.quan.excepts), line


@pytest.mark.parametrize(("arch", "names"), [
    ("resnet20", ["conv1", "bn1", "fc"]), ("mobilenetv1", ["stem.0", "stem.1", "fc"]),
    ("mobilenet_v2", ["features.0.0", "features.0.1", "classifier.1"]), ("regnet_y_400mf", ["stem.0", "stem.1", "fc"]),
    ("convnext_tiny", ["features.0.0", "classifier.2"]), ("vit_tiny_patch4_32", ["conv_proj", "heads.head"]),
    ("swin_t", ["features.0.0", "head"]), ("squeezenet1_0", ["features.0", "classifier.1"])])
def test_first_layer_its_batchnorm_and_classifier_are_found(arch, names):
    excepts, line = found(create_model(arch, 10, input_size=32), 32)
    assert excepts == names and all(name in line for name in names)
    assert f"{names[0]} (first layer)" in line and f"{names[-1]} (classifier)" in line


class Unordered(nn.Module):
    """Registered in another order than it is called, ending in a scale; its output comes from `a` alone."""

    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b, self.c = nn.Linear(4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Conv2d(3, 4, 3)

    def forward(self, x):
        x = self.b(self.bn(self.c(x)))
        return self.a(x.mean((2, 3))).mul(2).clamp(-9, 9)


def test_the_ends_come_from_the_graph_not_from_names():
    assert found(Unordered(), 8)[0] == ["c", "bn", "a"]


def test_a_network_without_convolutions_excepts_its_first_layer():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.ReLU(), nn.Linear(5, 5), nn.Linear(5, 2))
    assert found(model, 4)[0] == ["1", "4"]


class Branches(nn.Module):
    """Two convolutions see the image, two linear layers give the output, and a block's output is added to its input."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.norm, self.block, self.last = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.one, self.two = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        x = self.norm(self.wide(x)) + self.narrow(x)
        x = self.last(x + self.block(x)).mean((2, 3))
        return (self.one(x) + self.two(x)) / 2


class Beside(nn.Module):
    """A linear layer sees the image, beside a convolution."""

    def __init__(self):
        super().__init__()
        self.flat, self.conv, self.last, self.head = nn.Linear(192, 4), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.flat(x.flatten(1)) + self.last(self.conv(x)).mean((2, 3)))


class Residual(nn.Module):
    """Its output is a sum that reaches back to the first convolution."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.block(x)
        return (x + self.last(x)).mean((2, 3))


class Padded(nn.Conv2d):
    """No layer as torch has it, so it stays in full precision."""

    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))


def test_every_convolution_that_sees_the_image_and_every_layer_that_answers_is_an_exception():
    assert found(Branches(), 8)[0] == ["wide", "narrow", "norm", "one", "two"]
    assert found(Residual(), 8)[0] == ["stem", "last"]
    assert found(Beside(), 8)[0] == ["conv", "head"]


def test_a_convolution_that_stays_in_full_precision_leaves_nothing_else_to_be_first():
    model = nn.Sequential(Padded(3, 4, 2), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(4, 2))
    graph = trace(model, 8)
    assert found(model, 8)[0] == ["5"] and graph.uncounted == {"0.weight": 48} and graph.batchnorms == {"1": None}
    assert graph.non_layer_macs == {"0": 48 * 64}


def test_exceptions_that_are_named_stay_and_auto_is_what_is_not_written():
    graph = trace(create_model("resnet20", 10), 8)
    named = IndicatorsConfig(quan=QuanConfig(excepts={"layer1.0.conv1": ExceptionConfig()}))
    assert name_exceptions(named, graph) == (named, "")
    assert IndicatorsConfig().quan.excepts == "auto" and QuanConfig(excepts="none").excepts == {}


@pytest.mark.parametrize(("excepts", "message"), [
    ("auto", r"arch: no layer is left to be searched: 1 \(first layer\), 2 \(classifier\) have fixed bits"),
    ({"1": ExceptionConfig(), "2": ExceptionConfig()}, "quan.excepts: 1, 2 leave no layer to be searched")])
def test_exceptions_that_leave_nothing_to_search_are_refused(excepts, message):
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.Linear(5, 2))
    with pytest.raises(UserError, match=message):
        name_exceptions(IndicatorsConfig(quan=QuanConfig(excepts=excepts)), trace(model, 4))


class Borrowing(nn.Module):
    """A layer whose weight something else computes with."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(F.conv2d(self.stem(x), self.a.weight).mean((2, 3)))


def test_why_a_layer_is_not_searched_is_said_where_none_is_left():
    with pytest.raises(UserError, match=r"have fixed bits; left in full precision, .* 16 weights \(a.weight\)"):
        name_exceptions(IndicatorsConfig(), trace(Borrowing(), 4))


# ---------------------------------------------------------------------------------------------------------------------
# Subclasses of layers.


class Same(nn.Conv2d):
    """The layer that it comes from, with more to be asked for."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain, self.scale = 3.0, nn.Parameter(torch.full((1,), 2.0))

    @property
    def area(self):
        return self.kernel_size[0] * self.kernel_size[1]


class StillSame(Same):
    pass


class SameLinear(nn.Linear):
    def widths(self):
        return self.in_features, self.out_features


class ChangedInside(Same):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Cosine(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x), F.normalize(self.weight))


class Head(nn.Module):
    """A classifier that is no layer of torch's: a product with a matrix of its own."""

    def __init__(self):
        super().__init__()
        self.centres = nn.Parameter(torch.randn(5, 4))

    def forward(self, x):
        return x @ F.normalize(self.centres).T


class Asking(nn.Module):
    """A network that uses what its own layers know."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.fc = Same(3, 4, 3), StillSame(4, 4, 1, bias=False), SameLinear(4, 5)
        self.body.register_forward_hook(lambda module, inputs, output: output * module.gain)

    def forward(self, x):
        assert isinstance(self.body, StillSame) and self.fc.widths() == (4, 5)
        return self.fc((self.body(self.stem(x)) * self.body.scale + self.body.area).mean((2, 3)))


def test_a_subclass_that_computes_as_its_layer_is_that_layer_with_all_that_it_knows():
    torch.manual_seed(0)
    model, images = Asking(), torch.randn(2, 3, 8, 8)
    graph, expected = trace(model, 8, 5), model(images)
    assert list(graph.layers) == ["stem", "body", "fc"] and not graph.unquantizable
    assert graph.classifiers == graph.heads == ("fc",)
    excepts = name_exceptions(IndicatorsConfig(), graph)[0].quan.excepts
    signed = QuanConfig(act=ActQuantizerConfig(all_positive=False), excepts=excepts)
    names = set(model.state_dict())
    modules = policy_modules(model, graph, signed, {"body": 8}, {"body": 8}, {})
    tuned = replace_module_by_names(model, modules).train()
    assert isinstance(tuned.body, QuanConv2d) and isinstance(tuned.fc, QuanLinear)
    tuned(images)
    torch.testing.assert_close(tuned.eval()(images), expected, atol=0.3, rtol=0.05)
    assert {name for name in tuned.state_dict() if ".quan_" not in name} == names
    assert torch.equal(copy.deepcopy(tuned)(images), tuned(images))


@pytest.mark.parametrize(("layer", "why"), [
    (Padded(4, 4, 2), "its class Padded has a forward of its own"),
    (ChangedInside(4, 4, 1), "its class ChangedInside has a _conv_forward of its own"),
    (nn.ConvTranspose2d(4, 4, 1), "its class ConvTranspose2d is neither a Conv2d nor a Linear"),
    (nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), "its weight is computed from other tensors")])
def test_a_layer_that_computes_otherwise_is_named_with_why(layer, why):
    graph = trace(nn.Sequential(nn.Conv2d(3, 4, 1), layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)), 8)
    assert list(graph.layers) == ["0", "4"] and graph.unquantizable == {"1": why}
    assert f"1: {why}, so it stays in full precision" in graph.describe().splitlines()


def test_a_layer_whose_forward_was_replaced_is_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    model[1].forward = lambda x: x.relu()
    assert trace(model, 8).unquantizable == {"1": "it was given a forward of its own"}


@pytest.mark.parametrize("head", [Cosine(4, 5), Head(), nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))])
def test_a_classifier_that_cannot_be_quantized_makes_no_other_layer_the_classifier(head):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          head)
    graph = trace(model, 8, 5)
    assert graph.classifiers == () and graph.heads == ("5",) and graph.batchnorms == {"2": "1"}
    assert found(model, 8)[0] == ["0"]


def test_a_layer_that_feeds_itself_is_still_the_classifier():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.fc = nn.Linear(48, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(self.fc(self.stem(x.flatten(1))))

    assert trace(Again(), 4).classifiers == ("fc",)


def test_a_network_without_any_layer_that_can_be_quantized_is_told_why():
    with pytest.raises(UserError, match="^arch: no layer can be quantized; 0: its class Padded has a forward of its own"):
        trace(nn.Sequential(Padded(3, 4, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Cosine(4, 2)), 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Padded(4, 4, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(UserError, match="arch: no layer is left to be searched: .*; 1: its class Padded has a forward"):
        name_exceptions(IndicatorsConfig(), trace(model, 8))
    with pytest.raises(UserError, match="quan.excepts.1: asks for bits, but its class Padded"):
        entry = ExceptionConfig(weight=ExceptedQuantizerConfig(bit=4))
        name_exceptions(IndicatorsConfig(quan=QuanConfig(excepts={"1": entry})), trace(model, 8))
    with pytest.raises(UserError, match="arch: the shape of 1.weight is open until the network is called"):
        trace(nn.Sequential(nn.Flatten(), nn.LazyLinear(4)), 8)


def test_linear_layers_over_tokens_are_quantized():
    model = create_model("vit_tiny_patch4_32", 10, input_size=8)
    graph = trace(model, 8, 10)
    quan = QuanConfig(act=ActQuantizerConfig(all_positive=False),
                      excepts={name: ExceptionConfig() for name in ("conv_proj", "heads.head")})
    replace_module_by_names(model, joint_modules(model, graph, quan, [4]))
    assert sum(isinstance(module, QuanLinear) for module in model.modules()) == 24
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 10)
