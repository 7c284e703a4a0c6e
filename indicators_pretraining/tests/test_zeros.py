"""A quantizer that meets nothing but zeros takes neither sign nor step size from them, and nothing is lost by waiting."""

import copy

import pytest
import torch
from torch import nn

from model.layer_table import trace
from process import joint_step
from quan.bit_switch import BitSwitch
from quan.config import QuanConfig, QuantizerConfig
from quan.quantizer import LsqQuan
from quan.utils import joint_modules, name_exceptions, replace_module_by_names, signedness_in_use, step_quantizers
from schema import IndicatorsConfig


def test_zeros_decide_nothing():
    quantizer = LsqQuan([4, 2], signed=None).train()
    for x in (torch.zeros(8), torch.zeros(8, requires_grad=True), torch.zeros(0)):
        out = quantizer(x)
        assert not out.any() and quantizer.signed is None
        assert quantizer.s.tolist() == [1, 1] and quantizer.init_state.tolist() == [0, 0] and not quantizer.is_initialized
    x = torch.zeros(8, requires_grad=True)
    quantizer(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(8)) and not quantizer.s.grad.any()
    fresh = LsqQuan([4, 2], signed=None).train()
    for each in (quantizer, fresh):
        each(torch.tensor([-1.0, 2.0]))
        each(torch.zeros(8))
    assert quantizer.signed and torch.equal(quantizer.s, fresh.s) and quantizer.init_state.tolist() == [1, 0]


def test_a_given_sign_does_not_make_zeros_a_value():
    quantizer = LsqQuan([4], signed=False).train()
    quantizer(torch.zeros(8))
    assert quantizer.init_state.tolist() == [0]
    quantizer(torch.full((8,), 0.5))
    assert quantizer.s.item() == pytest.approx(2 * 0.5 / 15**0.5)


@pytest.mark.parametrize("channels", [None, 3])
def test_a_weight_of_zeros_waits_for_one_that_is_not(channels):
    weight, later = torch.zeros(3, 4, requires_grad=True), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    quantizer, wanted = (LsqQuan([4, 2], signed=True, channels=channels).train() for _ in range(2))
    quantizer.init_from_weight(weight)
    wanted.init_from_weight(later)
    quantizer(weight).sum().backward()
    assert torch.equal(weight.grad, torch.ones(3, 4)) and not quantizer.s.grad.any() and not quantizer.is_initialized
    assert torch.equal(quantizer.s, torch.ones_like(quantizer.s))
    quantizer.eval()(later)
    assert not quantizer.is_initialized
    quantizer.train()(later)
    assert torch.equal(quantizer.s, wanted.s) and quantizer.init_state.tolist() == [1, 1]


def test_a_weight_that_waits_knows_what_is_pruned_of_it():
    kept = torch.tensor([[True, False], [True, True]])
    quantizer = LsqQuan([4], signed=True).train()
    quantizer.init_from_weight(torch.zeros(2, 2), kept)
    quantizer(torch.tensor([[1.0, 0], [2, 3]]))
    assert quantizer.s.item() == pytest.approx(2 * 2 / 7**0.5)
    quantizer.init_from_weight(torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.bool))  # nothing is left that could grow
    assert quantizer.is_initialized and quantizer.s.item() == pytest.approx(1e-5)


def test_a_channel_of_zeros_takes_the_step_of_the_others_and_learns():
    weight = torch.tensor([[1.0, -1.0], [0, 0], [3, 3]], requires_grad=True)
    quantizer = LsqQuan([4], signed=True, channels=3)
    quantizer.init_from_weight(weight)
    assert quantizer.s[0].tolist() == pytest.approx([2 / 7**0.5, 4 / 7**0.5, 6 / 7**0.5])
    quantizer(weight).sum().backward()
    assert weight.grad[1].tolist() == [1, 1]


class ZeroBranch(nn.Module):
    """A residual branch that ends in a convolution which begins at zero, and one more that sees nothing else."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.outer = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.behind, self.fc = nn.Conv2d(6, 6, 1, bias=False), nn.Linear(6, 2)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, x):
        branch = self.behind(self.outer(torch.relu(self.inner(self.stem(x)))))
        return self.fc(branch.square().mean((2, 3)) + branch.mean((2, 3)))


def joint(per_channel=False):
    torch.manual_seed(0)
    model = ZeroBranch()
    graph = trace(model, 8)
    quan = QuanConfig(weight=QuantizerConfig(per_channel=per_channel))
    config, _ = name_exceptions(IndicatorsConfig(target_bits=[4, 3], quan=quan), graph)
    replace_module_by_names(model, joint_modules(model, graph, config.quan, config.target_bits))
    return model.train(), BitSwitch(model, graph, config.quan.excepts, config.target_bits)


def steps_of(model, switch, optimizer, count, seed):
    """The losses at the highest bit-width in some joint steps; the images of one class are the brighter ones."""
    draws, losses = torch.Generator().manual_seed(seed), []

    def criterion(logits, target):
        losses.append(nn.functional.cross_entropy(logits, target))
        return losses[-1]

    for _ in range(count):
        target = torch.randint(2, (16,), generator=draws)
        images = torch.randn(16, 3, 8, 8, generator=draws) + target[:, None, None, None]
        joint_step(model, switch, images, target, criterion, optimizer, None)
    return [float(loss.detach()) for loss in losses[::2]]


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_branch_that_begins_at_zero_trains_and_is_resumed_exactly(per_channel):
    model, switch = joint(per_channel)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    waiting = {"outer.quan_w_fn", "behind.quan_a_fn"}
    found = {name for name, quantizer in step_quantizers(model).items() if quantizer._initialized == [False, False]}
    assert found >= {"outer.quan_w_fn"}
    steps_of(model, switch, optimizer, 1, 0)
    assert {name for name, quantizer in step_quantizers(model).items() if not quantizer.is_initialized} == waiting
    assert "behind" not in signedness_in_use(model) and model.outer.weight.any()
    state, resting = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    resumed, resumed_switch = joint(per_channel)
    resumed.load_state_dict(state)
    for name, signed in signedness_in_use(model).items():
        resumed.get_submodule(name).quan_a_fn.signed = signed
    other = torch.optim.SGD(resumed.parameters(), 0.1, momentum=0.9)
    other.load_state_dict(resting)
    steps_of(model, switch, optimizer, 2, 1)
    steps_of(resumed, resumed_switch, other, 2, 1)
    assert all(quantizer.is_initialized for quantizer in step_quantizers(model).values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    losses = steps_of(model, switch, optimizer, 60, 2)
    assert sum(losses[-10:]) / 10 < 0.3 < sum(losses[:10]) / 10
