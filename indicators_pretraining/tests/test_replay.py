"""Outputs computed anew from a changed layer on equal those of the whole network, bit for bit."""

import pytest
import torch
import torch.nn.functional as F
from test_joint_training import jointly_quantized
from torch import nn

from quan.utils import weights_quantized_once
from replay import Replay


class Odd(nn.Module):
    """In-place additions and activations, one layer used twice, a layer that passes over, an output that is a view."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 5)
        self.norm, self.relu, self.same = nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Identity()

    def forward(self, x):
        x = self.relu(self.norm(self.a(x)))
        y = self.same(self.b(x))
        y += x
        z = self.b(F.relu_(y))
        z.mul_(2).add_(y)
        return self.c(z.flatten(2).transpose(1, 2)).mean(1)


@torch.no_grad()
@pytest.mark.parametrize("name", ["a", "b", "c", "norm"])
def test_a_changed_layer_gives_what_the_whole_network_gives(name):
    torch.manual_seed(0)
    model, images = Odd().eval(), torch.randn(2, 3, 6, 6)
    before = model(images)
    replay = Replay(model, images)
    assert torch.equal(replay.output, before)
    for factor in (2, 0.5):
        model.get_submodule(name).weight.mul_(factor)
        found = replay.output_after_change(name)
        assert torch.equal(found, model(images)) and (factor == 0.5 or not torch.equal(found, before))
    assert torch.equal(replay.output_after_change(name), before)
    assert not any("forward" in vars(module) for module in model.modules())


@torch.no_grad()
def test_only_what_follows_the_layer_is_computed():
    model, switch = jointly_quantized()
    images = torch.rand(4, 3, 9, 9, dtype=torch.float64)
    model(images)
    model.eval()
    with weights_quantized_once(model):
        calls = []
        for name in ("stem", "bn_first", "second", "fc"):
            note_calls(model.get_submodule(name), name, calls)
        replay = Replay(model, images)
        switch.layers["second"].select(2)
        calls.clear()
        found = replay.output_after_change("second")
        assert calls == ["second", "fc"] and torch.equal(found, model(images))


def note_calls(module, name, calls):
    forward = module.forward
    module.forward = lambda x: calls.append(name) or forward(x)
