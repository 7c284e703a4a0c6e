"""Fine-tuning: policies by name and by order, the start from stage 1, calibration, accumulation, and what is reported."""

import copy
import dataclasses
import pathlib
import types
from datetime import timedelta

import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
import yaml
from torch import nn

import process
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.loop import training_step
from engine.metrics import evaluate
from model import create_model
from model.layer_table import trace
from model.weights import load_state
from network import build_network, check_same_bits, create_teacher
from policy import resolve_policy
from quan.config import ExceptedQuantizerConfig, ExceptionConfig, QuanConfig, QuantizerConfig
from quan.quantizer import IdentityQuan
from quan.transfer import choose_candidates
from quan.utils import joint_modules, replace_module_by_names, set_batch_parts, step_quantizers
from schema import DistillationConfig, FinetuneConfig, GradualPruneConfig
from util import distributed
from util.config import describe_idle
from util.errors import UserError
from util.exchange import read_policy, write_policy

pytestmark = pytest.mark.usefixtures("shallow")
CPU = torch.device("cpu")
EXCEPTS = {name: ExceptionConfig() for name in ("conv1", "bn1", "fc")}
QUAN = QuanConfig(act=QuantizerConfig(all_positive=True), excepts=EXCEPTS)


def config(**changes):
    return FinetuneConfig(**{"arch": "resnet20", "quan": QUAN, "weight_bits": 3, "act_bits": 4, **changes})


def network(checkpoint=None, **changes):
    torch.manual_seed(0)
    return build_network(config(**changes), 10, 8, checkpoint, CPU)


def layer_names():
    return [name for name in trace(create_model("resnet20", 10), 8).layers if name not in EXCEPTS]


def batches(count, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 3, 8, 8, generator=generator), torch.randint(10, (size,), generator=generator))
            for _ in range(count)]


def bits_of_quantizers(model):
    return {name: quantizer.bits[0] for name, quantizer in step_quantizers(model).items()}


def test_a_policy_file_is_matched_by_name_and_pasted_lists_by_order(tmp_path):
    names = layer_names()
    weight_bits = [2 + index % 5 for index in range(len(names))]
    order = list(range(len(names)))[::-1]
    path = str(tmp_path / "policy.yaml")
    write_policy(path, {"arch": "resnet20", "layer_name": [f"module.{names[i]}" for i in order],
                        "weight_bits": [weight_bits[i] for i in order], "act_bits": [4] * len(names)})
    by_name = network(policy=path, weight_bits=None, act_bits=None)
    by_order = network(weight_bits=weight_bits, act_bits=[4] * len(names))
    assert bits_of_quantizers(by_name.model) == bits_of_quantizers(by_order.model)
    assert by_name.metadata["weight_bits"] == dict(zip(names, weight_bits, strict=True))
    used = bits_of_quantizers(by_name.model)
    assert used["conv1.quan_w_fn"] == 8 and "conv1.quan_a_fn" not in used
    assert used["fc.quan_w_fn"] == used["fc.quan_a_fn"] == 8


def test_one_number_is_a_uniform_policy():
    used = bits_of_quantizers(network(weight_bits=5, act_bits=2).model)
    assert {used[f"{name}.quan_w_fn"] for name in layer_names()} == {5}
    assert {used[f"{name}.quan_a_fn"] for name in layer_names()} == {2}


@pytest.mark.parametrize(("change", "message"), [
    ({"arch": "resnet50"}, "is for resnet50, but arch is resnet20"),
    ({"layer_name": ["layer1.0.con1"]}, "layer1.0.con1 is no searchable layer of resnet20; did you mean 'layer1.0.conv1'"),
    ({"layer_name": ["stem", "a.b", "layer1.0.conv1"]},
     "stem is no searchable layer of resnet20; nor are 2 of the policy's 3 layers in all: it is another network's"),
    ({"layer_name": ["layer1.0.conv1"]}, "says nothing of the layer layer1.0.conv2")])
