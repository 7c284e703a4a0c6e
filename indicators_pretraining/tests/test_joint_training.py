"""Joint training against a literal transcription of its formula, and over two processes against one."""

import csv
import math
import random
import re
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
import yaml
from test_resume import SMALL
from torch import nn

import importance_extractor
import main
import process
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.optim import create_optimizer
from model.layer_table import trace
from network import build_network
from quan.bit_switch import BitSwitch
from quan.config import ExceptionConfig, QuanConfig, QuantizerConfig
from quan.utils import freeze_weights, joint_modules, replace_module_by_names, set_batch_parts, step_quantizers
from schema import IndicatorsConfig
from util import distributed
from util.errors import UserError
from util.exchange import read_indicators

BITS = [2, 4, 3]  # on purpose not sorted
EXCEPTS = {"stem": ExceptionConfig(), "bn_stem": ExceptionConfig(), "fc": ExceptionConfig()}


class SmallNet(nn.Module):
    """An excepted stem, two searchable convolutions with a BatchNorm each, and an excepted classifier."""

    def __init__(self, batchnorm=True):
        super().__init__()
        make = nn.BatchNorm2d if batchnorm else lambda channels: nn.Identity()
        self.bn_second, self.bn_first, self.bn_stem = make(5), make(4), make(3)
        self.stem = nn.Conv2d(3, 3, 3, bias=False)
        self.second = nn.Conv2d(4, 5, 3, stride=2, groups=1)
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        x = F.relu(self.bn_stem(self.stem(x)))
        x = F.relu(self.bn_first(self.first(x)))
        x = F.relu(self.bn_second(self.second(x)))
        return self.fc(x.mean((2, 3)))


def jointly_quantized(batchnorm=True, seed=0):
    torch.manual_seed(seed)
    model = SmallNet(batchnorm)
    graph = trace(model, 9)
    model.double()
    excepts = EXCEPTS if batchnorm else {name: EXCEPTS[name] for name in ("stem", "fc")}
    config = QuanConfig(act=QuantizerConfig(all_positive=True), excepts=excepts)
    replace_module_by_names(model, joint_modules(model, graph, config, BITS))
    return model.double().train(), BitSwitch(model, graph, excepts, BITS)


def batch(count=8):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(count, 3, 9, 9, generator=generator, dtype=torch.float64),
            torch.randint(3, (count,), generator=generator))


