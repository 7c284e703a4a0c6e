"""Memory layout: channels last, or contiguous where a network needs it; convolutions that corrupt memory in torch; images
that a network changes in place."""

import ctypes.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engine.passes import Passes, to_device
from model.layer_table import trace
from process import joint_gradients
from quan.bit_switch import BitSwitch
from quan.utils import joint_modules, name_exceptions, replace_module_by_names
from schema import IndicatorsConfig

CPU = torch.device("cpu")
SIZE = 8


class Tutorial(nn.Module):
    """As PyTorch's own tutorial: a convolution, and x.view(-1, n) behind it."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(64, 3)

    def forward(self, x):
        return self.fc(self.flat(F.max_pool2d(self.conv2(F.relu(self.conv1(x))), 2)))

    def flat(self, x):
        return x.view(-1, 64)


class MergesImages(Tutorial):
    def flat(self, x):
        return x.view(x.shape[0] * x.shape[1], -1).view(x.shape[0], -1)


class InTraining(Tutorial):
    def flat(self, x):
        return x.view(-1, 64) if self.training else x.flatten(1)


class LooksAtValues(Tutorial):
    def flat(self, x):
        return x.view(-1, 64) if float(x.sum()) < float("inf") else x


class Strided(Tutorial):
    def flat(self, x):
        return torch.as_strided(x, (x.shape[0], 64), (64, 1))


class OwnConvolution(Tutorial):
    def __init__(self):
        super().__init__()
        self.own = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.fc = nn.Linear(16, 3)

    def flat(self, x):
        return F.conv2d(x, self.own, stride=2).flatten(1)


class Complex(Tutorial):
    """A filter in the frequency domain, as GFNet has it: a parameter [h, w, c, 2]."""

    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.randn(4, 3, 4, 2))

    def flat(self, x):
        spectrum = torch.fft.rfft2(x.permute(0, 2, 3, 1), dim=(1, 2)) * torch.view_as_complex(self.filter)
        return torch.fft.irfft2(spectrum, s=(4, 4), dim=(1, 2)).flatten(1)


class FiveDimensions(Tutorial):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 4, 1, 1, 1))

    def flat(self, x):
        return (x[..., None] * self.scale).flatten(1)


class FlatWeight(Tutorial):
    """A weight that is looked at row by row, as weight standardization does."""

    def flat(self, x):
        return x.flatten(1) * self.conv2.weight.view(4, -1).std(1).mean()


def joint(model, bits=(4, 2)):
    graph = trace(model, SIZE)
    config, _ = name_exceptions(IndicatorsConfig(target_bits=list(bits)), graph)
    replace_module_by_names(model, joint_modules(model, graph, config.quan, config.target_bits))
    return to_device(model, CPU, graph), BitSwitch(model, graph, config.quan.excepts, config.target_bits), graph


@pytest.mark.parametrize("kind", [Tutorial, MergesImages, InTraining, LooksAtValues, Strided, OwnConvolution, Complex,
                                  FiveDimensions, FlatWeight])
def test_a_network_that_needs_contiguous_memory_gets_it(kind):
    torch.manual_seed(0)
    images, plain = torch.randn(4, 3, SIZE, SIZE), kind()
    wanted = plain(images)
    graph = trace(plain, SIZE, 3)
    assert graph.contiguous and "contiguous" in graph.describe()
    moved = to_device(plain, CPU, graph)
    assert torch.allclose(moved(images), wanted, atol=1e-5)
    model, switch, _ = joint(kind())
    for training in (True, False):
        switch.uniform(2)
        model.train(training)(images).sum().backward()


@pytest.mark.parametrize("flat", [
    lambda x: x.flatten(1), lambda x: x.view(x.shape[0], x.shape[1], -1).flatten(1), lambda x: x.reshape(-1, 64),
    lambda x: x.contiguous().view(-1, 64),
    lambda x: F.conv2d(x.repeat(1, 4, 1, 1), torch.ones(16, 16, 1, 1, device=x.device), stride=2).flatten(1)])  # 16 channels
def test_others_stay_channels_last(flat):
    model = Tutorial()
    model.flat = flat
    graph = trace(model, SIZE, 3)
    assert not graph.contiguous and not graph.describe_layout()
    assert to_device(model, CPU, graph).conv2.weight.is_contiguous(memory_format=torch.channels_last)


def test_the_look_at_the_layout_draws_no_random_numbers():
    model = nn.Sequential(LooksAtValues(), nn.Dropout())
    torch.manual_seed(0)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    trace(model, SIZE)
    assert torch.rand(1) == wanted


@pytest.mark.parametrize(("channels", "stride", "padding", "mode"), [
    (3, 2, 0, "zeros"), (5, (1, 3), 1, "zeros"), (1, (2, 1), (2, 0), "zeros"), (7, 4, 1, "reflect"), (4, 2, 2, "circular"),
    (3, 2, "valid", "zeros")])
def test_a_strided_pointwise_convolution_keeps_its_values_and_gradients(channels, stride, padding, mode):
    torch.manual_seed(0)
    plain = nn.Conv2d(channels, 6, 1, stride, padding, padding_mode=mode).double()
    images = torch.randn(3, channels, 9, 8, dtype=torch.double, requires_grad=True)
    wanted = plain(images)
    gradients = torch.autograd.grad(wanted.square().sum(), (images, *plain.parameters()))
    moved = to_device(plain, CPU)
    assert "_conv_forward" in vars(moved)
    found = moved(images)
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)
    for one, other in zip(torch.autograd.grad(found.square().sum(), (images, *moved.parameters())), gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)
    assert torch.allclose(moved(images[0]), wanted[0], rtol=1e-12, atol=1e-12)


def test_other_convolutions_are_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 32, 3, 2), nn.Conv2d(32, 3, 1, 2), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1, 2, groups=3))
    assert not any("_conv_forward" in vars(module) for module in to_device(model, CPU))


CRASHING = f"""
import copy, sys
sys.path[:0] = [{str(Path(__file__).parents[1])!r}, {str(Path(__file__).parent)!r}]
import torch
from torch import nn
from test_layout import CPU, SIZE, joint, trace, to_device
from process import joint_step
from engine.loop import training_step
from engine.metrics import Metrics, evaluate