def test_a_policy_of_another_network_is_refused(tmp_path, change, message):
    names = change.get("layer_name", layer_names())
    path = str(tmp_path / "policy.yaml")
    write_policy(path, {"arch": "resnet20", "weight_bits": [4] * len(names), "act_bits": [4] * len(names),
                        "layer_name": names, **change})
    with pytest.raises(UserError, match="policy.yaml") as error:
        resolve_policy(config(policy=path, weight_bits=None, act_bits=None), layer_names(), read_policy(path))
    assert message in str(error.value)


def test_a_list_of_the_wrong_length_is_refused():
    with pytest.raises(UserError, match="weight_bits: found 2 values, this network has 6 searchable layers"):
        network(weight_bits=[3, 3])


def test_signs_come_from_the_policy(tmp_path):
    names = layer_names()
    path = str(tmp_path / "policy.yaml")
    write_policy(path, {"layer_name": names, "weight_bits": [4] * 6, "act_bits": [4] * 6,
                        "act_signed": [True] + [False] * 5})
    tuned = network(policy=path, weight_bits=None, act_bits=None)
    assert [tuned.model.get_submodule(name).quan_a_fn.signed for name in names] == [True] + [False] * 5


def joint_checkpoint(path, seed=3):
    """A stage-1 checkpoint with a different value in every tensor, and the graph of its network."""
    torch.manual_seed(seed)
    model = create_model("resnet20", 10)
    graph, bits = trace(model, 8), [2, 6, 4]
    replace_module_by_names(model, joint_modules(model, graph, QUAN, bits))
    state = {name: torch.rand(tensor.shape) + 0.1 if tensor.is_floating_point() else tensor
             for name, tensor in model.state_dict().items()}
    for name in state:
        if name.endswith("init_state"):
            state[name] = torch.ones(3)
    layers = {name: {"signed": {"weight": True, "act": name == "layer2.0.conv1"}} for name in layer_names()}
    save_checkpoint(path, {"arch": "resnet20", "bits": bits, "batchnorms": dict(graph.batchnorms), "state_dict": state,
                           "layers": layers})
    return state, graph, bits


def test_fine_tuning_starts_from_the_steps_and_batchnorms_of_the_chosen_bits(tmp_path):
    path = str(tmp_path / "joint.pth.tar")
    state, graph, bits = joint_checkpoint(path)
    names = layer_names()
    weight_bits = [bits[index % 3] for index in range(6)]
    act_bits = [bits[(index + 1) % 3] for index in range(6)]
    model = network(weight_bits=weight_bits, act_bits=act_bits, init_from=path).model
    tuned = model.state_dict()
    for index, name in enumerate(names):
        assert tuned[f"{name}.quan_w_fn.s"].item() == state[f"{name}.quan_w_fn.s"][bits.index(weight_bits[index])]
        assert tuned[f"{name}.quan_a_fn.s"].item() == state[f"{name}.quan_a_fn.s"][bits.index(act_bits[index])]
        assert tuned[f"{name}.quan_a_fn.init_state"].tolist() == [1]
        batchnorm = name.replace("conv", "bn")
        copy_index = bits.index(weight_bits[names.index(graph.batchnorms[batchnorm])])
        for entry in ("weight", "bias", "running_mean", "running_var"):
            assert torch.equal(tuned[f"{batchnorm}.{entry}"], state[f"{batchnorm}.bns.{copy_index}.{entry}"])
        assert torch.equal(tuned[f"{name}.weight"], state[f"{name}.weight"])
    assert torch.equal(tuned["bn1.weight"], state["bn1.bn.weight"])
    expected = 2 * state["conv1.weight"].abs().mean() / 127**0.5
    torch.testing.assert_close(tuned["conv1.quan_w_fn.s"], expected.reshape(1))
    assert model.get_submodule("layer2.0.conv1").quan_a_fn.signed
    before = {name: quantizer.s.detach().clone() for name, quantizer in step_quantizers(model).items()}
    model.train()(batches(1)[0][0])
    assert all(torch.equal(before[name], quantizer.s) for name, quantizer in step_quantizers(model).items()
               if name != "fc.quan_a_fn"), "a step size that stage 1 trained was initialised again"


