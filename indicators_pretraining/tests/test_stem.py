"""The stem of a network, computed once for all passes of a joint step, against computing it in each."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import process
from engine.passes import Passes
from model.model import OWN_MODELS, create_traced
from quan.bit_switch import BitSwitch
from quan.config import ActQuantizerConfig, ExceptionConfig, QuanConfig
from quan.func import QuanConv2d
from quan.quantizer import LsqQuan
from quan.stem import SharedStem, find_stem
from quan.utils import joint_modules, replace_module_by_names

BITS = [4, 3, 2]
EXCEPTS = ("conv1", "bn1", "fc")


class Thin(nn.Module):
    """The stem of a ResNet, one convolution beside a shortcut, and a classifier."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.conv2, self.bn2, self.fc = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc((self.bn2(self.conv2(x)) + x).relu().mean((2, 3)))


@pytest.fixture(autouse=True)
def thin(monkeypatch):
    monkeypatch.setitem(OWN_MODELS, "thin", Thin)


def joint_network(arch, excepts, size, seed=0, input_size=None):
    torch.manual_seed(seed)
    model, graph = create_traced(arch, 10, False, input_size or size)
    excepts = {name: ExceptionConfig() for name in excepts}
    replace_module_by_names(model, joint_modules(model, graph, QuanConfig(act=ActQuantizerConfig(), excepts=excepts), BITS))
    return model.double().train(), BitSwitch(model, graph, excepts, BITS)


@pytest.mark.parametrize("arch, excepts, size, expected", [
    ("resnet18", EXCEPTS, 32, ["conv1", "bn1", "relu", "maxpool"]),
    ("thin", EXCEPTS, 32, ["conv1", "bn1", "relu", "maxpool"]),
    ("thin", ("conv1", "fc"), 32, ["conv1"]),  # its BatchNorm has a copy for each candidate
    ("thin", (), 32, []),
    ("mobilenetv1", ("stem.0", "stem.1"), 32, ["stem.0", "stem.1", "stem.2"])])
def test_the_stem_ends_where_bit_widths_begin(arch, excepts, size, expected):
    model, _ = joint_network(arch, excepts, size)
    assert find_stem(model, size) == expected


class Net(nn.Module):
    """conv, norm and act, then a quantized convolution, put together as `variant` says."""

    def __init__(self, variant="plain"):
        super().__init__()
        self.variant = variant
        self.conv, self.norm, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        conv = nn.Conv2d(3, 3, 3, padding=1)
        self.quantized = QuanConv2d(conv, LsqQuan(BITS, signed=True), LsqQuan(BITS, signed=True))

    def forward(self, x):
        size = x.shape[-2:] if self.variant == "size of images" else 8
        if self.variant == "noise in training" and self.training:
            x = x + torch.randn_like(x)
        y = self.conv(x) if x.device.type else None  # asking for the device is no use
        if self.variant == "size of images":
            return self.quantized(F.interpolate(self.act(self.norm(y)), size))
        if self.variant == "size of conv":
            return self.quantized(F.interpolate(self.act(self.norm(y)), y.shape[-2:]))
        if self.variant == "dropout in place":
            return self.quantized(F.dropout(self.norm(y), training=self.training, inplace=True))
        if self.variant == "a decision by values" and y.sum() > 0:
            return self.quantized(y)
        if self.variant == "shortcut of conv":
            return self.quantized(self.act(self.norm(y))) + y
        y = self.norm(y)
        if self.variant == "shortcut of images":
            return self.quantized(self.act(y)) + x
        if self.variant == "function":
            return self.quantized(F.relu(y))
        if self.variant == "in place":
            y.relu_()
            return self.quantized(y)
        if self.variant == "dropout":
            return self.quantized(self.drop(y))
        y = self.act(y)
        if self.variant == "used twice":
            return self.quantized(self.conv(y))
        if self.variant == "two users":
            return self.quantized(y) + y
        if self.variant == "a quantized user before":
            return self.quantized(x) + self.quantized(y)
        return self.quantized(y)


