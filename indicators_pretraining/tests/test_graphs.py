"""Passes that are recorded, where recording is what CUDA's is: a function is called once without effect on tensors, and called
again to play it back."""

import contextlib
import itertools
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_joint_training import BITS, batch, jointly_quantized
from torch import nn

import process
from engine import graphs
from engine.loop import training_step
from engine.metrics import Metrics
from engine.passes import Passes
from taylor import TaylorSums
from util.errors import UserError

STEPS = 6
POLICIES = [*itertools.permutations(BITS, 2)]  # none twice


class Cpu:
    """In place of a GPU."""

    tensors = ()  # that recording leaves as they are

    def within(self):
        return contextlib.nullcontext()

    warns_of_waiting = within

    def record(self, function):
        tensors = self.tensors()
        before, state = [tensor.clone() for tensor in tensors], torch.get_rng_state()
        function()
        for tensor, value in zip(tensors, before, strict=True):
            tensor.data.copy_(value)  # unnoticed by autograd
        torch.set_rng_state(state)
        return function


def graphed(monkeypatch, model):
    """(Passes of a model that are recorded, the lines that they log)."""
    monkeypatch.setattr(graphs, "Gpu", Cpu)
    passes, lines = Passes(model), []
    passes.graphed = graphs.GraphedPasses(model, passes.compute)
    passes.graphed.gpu.tensors = lambda: [*model.state_dict().values(), *passes.graphed.sums.values()]
    passes.log_to(lines.append)
    return passes, lines


def joint(passes_of, distilled=False, sums=True):
    """(state of the network, gradients of the last step, sums of T, metrics, Passes) after STEPS joint steps."""
    model, switch = jointly_quantized()
    passes, images_and_target = passes_of(model), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    taylor = TaylorSums(switch) if sums and not distilled else None
    metrics = {candidate: Metrics(torch.device("cpu")) for candidate in [*BITS, "random"]}
    for step in range(STEPS):
        chosen = dict(zip(switch.layers, POLICIES[step], strict=True))
        process.joint_step(model, switch, *images_and_target, nn.CrossEntropyLoss(), optimizer, chosen, distilled, metrics,
                           passes, taylor)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return model.state_dict(), gradients, taylor and taylor.sums, {key: m.sums for key, m in metrics.items()}, passes


def equal(one, other):
    return one.keys() == other.keys() and all(a is b is None or torch.equal(a, b)
                                              for a, b in zip(one.values(), other.values(), strict=True))


@pytest.mark.parametrize("distilled", [False, True])
def test_recorded_joint_steps_equal_those_computed_one_by_one(monkeypatch, distilled):
    state, gradients, sums, metrics, _ = joint(Passes, distilled)
    found = joint(lambda model: graphed(monkeypatch, model)[0], distilled)
    assert equal(found[0], state) and equal(found[1], gradients) and equal(found[3], metrics)
    assert distilled or torch.equal(found[2], sums)
    assert len(found[4].graphed.recorded) == len(BITS)  # each candidate, and not what was drawn at random


def test_gradients_stay_where_they_are_and_those_from_elsewhere_count(monkeypatch):
    model, switch = jointly_quantized()
    passes, _ = graphed(monkeypatch, model)
    images, target = batch()
    for bit in BITS:
        switch.uniform(bit)
        passes.logits(images).sum().backward()
    places = []
    for step in range(STEPS):
        model.zero_grad(set_to_none=step % 2 == 0)
        model.first.weight.grad = torch.ones_like(model.first.weight)
        F.cross_entropy(passes.logits(images), target).backward()
        places.append(model.first.weight.grad.data_ptr())
    ours = model.first.weight.grad.clone()
    assert len(passes.graphed.recorded) == 1 and len(set(places)) == 1
    assert model.bn_first.bns[0].weight.grad is None  # of another bit-width
    model.zero_grad()
    F.cross_entropy(model(images), target).backward()
    torch.testing.assert_close(ours, model.first.weight.grad + 1, rtol=1e-12, atol=1e-12)


def test_fine_tuning_is_recorded_with_its_random_numbers(monkeypatch):
    class Net(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Flatten(), nn.Linear(27, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))

    states = []
    for is_graphed in (False, True):
        torch.manual_seed(0)
        model = Net()
        passes, lines = graphed(monkeypatch, model) if is_graphed else (Passes(model), [])
        optimizer, metrics = torch.optim.SGD(model.parameters(), lr=0.1), Metrics(torch.device("cpu"))
        for step in range(STEPS):
            batches = [(torch.randn(4, 3, 3, 3), torch.randint(3, (4,))) for _ in range(2)]
            if is_graphed and step == 1:  # the CPU's generator stands for the GPU's here
                passes.graphed.is_refused = False
            training_step(model, batches, lambda logits, images, target: F.cross_entropy(logits, target), optimizer, metrics,
                          passes)
        states.append({**model.state_dict(), "metrics": metrics.sums})
    assert equal(*states) and len(passes.graphed.recorded) == 1
    assert lines == ["passes are not recorded as CUDA graphs: the network draws random numbers on the CPU in its passes",
                     "passes are recorded as CUDA graphs"]


class Drawing(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(1)) * random.choice([1, 2])