def test_inputs_that_a_policy_leaves_alone_start_without_the_steps_of_stage_1(tmp_path):
    path, policy = str(tmp_path / "joint.pth.tar"), str(tmp_path / "policy.yaml")
    state, *_ = joint_checkpoint(path)
    names = layer_names()
    act_bits = [32 if index % 2 else 4 for index in range(6)]
    write_policy(policy, {"arch": "resnet20", "layer_name": names, "weight_bits": [2] * 6, "act_bits": act_bits})
    tuned = network(policy=policy, weight_bits=None, act_bits=None, init_from=path)
    for name, bits in zip(names, act_bits, strict=True):
        layer = tuned.model.get_submodule(name)
        assert torch.equal(layer.quan_w_fn.s, state[f"{name}.quan_w_fn.s"][:1])
        assert isinstance(layer.quan_a_fn, IdentityQuan) == (bits == 32)
    everywhere = network(weight_bits=2, act_bits=4)
    macs = {name: call.macs_exact for name, call in tuned.graph.layers.items()}
    left_alone = sum(macs[name] * 2 * (32 - 4) for name, bits in zip(names, act_bits, strict=True) if bits == 32)
    assert tuned.cost["gbitops_exact"] - everywhere.cost["gbitops_exact"] == pytest.approx(left_alone / 1e9)


def test_a_start_that_does_not_fit_is_refused(tmp_path):
    path = str(tmp_path / "joint.pth.tar")
    joint_checkpoint(path)
    with pytest.raises(UserError, match="the policy chose 3 bits, the checkpoint was trained at"):
        network(init_from=path)
    save_checkpoint(path, {"state_dict": create_model("resnet20", 10).state_dict(), "arch": "resnet20"})
    with pytest.raises(UserError, match="not a checkpoint of indicators_pretraining"):
        network(init_from=path)
    save_checkpoint(path, {"state_dict": {}, "arch": "resnet18"})
    with pytest.raises(UserError, match="holds resnet18, but arch is resnet20"):
        network(init_from=path)


def test_reducing_keeps_a_fixed_exception_and_refuses_an_unknown_bit():
    checkpoint = {"bits": [4, 2], "batchnorms": {"bn": "a"}, "state_dict": {
        "a.quan_w_fn.s": torch.tensor([1.0, 2.0]), "stem.quan_w_fn.s": torch.tensor([5.0]),
        "bn.bns.0.weight": torch.tensor([4.0]), "bn.bns.1.weight": torch.tensor([2.0]),
        "group.bn.weight": torch.tensor([3.0])}}  # a layer of another kind that is called so
    chosen = choose_candidates(checkpoint, {"a": 2}, {"a": 4}, "c")
    assert {name: tensor.tolist() for name, tensor in chosen.items()} == {
        "a.quan_w_fn.s": [2.0], "stem.quan_w_fn.s": [5.0], "bn.weight": [2.0], "group.bn.weight": [3.0]}
    with pytest.raises(UserError, match="chose 8 bits"):
        choose_candidates(checkpoint, {"a": 8}, {"a": 4}, "c")
    for missing in ("bits", "batchnorms"):
        with pytest.raises(UserError, match="^c: not a checkpoint of indicators_pretraining"):
            choose_candidates({key: value for key, value in checkpoint.items() if key != missing}, {"a": 2}, {"a": 4}, "c")


