"""The schedule and the loop that every training shares, against numbers worked out by hand."""

import math
import random
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import process
from engine import interruption
from engine.loop import Hooks, Training, grouped, not_finite, training_step
from engine.metrics import Metrics
from engine.optim import learning_rate
from quan.quantizer import LsqQuan
from quan.utils import keep_steps_positive
from schema import IndicatorsConfig
from util import distributed
from util.errors import Interrupted, UserError

CPU = torch.device("cpu")


def rates(times, **changes):
    config = IndicatorsConfig(**{"epochs": 10, "warmup_epochs": 2, "lr": 1.0, "warmup_lr": 0.2, "min_lr": 0.1, **changes})
    return [learning_rate(config, time) for time in times]


@pytest.mark.parametrize(("changes", "points"), [
    ({}, {0: 0.2, 0.5: 0.4, 1: 0.6, 2: 1.0, 4: 0.1 + 0.9 * (0.5 + math.sqrt(0.125)), 6: 0.55,
          8: 0.1 + 0.9 * (0.5 - math.sqrt(0.125)), 10: 0.1}),
    ({"warmup_lr": 3.0}, {0: 3.0, 1: 2.0, 2: 1.0}),
    ({"cooldown_epochs": 3}, {6: 0.55, 10: 0.1, 11.5: 0.1, 13: 0.1}),
    ({"cooldown_epochs": 3, "sched": "step", "decay_epochs": 6, "min_lr": 0.0}, {10: 0.1, 12.5: 0.1}),
    ({"warmup_epochs": 0, "sched": "step", "decay_epochs": 3, "decay_rate": 0.5}, {0: 1, 2.99: 1, 3: 0.5, 5.99: 0.5, 6: 0.25,
                                                                                9: 0.125}),
    ({"warmup_epochs": 0, "sched": "step", "decay_epochs": 1.5, "decay_rate": 0.5}, {1.49: 1, 1.5: 0.5, 3: 0.25, 9: 0.1}),
    ({"warmup_epochs": 0, "sched": "multistep", "decay_epochs": [0.5, 3.0], "decay_rate": 0.5}, {0.4: 1, 0.5: 0.5, 3: 0.25}),
    ({"sched": "constant"}, {1: 0.6, 2: 1, 9.9: 1, 12: 1})])
def test_the_learning_rate_is_that_of_the_schedule(changes, points):
    assert rates(points, **changes) == pytest.approx(list(points.values()), rel=1e-12)


@pytest.mark.parametrize(("changes", "message"), [
    ({"warmup_epochs": 10}, r"^warmup_epochs: found 10, allowed is less than epochs \(10\)"),
    ({"min_lr": 1.5}, r"^min_lr: found 1.5, allowed is at most lr \(1\)")])
def test_a_schedule_that_cannot_be_followed_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        rates([], **changes)


def test_bounds_of_a_schedule_can_be_followed():
    assert rates([9.5], warmup_epochs=9.9, min_lr=1.0) == pytest.approx([0.2 + 0.8 * 9.5 / 9.9])
    assert rates([0], epochs=1, warmup_epochs=0) == [1.0]


