"""Quantized layers against the plain operation on quantized tensors, and the replacement of modules by name."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import create_model
from model.layer_table import trace
from quan.bit_switch import BitSwitch
from quan.config import ExceptedQuantizerConfig, ExceptionConfig, QuanConfig, QuantizerConfig
from quan.cost import full_precision_cost, policy_cost
from quan.func import QuanConv2d, QuanLinear, SwitchableBatchNorm
from quan.quantizer import LsqQuan
from quan.utils import joint_modules, policy_modules, replace_module_by_names
from util.errors import UserError

BLANK = ExceptionConfig()


def quantizers(weight, channels=None):
    return LsqQuan([4], signed=True, channels=channels), LsqQuan([4], signed=True).train()


@pytest.mark.parametrize("options", [
    {"padding": 1}, {"padding": 2, "padding_mode": "reflect"}, {"groups": 2, "bias": False},
    {"dilation": 2, "stride": 2}, {"padding": "same", "padding_mode": "circular"}])
@pytest.mark.parametrize("channels", [None, 6])
def test_quantized_convolution_keeps_every_option(options, channels):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, **options)
    layer = QuanConv2d(conv, *quantizers(conv.weight, channels))
    x = torch.randn(2, 4, 9, 9)
    out = layer(x)
    twin = copy.deepcopy(conv)
    twin.weight.data = layer.quan_w_fn(layer.weight).detach()
    torch.testing.assert_close(out, twin(layer.quan_a_fn(x)))
    assert layer.weight is conv.weight and layer.bias is conv.bias
    assert not torch.allclose(out, conv(x))


@pytest.mark.parametrize("sat", [False, True])
def test_quantized_linear_layer_and_scale_adjusted_training(sat):
    torch.manual_seed(0)
    linear = nn.Linear(7, 5)
    layer = QuanLinear(linear, *quantizers(linear.weight), sat=sat)
    x = torch.randn(3, 7)
    weight = layer.quan_w_fn(layer.weight)
    scale = 1 / (5**0.5 * weight.std(unbiased=True).detach()) if sat else torch.tensor(1.0)
    torch.testing.assert_close(layer(x), F.linear(layer.quan_a_fn(x), weight * scale, linear.bias))
    torch.testing.assert_close(layer.eval()(x), layer.train()(x))
    layer(x).sum().backward()
    ours = layer.weight.grad.clone()
    layer.weight.grad = None
    F.linear(layer.quan_a_fn(x), layer.quan_w_fn(layer.weight) * scale, linear.bias).sum().backward()
    torch.testing.assert_close(ours, layer.weight.grad)


@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8), (2, 3, 4, 8), (1, 2, 3, 4, 8)])
@pytest.mark.parametrize(("bias", "sat"), [(True, False), (False, False), (True, True)])
def test_what_follows_a_quantized_layer_may_change_its_output_in_place(shape, bias, sat):
    torch.manual_seed(0)
    linear = nn.Linear(8, 5, bias=bias)
    layer, x = QuanLinear(linear, *quantizers(linear.weight), sat=sat), torch.randn(shape)
    gradients = []
    for activation in (torch.relu, torch.relu_):
        layer.zero_grad()
        activation(layer(x)).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in layer.parameters()])
    assert gradients[0][0].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_switchable_batchnorm_keeps_one_set_of_statistics_per_candidate():
    torch.manual_seed(0)
    bn = SwitchableBatchNorm(nn.BatchNorm2d(3), [4, 2]).train()
    bn.select(2)
    bn(torch.randn(4, 3, 5, 5) + 7)
    assert bn.bns[0].running_mean.abs().max() == 0
    assert bn.bns[1].running_mean.min() > 0.5


class Misleading(nn.Module):
    """Registered in an order, and under names, that say nothing of which BatchNorm follows which convolution."""

    def __init__(self):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(4)
        self.bn2 = nn.BatchNorm2d(4)
        self.bn3 = nn.BatchNorm2d(4)
        self.bn4 = nn.BatchNorm2d(4)
        self.conv3 = nn.Conv2d(4, 4, 1)
        self.conv1 = nn.Conv2d(4, 4, 1)
        self.conv2 = nn.Conv2d(3, 4, 1)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        x = self.bn3(self.conv2(x)).relu()
        y = self.bn1(self.conv3(x).relu())
        z = self.conv1(x)
        return self.fc(self.bn4(z + self.bn2(z) + y).mean((2, 3)))


def test_pairing_of_batchnorms_comes_from_the_graph():
    graph = trace(Misleading(), 8)
    assert list(graph.layers) == ["conv2", "conv3", "conv1", "fc"]
    assert graph.batchnorms == {"bn3": "conv2", "bn1": "conv3", "bn2": "conv1", "bn4": None}


def test_batchnorms_follow_the_bits_of_the_layer_before_them():
    model = Misleading()
    graph, excepts, bits = trace(model, 8), {"conv2": BLANK, "fc": BLANK}, [2, 4, 3]
    replace_module_by_names(model, joint_modules(model, graph, QuanConfig(excepts=excepts), bits))
    switch = BitSwitch(model, graph, excepts, bits)
    switch.policy({"conv3": 2, "conv1": 3})
    selected = {name: bits[getattr(model, name).index] for name in ("bn1", "bn2", "bn3", "bn4")}
    assert selected == {"bn1": 2, "bn2": 3, "bn3": 4, "bn4": 4}  # after an exception, or a sum: the highest
    assert bits[model.conv3.quan_w_fn.index] == 2 and bits[model.conv1.quan_a_fn.index] == 3
    switch.uniform(3)
    assert {bits[getattr(model, name).index] for name in ("bn1", "bn2", "bn3", "bn4")} == {3}


def test_exceptions_are_left_alone_in_joint_training_and_get_fixed_bits_in_fine_tuning():
    excepts = {"conv1": BLANK, "bn1": BLANK, "fc": BLANK}
    model = create_model("resnet20", 10)
    graph = trace(model, 32)
    joint = joint_modules(model, graph, QuanConfig(excepts=excepts), [4, 2])
    assert "conv1" not in joint and "fc" not in joint and type(joint["bn1"]).__name__ == "ExceptedBatchNorm"
    names = [name for name in graph.layers if name not in excepts]
    bits = dict.fromkeys(names, 3)
    tuned = policy_modules(model, graph, QuanConfig(excepts=excepts), bits, bits, {names[0]: True}, scaled=["fc"])
    assert tuned["conv1"].quan_w_fn.bits == (8,) and not list(tuned["conv1"].quan_a_fn.parameters())
    assert tuned["fc"].quan_w_fn.bits == (8,) and tuned["fc"].quan_a_fn.bits == (8,) and tuned["fc"].sat
    assert tuned[names[0]].quan_a_fn.signed and not tuned[names[1]].quan_a_fn.signed
    assert not any(name.startswith("bn") for name in tuned)


def test_only_images_are_left_alone_other_exceptions_that_are_convolutions_get_8_bits_in_both():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(),
                          nn.Conv2d(4, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    graph = trace(model, 8)
    tuned = policy_modules(model, graph, QuanConfig(excepts=dict.fromkeys("046", BLANK)), {"2": 3}, {"2": 3}, {})
    acts = {name: layer.quan_a_fn.bits for name, layer in tuned.items()}
    assert acts == {"0": (), "2": (3,), "4": (8,), "6": (8,)}
    assert {layer.quan_w_fn.bits for layer in tuned.values()} == {(8,), (3,)}


def test_an_exception_at_bits_of_its_own():
    entry = ExceptionConfig(weight=ExceptedQuantizerConfig(bit=5), act=ExceptedQuantizerConfig(bit=6, all_positive=False))
    model = create_model("resnet20", 10)
    config = QuanConfig(act=QuantizerConfig(all_positive=True), excepts={"conv1": entry})
    layer = joint_modules(model, trace(model, 32), config, [4, 2])["conv1"]
    assert layer.quan_w_fn.bits == (5,) and layer.quan_a_fn.bits == (6,) and layer.quan_a_fn.signed


def test_a_misspelt_exception_is_refused_with_the_nearest_name():
    model = create_model("resnet20", 10)
    with pytest.raises(UserError, match=r"quan.excepts.layer1.0.con1: .*did you mean 'layer1.0.conv1'"):
        joint_modules(model, trace(model, 32), QuanConfig(excepts={"layer1.0.con1": BLANK}), [4])


class Odd(nn.Module):
    """A used-twice layer, a layer that is never reached, a grouped and a strided one."""

    def __init__(self):
        super().__init__()
        self.twice = nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False)
        self.strided = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.unused = nn.Linear(5, 5)
        self.fc = nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(self.strided(self.twice(self.twice(x))).mean((2, 3)))


def test_macs_parameters_and_elements_of_each_layer():
    graph = trace(Odd(), 10)
    assert graph.uncounted == {"unused.weight": 25} and "25 weights (unused.weight)" in graph.describe()
    rows = {name: (call.macs_published, call.macs_exact, call.params, call.act_elements)
            for name, call in graph.layers.items()}
    # (10 - 3) / 2 + 1 = 4.5 before rounding down: int(4.5 * 4.5) = 20 against 16 outputs
    assert rows == {"twice": (5400, 5400, 27, 600), "strided": (216 * 20, 216 * 16, 216, 300), "fc": (16, 16, 16, 8)}


def test_macs_of_resnet50_and_mobilenetv1_are_those_of_the_literature():
    for arch, millions in {"resnet50": 4089.2, "mobilenetv1": 568.7}.items():
        layers = trace(create_model(arch, 1000), 224).layers.values()
        assert sum(call.macs_exact for call in layers) / 1e6 == pytest.approx(millions, abs=0.05)


def test_cost_of_a_policy():
    layers = trace(Odd(), 10).layers
    cost = policy_cost(layers, {"twice": 2, "strided": 3}, {"twice": 4, "strided": 5})
    bits = 27 * 2 + 216 * 3 + 16 * 8
    assert cost["size_mb"] == bits / 8 / 2**20 and cost["ratio"] == 32 * 259 / bits
    assert cost["gbitops"] == pytest.approx((5400 * 8 + 4320 * 15 + 16 * 64) / 1e9, rel=1e-12)
    assert full_precision_cost(layers)["gbitops_exact"] == pytest.approx((5400 + 3456 + 16) * 1024 / 1e9, rel=1e-12)