torch.set_num_threads(1)
for channels in (3, 5):
    make = lambda: nn.Sequential(nn.Conv2d(3, 8, 1, 2), nn.ReLU(), nn.Conv2d(8, channels, 3, padding=1),
                                 nn.Conv2d(channels, 8, 1, 2), nn.Flatten(), nn.Linear(32, 3))
    images, target, blocks = torch.randn(4, 3, SIZE, SIZE), torch.randint(3, (4,)), []
    model = make()
    plain = to_device(make(), CPU, trace(model, SIZE))
    model, switch, _ = joint(model)
    optimizers = [torch.optim.SGD(network.parameters(), 0.01) for network in (plain, model)]
    criterion = nn.CrossEntropyLoss()
    for step in range(12):
        training_step(plain, [(images, target)], lambda logits, _, wanted: criterion(logits, wanted), optimizers[0],
                      Metrics(CPU))
        joint_step(copy.deepcopy(model), switch, images, target, criterion, optimizers[1], None)
        joint_step(model, switch, images, target, criterion, optimizers[1], dict.fromkeys(switch.layers, 2))
        blocks = [*blocks[-3:], torch.randn(step + 3)]
    evaluate(model, [(images, target)])
"""


def test_no_convolution_ends_a_run():
    checking = ctypes.util.find_library("c_malloc_debug")  # glibc's, which notices a write past the end of a block
    found = {"LD_PRELOAD": checking, "MALLOC_CHECK_": "3"} if checking else {}
    done = subprocess.run([sys.executable, "-c", CRASHING], capture_output=True, text=True, timeout=120, check=False,
                          env=os.environ | found)
    assert done.returncode == 0, done.stderr[-2000:]


# ---------------------------------------------------------------------------------------------------------------------
# Images that a network changes in place.


class Normalises(Tutorial):
    def forward(self, x):
        return super().forward(x.sub_(0.3))


class ScalesAChannel(Tutorial):
    def forward(self, x):
        x[:, 0] *= 2
        return super().forward(x)


class BehindAutogradsBack(Tutorial):
    def forward(self, x):
        x.data.mul_(2)
        return super().forward(x)


class OnlyInTraining(Tutorial):
    def forward(self, x):
        return super().forward(x.mul_(2) if self.training else x)


class RectifiesBehindTheFirst(Tutorial):
    """Changes the output of its first layer."""

    def forward(self, x):
        return self.fc(self.conv2(self.conv1(x).mul_(2))[..., ::2, ::2].flatten(1))


def changing(kind):
    torch.manual_seed(0)
    return nn.Sequential(nn.ReLU(inplace=True), Tutorial()) if kind is nn.ReLU else kind()


CHANGING = [Normalises, ScalesAChannel, BehindAutogradsBack, OnlyInTraining, nn.ReLU, RectifiesBehindTheFirst]


@pytest.mark.parametrize("kind", CHANGING)
def test_all_passes_of_a_joint_step_see_the_same_images(kind):
    model, switch, _ = joint(changing(kind), (4, 3, 2))
    images, target = torch.randn(8, 3, SIZE, SIZE), torch.arange(8) % 3
    criterion, chosen = nn.CrossEntropyLoss(), dict.fromkeys(switch.layers, 3)
    switch.uniform(4)
    for bit in switch.bits:  # step sizes take their values from data
        switch.uniform(bit)
        model.train()(images.clone())
    wanted = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for select in [*(lambda bit=bit: switch.uniform(bit) for bit in switch.bits), lambda: switch.policy(chosen)]:
        select()
        model.zero_grad()
        criterion(model(images.clone()), target).backward()
        for name, parameter in model.named_parameters():
            wanted[name] += 0 if parameter.grad is None else parameter.grad
    model.zero_grad()
    joint_gradients(model, switch, images, target, criterion, chosen, passes=Passes(model))
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("kind", CHANGING)
def test_images_stay_as_they_are(kind):
    model, _, graph = joint(changing(kind))
    assert graph.changes_images == (kind is not RectifiesBehindTheFirst)
    images = torch.randn(4, 3, SIZE, SIZE)
    before = images.clone()
    for training in (True, False):
        model.train(training)(images)
        assert torch.equal(images, before)


def test_an_ordinary_network_gets_the_images_themselves():
    model, _, _ = joint(Tutorial())
    images, met = torch.randn(2, 3, SIZE, SIZE), []
    model.conv1.register_forward_pre_hook(lambda module, inputs: met.append(inputs[0]))
    model(images)
    assert met[0] is images