def test_a_batchnorm_without_a_searched_layer_before_it_keeps_the_copy_of_the_widest_candidate():
    state = {f"{name}.bns.{copy}.{entry}": torch.tensor([copy + 10.0 * (entry == "bias")])
             for name in ("first", "second", "third") for copy in range(3) for entry in ("weight", "bias")}
    checkpoint = {"bits": [2, 6, 4], "batchnorms": {"first": "stem", "second": None, "third": "a"}, "state_dict": {
        **state, "stem_bn.bn.weight": torch.ones(1), "twice.bns.0.weight": torch.ones(1), "fc.weight": torch.ones(1)}}
    checkpoint["batchnorms"]["stem_bn"] = "stem"
    chosen = choose_candidates(checkpoint, {"a": 4}, {"a": 2}, "c", frozenset({"twice"}))
    assert {name: tensor.item() for name, tensor in chosen.items()} == {
        "first.weight": 1, "first.bias": 11, "second.weight": 1, "second.bias": 11, "third.weight": 2, "third.bias": 12,
        "stem_bn.weight": 1, "fc.weight": 1}


def test_signs_of_the_checkpoint_go_before_those_of_the_policy(tmp_path):
    names, path, joint = layer_names(), str(tmp_path / "policy.yaml"), str(tmp_path / "joint.pth.tar")
    joint_checkpoint(joint)  # signed: layer2.0.conv1 alone
    write_policy(path, {"layer_name": names, "weight_bits": [4] * 6, "act_bits": [4] * 6,
                        "act_signed": [name == "layer1.0.conv1" for name in names]})
    tuned = network(policy=path, weight_bits=None, act_bits=None, init_from=joint)
    assert [name for name in names if tuned.model.get_submodule(name).quan_a_fn.signed] == ["layer2.0.conv1"]


def test_published_names_of_fine_tuned_checkpoints_load(tmp_path):
    model = network().model
    state = {}
    for name, tensor in create_model("resnet20", 10).state_dict().items():
        module, _, entry = name.rpartition(".")
        state[f"module.{name}"] = torch.rand_like(tensor) if tensor.is_floating_point() else tensor
        if entry == "weight" and "bn" not in module:
            for quantizer in ("quan_w_fn",) if module == "conv1" else ("quan_w_fn", "quan_a_fn"):
                state[f"module.{module}.{quantizer}.s"] = torch.rand(1)
                state[f"module.{module}.{quantizer}.init_state"] = torch.ones(1)
    torch.save({"state_dict": state, "arch": "resnet20", "epoch": 1}, tmp_path / "c")
    checkpoint = load_checkpoint(str(tmp_path / "c"))
    load_state(model, checkpoint["state_dict"], "c")
    check_same_bits(checkpoint, network().metadata)
    assert all(torch.equal(tensor, state[f"module.{name}"]) for name, tensor in model.state_dict().items())


def test_a_checkpoint_of_other_bits_is_refused_and_evaluation_takes_its_own():
    facts = network().metadata
    checkpoint = {"version": 1, **facts}
    with pytest.raises(UserError, match="layer1.0.conv1: the checkpoint was trained at 3 bits, .* asks for 5"):
        network(checkpoint=checkpoint, weight_bits=5)
    with pytest.raises(UserError, match="quantized"):
        network(checkpoint=checkpoint, fp_model=True)
    own = network(checkpoint=checkpoint, weight_bits=None, act_bits=None, eval=True)
    assert own.metadata["weight_bits"] == facts["weight_bits"]


