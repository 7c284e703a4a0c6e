"""Weights and checkpoints that other programs wrote: what is read of them, and what is said of the rest."""

import argparse
import collections

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import importance_extractor
import main
from engine.checkpoint import is_foreign, load_checkpoint
from engine.resume import ResumeCheckpoint, restore
from model import create_model
from model.weights import load_weights
from network import build_network
from quan.config import ExceptionConfig, QuanConfig, QuantizerConfig
from schema import IndicatorsConfig
from util.errors import UserError
from util.exchange import read_indicators


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def weights():
    return {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2), "n.num_batches_tracked": torch.tensor(3)}


def parallel(state):
    return {f"module.{name}": tensor for name, tensor in state.items()}


OTHERS = {"version": "1.0", "epoch": "last", "optimizer": {"state": {0: {"exp_avg": torch.ones(2), "step": 3}}},
          "args": {"lr": 0.1, "dtype": torch.float32, "names": ("a", None)}, "config": "x", "bits": 8, "layers": 12,
          "masks": {"x": torch.ones(2, dtype=torch.bool)}, "best_acc1": torch.tensor(71.8), "arch": 5,
          "scheduler": {"last": [1, {"x": 2}]}, "random_states": 3, "weight_bits": {"a": 4}, "extras": None,
          "input_size": [3, 224, 224]}


@pytest.mark.parametrize("key", ["state_dict", "model", "net", "model_state_dict", "state_dict_ema", "model_ema", "ema",
                                 "params", "backbone"])
@pytest.mark.parametrize("others", [{}, {"version": 7}, OTHERS])
def test_weights_are_found_under_any_name_whatever_stands_beside_them(key, others):
    for content in ({key: weights()}, {key: {"state_dict": weights()}}, {key: parallel(weights())},
                    {key: collections.OrderedDict(weights())}):
        torch.save({**others, **content}, "c")
        read = load_checkpoint("c")
        assert is_foreign(read) and read["state_dict"].keys() == weights().keys()
        assert all(torch.equal(tensor, weights()[name]) for name, tensor in read["state_dict"].items())


def test_a_bare_state_dict_and_one_of_parameters_are_read():
    torch.save(nn.Linear(2, 2).state_dict(), "c")
    assert list(load_checkpoint("c")["state_dict"]) == ["weight", "bias"]
    torch.save(dict(nn.Linear(2, 2).named_parameters()) | {"epoch": 3}, "c")
    assert list(load_checkpoint("c")["state_dict"]) == ["weight", "bias"]


def test_the_usual_set_of_weights_is_taken_and_of_unusual_ones_none():
    torch.save({"ema": {"a": torch.ones(1)}, "model": {"a": torch.zeros(1)}}, "c")
    assert load_checkpoint("c")["state_dict"]["a"] == 0
    torch.save({"teacher": weights(), "student": weights()}, "c")
    with pytest.raises(UserError, match=r"c: holds several sets of weights \(teacher, student\); save one alone: torch.save"):
        load_checkpoint("c")
    torch.save({"epoch": 3, "state_dict": {}}, "c")
    with pytest.raises(UserError, match="c: not a checkpoint .it has no state_dict with tensors; it holds epoch, state_dict"):
        load_checkpoint("c")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("write", [lambda state: torch.save({"model": state}, "c"), lambda state: save_file(state, "c")],
                         ids=["torch", "safetensors"])
def test_other_precisions_become_float32(dtype, write):
    model, other = create_model("resnet20", 10), create_model("resnet20", 10)
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}
    write(state)
    assert load_weights(other, load_checkpoint("c")["state_dict"], "c")
    for name, tensor in other.state_dict().items():
        assert tensor.dtype == model.state_dict()[name].dtype and torch.equal(tensor, state[name].to(tensor.dtype)), name


class Settings:
    """A class of the user's own."""


@pytest.mark.parametrize(("content", "held", "remedy"), [
    ({"args": argparse.Namespace(lr=1), "state_dict": {}}, "argparse.Namespace", "torch.save(checkpoint['state_dict'], "),
    ({"net": {}, "best": np.float64(3)}, "scalar", "torch.save(checkpoint['net'], "),
    ({"cfg": Settings(), "model": {}}, "test_foreign.Settings", "torch.save(checkpoint['model'], "),
    (nn.Linear(2, 2), "torch.nn.modules.linear.Linear", "torch.save(checkpoint.state_dict(), ")])
