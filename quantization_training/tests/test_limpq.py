"""LIMPQ's checkpoints in this stage: evaluated, continued, packed, and those of its joint training as a start."""

import pytest
import torch

import export
import main
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.optim import create_optimizer
from engine.resume import find_run, restore
from engine.run_folder import RunFolder
from model import create_model
from model.layer_table import trace
from network import build_network
from packed_network import load_any
from quan.config import ExceptionConfig, QuanConfig, QuantizerConfig
from quan.transfer import clamp_as_limpq
from quan.utils import joint_modules, replace_module_by_names, step_quantizers
from schema import FinetuneConfig
from util.config import load_config
from util.errors import UserError
from util.exchange import write_policy

pytestmark = pytest.mark.usefixtures("shallow")
CPU, BITS = torch.device("cpu"), [6, 4, 2]
YAML = """
name: run
output_dir: out
training_device: cpu
arch: resnet20
epochs: 4
opt: sgd
lr: 0.1
weight_decay: 1.0e-4
final_test: false
calibration_images: 0
target_bits: [6, 4, 2]
weight_bits: 4
act_bits: 4
dataloader: {dataset: digits, batch_size: 64, workers: 0, data_fraction: 0.05, input_size: 8}
quan:
  act: {mode: lsq, all_positive: true}
  weight: {mode: lsq}
  excepts:
    conv1: {act: {bit: , all_positive: false}, weight: {bit: }}
    bn1: {act: {bit: }, weight: {bit: }}
    fc: {act: {bit: }, weight: {bit: }}
"""


def randomly(name, tensor):
    generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
    return torch.rand(tensor.shape, generator=generator) + 0.1 if tensor.is_floating_point() else tensor


def stage_3(extra=False):
    """A state_dict of ResNet-20 as LIMPQ's fine-tuning names and orders it."""
    state = {}
    for name, tensor in create_model("resnet20", 10).state_dict().items():
        module, _, entry = name.rpartition(".")
        state[f"module.{name}"] = randomly(name, tensor)
        is_layer = "conv" in module or module == "fc"
        if entry == "weight" and extra and "conv" in module:
            state[f"module.{module}.act_rescale_p"] = torch.ones(1)
        if is_layer and entry == ("bias" if module == "fc" else "weight"):
            for quantizer in ("quan_w_fn",) if module == "conv1" else ("quan_w_fn", "quan_a_fn"):
                state[f"module.{module}.{quantizer}.s"] = randomly(module + quantizer, torch.ones(1))
                state[f"module.{module}.{quantizer}.init_state"] = torch.ones(1)
    return state


def stage_1():
    """A state_dict of ResNet-20 as LIMPQ's joint training names it, step sizes outside of [1e-5, 1] among them."""
    state = {}
    for name, tensor in create_model("resnet20", 10).state_dict().items():
        module, _, entry = name.rpartition(".")
        if module == "bn1":
            state[f"module.bn1.bn.{entry}"] = randomly(name, tensor)
        elif "bn" in module:
            state.update({f"module.{module}.bns.{index}.{entry}": randomly(f"{name}{index}", tensor) for index in range(3)})
        else:
            state[f"module.{name}"] = randomly(name, tensor)
        if "layer" in module and "conv" in module:
            for quantizer in ("quan_w_fn", "quan_a_fn"):
                state[f"module.{module}.{quantizer}.s"] = torch.tensor([0.1, 0.2, 0.4])
                state[f"module.{module}.{quantizer}.init_state"] = torch.ones(3)
    state["module.layer1.0.conv1.quan_w_fn.s"] = torch.tensor([0.1, -0.2, 0.4])
    state["module.layer1.0.conv2.quan_a_fn.s"] = torch.tensor([0.1, 2.5, 0.4])
    return state


def parameters(state):
    return [name for name in state if not name.endswith(("running_mean", "running_var", "num_batches_tracked", "init_state"))]


def momenta(state):
    """What timm's SGD with weight decay saves: parameters with one dimension first, in the network's order."""
    names = parameters(state)
    plain = [name for name in names if state[name].dim() <= 1]
    ordered = plain + [name for name in names if name not in plain]
    return {"state": {index: {"momentum_buffer": randomly(f"{name}!", state[name])} for index, name in enumerate(ordered)},
            "param_groups": [{"lr": 0.01, "weight_decay": 0.0, "params": list(range(len(plain)))},
                             {"lr": 0.01, "weight_decay": 1e-4, "params": list(range(len(plain), len(ordered)))}]}, ordered


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(YAML)
    state = stage_3()
    torch.save({"epoch": 1, "arch": "resnet20", "state_dict": state, "extras": {"top1": 30.0, "top5": 70.0},
                "optimizer": momenta(state)[0]}, "tuned")
    torch.save({"epoch": 9, "arch": "resnet20", "state_dict": stage_1(), "extras": {"top1": 1.0, "top5": 2.0}}, "joint")
    return tmp_path