def test_calibration_gives_the_mean_statistics_of_all_batches_and_puts_momentum_and_mode_back():
    model = network(fp_model=True).model
    model.layer1[0].bn1.momentum = 0.3
    model.train()
    model.layer2.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    inputs, means, variances = batches(3), [], []
    with torch.no_grad():
        for images, _ in inputs:
            out = model.conv1(images)
            means.append(out.mean((0, 2, 3)))
            variances.append(out.var((0, 2, 3), unbiased=True))
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    process.calibrate_batchnorm(model, inputs)
    torch.testing.assert_close(model.bn1.running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(model.bn1.running_var, torch.stack(variances).mean(0))
    assert model.layer1[0].bn1.momentum == 0.3 and model.bn1.momentum == 0.1
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert all(torch.equal(parameter, weights[name]) and parameter.grad is None
               for name, parameter in model.named_parameters())


class Silent:
    """A monitor that keeps nothing."""

    def epoch(self, *arguments):
        pass

    scores = save_plots = epoch


class Batches(list):
    def set_epoch(self, epoch):
        self.epoch = epoch


def test_validation_calibrates_a_quantized_network_on_the_number_of_images_asked_for():
    asked = []

    def calibration(images):
        asked.append(Batches(batches(2)))
        return asked[-1]

    loaders = types.SimpleNamespace(val=batches(1, seed=5), calibration=calibration)
    for changes, calibrated in (({}, True), ({"calibration_images": 0}, False),
                                ({"fp_model": True, "weight_bits": None, "act_bits": None}, False)):
        model = network(**changes).model
        model.train()(batches(1)[0][0])
        model.bn1.running_mean.fill_(7)
        process.validate(model, loaders, config(**changes), 3, Silent())
        assert (model.bn1.running_mean.max() < 7) == calibrated
    assert len(asked) == 1 and asked[0].epoch == 3


def test_only_steps_and_normalization_learn_with_frozen_weights():
    model = network(freeze_weights=True).model
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(name.endswith(".s") or "bn" in name for name in trained)


def test_excepted_layers_cost_the_bits_that_they_have():
    eight = network().cost
    entry = ExceptionConfig(weight=ExceptedQuantizerConfig(bit=2), act=ExceptedQuantizerConfig(bit=2))
    two = network(quan=QuanConfig(excepts={**EXCEPTS, "fc": entry})).cost
    assert (eight["size_mb"] - two["size_mb"]) * 8 * 2**20 == pytest.approx(640 * 6)
    assert (eight["gbitops"] - two["gbitops"]) * 1e9 == pytest.approx(640 * 60)


def test_signs_come_from_the_checkpoint_before_anything_else():
    facts = network().metadata
    signed = {**facts, "signed": dict.fromkeys([*facts["act_bits"], "fc"], True), "version": 1}
    assert network(checkpoint=signed).metadata["signed"] == signed["signed"]
    assert network(checkpoint=signed, init_from="a file that is gone").metadata["signed"] == signed["signed"]


def test_a_teacher_of_other_classes_is_refused(tmp_path):
    path = str(tmp_path / "teacher")
    save_checkpoint(path, {"state_dict": create_model("resnet20", 7).state_dict()})
    with pytest.raises(UserError, match="distillation.teacher: .* another number of classes"):
        create_teacher(config(distillation=DistillationConfig(teacher=path)), 10, CPU, 16)
    with pytest.raises(UserError, match="distillation.teacher: torchvision's networks know 1000 classes"):
        create_teacher(config(distillation=DistillationConfig(teacher="pre_trained")), 10, CPU, 16)
    save_checkpoint(path, {"state_dict": create_model("resnet20", 10).state_dict()})
    teacher = create_teacher(config(distillation=DistillationConfig(teacher=path)), 10, CPU, 16)
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())