def transcription(tensors, images, target, policies, distilled):
    """Gradients of one joint step, written down from the formulas with nothing but torch operations.

    tensors: {name: tensor} with the names of a checkpoint. policies: per pass, (BatchNorm copies, layer bits).
    """
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}

    def quantize(v, name, bit, signed):
        qn, qp = (2 ** (bit - 1), 2 ** (bit - 1) - 1) if signed else (0, 2**bit - 1)
        s = leaves[f"{name}.s"][BITS.index(bit)]
        g = 1 / math.sqrt(v.numel() * qp)
        s = (s - s * g).detach() + s * g
        scaled = v / s
        clipped = torch.where(scaled < -qn, -qn, torch.where(scaled > qp, qp, scaled))
        return (clipped + (clipped.round() - clipped).detach()) * s

    def batchnorm(x, name):
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt() * leaves[f"{name}.weight"].view(1, -1, 1, 1) \
            + leaves[f"{name}.bias"].view(1, -1, 1, 1)

    def convolve(x, name, bit, **options):
        return F.conv2d(quantize(x, f"{name}.quan_a_fn", bit, False),
                        quantize(leaves[f"{name}.weight"], f"{name}.quan_w_fn", bit, True), leaves[f"{name}.bias"],
                        **options)

    wanted = F.one_hot(target, 3).double()
    for first, second in policies:
        x = F.relu(batchnorm(F.conv2d(images, leaves["stem.weight"]), "bn_stem.bn"))
        x = F.relu(batchnorm(convolve(x, "first", first, padding=1), f"bn_first.bns.{BITS.index(first)}"))
        x = F.relu(batchnorm(convolve(x, "second", second, stride=2), f"bn_second.bns.{BITS.index(second)}"))
        logits = F.linear(x.mean((2, 3)), leaves["fc.weight"], leaves["fc.bias"])
        loss = -(wanted * F.log_softmax(logits, 1)).sum(1).mean()
        loss.backward()
        if distilled:  # the first pass is the one at the highest bit-width
            wanted, distilled = F.softmax(logits, 1).detach(), False
    return {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("has_random_pass", [True, False])
@pytest.mark.parametrize("distilled", [False, True])
def test_a_joint_step_equals_its_literal_transcription(distilled, has_random_pass):
    model, switch = jointly_quantized()
    images, target = batch()
    model.fc.weight.data.mul_(40)  # large gradients, so that some are clipped
    for quantizer in step_quantizers(model).values():  # no step takes its value from the data during the comparison
        quantizer.s.data.mul_(torch.tensor([0.7, 0.4, 0.55], dtype=torch.float64))
        quantizer.init_state.fill_(1)
        quantizer._initialized = [True] * 3
    chosen = {"first": 3, "second": 2} if has_random_pass else None
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    order = [(4, 4), (2, 2), (3, 3)] if distilled else [(2, 2), (4, 4), (3, 3)]
    order += [(3, 2)] if has_random_pass else []
    expected = transcription(before, images, target, order, distilled)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    process.joint_step(model, switch, images, target, nn.CrossEntropyLoss(), optimizer, chosen, distilled)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1, "nothing to clip: the test shows too little"
    for name, parameter in model.named_parameters():
        wanted = before[name] - 0.5 * expected[name].clamp(-1, 1)
        if name.endswith(".s"):
            wanted = wanted.clamp(min=1e-5)
        torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-9, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")


def test_parameters_without_a_gradient_are_left_as_they_are():
    model, switch = jointly_quantized()
    model.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    process.joint_step(model, switch, *batch(), nn.CrossEntropyLoss(), optimizer, {"first": 3, "second": 2})
    assert torch.equal(model.unused, torch.ones(3, dtype=torch.float64))


def test_frozen_weights_stay_and_step_sizes_learn():
    model, switch = jointly_quantized()
    freeze_weights(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        process.joint_step(model, switch, *batch(), nn.CrossEntropyLoss(), optimizer, {"first": 3, "second": 2})
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name for name in before if name.endswith((".s",)) or ".bns." in name or ".bn." in name} == changed


def test_step_sizes_biases_and_normalization_get_no_weight_decay():
    model, _ = jointly_quantized()
    optimizer = create_optimizer(model, IndicatorsConfig(weight_decay=0.1))
    decayed = {id(parameter) for group in optimizer.param_groups if group["weight_decay"] for parameter in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert names == {"stem.weight", "first.weight", "second.weight", "fc.weight"}


def test_per_channel_step_sizes_get_no_weight_decay():
    model = SmallNet()
    config = QuanConfig(weight=QuantizerConfig(per_channel=True), excepts=EXCEPTS)
    replace_module_by_names(model, joint_modules(model, trace(model, 9), config, BITS))
    optimizer = create_optimizer(model, IndicatorsConfig(weight_decay=0.1))
    decayed = {id(parameter) for group in optimizer.param_groups if group["weight_decay"] for parameter in group["params"]}
    assert id(model.first.quan_w_fn.s) not in decayed and model.first.quan_w_fn.s.shape == (3, 4)


def test_random_policies_repeat_with_the_seed_and_change_with_the_step():
    layers = [f"layer{index}" for index in range(40)]
    draws = [process.random_policy(layers, BITS, seed, epoch, step)
             for seed in range(2) for epoch in range(2) for step in range(3)]
    assert draws == [process.random_policy(layers, BITS, seed, epoch, step)
                     for seed in range(2) for epoch in range(2) for step in range(3)]
    assert len({tuple(draw.values()) for draw in draws}) == len(draws)
    assert {bit for draw in draws for bit in draw.values()} == set(BITS)


def test_a_student_that_answers_as_its_teacher_does_has_nothing_to_learn():
    """Label smoothing is for labels: smoothed answers of a teacher would pull even the teacher itself towards them."""
    model, switch = jointly_quantized()
    criterion, gradients = nn.CrossEntropyLoss(label_smoothing=0.2), []
    for chosen in (None, dict.fromkeys(switch.layers, 4)):  # with the last pass as the widest, or without
        model.zero_grad()
        process.joint_gradients(model, switch, *batch(), criterion, chosen, in_place_distillation=True)
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    for alone, both in zip(*gradients, strict=True):
        assert torch.allclose(alone, both, rtol=0, atol=1e-12)
    assert max(gradient.abs().max() for gradient in gradients[0]) > 1e-3


def test_the_highest_bit_width_comes_first_in_distillation_only():
    model, switch = jointly_quantized()
    seen = []
    for distilled in (False, True):
        hook = model.first.register_forward_pre_hook(lambda layer, _: seen.append(layer.quan_w_fn.bits[layer.quan_w_fn.index]))
        process.joint_gradients(model, switch, *batch(), nn.CrossEntropyLoss(), {"first": 3, "second": 2}, distilled)
        hook.remove()
    assert seen == [2, 4, 3, 3, 4, 2, 3, 3]


CONFIG = """
arch: resnet20
target_bits: [4]
random_pass: false
dataloader: {dataset: digits, input_size: 8, batch_size: 32, data_fraction: 0.1, val_split: 0.1}
wandb: {mode: disabled}
epochs: 1
"""


@pytest.mark.usefixtures("shallow")
def test_a_single_bit_width_without_the_random_pass_is_trained_to_its_indicators(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)
    idle = ["quan.act.bit=3", "gpu=0", "quan.excepts.conv1=", "quan.excepts.fc=", "quan.excepts.bn1.weight.bit=8"]
    main.main(["config.yaml", "--dry-run", *idle])
    said = capsys.readouterr().out
    assert re.findall("loss at (.*):", said) == ["4 bits"]
    main.main(["config.yaml", "--dry-run", "random_pass=true", "target_bits=[4, 2]"])
    assert re.findall("loss at (.*):", capsys.readouterr().out) == ["4 bits", "2 bits", "random bits"]
    lines = ["without effect here: gpu (a note), quan.act.bit (target_bits, or a policy, says the bits)\n",
             "without effect here: quan.excepts.*.bit of bn1 (a BatchNorm)\n"]
    assert all(line in said for line in lines)
    main.main(["config.yaml", *idle])
    log = (tmp_path / "results/indicators/indicators.log").read_text()
    said = capsys.readouterr().out
    assert all(line in log and line in said for line in lines)
    rows = csv.DictReader((tmp_path / "results/indicators/metrics.csv").read_text().splitlines())
    assert {(row["split"], row["bits"]) for row in rows} == {("train", "4"), ("val", "4"), ("test", "4")}
    summary = yaml.safe_load((tmp_path / "results/indicators/summary.yaml").read_text())
    assert summary["best"] == {"epoch": 1, "candidates": summary["candidates"]} and summary["candidates"].keys() == {4}
    main.main(["config.yaml", *idle, "eval=true"])
    assert capsys.readouterr().out.splitlines()[-1].endswith(
        f"best.pth.tar at 4 bits: {process.describe_accuracy(summary['candidates'][4])}")
    importance_extractor.main(["results/indicators/indicators_checkpoint.pth.tar", "--output", "i.pkl"])
    content = read_indicators("i.pkl")
    assert content["bits"] == [4] and all(row.keys() == {4} for kind in ("weight", "act") for row in content[kind].values())
    with pytest.raises(UserError, match="the run was started with another random_pass"):
        main.main(["config.yaml", *idle, "epochs=2", "random_pass=true"])


@pytest.mark.usefixtures("shallow")
def test_a_run_from_before_a_key_was_there_goes_on_with_its_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)
    main.main(["config.yaml", "random_pass=true"])
    path = "results/indicators/indicators_checkpoint.pth.tar"
    content = load_checkpoint(path)
    del content["config"]["random_pass"], content["config"]["lr_per"], content["config"]["dataloader"]["data_fraction"]
    save_checkpoint(path, content)
    with pytest.raises(UserError, match="another dataloader.data_fraction, random_pass;"):
        main.main(["config.yaml", "epochs=2"])
    main.main(["config.yaml", "epochs=2", "random_pass=true", "dataloader.data_fraction=1"])
    assert load_checkpoint(path)["epoch"] == 2


def joined_gradients(parts, own_images, own_target):
    """{name: gradient} of a joint step on a net without BatchNorm, as its optimizer sees it, and the policy drawn."""
    model, switch = jointly_quantized(batchnorm=False)
    model.fc.weight.data.mul_(40)  # large gradients: it matters that they are clipped after they are averaged
    set_batch_parts(model, parts)
    chosen = process.random_policy(list(switch.layers), switch.bits, 5, 0, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    process.joint_step(model, switch, own_images, own_target, nn.CrossEntropyLoss(), optimizer, chosen)
    return {name: parameter.grad for name, parameter in model.named_parameters()}, chosen, \
        {name: quantizer.s.detach().clone() for name, quantizer in step_quantizers(model).items()}


def one_rank(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2,
                                         timeout=timedelta(minutes=2))
    images, target = batch()
    result = joined_gradients(2, images[rank::2], target[rank::2])
    torch.manual_seed(rank)
    network = build_network(IndicatorsConfig(arch=f"{folder}/small.py:make"), 10, 16, None, torch.device("cpu"))
    bn = nn.BatchNorm2d(2)
    bn.running_mean.fill_(rank)
    bn.running_var.fill_(3 + 2 * rank)
    distributed.average_batchnorm_statistics(bn)
    parts = {quantizer.batch_parts for name, quantizer in step_quantizers(network.model).items() if "quan_a_fn" in name}
    weights = distributed.gather_objects({"conv": network.model[3].weight.detach().clone()})
    try:
        distributed.on_main(refuse)
        message = None
    except UserError as error:
        message = str(error)
    distributed.set_seed(7)
    draws = distributed.gather_objects([torch.rand(1).item(), np.random.rand(), random.random()])
    torch.save((result, torch.equal(weights[0]["conv"], weights[1]["conv"]), message,
                [bn.running_mean.tolist(), bn.running_var.tolist(), parts], draws), f"{folder}/{rank}.pt")
    distributed.leave_process_group()


def refuse():
    raise UserError("only rank 0 looked")


def test_two_processes_give_the_gradients_of_one_on_the_joined_batch(tmp_path):
    (tmp_path / "small.py").write_text(SMALL)
    other = multiprocessing.spawn(one_rank, (str(tmp_path),), nprocs=1, join=False)  # rank 0; this process is the other one
    one_rank(1, str(tmp_path))
    while not other.join():
        pass
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    gradients, chosen, steps = joined_gradients(1, *batch())
    assert max(gradient.abs().max() for gradient in gradients.values()) == 1, "nothing is clipped: the test shows too little"
    for (got, drawn, initial), same_weights, message, statistics, draws in results:
        assert all(one != other for one, other in zip(*draws, strict=True)), "ranks draw alike"
        assert drawn == chosen and same_weights and message == "only rank 0 looked"
        assert statistics == [[0.5, 0.5], [4, 4], {2}]
        assert got.keys() == gradients.keys() and any(name.endswith("quan_a_fn.s") for name in got)
        for name, value in steps.items():
            torch.testing.assert_close(initial[name], value, rtol=1e-6, atol=0)
        for name, gradient in gradients.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=4e-8, msg=lambda text, n=name: f"{n}: {text}")
    first, second = results[0][0][0], results[1][0][0]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_candidates_are_validated_at_each_cycle_and_after_the_last_epoch(monkeypatch):
    validated = []
    monkeypatch.setattr(process, "validate", lambda *words: validated.append(words[3]) or (1.0, 2.0))
    monkeypatch.setattr(process, "log_start", lambda *_: None)

    class Loop:
        def __init__(self, model, optimizer, loader, config, monitor, hooks):
            self.validate = hooks.validate

        def run(self, start, last):
            self.scores = [self.validate(epoch) for epoch in range(last)]
            assert self.scores == [None, (1.0, 2.0), None, (1.0, 2.0), (1.0, 2.0)]

    monkeypatch.setattr(process, "Training", Loop)
    network = SimpleNamespace(model=None, switch=SimpleNamespace(layers={}, bits=(4, 2)), remark="",
                              passes=SimpleNamespace(log_to=lambda log: None))
    process.pretrain(network, SimpleNamespace(train=None, val=None), None, IndicatorsConfig(epochs=5, val_cycle=2),
                     SimpleNamespace(log=None), None, None)
    assert validated == [2, 4, 5]


@pytest.mark.parametrize("final_test", [True, False])
def test_the_test_set_is_left_alone_without_a_final_test(final_test):
    model, switch = jointly_quantized()[:2]
    written, seen = {}, []
    test = [(torch.randn(4, 3, 9, 9, dtype=torch.float64), torch.tensor([0, 1, 2, 0]))]
    network = SimpleNamespace(model=model, switch=switch)
    monitor = SimpleNamespace(epoch=lambda *arguments, bits: seen.append(bits))
    folder = SimpleNamespace(summarise=written.update, best="none")
    process.final_evaluation(network, SimpleNamespace(test=test if final_test else None),
                             IndicatorsConfig(final_test=final_test), monitor, folder)
    assert seen == list(written["candidates"]) == (BITS if final_test else [])
    assert written["epochs"] == IndicatorsConfig().last_epoch