def started(*overrides):
    config = load_config(FinetuneConfig, ["config.yaml"], overrides)
    found = find_run(config, RunFolder.of(config), load_any)
    network = build_network(config, 10, 8, found and found.content, CPU)
    optimizer = create_optimizer(network.model, network.config)
    return network, optimizer, restore(found, network.model, optimizer, network.config)


def complaint(capsys, command, *arguments):
    with pytest.raises(UserError) as error:
        command([*arguments])
    capsys.readouterr()
    return str(error.value)


def test_a_run_of_limpq_goes_on_with_its_epoch_and_every_momentum(folder):
    network, optimizer, start = started("resume.path=tuned")
    assert (start.epoch, start.best) == (2, (30.0, 70.0)) and "LIMPQ" in start.remark
    state = stage_3()
    saved, ordered = momenta(state)
    for name, parameter in network.model.named_parameters():
        assert torch.equal(parameter, state[f"module.{name}"]), name
        expected = saved["state"][ordered.index(f"module.{name}")]["momentum_buffer"]
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], expected), name
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 1e-4}
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_continued_run_trains_to_its_last_epoch_and_is_one_of_ours_then(folder, capsys):
    main.main(["config.yaml", "resume.path=tuned", "epochs=3"])
    assert "continuing after epoch 2" in (folder / "out/run/run.log").read_text()
    assert load_checkpoint("out/run/run_checkpoint.pth.tar")["epoch"] == 3
    main.main(["config.yaml", "resume.path=tuned", "epochs=3"])
    assert "this run is finished" in capsys.readouterr().out


@pytest.mark.parametrize(("change", "why"), [
    (lambda content: content.pop("optimizer"), "its epoch and optimizer"),
    (lambda content: content.pop("epoch"), "its epoch and"),
    (lambda content: content["optimizer"]["param_groups"][0]["params"].pop(), "its optimizer has other parameters"),
    (lambda content: content["optimizer"]["state"].update({0: {"exp_avg": torch.ones(1)}}), "its optimizer is another one"),
    (lambda content: content["optimizer"]["state"][3].update(momentum_buffer=torch.ones(77)), "the optimizer is of other")])
def test_what_cannot_go_on_says_that_its_weights_can_be_taken(folder, capsys, change, why):
    content = torch.load("tuned", weights_only=True)
    change(content)
    torch.save(content, "tuned")
    said = complaint(capsys, main.main, "config.yaml", "resume.path=tuned")
    assert said.startswith("tuned: holds no run to continue (") and why in said
    assert "resume.lean: true takes its weights only" in said
    network, _, start = started("resume.path=tuned", "resume.lean=true")  # which is true
    assert start.epoch == 0 and torch.equal(network.model.fc.weight, stage_3()["module.fc.weight"])


def test_adamw_of_limpq_goes_on_too(folder):
    content = torch.load("tuned", weights_only=True)
    for entry in content["optimizer"]["state"].values():
        buffer = entry.pop("momentum_buffer")
        entry.update(step=torch.tensor(7.0), exp_avg=buffer, exp_avg_sq=buffer.square())
    torch.save(content, "tuned")
    network, optimizer, start = started("resume.path=tuned", "opt=adamw")
    assert start.epoch == 2 and optimizer.state[network.model.fc.weight]["step"] == 7


def test_entries_that_compute_nothing_may_be_missing(folder):
    content = torch.load("tuned", weights_only=True)
    content["state_dict"] = {name: tensor for name, tensor in content["state_dict"].items()
                             if not name.endswith(("num_batches_tracked", "init_state"))}
    torch.save(content, "tuned")
    network, _, start = started("resume.path=tuned")
    assert start.epoch == 2
    assert all(quantizer.init_state.all() for quantizer in step_quantizers(network.model).values())