def small_step(parts, images, target):
    """{name: gradient} of a training step on a quantized net without BatchNorm, as its optimizer sees it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 10))
    modules = joint_modules(model, trace(model, 8), QuanConfig(excepts={"0": ExceptionConfig()}), [4])
    replace_module_by_names(model, modules)
    set_batch_parts(model, parts)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    training_step(model.train(), [(images, target)], process.create_criterion(config()), optimizer, process.Metrics(CPU))
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def one_rank(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2,
                                         timeout=timedelta(minutes=2))
    images, target = batches(1)[0]
    tuned = build_network(FinetuneConfig(arch=f"{folder}/net.py:two", weight_bits=3, act_bits=4, accumulation=3), 10, 8, None,
                          CPU).model
    parts = {quantizer.batch_parts for name, quantizer in step_quantizers(tuned).items() if name.endswith("quan_a_fn")}
    torch.save((small_step(2, images[rank::2], target[rank::2]), parts), f"{folder}/{rank}.pt")
    distributed.leave_process_group()


def test_two_processes_take_the_step_of_one_on_the_joined_batch(tmp_path):
    (tmp_path / "net.py").write_text(HEADS)
    other = torch.multiprocessing.spawn(one_rank, (str(tmp_path),), nprocs=1, join=False)  # rank 0; this is the other one
    one_rank(1, str(tmp_path))
    while not other.join():
        pass
    expected = small_step(1, *batches(1)[0])
    for rank in range(2):
        gradients, parts = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert parts == {6}  # two ranks times three accumulated batches
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_momentum_and_mode_are_put_back_when_calibration_fails():
    model = network(fp_model=True).model.train()
    with pytest.raises(RuntimeError):
        process.calibrate_batchnorm(model, [(torch.zeros(1, 5, 8, 8), None)])
    assert model.training and all(module.training for module in model.modules())
    assert model.bn1.momentum == 0.1


def test_accumulated_batches_give_the_gradients_of_one_large_batch():
    torch.manual_seed(0)
    joined = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 10))
    replace_module_by_names(joined, joint_modules(joined, trace(joined, 8), QuanConfig(
        act=QuantizerConfig(all_positive=True), excepts={"0": ExceptionConfig()}), [4]))
    images, target = batches(1, size=8)[0]
    joined.train()(images)  # step sizes start from the joined batch in both
    split = copy.deepcopy(joined)
    for quantizer in step_quantizers(split).values():
        quantizer.batch_parts = 1
    set_batch_parts(split, 2)
    criterion = process.create_criterion(config())
    for model, parts in ((joined, [(images, target)]), (split, [(images[:4], target[:4]), (images[4:], target[4:])])):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        training_step(model, parts, criterion, optimizer, process.Metrics(CPU))
    for (name, one), two in zip(joined.named_parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_distillation_mixes_the_two_losses():
    torch.manual_seed(0)
    teacher, logits, (images, target) = nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), torch.randn(8, 10), batches(1)[0]
    settings = DistillationConfig(teacher="x", weight=0.25, temperature=4.0)
    loss = process.create_criterion(config(distillation=settings, smoothing=0.1), teacher)(logits, images, target)
    p, q = F.softmax(teacher(images) / 4, 1), F.softmax(logits / 4, 1)
    expected = 0.75 * F.cross_entropy(logits, target, label_smoothing=0.1) \
        + 0.25 * 16 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(loss, expected.detach(), check_dtype=True)


@pytest.mark.parametrize(("cycle", "epochs", "cooldown", "expected"), [
    (10, 40, 0, [0, 9, 19, *range(25, 40)]), (50, 20, 3, [0, *range(8, 23)]), (1, 3, 0, [0, 1, 2])])
def test_when_validation_is_due(cycle, epochs, cooldown, expected):
    settings = config(val_cycle=cycle, epochs=epochs, cooldown_epochs=cooldown)
    assert [epoch for epoch in range(epochs + cooldown) if process.is_validated(epoch, settings)] == expected


def test_evaluation_equals_a_plain_computation_and_keeps_the_mode():
    model = network(fp_model=True).model.train()
    inputs = [*batches(2), *batches(1, size=3, seed=9)]
    figures = evaluate(model, inputs)
    assert model.training
    images, target = torch.cat([pair[0] for pair in inputs]), torch.cat([pair[1] for pair in inputs])
    logits = model.eval()(images).detach()
    rank_of_target = (logits > logits.gather(1, target[:, None])).sum(1)
    assert figures["top1"] == pytest.approx(100 * (rank_of_target < 1).double().mean().item())
    assert figures["top5"] == pytest.approx(100 * (rank_of_target < 5).double().mean().item())
    assert figures["loss"] == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-5)


@pytest.mark.parametrize(("changes", "message"), [
    ({"policy": "p"}, "weight_bits: the bits come from policy already"),
    ({"weight_bits": None}, "policy: a policy file, or weight_bits and act_bits, are needed"),
    ({"weight_bits": 9}, "weight_bits: found 9"), ({"act_bits": [4, 1]}, "act_bits: found 1"),
    ({"init_from": "a", "pre_trained": True}, "init_from: weights come from pre_trained already"),
    ({"init_from": "a", "fp_model": True}, "init_from: takes step sizes")])
def test_contradictions_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        config(**changes)


@pytest.mark.parametrize(("changes", "line"), [
    ({}, ""), ({"target_bits": [4, 2]}, "target_bits (indicators_pretraining reads it)"),
    ({"fp_model": True, "sat": False}, "weight_bits (fp_model: true), act_bits (fp_model: true), sat (fp_model: true)"),
    ({"distillation": DistillationConfig(temperature=2.0)}, "distillation.temperature (no distillation.teacher)"),
    ({"distillation": DistillationConfig("pre_trained", temperature=2.0)}, ""),
    ({"prune": GradualPruneConfig(frequency=3)}, "prune (no prune.target_sparsity)"),
    ({"prune": GradualPruneConfig(0.5, frequency=3)}, ""),
])
def test_keys_that_nothing_reads_are_named(changes, line):
    assert describe_idle(FinetuneConfig(**{"weight_bits": 3, "act_bits": 3, **changes})) \
        == (f"without effect here: {line}" if line else "")


def test_every_shipped_configuration_is_valid():
    import pathlib

    from util.config import load_config
    folder = pathlib.Path(__file__).parents[1]
    paths = sorted(folder.glob("*.yaml"))
    assert len(paths) >= 3
    for path in paths:
        assert load_config(FinetuneConfig, [path]).name
        assert yaml.safe_load(path.read_text())


def test_without_a_final_test_the_test_set_is_left_alone_and_the_summary_says_what_the_network_costs():
    written = {}
    folder = types.SimpleNamespace(summarise=written.update, best="none")
    monitor = types.SimpleNamespace(epoch=lambda *arguments: None, log=print)
    tested = network()
    for final_test in (False, True):
        loaders = types.SimpleNamespace(test=batches(2) if final_test else None)
        process.final_evaluation(tested, loaders, config(final_test=final_test), monitor, folder)
        assert ("top1" in written) == final_test
        assert written["gbitops"] > 0 and written["epochs"] == config().last_epoch


def test_a_network_without_batchnorms_is_not_run_for_their_statistics():
    class Unread(list):
        def __iter__(self):
            raise AssertionError("images were read")

    process.calibrate_batchnorm(torch.nn.Linear(3, 2), Unread())
    with pytest.raises(AssertionError, match="images were read"):
        process.calibrate_batchnorm(torch.nn.BatchNorm1d(3), Unread())


def test_the_log_says_by_how_much_scale_adjusted_training_changes_the_outputs(tmp_path):
    dense = create_model("resnet20", 10)
    nn.init.zeros_(dense.fc.bias)
    remarks, outputs = {}, {}
    for std in (0.02, 0.3):
        dense.fc.weight.data *= std / dense.fc.weight.std()
        path = str(tmp_path / f"{std}.pth")
        save_checkpoint(path, {"arch": "resnet20", "state_dict": dense.state_dict()})
        for sat in (True, False):
            built = network(pre_trained=path, sat=sat)
            remarks[std, sat] = [line for line in built.remark.splitlines() if "scale-adjusted" in line]
            outputs[std, sat] = built.model.eval()(batches(1)[0][0]).detach()
    ratio = (outputs[0.02, True] / outputs[0.02, False]).median().item()
    (line,) = remarks.pop((0.02, True))
    assert line.startswith("scale-adjusted training multiplies the outputs of fc by 15.8; sat: false")
    assert ratio == pytest.approx(15.8, rel=0.03)
    assert not any(remarks.values())  # where it changes little, or is off
    assert "scale-adjusted" not in network(built.metadata | {"state_dict": {}}).remark  # too late to choose


# ---------------------------------------------------------------------------------------------------------------------
# Scale-adjusted training: which layers, and when not.

HEADS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, heads, squeeze=False):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1)
        self.heads, self.gate = nn.ModuleList(heads), nn.Linear(6, 6) if squeeze else None

    def forward(self, x):
        x = self.body(self.stem(x).relu())
        if self.gate is not None:
            x = x * self.gate(x.mean((2, 3))).sigmoid()[:, :, None, None]
        answers = [head(x) if isinstance(head, nn.Conv2d) else head(x.mean((2, 3))) for head in self.heads]
        return sum(answer.mean((2, 3)) if answer.dim() == 4 else answer for answer in answers)

def two(num_classes):
    return Net([nn.Linear(6, num_classes), nn.Linear(6, num_classes)])

def convolution(num_classes):
    return Net([nn.Conv2d(6, num_classes, 1)], squeeze=True)

def zero(num_classes):
    net = two(num_classes)
    for head in net.heads:
        nn.init.zeros_(head.weight)
    return net

def constant(num_classes):
    net = two(num_classes)
    nn.init.constant_(net.heads[0].weight, 0.1)
    net.heads[0].weight.data += 1e-4 * torch.randn(num_classes, 6)
    return net

def small(num_classes):
    net = two(num_classes)
    net.heads[0].weight.data *= 1e-4
    return net
"""