@pytest.mark.parametrize("is_zip", [True, False])
def test_what_is_not_read_is_named_with_the_remedy(content, held, remedy, is_zip):
    torch.save(content, "c", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(UserError, match="^c: not a checkpoint of tensors and plain values alone; it holds ") as error:
        load_checkpoint("c")
    assert held in str(error.value) and remedy in str(error.value)
    assert "torch.load('c', weights_only=False)" in str(error.value)


def test_damaged_safetensors_are_refused_by_name():
    save_file(weights(), "c.safetensors")
    with open("c.safetensors", "rb") as file:
        whole = file.read()
    for length in range(0, len(whole), 5):
        with open("c.safetensors", "wb") as file:
            file.write(whole[:length])
        with pytest.raises(UserError, match="^c.safetensors: (damaged or )?not a checkpoint"):
            load_checkpoint("c.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# LIMPQ's joint training.

STEPS = {"layer1.0.conv1.quan_w_fn": [0.1, -0.2], "layer1.0.conv2.quan_a_fn": [2.5, 0.4],
         "layer1.1.conv1.quan_a_fn": [0.0, 0.3]}
EXCEPTS = {name: ExceptionConfig() for name in ("conv1", "bn1", "fc")}


def config(**changes):
    quan = QuanConfig(act=QuantizerConfig(all_positive=True), excepts=EXCEPTS)
    return IndicatorsConfig(arch="resnet20", target_bits=[4, 2], quan=quan, **changes)


def limpqs(**steps):
    """A checkpoint of ResNet-20 as LIMPQ's joint training writes it; `steps` take the place of some of STEPS."""
    torch.manual_seed(0)
    state = build_network(config(), 10, 8, None, torch.device("cpu")).model.state_dict()
    for name in state:
        if name.endswith("fn.init_state"):
            state[name] = torch.ones(2)
    state.update({f"{name}.s": torch.tensor(values) for name, values in {**STEPS, **steps}.items()})
    torch.save({"epoch": 9, "arch": "resnet20", "extras": {"top1": 3.0, "top5": 9.0}, "state_dict": parallel(state)}, "c")
    return state


def test_step_sizes_that_left_their_range_are_extracted_as_they_are_and_named(capsys):
    limpqs()
    importance_extractor.main(["c", "--b", "4", "2", "--output", "i.pkl"])
    said = capsys.readouterr().out
    assert "warning: c: step sizes that are not positive: layer1.0.conv1.quan_w_fn, layer1.1.conv1.quan_a_fn\n" in said
    assert "warning: c: step sizes above 1, where LIMPQ clamps them: layer1.0.conv2.quan_a_fn\n" in said
    content = read_indicators("i.pkl")
    assert content["weight"]["layer1.0.conv1"] == {4: pytest.approx(0.1), 2: pytest.approx(-0.2)}
    assert content["act"]["layer1.0.conv2"] == {4: 2.5, 2: pytest.approx(0.4)} and content["act"]["layer1.1.conv1"][4] == 0
    assert content["layer_name"][0] == "layer1.0.conv1"


def test_a_step_size_that_is_no_number_is_refused_all_the_same():
    limpqs(**{"layer1.0.conv1.quan_w_fn": [0.1, float("nan")]})
    with pytest.raises(UserError, match="c: layer1.0.conv1.quan_w_fn: the step size at 2 bits is nan, expected a finite"):
        importance_extractor.main(["c", "--b", "4", "2", "--output", "i.pkl"])


def test_evaluation_takes_step_sizes_at_the_ends_of_their_range_as_limpqs_forward_does(capsys):
    state = limpqs()
    settings = config(eval=True)
    found = ResumeCheckpoint("c", load_checkpoint("c"), True)
    network = build_network(settings, 10, 8, found, torch.device("cpu"))
    restore(found, network.model, None, settings)
    said = capsys.readouterr().out
    assert "c: 3 step sizes are taken at the nearer end of [1e-5, 1], as LIMPQ does: those of layer1.0.conv1.quan_w_fn" in said
    for name, tensor in network.model.state_dict().items():
        assert torch.equal(tensor, state[name].clamp(1e-5, 1) if name.endswith("_fn.s") else state[name]), name


def test_step_sizes_of_our_own_are_never_clamped():
    state = limpqs()
    found = ResumeCheckpoint("c", {"version": 2, "arch": "resnet20", "state_dict": state, "bits": [4, 2]}, True)
    network = build_network(config(eval=True), 10, 8, found, torch.device("cpu"))
    restore(found, network.model, None, config(eval=True))
    assert network.model.layer1[0].conv2.quan_a_fn.s[0] == 2.5


def test_a_run_of_limpqs_joint_training_does_not_go_on_and_says_what_does(capsys):
    limpqs()
    with open("c.yaml", "w") as file:
        file.write("{training_device: cpu, arch: resnet20, target_bits: [4, 2], "
                   "dataloader: {dataset: digits, input_size: 8}}")
    with pytest.raises(UserError, match="c: holds no run to continue .*resume.lean: true takes its weights only"):
        main.main(["c.yaml", "resume.path=c"])
    with pytest.raises(UserError, match="c: it is a quantized checkpoint .layer1.0.conv1.quan_w_fn.s., but weights in full"):
        main.main(["c.yaml", "pre_trained=c"])
    main.main(["c.yaml", "resume.path=c", "resume.lean=true", "dataloader.batch_size=8", "--dry-run"])
    assert "dry run: nothing was written" in capsys.readouterr().out