class Waiting(nn.Linear):
    def forward(self, x):
        warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)  # as torch does where it is asked to
        warnings.warn("something else", UserWarning, stacklevel=1)
        return super().forward(x.flatten(1))


class Counting(nn.Linear):
    count = 0

    def forward(self, x):
        self.count += 1
        return super().forward(x.flatten(1)) / self.count


class Averaging(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean()
        return super().forward(x.flatten(1) - self.mean)


@pytest.mark.filterwarnings("ignore:called a sync")
@pytest.mark.parametrize("kind, why", [(Drawing, "draws random numbers on the CPU"),
                                       (Waiting, "waits for numbers from the GPU"),
                                       (Counting, "changes numbers of its modules"),
                                       (Averaging, "replaces buffers")])
def test_what_cannot_be_played_back_is_not_recorded(monkeypatch, kind, why):
    passes, lines = graphed(monkeypatch, kind(27, 3))
    with pytest.warns(UserWarning, match="something else") if kind is Waiting else contextlib.nullcontext():
        for _ in range(STEPS):
            passes.logits(torch.randn(4, 3, 3, 3)).sum().backward()
    assert not passes.graphed.recorded
    [line] = lines
    assert line.startswith(f"passes are not recorded as CUDA graphs: the network {why} in its passes")


def test_a_warning_of_several_layers_is_shown_once_in_a_pass(monkeypatch):
    class Warns(nn.Module):
        def forward(self, x):
            warnings.warn("not deterministic", UserWarning, stacklevel=1)
            return x

    passes, _ = graphed(monkeypatch, nn.Sequential(nn.Flatten(), Warns(), nn.Linear(27, 3), Warns()))
    passes.graphed.is_refused = True
    for is_watched in (False, True):
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("default")
            started = graphs._WatchedPass(passes.graphed) if is_watched else graphs._PlainPass(passes.graphed)
            started.start(torch.randn(4, 3, 3, 3))
        assert len(shown) == 1


def test_other_images_bits_and_weights_are_other_passes(monkeypatch):
    model, switch = jointly_quantized()
    passes, _ = graphed(monkeypatch, model)
    for bit in BITS:
        switch.uniform(bit)
        passes.logits(batch()[0]).sum().backward()
    choice, images = passes.graphed.choice, batch()[0]
    seen = {choice(images), choice(images[:4]), choice(images.contiguous(memory_format=torch.channels_last))}
    switch.uniform(BITS[0])
    seen.add(choice(images))
    model.first.quan_a_fn.changes = []
    seen.add(choice(images))
    model.first.weight.data = model.first.weight.data.clone()
    seen.add(choice(images))
    assert len(seen) == 6


def test_step_sizes_take_their_values_before_anything_is_recorded(monkeypatch):
    model, switch = jointly_quantized()
    passes, _ = graphed(monkeypatch, model)
    switch.uniform(BITS[0])
    for _ in range(STEPS):
        passes.logits(batch()[0]).sum().backward()
    assert not passes.graphed.recorded  # those of other bit-widths wait


def test_a_pass_is_finished_before_the_next_one(monkeypatch):
    passes, _ = graphed(monkeypatch, nn.Sequential(nn.Flatten(), nn.Linear(27, 3)))
    first, second = passes.logits(torch.randn(4, 3, 3, 3)), passes.logits(torch.randn(4, 3, 3, 3))
    second.sum().backward()
    with pytest.raises(RuntimeError, match="before the next pass"):
        first.sum().backward()


def test_a_failure_to_record_is_one_line(monkeypatch):
    passes, _ = graphed(monkeypatch, nn.Sequential(nn.Flatten(), nn.Linear(27, 3)))

    def fail(function):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    passes.graphed.gpu.record = fail
    with pytest.raises(UserError, match="^cuda_graphs: the passes of this network cannot be recorded "
                                        r"\(operation not permitted when stream is capturing\); give cuda_graphs: false$"):
        for _ in range(STEPS):
            passes.logits(torch.randn(4, 3, 3, 3)).sum().backward()


def test_choices_that_never_come_again_are_forgotten(monkeypatch):
    monkeypatch.setattr(graphs, "MOST_REMEMBERED", 3)
    passes, _ = graphed(monkeypatch, nn.Sequential(nn.Flatten(), nn.LazyLinear(3)))
    passes.compute(torch.randn(1, 3, 3, 3))
    passes, _ = graphed(monkeypatch, passes.model)
    for count in range(1, 8):
        passes.logits(torch.randn(count, 3, 3, 3)).sum().backward()
        assert len(passes.graphed.met) <= 3


def test_on_a_cpu_nothing_is_recorded():
    assert Passes(nn.Linear(1, 1), recorded=True).graphed is None


def test_a_torch_without_pools_of_memory_computes_one_by_one(monkeypatch):
    def fail():
        raise RuntimeError("cudaMallocAsync does not support pools\nand more")

    monkeypatch.setattr(graphs, "Gpu", fail)
    passes, lines = Passes(nn.Linear(1, 1)), []
    passes.begin_recording()
    passes.log_to(lines.append)
    assert lines == ["passes are not recorded as CUDA graphs: cudaMallocAsync does not support pools"]
    assert passes.logits(torch.ones(1, 1)).requires_grad