@pytest.mark.parametrize(("factory", "scaled", "warned"), [
    ("two", ["heads.0", "heads.1"], ""), ("convolution", [], ""), ("zero", ["heads.0", "heads.1"], ""),
    ("constant", ["heads.1"], "heads.0"), ("small", ["heads.1"], "heads.0")])
def test_classifiers_are_scale_adjusted_where_that_makes_sense_decided_once(factory, scaled, warned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("net.py").write_text(HEADS)
    torch.manual_seed(0)
    asked = FinetuneConfig(arch=f"net.py:{factory}", weight_bits=4, act_bits=4)
    network = build_network(asked, 10, 8, None, CPU)
    assert network.metadata["scaled"] == scaled
    assert f"warning: no scale-adjusted training of {warned}:" in network.remark if warned else "warning" not in network.remark
    for name in network.graph.classifiers:
        assert network.model.get_submodule(name).weight.any()
    again = build_network(dataclasses.replace(asked, eval=True), 10, 8, {**network.metadata, "arch": asked.arch}, CPU)
    assert again.metadata["scaled"] == scaled
    assert not build_network(dataclasses.replace(asked, sat=False), 10, 8, None, CPU).metadata["scaled"]


def test_a_checkpoint_of_before_is_scaled_on_the_linear_layer_that_is_called_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("net.py").write_text(HEADS)
    asked = FinetuneConfig(arch="net.py:convolution", weight_bits=4, act_bits=4)
    old = {key: value for key, value in build_network(asked, 10, 8, None, CPU).metadata.items() if key != "scaled"}
    assert build_network(asked, 10, 8, old, CPU).metadata["scaled"] == ["gate"]
    with pytest.raises(UserError, match="resume.path: scaled: body is no linear layer of this network"):
        build_network(asked, 10, 8, {**old, "scaled": ["body"]}, CPU)


def test_weights_for_another_number_of_classes_leave_all_classifiers_fresh(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("net.py").write_text(HEADS)
    for factory, heads in (("two", ["heads.0", "heads.1"]), ("convolution", ["heads.0"])):
        dense = create_model(f"net.py:{factory}", 7)
        save_checkpoint("dense", {"state_dict": dense.state_dict()})
        asked = FinetuneConfig(arch=f"net.py:{factory}", weight_bits=4, act_bits=4, pre_trained="dense")
        model = build_network(asked, 10, 8, None, CPU).model
        assert torch.equal(model.body.weight, dense.body.weight)
        assert all(len(model.get_submodule(name).weight) == 10 for name in heads)
