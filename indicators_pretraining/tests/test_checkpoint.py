"""Checkpoints: whole on disk, readable without running code, with LIMPQ's published names."""

import os
import pickle

import pytest
import torch
from torchvision.models import resnet50

from model.weights import load_state
from network import build_network
from process import joint_step
from schema import IndicatorsConfig
from util.checkpoint import RunFolder, find_checkpoint, load_checkpoint, save_checkpoint
from util.config import ExceptionConfig, QuanConfig, ResumeConfig
from util.distributed import random_states, set_random_states
from util.errors import UserError
from util.exchange import write_atomically

BITS = [6, 5, 4, 3, 2]


def published_names(prefix="module."):
    """A stage-1 state_dict of ResNet-50 with the names that LIMPQ's checkpoints have."""
    state = {}
    for name, tensor in resnet50().state_dict().items():
        module, _, entry = name.rpartition(".")
        is_norm = "bn" in module or "downsample.1" in module
        if module == "bn1":
            state[f"{prefix}bn1.bn.{entry}"] = tensor
        elif is_norm:
            state.update({f"{prefix}{module}.bns.{index}.{entry}": tensor.clone() for index in range(5)})
        else:
            state[f"{prefix}{name}"] = tensor
        if not is_norm and entry == "weight" and module not in ("conv1", "fc"):
            for quantizer in ("quan_w_fn", "quan_a_fn"):
                state[f"{prefix}{module}.{quantizer}.s"] = torch.rand(5) + 0.1
                state[f"{prefix}{module}.{quantizer}.init_state"] = torch.ones(5)
    return state


def test_a_checkpoint_with_limpqs_names_loads(tmp_path):
    state = published_names()
    torch.save({"epoch": 3, "arch": "resnet50", "state_dict": state, "extras": {}, "optimizer": {}}, tmp_path / "c")
    excepts = {name: ExceptionConfig() for name in ("conv1", "bn1", "fc")}
    config = IndicatorsConfig(arch="resnet50", target_bits=BITS, quan=QuanConfig(excepts=excepts))
    model = build_network(config, 1000, 64, None, torch.device("cpu")).model
    load_state(model, load_checkpoint(tmp_path / "c")["state_dict"], "c")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[f"module.{name}"]), name


def small(seed=0):
    config = IndicatorsConfig(arch="resnet20", target_bits=[4, 2], seed=seed)
    torch.manual_seed(seed)
    return build_network(config, 10, 8, None, torch.device("cpu"))


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    network = small()
    optimizer = torch.optim.SGD(network.model.parameters(), lr=0.1, momentum=0.9)
    images, target = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    chosen = dict.fromkeys(network.switch.layers, 2)
    joint_step(network.model, network.switch, images, target, torch.nn.CrossEntropyLoss(), optimizer, chosen)
    path = str(tmp_path / "a_checkpoint.pth.tar")
    save_checkpoint(path, {"state_dict": network.model.state_dict(), "optimizer": optimizer.state_dict(),
                           "random_states": random_states(), **network.facts})
    expected = torch.rand(3)
    checkpoint = load_checkpoint(path)
    other = small(seed=1)
    load_state(other.model, checkpoint["state_dict"], path)
    for name, tensor in network.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], tensor), name
    set_random_states(checkpoint["random_states"])
    assert torch.equal(torch.rand(3), expected)
    momentum = optimizer.state_dict()["state"][0]["momentum_buffer"]
    assert torch.equal(checkpoint["optimizer"]["state"][0]["momentum_buffer"], momentum)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_made_to_run_code_runs_none(tmp_path):
    torch.save({"state_dict": {}, "x": Evil(str(tmp_path / "ran"))}, tmp_path / "evil")
    (tmp_path / "pickle").write_bytes(pickle.dumps(Evil(str(tmp_path / "ran"))))
    for name in ("evil", "pickle"):
        with pytest.raises(UserError, match=name):
            load_checkpoint(str(tmp_path / name))
    assert not (tmp_path / "ran").exists()


def test_damaged_and_foreign_files_are_refused_by_name(tmp_path):
    path = tmp_path / "c.pth.tar"
    save_checkpoint(str(path), {"state_dict": {"a": torch.ones(100)}})
    whole = path.read_bytes()
    for content in (whole[:len(whole) // 2], whole[:10], b"", b"hello", whole[:200] + b"\0" * 50 + whole[250:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="c.pth.tar"):
            load_checkpoint(str(path))
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="no state_dict"):
        load_checkpoint(str(path))
    for entry in ({"version": "1.0"}, {"epoch": None}, {"config": "x"}, {"bits": 4}, {"layers": []}):
        torch.save({"state_dict": {}, **entry}, path)
        with pytest.raises(UserError, match=f"c.pth.tar: {next(iter(entry))}: found"):
            load_checkpoint(str(path))
    torch.save({"state_dict": {"a": 3}}, path)
    with pytest.raises(UserError, match="names and tensors only"):
        load_checkpoint(str(path))
    torch.save({"state_dict": {}, "version": 99}, path)
    with pytest.raises(UserError, match="newer version"):
        load_checkpoint(str(path))
    with pytest.raises(UserError, match="No such file"):
        load_checkpoint(str(tmp_path / "nothing"))


def test_tensors_that_do_not_fit_are_named(tmp_path):
    model = torch.nn.Linear(2, 2)
    for change, message in (({"bias": None}, "bias of this network is missing"), ({"extra": torch.ones(1)}, "extra is not"),
                            ({"weight": torch.ones(3, 2)}, r"weight has shape \[3, 2\]")):
        state = {**model.state_dict(), **change}
        with pytest.raises(UserError, match=message):
            load_state(model, {name: tensor for name, tensor in state.items() if tensor is not None}, "c")


def test_a_failing_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = str(tmp_path / "file")
    write_atomically(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_atomically(path, b"new and longer")
    with open(path, "rb") as file:
        assert file.read() == b"old"


def test_which_checkpoint_resume_path_stands_for(tmp_path):
    def config(path="auto", evaluate=False, lean=False):
        resume = ResumeConfig(path=path, lean=lean)
        return IndicatorsConfig(name="n", output_dir=str(tmp_path), resume=resume, eval=evaluate)

    folder = RunFolder.of(config())
    assert find_checkpoint(config(), folder) == find_checkpoint(config("none"), folder) == (None, False)
    assert find_checkpoint(config("other"), folder) == ("other", False)
    assert find_checkpoint(config("other", lean=True), folder) == ("other", True)
    for wrong in (config(evaluate=True), config("none", evaluate=True)):
        with pytest.raises(UserError, match="resume.path"):
            find_checkpoint(wrong, folder)
    folder.save({"state_dict": {}}, is_best=True)
    assert find_checkpoint(config(), folder) == (str(tmp_path / "n" / "n_checkpoint.pth.tar"), False)
    assert find_checkpoint(config(evaluate=True), folder) == (str(tmp_path / "n" / "n_best.pth.tar"), True)
    assert find_checkpoint(config("other", evaluate=True), folder) == ("other", True)
    assert find_checkpoint(config(folder.best), folder) == (folder.best, False)
    assert find_checkpoint(config("other", lean=True), folder) == (folder.last, False)  # it has started from there
    for wrong in (config("none"), config("other")):
        with pytest.raises(UserError, match="holds a run"):
            find_checkpoint(wrong, folder)