@pytest.mark.parametrize("variant, expected", [
    ("plain", ["conv", "norm", "act"]), ("shortcut of conv", ["conv"]), ("shortcut of images", []),
    ("function", ["conv", "norm"]), ("in place", ["conv"]), ("dropout", ["conv", "norm"]), ("used twice", []),
    ("two users", ["conv", "norm", "act"]), ("a quantized user before", []), ("size of images", []),
    ("size of conv", ["conv"]), ("noise in training", []), ("dropout in place", ["conv"]), ("a decision by values", [])])
def test_what_others_use_or_change_is_not_shared(variant, expected):
    assert find_stem(Net(variant), 8) == expected


def test_a_module_that_computes_something_else_than_its_type_says_is_not_shared():
    hooked, patched = Net(), Net()
    hooked.norm.register_forward_hook(lambda module, inputs, output: 2 * output)
    patched.norm.forward = lambda x: 2 * x
    assert find_stem(hooked, 8) == find_stem(patched, 8) == ["conv"]
    assert find_stem(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), Net()), 8) == []


@pytest.mark.parametrize("size", [8, 16])
def test_a_network_that_asks_for_the_size_of_its_images_can_be_trained(size):
    model, switch = joint_network("vit_tiny_patch4_32", ("conv_proj", "heads.head"), size, input_size=size)
    images, target = torch.randn(2, 3, size, size, dtype=torch.float64), torch.tensor([1, 2])
    passes = Passes(model, stem=SharedStem(model, find_stem(model, size), len(BITS) + 1))
    process.joint_gradients(model, switch, images, target, nn.CrossEntropyLoss(), dict.fromkeys(switch.layers, 3),
                            passes=passes)
    assert model.conv_proj.weight.grad.abs().sum() > 0


def step_of(model, switch, stem, passes=2):
    """{name: gradient} and buffers after joint steps on fixed batches."""
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    target = torch.tensor([1, 2, 3, 4])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    chosen = {name: BITS[index % 3] for index, name in enumerate(switch.layers)}
    for _ in range(passes):
        process.joint_step(model, switch, images, target, nn.CrossEntropyLoss(), optimizer, chosen,
                           passes=Passes(model, stem=stem))
    return {name: parameter.grad for name, parameter in model.named_parameters()}, dict(model.named_buffers())


@pytest.mark.parametrize("excepts", [EXCEPTS, ("conv1", "bn1"), ("conv1",), ()])
def test_gradients_and_statistics_are_those_of_computing_it_in_each_pass(excepts):
    model, switch = joint_network("thin", excepts, 32)
    twin, twin_switch = joint_network("thin", excepts, 32)
    gradients, buffers = step_of(model, switch, SharedStem(model, find_stem(model, 32), len(BITS) + 1))
    wanted, wanted_buffers = step_of(twin, twin_switch, None)
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")
    for name, buffer in wanted_buffers.items():
        torch.testing.assert_close(buffers[name], buffer, rtol=1e-7, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")


def test_the_stem_is_computed_once_and_the_network_is_itself_again_afterwards():
    model, switch = joint_network("thin", EXCEPTS, 32)
    stem, calls = SharedStem(model, find_stem(model, 32), len(BITS) + 1), []
    model.conv1.register_forward_hook(lambda *_: calls.append(1))
    step_of(model, switch, stem, passes=1)
    assert len(calls) == 1 + len(BITS) + 1  # once in truth, and once in each pass as what hands its input on
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_error_in_a_pass_leaves_the_network_as_it_was():
    model, _ = joint_network("thin", EXCEPTS, 32)
    stem = SharedStem(model, find_stem(model, 32), 4)
    images = torch.zeros(2, 3, 32, 32, dtype=torch.float64)
    with pytest.raises(ZeroDivisionError), stem.computed_once(images, contextlib.nullcontext()):
        raise ZeroDivisionError
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_frozen_stem_passes_no_gradient():
    model, switch = joint_network("thin", EXCEPTS, 32)
    for module in (model.conv1, model.bn1):
        module.requires_grad_(False)
    before = copy.deepcopy(model.conv1.weight)
    step_of(model, switch, SharedStem(model, find_stem(model, 32), 4), passes=1)
    assert model.conv1.weight.grad is None and torch.equal(before, model.conv1.weight)