def test_steps_above_one_and_the_first_codes_normalised_weights_are_taken_as_that_computes(folder, capsys):
    state = stage_3(extra=True)
    state["module.layer1.0.conv1.quan_a_fn.s"] = torch.tensor([3.0])
    torch.save({"epoch": 1, "arch": "resnet20", "state_dict": state, "extras": {}}, "tuned")
    network, _, _ = started("resume.path=tuned", "resume.lean=true")
    weight = state["module.layer2.0.conv1.weight"]
    assert torch.equal(network.model.layer2[0].conv1.weight, (weight - weight.mean()) / weight.std())
    assert torch.equal(network.model.fc.weight, state["module.fc.weight"])
    assert network.model.layer1[0].conv1.quan_a_fn.s.item() == 3  # its fine-tuning does not clamp
    assert "act_rescale_p" in capsys.readouterr().out


def test_fine_tuning_starts_from_limpqs_joint_training(folder):
    network, _, _ = started("init_from=joint", "act_bits=[" + ", ".join(["4"] * 5) + ", 2]")
    tensors, state = network.model.state_dict(), stage_1()
    for name in ("layer2.0.conv1", "layer3.0.conv1"):
        assert tensors[f"{name}.quan_w_fn.s"].tolist() == pytest.approx([0.2])
        assert torch.equal(tensors[f"{name.replace('conv', 'bn')}.running_var"],
                           state[f"module.{name.replace('conv', 'bn')}.bns.1.running_var"])
    assert tensors["layer3.0.conv2.quan_a_fn.s"].tolist() == pytest.approx([0.4])
    assert torch.equal(tensors["bn1.bias"], state["module.bn1.bn.bias"])
    assert tensors["layer1.0.conv1.quan_w_fn.s"].item() == pytest.approx(1e-5)
    assert tensors["layer1.0.conv2.quan_a_fn.s"].item() == 1
    assert "2 step sizes are taken at the nearer end of [1e-5, 1], as LIMPQ does: those of layer1.0.conv1.quan_w_fn.s, " \
        "layer1.0.conv2.quan_a_fn.s" in network.remark


@pytest.mark.parametrize(("arguments", "said"), [
    (["init_from=joint", "target_bits=[4, 2]"], "target_bits: found [4, 2], but joint was trained at 3 bit-widths"),
    (["init_from=joint", "weight_bits=5"], "the policy chose 5 bits, the checkpoint was trained at [6, 4, 2]"),
    (["init_from=tuned"], "tuned was fine-tuned at one bit-width per layer; resume.path takes it"),
    (["init_from=dense"], "dense holds no step sizes; pre_trained takes weights in full precision"),
    (["resume.path=joint"], "it is a checkpoint of indicators_pretraining, at all bits together; init_from"),
    (["resume.path=dense"], "the checkpoint is in full precision, the configuration asks for a network quantized; pre_"),
    (["resume.path=tuned", "fp_model=true"], "the checkpoint is quantized, the configuration asks for a network in full"),
    (["pre_trained=joint"], "it is a quantized checkpoint (layer1.0.conv1.quan_w_fn.s)"),
    (["pre_trained=tuned"], "it is a quantized checkpoint (conv1.quan_w_fn.s)")])
def test_each_file_in_a_wrong_place_is_told_from_the_others(folder, capsys, arguments, said):
    torch.save({"epoch": 3, "state_dict": create_model("resnet20", 10).state_dict()}, "dense")
    assert said in complaint(capsys, main.main, "config.yaml", *arguments)
    assert not (folder / "out").exists()


def test_a_checkpoint_of_limpq_is_packed_with_the_configuration_that_evaluates_it(folder, capsys):
    export.main(["tuned", "--config", "config.yaml", "--output", "m.safetensors"])
    assert "equal to the checkpoint's, bit for bit" in capsys.readouterr().out
    main.main(["config.yaml", "eval=true", "resume.path=tuned"])
    evaluated = capsys.readouterr().out.split("loss")[1]
    main.main(["config.yaml", "eval=true", "resume.path=m.safetensors"])
    assert capsys.readouterr().out.split("loss")[1] == evaluated
    said = complaint(capsys, export.main, "tuned", "--output", "m")
    assert said == "tuned: does not say how it was trained; give the YAML file that evaluates it as --config"
    said = complaint(capsys, export.main, "joint", "--config", "config.yaml", "--output", "m")
    assert said.startswith("joint: it is a checkpoint of indicators_pretraining")
    assert "init_from starts fine-tuning from it" in said
    save_checkpoint("ours", {"state_dict": {}, "config": {}})
    assert "leave --config out" in complaint(capsys, export.main, "ours", "--config", "config.yaml", "--output", "m")