@given(st.lists(st.integers(), max_size=20), st.integers(1, 6))
def test_groups_hold_every_element_but_an_incomplete_rest(elements, size):
    groups = list(grouped(iter(elements), size))
    assert sum(groups, ()) == tuple(elements[:len(elements) // size * size]) and {len(group) for group in groups} <= {size}


# ---------------------------------------------------------------------------------------------------------------------
# One step.


def test_the_labels_of_stage_1_are_smoothed_as_configured():
    logits, target = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 4
    for smoothing in (0.0, 0.1, 0.6):
        wanted = (1 - smoothing) * F.one_hot(target, 4) + smoothing / 4
        expected = -(wanted * F.log_softmax(logits, 1)).sum(1).mean()
        torch.testing.assert_close(process.joint_criterion(IndicatorsConfig(smoothing=smoothing))(logits, target), expected)


class Steep(nn.Module):
    """Logits [batch, 2] whose loss falls as the step size does, however small it is."""

    def __init__(self):
        super().__init__()
        self.quantizer = LsqQuan([4], signed=True)
        self.quantizer.s.data.fill_(0.1)

    def forward(self, x):
        return torch.stack([-self.quantizer.s.expand(len(x)), torch.zeros(len(x))], 1)


def test_step_sizes_stay_positive_after_a_step_of_training():
    model, batch = Steep(), (torch.zeros(4, 1), torch.zeros(4, dtype=torch.long))
    for _ in range(2):
        optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
        training_step(model, [batch], lambda logits, _, target: F.cross_entropy(logits, target), optimizer, Metrics(CPU))
        assert 0 < model.quantizer.s.item() <= 1e-4


def test_a_step_takes_the_mean_of_its_batches_and_leaves_no_gradient_of_the_one_before():
    torch.manual_seed(0)
    model, metrics = nn.Linear(3, 2).double(), Metrics(CPU)
    batches = [(torch.randn(4, 3, dtype=torch.float64), torch.randint(2, (4,))) for _ in range(3)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(2):
        joined = F.cross_entropy(model(torch.cat([x for x, _ in batches])), torch.cat([y for _, y in batches]))
        gradient = torch.autograd.grad(joined, model.weight)[0]
        wanted = model.weight.detach() - 0.3 * gradient
        training_step(model, batches, lambda logits, _, target: F.cross_entropy(logits, target), optimizer, metrics)
        torch.testing.assert_close(model.weight.detach(), wanted)
    assert metrics.sums[3] == 24 and metrics.result()["loss"] > joined.item()


# ---------------------------------------------------------------------------------------------------------------------
# The loop.


class Loader(list):
    """Batches of 5 images; the epochs that were asked for."""

    images = 35

    def __init__(self):
        super().__init__((torch.ones(5, 2), torch.zeros(5, dtype=torch.long)) for _ in range(7))
        self.asked = []

    def set_epoch(self, epoch, first=0):
        self.asked.append((epoch, first))
        self.first = first

    def __iter__(self):
        return iter(list.__getitem__(self, slice(self.first, None)))


class Monitor:
    """Notes what is told."""

    def __init__(self):
        self.shown, self.epochs, self.bars = [], [], []

    def progress(self, batches, title, images_per_step, steps, first):
        self.bars.append((title, images_per_step, steps, first))
        return batches

    def step(self, epoch, done, steps, loss, top1):
        self.shown.append((epoch, done, steps, loss, top1))

    def epoch(self, epoch, split, figures, bits=None):
        self.epochs.append((epoch, split, figures, bits))


def make_loop(scores, monkeypatch, **more):
    """(a Training whose epochs reach these scores, what it did)"""
    done = SimpleNamespace(steps=[], saved=[], monitor=Monitor(), loader=Loader())
    monkeypatch.setattr("engine.loop.training_state", lambda model, optimizer, epochs, best, *_: {"epochs": epochs,
                                                                                                    "best": best})
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=9.0)
    config = IndicatorsConfig(epochs=4, warmup_epochs=2, lr=1.0, cooldown_epochs=1, **more.pop("config", {}))

    def take_step(batches, epoch, step, metrics):
        done.steps.append((epoch, step, len(batches), optimizer.param_groups[0]["lr"]))
        [value] = metrics.values()
        value.update(torch.tensor([[2.0, 1.0]] * 5), torch.tensor([0, 0, 0, 1, 1]), torch.tensor(float(step)))

    hooks = Hooks(take_step, scores.__getitem__, lambda state, is_best: done.saved.append((state, is_best)), **more)
    return Training(model, optimizer, done.loader, config, done.monitor, hooks), done


def beginning(**changes):
    return SimpleNamespace(**{"epoch": 0, "inside": None, "best": (0.0, 0.0), **changes})


def test_every_step_has_its_learning_rate_and_every_epoch_its_checkpoint(monkeypatch):
    scores = [(10.0, 50.0), (30.0, 60.0), None, (30.0, 70.0), (40.0, 40.0)]
    loop, done = make_loop(scores, monkeypatch, batches_per_step=2, epochs_before=2, config={})
    loop.run(beginning(), 5)
    assert [step[:3] for step in done.steps] == [(epoch, step, 2) for epoch in range(5) for step in range(3)]
    assert [step[3] for step in done.steps] == pytest.approx(
        [learning_rate(loop.config, epoch + step / 3) for epoch in range(5) for step in range(3)])
    assert [state["epochs"] for state, _ in done.saved] == [1, 2, 3, 4, 5]
    assert [is_best for _, is_best in done.saved] == [True, True, False, False, True]
    assert [state["best"] for state, _ in done.saved] == [scores[0], scores[1], scores[1], scores[1], scores[4]]
    assert done.loader.asked == [(epoch, 0) for epoch in range(5)]
    assert done.monitor.bars == [(f"epoch {number}", 10, 3, 0) for number in range(3, 8)]
    for number, (epoch, split, figures, bits) in enumerate(done.monitor.epochs, 3):
        assert (epoch, split, bits) == (number, "train", None)
        assert figures["loss"] == 1 and figures["top1"] == 60 and 0 <= figures["seconds"] < 60


def test_figures_are_shown_and_checkpoints_written_inside_an_epoch_where_due(monkeypatch):
    loop, done = make_loop([(1.0, 1.0)], monkeypatch, config={"log": SimpleNamespace(print_freq=3, checkpoint_steps=2)})
    monkeypatch.setattr("engine.loop.MidEpochState.as_plain", lambda inside: inside)
    loop.run(beginning(), 1)
    assert done.monitor.shown == [(1, 3, 7, 1.0, 60.0), (1, 6, 7, 2.5, 60.0)]
    assert [(state["epochs"], state["inside"].step if "inside" in state else None, is_best)
            for state, is_best in done.saved] == [(0, 2, False), (0, 4, False), (0, 6, False), (1, None, True)]
    inside = done.saved[1][0]["inside"]
    assert inside.images_per_step == 5 and not inside.is_trained


def test_an_epoch_goes_on_where_it_was_left_also_with_other_batches(monkeypatch):
    inside = SimpleNamespace(step=4, images_per_step=5, seconds=100.0, is_trained=False,
                             own_sums=lambda: [torch.tensor([20.0, 12.0, 20.0, 20.0])])
    loop, done = make_loop([None, (1.0, 1.0)], monkeypatch, batches_per_step=2)
    loop.run(beginning(epoch=1, inside=inside), 2)
    assert [step[:2] for step in done.steps] == [(1, 2)] and done.loader.asked == [(1, 4)]
    [(_, _, figures, _)] = done.monitor.epochs
    assert figures["loss"] == (20 + 2 * 5) / 25 and figures["top1"] == 60 and figures["seconds"] >= 100
    inside.is_trained = True  # all that is left is to validate
    loop, done = make_loop([None, (1.0, 1.0)], monkeypatch)
    loop.run(beginning(epoch=1, inside=inside), 2)
    assert not done.steps and [state["epochs"] for state, _ in done.saved] == [2]


def spoil(loop):
    step = loop.hooks.take_step
    loop.hooks = replace(loop.hooks, take_step=lambda *words: (step(*words), loop.model.weight.data.fill_(math.nan)))


def test_what_is_not_finite_is_named_with_what_to_do(monkeypatch):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), LsqQuan([4], signed=True))
    assert not_finite(model) == ""
    model[2].s.data.fill_(math.inf)
    assert not_finite(model) == "the step size 2.s"
    model[1].bias.data[1] = math.nan
    assert not_finite(model) == "the parameter 1.bias"
    loop, done = make_loop([(1.0, 1.0)] * 2, monkeypatch)
    spoil(loop)
    with pytest.raises(UserError, match="the parameter weight is not finite after epoch 1; lower lr, or add warmup_epochs$"):
        loop.run(beginning(), 2)
    assert not done.saved
    loop, _ = make_loop([(1.0, 1.0)] * 2, monkeypatch)
    with pytest.raises(UserError, match=r"after epoch 2; .* \(a checkpoint from before is kept\)$"):
        loop.hooks = replace(loop.hooks, validate=lambda epoch: spoil(loop) if epoch == 0 else None)
        loop.run(beginning(), 2)
    loop, _ = make_loop([(1.0, 1.0)] * 2, monkeypatch, epochs_before=1)
    spoil(loop)
    with pytest.raises(UserError, match=r"after epoch 2; .* \(a checkpoint from before is kept\)$"):
        loop.run(beginning(), 2)


