"""What `opt` and `sched` stand for: one step against formulas in float64, and runs from before `sgd` was Nesterov."""

import math
from pathlib import Path

import pytest
import torch

import main
import pruning
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.optim import create_optimizer, learning_rate
from schema import IndicatorsConfig
from util.errors import UserError

pytestmark = pytest.mark.usefixtures("shallow")
LR, MOMENTUM, DECAY = 0.1, 0.9, 0.05
CONFIG = """
arch: resnet20
target_bits: [4]
random_pass: false
opt: momentum
dataloader: {dataset: digits, input_size: 8, batch_size: 32, data_fraction: 0.06, val_split: 0.1, workers: 0}
wandb: {mode: disabled}
prune: {levels: 1, amount: 0.3}
epochs: 2
"""


def stepped(opt, momentum=MOMENTUM, steps=3):
    """{name: (start, gradients of each step, end)} in float64: a weight, which decays, and a bias, which does not."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 4).double()
    config = IndicatorsConfig(opt=opt, lr=LR, momentum=momentum, weight_decay=DECAY)
    optimizer = create_optimizer(model, config)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients = {name: torch.randn(steps, *parameter.shape, dtype=torch.float64) for name, parameter in before.items()}
    for step in range(steps):
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name][step].clone()
        optimizer.step()
    return {name: (before[name], gradients[name], parameter.detach()) for name, parameter in model.named_parameters()}


def by_sgd(weight, gradients, decay, momentum, nesterov):
    velocity = torch.zeros_like(weight)
    for gradient in gradients:
        full = gradient + decay * weight
        velocity = momentum * velocity + full
        weight = weight - LR * (full + momentum * velocity if nesterov else velocity)
    return weight


def by_adam(weight, gradients, decay, decoupled):
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, gradient in enumerate(gradients, 1):
        if decoupled:
            weight = weight * (1 - LR * decay)
        full = gradient if decoupled else gradient + decay * weight
        first, second = 0.9 * first + 0.1 * full, 0.999 * second + 0.001 * full**2
        weight = weight - LR * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    return weight


@pytest.mark.parametrize(("opt", "momentum", "formula"), [
    ("sgd", MOMENTUM, lambda *given: by_sgd(*given, MOMENTUM, True)),
    ("momentum", MOMENTUM, lambda *given: by_sgd(*given, MOMENTUM, False)),
    ("sgd", 0.0, lambda *given: by_sgd(*given, 0.0, False)), ("momentum", 0.0, lambda *given: by_sgd(*given, 0.0, False)),
    ("adam", MOMENTUM, lambda *given: by_adam(*given, False)), ("adamw", MOMENTUM, lambda *given: by_adam(*given, True))])
def test_steps_are_those_of_the_formula(opt, momentum, formula):
    for name, (before, gradients, after) in stepped(opt, momentum).items():
        wanted = formula(before, gradients, DECAY if name == "weight" else 0.0)
        torch.testing.assert_close(after, wanted, rtol=1e-12, atol=1e-12)


def test_a_first_step_of_sgd_is_almost_twice_that_of_plain_momentum():
    [nesterov, plain] = [stepped(opt, steps=1)["bias"] for opt in ("sgd", "momentum")]
    torch.testing.assert_close(nesterov[2] - nesterov[0], 1.9 * (plain[2] - plain[0]), rtol=1e-12, atol=0)


def test_multistep_decays_at_each_of_its_epochs():
    config = IndicatorsConfig(epochs=10, sched="multistep", decay_epochs=[2.0, 5.0, 7.5], lr=1.0, decay_rate=0.1, min_lr=0.005)
    rates = [learning_rate(config, time) for time in (0, 1.99, 2, 4.99, 5, 7.49, 7.5, 12)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.005, 0.005])


def test_rates_per_epoch_are_those_of_timm():
    config = IndicatorsConfig(epochs=90, lr=0.04, min_lr=1e-5, warmup_epochs=5, warmup_lr=1e-5, cooldown_epochs=5,
                              lr_per="epoch")
    for epoch in range(95):
        wanted = 1e-5 + epoch * (0.04 - 1e-5) / 5 if epoch < 5 else \
            1e-5 + (0.04 - 1e-5) * (1 + math.cos(math.pi * epoch / 90)) / 2 if epoch < 90 else 1e-5
        assert [learning_rate(config, epoch + part) for part in (0, 0.5, 0.999)] == pytest.approx([wanted] * 3, rel=1e-12)


@pytest.mark.parametrize(("sched", "epochs"), [
    ("multistep", 30.0), ("step", [30.0]), ("cosine", [3.0]), ("multistep", []), ("multistep", [3.0, 3.0]),
    ("multistep", [5.0, 3.0]), ("multistep", [0.0, 3.0])])
def test_epochs_that_do_not_fit_the_schedule_are_refused(sched, epochs):
    with pytest.raises(UserError, match="^decay_epochs: found "):
        IndicatorsConfig(sched=sched, decay_epochs=epochs)


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(CONFIG)


def run(name, *changes, entry=main):
    entry.main(["config.yaml", f"name={name}", *changes])


def as_it_was_written_before(source, target):
    """A copy of a checkpoint of `momentum`, as it was when `sgd` stood for that."""
    content = load_checkpoint(source)
    content["config"]["opt"] = "sgd"
    del content["config"]["lr_per"]
    assert not any(group["nesterov"] for group in content["optimizer"]["param_groups"])
    Path(target).parent.mkdir(exist_ok=True)
    save_checkpoint(target, content)


def are_equal(one, other):
    one, other = (load_checkpoint(path)["state_dict"] for path in (one, other))
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_run_that_began_when_sgd_was_plain_goes_on_as_it_began(config_file):
    run("whole", "log.keep_checkpoints=2")
    assert next(Path("results/whole").glob("*.log")).read_text().count("not given, so the defaults: smoothing 0 (LIMPQ: ") == 1
    file = "results/sgd/sgd_checkpoint.pth.tar"
    as_it_was_written_before("results/whole/whole_epoch_1_checkpoint.pth.tar", file)
    run("sgd", "opt=sgd")
    assert are_equal(file, "results/whole/whole_checkpoint.pth.tar")
    assert "not given" not in next(Path("results/sgd").glob("*.log")).read_text()


def test_levels_of_pruning_that_began_when_sgd_was_plain_go_on_as_they_began(config_file):
    run("whole", entry=pruning)
    for file in ("level_0_checkpoint.pth.tar", "rewind_checkpoint.pth.tar"):
        as_it_was_written_before(f"results/whole_pruning/{file}", f"results/old_pruning/{file}")
    run("old", "opt=sgd", entry=pruning)
    assert are_equal(*(f"results/{name}_pruning/level_1_checkpoint.pth.tar" for name in ("old", "whole")))


def test_a_run_with_nesterov_does_not_go_on_without_nor_the_other_way_round(config_file):
    run("nesterov", "opt=sgd", "epochs=1")
    run("plain", "epochs=1")
    for name, opt in (("nesterov", "momentum"), ("plain", "sgd"), ("plain", "adam")):
        with pytest.raises(UserError, match="the run was started with another opt"):
            run(name, f"opt={opt}", "epochs=2")