def test_a_plain_safetensors_file_is_no_packed_model(folder, capsys):
    from safetensors.torch import save_file

    dense = create_model("resnet20", 10)
    save_file({name: tensor.clone() for name, tensor in dense.state_dict().items()}, "dense.safetensors")
    save_file({name.removeprefix("module."): tensor.clone() for name, tensor in stage_3().items()}, "tuned.safetensors")
    network, _, _ = started("pre_trained=dense.safetensors")
    assert torch.equal(network.model.fc.weight, dense.fc.weight)
    network, _, _ = started("resume.path=tuned.safetensors", "resume.lean=true")
    assert torch.equal(network.model.fc.weight, stage_3()["module.fc.weight"])
    export.main(["tuned", "--config", "config.yaml", "--output", "m.safetensors"])
    assert "is a packed model, whose weights are integers; name the checkpoint that it was packed from" in complaint(
        capsys, main.main, "config.yaml", "pre_trained=m.safetensors")


NASTY = """
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        for name in NAMES:
            self.add_module(name, nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))

    def forward(self, x):
        for name in NAMES:
            x = getattr(self, name)(x)
        return x

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem, self.bn, self.bns, self.aux = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), Block(), Block()
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x):
        return self.fc(self.aux(self.bns(self.bn(self.stem(x)))).mean((2, 3)))

class Inside(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.module = Net(num_classes)

    def forward(self, x):
        return self.module(x)

def wrapped(num_classes):
    return nn.DataParallel(Net(num_classes))
"""


@pytest.mark.parametrize("factory", ["Net", "Inside", "wrapped"])
@pytest.mark.parametrize("prefix", [None, "module.", "_orig_mod.module."])
def test_joint_training_of_a_network_with_any_names_is_a_start(folder, factory, prefix):
    """prefix None: a checkpoint of ours; else one of LIMPQ's, whose data-parallel wrapper stands before every name."""
    names = ["module", "bns", "bn", "0", "quan_w_fn", "quan_a_fn", "s", "init_state", "_orig_mod"]
    (folder / "net.py").write_text(f"NAMES = {names}{NASTY}")
    model = create_model(f"net.py:{factory}", 10)
    graph = trace(model, 8)
    excepts = {name: ExceptionConfig() for name in (*graph.first, next(iter(graph.batchnorms)), *graph.classifiers)}
    quan = QuanConfig(act=QuantizerConfig(all_positive=True), excepts=excepts)
    replace_module_by_names(model, joint_modules(model, graph, quan, BITS))
    state = {name: randomly(name, tensor) for name, tensor in model.state_dict().items()}
    if prefix is None:
        save_checkpoint("c", {"arch": f"net.py:{factory}", "bits": BITS, "batchnorms": dict(graph.batchnorms),
                              "state_dict": state})
    else:
        torch.save({"arch": "mine", "epoch": 3, "state_dict": {prefix + name: tensor for name, tensor in state.items()}}, "c")
    searched = [name for name in graph.layers if name not in excepts]
    bits = [BITS[index % 3] for index in range(len(searched))]
    write_policy("p.yaml", {"layer_name": [(prefix or "") + name for name in searched], "weight_bits": bits, "act_bits": bits})
    config = FinetuneConfig(arch=f"net.py:{factory}", quan=quan, policy="p.yaml", init_from="c", target_bits=BITS)
    tuned = build_network(config, 10, 8, None, CPU).model.state_dict()
    assert len(searched) == 18
    for name, bit in zip(searched, bits, strict=True):
        for kind in ("quan_w_fn", "quan_a_fn"):
            expected = state[f"{name}.{kind}.s"][BITS.index(bit)].clamp(max=1.0 if prefix else 9.0)
            assert tuned[f"{name}.{kind}.s"].tolist() == [expected.item()]
        assert torch.equal(tuned[f"{name}.weight"], state[f"{name}.weight"])
    for batchnorm, before in graph.batchnorms.items():
        copy = "bn" if batchnorm in excepts else f"bns.{BITS.index(dict(zip(searched, bits, strict=True))[before])}"
        assert torch.equal(tuned[f"{batchnorm}.running_var"], state[f"{batchnorm}.{copy}.running_var"])


def test_step_sizes_in_limpqs_range_stay_as_they_are_and_are_not_spoken_of():
    state = {"a.quan_w_fn.s": torch.tensor([1e-5, 1.0]), "a.weight": torch.tensor([3.0])}
    assert clamp_as_limpq(state) == (state, "")
    clamped, line = clamp_as_limpq({**state, "a.quan_a_fn.s": torch.tensor([1.5, 0.5])})
    assert clamped["a.quan_a_fn.s"].tolist() == [1.0, 0.5] and clamped["a.weight"].item() == 3
    assert line.startswith("1 step sizes") and line.endswith("those of a.quan_a_fn.s")