def test_ranks_ask_for_signals_without_waiting_and_a_single_process_asks_nobody(monkeypatch):
    asked = []

    def all_reduce(tensor, op, group, async_op):
        asked.append((int(tensor), async_op))
        return SimpleNamespace(wait=lambda: tensor.fill_(signal.SIGTERM))  # which came to another rank

    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    for is_initialized, processes in ((False, None), (True, 1)):
        monkeypatch.setattr(distributed, "is_distributed", lambda found=is_initialized: found)
        monkeypatch.setattr(distributed.dist, "get_world_size", lambda found=processes: found)
        interruption.check(asked=interruption.ask())
    assert asked == []
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    pending = interruption.ask()
    assert asked == [(0, True)]
    with pytest.raises(Interrupted, match="SIGTERM after it"):
        interruption.check(" after it", pending)


@pytest.mark.parametrize("channels", [None, 3])
def test_step_sizes_are_kept_positive_as_one_by_one_and_those_that_came_in_their_place_too(channels):
    model = nn.ModuleList(LsqQuan([4, 2], signed=True, channels=channels) for _ in range(3))
    for _ in range(2):
        for quantizer in model:
            quantizer.s = nn.Parameter(torch.randn_like(quantizer.s))
        model[0].s.data.view(-1)[:2] = torch.tensor([math.nan, -math.inf])
        wanted = [quantizer.s.detach().clamp(min=1e-5) for quantizer in model]
        keep_steps_positive(model)
        for quantizer, step in zip(model, wanted, strict=True):
            assert torch.equal(quantizer.s.detach().view(torch.int32), step.view(torch.int32))
    keep_steps_positive(nn.Linear(2, 2))


def test_repeatable_kernels_do_not_fill_what_is_written_anyway(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *words, **options: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    distributed.set_seed(0, deterministic=True)
    assert not torch.utils.deterministic.fill_uninitialized_memory
    torch.set_rng_state(before[0])
    random.setstate(before[1])
    np.random.set_state(before[2])
