"""What a newcomer gets wrong: one clear line on stderr, exit status 2, nothing written."""

import pathlib
import pickle
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

import importance_extractor
import main
import process
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.interruption import signals_noted
from util import errors
from util.config import decode_yaml, kind_of, read_bytes
from util.errors import UserError, user_errors_on_one_line
from util.exchange import read_indicators, read_policy

pytestmark = pytest.mark.usefixtures("shallow")
CONFIG = """
name: run
output_dir: out
arch: resnet20
target_bits: [4, 2]
dataloader: {dataset: digits, input_size: 8, batch_size: 32, data_fraction: 0.1}
wandb: {mode: disabled}
quan: {act: {all_positive: true}, excepts: {conv1: , bn1: , fc: }}
epochs: 1
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


def contents():
    """{path: bytes} of every file below the current folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in pathlib.Path().rglob("*")}


def complaint(capsys, command, *arguments):
    """The one line a command says to stderr when it refuses; the folder stays as it was."""
    before = contents()
    with pytest.raises(SystemExit) as stop, user_errors_on_one_line():
        command(list(arguments))
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
    assert contents() == before, "something was written"
    return said.err


@pytest.mark.parametrize(("arguments", "message"), [
    (["config.yaml", "epochz=3"], "command line: epochz: unknown key; did you mean 'epochs'?"),
    (["config.yaml", "quan.excepts.con1.weight.bit="], "no such layer; did you mean 'conv1'"),
    (["config.yaml", "arch=resnt20"], "arch: 'resnt20' is not a known network; did you mean 'resnet20'?"),
    (["config.yaml", "arch=resnet20", "pre_trained=true"], "pre_trained: torchvision has no weights of resnet20"),
    (["config.yaml", "dataloader.dataset=imagenet", "dataloader.path=missing", "dataloader.input_size="], "missing"),
    (["config.yaml", "dataloader.dataset=cifar10", "dataloader.input_size="], "dataloader.path"),
    (["config.yaml", "dataloader.std=[0, 0, 0]"], "dataloader.std: found [0.0, 0.0, 0.0], expected three numbers above 0, "),
    (["config.yaml", "dataloader.mean=[0, 0]"], "dataloader.mean: found [0.0, 0.0], expected three numbers, one per"),
    (["config.yaml", "pre_trained=none.pth"], "; train the network in full precision first, by main.py"),
    (["config.yaml", "dataloader.batch_size=5000"], "dataloader.batch_size"),
    (["config.yaml", "dataloader.num_classes=7"], "dataloader.num_classes"),
    (["config.yaml", "eval=true"], "resume.path: nothing to evaluate in out/run; train first, by the same command without"),
    (["config.yaml", "training_device=gpu"], "training_device: found gpu") if not torch.cuda.is_available() else
    (["config.yaml", "training_device=tpu"], "training_device"),
    (["nowhere.yaml"], "nowhere.yaml: cannot read the file"),
    (["epochs=3"], "a configuration file is needed"),
    ([], "required"),
    (["config.yaml", "--dryrun"], "--dryrun; did you mean '--dry-run'?"),
    (["config.yaml", "--epochs", "1"], "--epochs 1; a key of the configuration is written without dashes: epochs=1"),
    (["config.yaml", "arch=alexnet"], "the network does not take images of 8x8"),
])
def test_training(folder, capsys, arguments, message):
    assert message in complaint(capsys, main.main, *arguments)


@pytest.mark.parametrize("words", [["pre_trained"], ["init_from"], ["resume.path"], ["resume.path", "resume.lean=true"],
                                   ["resume.path", "eval=true"]])
def test_a_file_that_is_no_checkpoint_is_named_with_the_key_that_brought_it(folder, capsys, words):
    key, *others = words
    torch.save({"epoch": 1}, "empty.pth")
    for path, message in (("nowhere.pth", "cannot read the checkpoint"), ("config.yaml", "is text, not a checkpoint"),
                          ("empty.pth", "not a checkpoint")):
        said = complaint(capsys, main.main, "config.yaml", f"{key}={path}", *others)
        assert said.startswith(f"error: {key}: {path}: {message}"), said


def test_a_checkpoint_of_another_network_is_named_with_the_key_that_brought_it(folder, capsys):
    save_checkpoint("other", {"state_dict": {}, "arch": "resnet18"})
    for key in ("init_from", "resume.path"):
        said = complaint(capsys, main.main, "config.yaml", f"{key}=other")
        assert said == f"error: {key}: other: holds resnet18, but arch is resnet20\n"


def test_the_checkpoint_of_the_run_itself_is_named_without_a_key(folder, capsys):
    main.main(["config.yaml"])
    capsys.readouterr()
    path = "out/run/run_checkpoint.pth.tar"
    pathlib.Path(path).write_bytes(pathlib.Path(path).read_bytes()[:-3000])
    assert complaint(capsys, main.main, "config.yaml").startswith(f"error: {path}: damaged")


def test_another_run_is_not_overwritten_and_a_lean_start_goes_on(folder, capsys):
    main.main(["config.yaml"])
    main.main(["config.yaml", "name=lean", "resume.path=out/run/run_checkpoint.pth.tar", "resume.lean=true", "lr=0.02"])
    capsys.readouterr()
    main.main(["config.yaml", "name=lean", "resume.path=out/run/run_checkpoint.pth.tar", "resume.lean=true", "lr=0.02"])
    assert "this run is finished" in capsys.readouterr().out
    assert "would be overwritten" in complaint(capsys, main.main, "config.yaml", "name=lean",
                                               "resume.path=out/run/run_checkpoint.pth.tar")


def test_evaluation_with_other_quantizers_than_in_training(folder, capsys):
    main.main(["config.yaml"])
    capsys.readouterr()
    said = complaint(capsys, main.main, "config.yaml", "eval=true", "quan.act.all_positive=false")
    assert "was trained with another quan.act.all_positive" in said
    main.main(["config.yaml", "eval=true", "dataloader.batch_size=5000"])
    assert "at 2 bits: loss" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_ends_the_run(folder, capsys):
    with pytest.raises(SystemExit) as stop, user_errors_on_one_line():
        main.main(["config.yaml", "lr=1e30"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert "epoch 1, step 2 of 4: all weights and step sizes are finite, the activations are not; lower lr, or add " \
        "warmup_epochs\n" in said
    assert not (folder / "out/run/run_checkpoint.pth.tar").exists()


def test_the_step_size_that_is_not_finite_is_named(folder, capsys, monkeypatch):
    step, calls = process.joint_step, []

    def step_with_a_bad_one(model, *arguments):
        calls.append(1)
        if len(calls) == 3:
            model.layer2[0].conv1.quan_w_fn.s.data.fill_(float("nan"))
        step(model, *arguments)

    monkeypatch.setattr(process, "joint_step", step_with_a_bad_one)
    with pytest.raises(SystemExit) as stop, user_errors_on_one_line():
        main.main(["config.yaml"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert "in epoch 1, step 3 of 4: the step size layer2.0.conv1.quan_w_fn.s is not finite; lower lr" in said


@pytest.mark.parametrize(("step", "place"), [(3, " in epoch 1, after 3 of 4 steps"), (4, " after epoch 1"),
                                             (6, " in epoch 2, after 2 of 4 steps")])
def test_weights_that_an_update_made_not_finite_reach_no_checkpoint(folder, capsys, monkeypatch, step, place):
    take_step, calls = process.joint_step, []

    def step_with_a_bad_end(model, *arguments):
        take_step(model, *arguments)
        calls.append(1)
        if len(calls) == step:
            model.layer1[0].conv2.weight.data[0, 0] = float("inf")

    monkeypatch.setattr(process, "joint_step", step_with_a_bad_end)
    with pytest.raises(SystemExit) as stop, user_errors_on_one_line():
        main.main(["config.yaml", "epochs=2", "log.checkpoint_steps=1"])
    assert stop.value.code == 2
    assert f"error: the parameter layer1.0.conv2.weight is not finite{place}; lower lr, or add warmup_epochs " \
        "(a checkpoint from before is kept)\n" in capsys.readouterr().err
    kept = load_checkpoint("out/run/run_checkpoint.pth.tar")
    assert 4 * kept["epoch"] + kept.get("inside", {}).get("step", 0) == step - 1
    assert all(torch.isfinite(tensor).all() for tensor in kept["state_dict"].values())
    # A run that goes on has one from the start.
    monkeypatch.setattr(process, "joint_step", lambda model, *_: model.layer1[0].conv2.weight.data.fill_(float("inf")))
    with pytest.raises(UserError, match="is not finite.*a checkpoint from before is kept"):
        main.main(["config.yaml", "epochs=2", "log.checkpoint_steps=1"])


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore on it"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), MemoryError()])
def test_a_lack_of_memory_ends_in_one_line_with_the_knobs_to_turn(folder, capsys, monkeypatch, error):
    def need_too_much(*arguments):
        raise error

    monkeypatch.setattr(process, "joint_step", need_too_much)
    with pytest.raises(SystemExit) as stop, user_errors_on_one_line():
        main.main(["config.yaml"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and said.startswith("error: out of memory (")
    assert all(knob in said for knob in ("dataloader.batch_size", "accumulation", "dataloader.input_size", "precision: bf16"))


@pytest.fixture
def largest_file():
    """Sets how many bytes a file may have, as if the disk were full; put back at the end."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_gets_full_leaves_the_checkpoint_whole_and_says_what_is_needed(folder, capsys, monkeypatch, largest_file):
    take_step, path = process.joint_step, pathlib.Path("out/run/run_checkpoint.pth.tar")
    before = []

    def step_on_a_full_disk(*arguments):
        take_step(*arguments)
        if path.exists() and not before:
            before.append(path.read_bytes())
            largest_file(2**18)

    monkeypatch.setattr(process, "joint_step", step_on_a_full_disk)
    with pytest.raises(SystemExit) as stop, user_errors_on_one_line():
        main.main(["config.yaml", "log.checkpoint_steps=1"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    needed = len(before[0]) / 2**20
    assert f"run_checkpoint.pth.tar: cannot write the file (File too large; {needed:.1f} MB are needed)" in said
    assert path.read_bytes() == before[0]
    assert not list(path.parent.glob("*.partial"))


def test_batches_of_one_image_meet_batchnorm(folder, capsys):
    with pytest.raises(SystemExit) as stop, user_errors_on_one_line():
        main.main(["config.yaml", "dataloader.batch_size=1", "arch=mobilenetv1", "quan.excepts=", "dataloader.input_size=32"])
    assert stop.value.code == 2
    assert "dataloader.batch_size: a BatchNorm met a single value per channel" in capsys.readouterr().err


@pytest.mark.parametrize("said", ["", "; the same command goes on from the last checkpoint"])
def test_ctrl_c_ends_in_one_line(folder, capsys, monkeypatch, said):
    def interrupted(*arguments):
        if not said:
            raise KeyboardInterrupt
        with signals_noted():  # the second one while a run trains
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(main, "run", interrupted)
    with pytest.raises(SystemExit) as stop, user_errors_on_one_line():
        main.main(["config.yaml"])
    assert stop.value.code == 130 and capsys.readouterr().err == f"stopped from the keyboard{said}\n"


@pytest.mark.parametrize(("program", "status", "said"), [
    ("import signal\nsignal.raise_signal(signal.SIGINT)", -signal.SIGINT, ""),
    ("import signal\nwith user_errors_on_one_line():\n    signal.raise_signal(2)", 130, "stopped from the keyboard\n")])
def test_ctrl_c_while_a_command_starts_ends_it_without_a_traceback(tmp_path, program, status, said):
    (tmp_path / "util").mkdir()
    shutil.copy(errors.__file__, tmp_path / "util")
    (tmp_path / "command.py").write_text(f"from util.errors import user_errors_on_one_line\n{program}\n")
    ended = subprocess.run([sys.executable, "command.py"], cwd=tmp_path, capture_output=True, text=True,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # shells ignore it in background
    assert (ended.returncode, ended.stderr) == (status, said)


def test_a_truncated_checkpoint_is_not_continued(folder, capsys):
    main.main(["config.yaml"])
    capsys.readouterr()
    path = folder / "out" / "run" / "run_checkpoint.pth.tar"
    path.write_bytes(path.read_bytes()[:5000])
    assert "run_checkpoint.pth.tar: damaged or not a checkpoint" in complaint(capsys, main.main, "config.yaml")


def test_a_checkpoint_of_another_network_is_refused(folder, capsys):
    steps = {"conv1.quan_w_fn.s": torch.ones(4)}
    save_checkpoint("other", {"arch": "resnet18", "state_dict": steps, "epoch": 1, "config": {}, "extras": {"top1": 0}})
    assert "other: holds resnet18, but arch is resnet20" in complaint(capsys, main.main, "config.yaml", "resume.path=other")
    torch.save(nn.Linear(3, 3).state_dict(), "weights")
    assert "weights: the tensor weight is not part of this network" in complaint(
        capsys, main.main, "config.yaml", "pre_trained=weights")


def test_a_run_is_continued_only_with_its_own_bits_and_never_overwritten(folder, capsys):
    main.main(["config.yaml"])
    capsys.readouterr()
    assert "another target_bits" in complaint(capsys, main.main, "config.yaml", "target_bits=[8, 4]")
    assert "holds a run" in complaint(capsys, main.main, "config.yaml", "resume.path=none")
    main.main(["config.yaml"])
    assert "this run is finished" in capsys.readouterr().out
    main.main(["config.yaml", "epochs=2", "eval=false", "dataloader.workers=3"])
    said = capsys.readouterr().out
    assert "continuing after epoch 1" in said and "epochs changed" in said and "epoch 2 val 4 bits" in said


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "cut"])
def test_extraction_from_what_is_no_checkpoint(folder, capsys, content):
    save_checkpoint("c", {"state_dict": {"x": torch.ones(1000)}})
    with open("c", "rb") as file:
        whole = file.read()
    with open("c", "wb") as file:
        file.write(whole[:len(whole) // 2] if content == "cut" else content)
    assert "c: " in complaint(capsys, importance_extractor.main, "c", "--output", "i.pkl")


def test_extraction_never_overwrites_its_checkpoint(folder, capsys):
    save_checkpoint("c", {"state_dict": {"a.quan_w_fn.s": torch.ones(1), "a.quan_a_fn.s": torch.ones(1)}, "bits": [4]})
    assert "--output: c is also read by this command" in complaint(capsys, importance_extractor.main, "c", "--output", "c")


@pytest.mark.parametrize(("name", "message"), [
    ("c_best.pth.tar", "c_best.pth.tar ends in .pth.tar, as checkpoints do; indicators end in .pkl"),
    ("net.py", "net.py ends in .py, as Python files do"), ("p.YAML", "p.YAML ends in .yaml, as policies do"),
    ("", "found '', expected a name for the file"), ("/proc/i.pkl", "/proc/i.pkl cannot be written, since /proc is no folder"),
    ("config.yaml/i.pkl", "config.yaml/i.pkl cannot be written, since"), (".", ". is a folder; name a file"),
    ("/dev/null", "/dev/null is a device or a pipe; name a file")])
def test_what_cannot_be_an_output_is_refused_before_anything_is_read(folder, capsys, name, message):
    there = sorted(folder.iterdir())
    assert f"--output: {message}" in complaint(capsys, importance_extractor.main, "none", f"--output={name}")
    assert sorted(folder.iterdir()) == there


def test_extraction_from_a_checkpoint_of_another_stage(folder, capsys):
    for bits in ({"bits": [4]}, {}):
        save_checkpoint("c", {"state_dict": {"x": torch.ones(3)}, **bits})
        assert "holds no step sizes" in complaint(capsys, importance_extractor.main, "c", "--output", "i.pkl")
    step = {"state_dict": {"x.quan_w_fn.s": torch.ones(1), "x.quan_a_fn.s": torch.ones(1)}}
    for finetuned in (step, {**step, "weight_bits": {"x": 3}, "act_bits": {"x": 3}}):
        save_checkpoint("c", finetuned)
        assert "c: was fine-tuned in quantization_training, at one bit-width for each layer; expected a checkpoint of " in \
            complaint(capsys, importance_extractor.main, "c", "--output", "i.pkl", "--b", "3")
    save_checkpoint("c", {"state_dict": {"x.quan_w_fn.s": torch.ones(3)}})
    assert "--b" in complaint(capsys, importance_extractor.main, "c", "--output", "i.pkl")


@pytest.mark.parametrize("words", [["eval=true"], []])
def test_a_checkpoint_of_another_stage_is_no_run_of_this_one(folder, capsys, words):
    steps = {"conv1.quan_w_fn.s": torch.ones(1)}
    content = {"arch": "resnet20", "config": {"sat": True}, "epoch": 1}
    save_checkpoint("tuned", {**content, "state_dict": steps, "weight_bits": {"a": 3}, "act_bits": {"a": 3}})
    save_checkpoint("dense", {**content, "state_dict": {"conv1.weight": torch.ones(1)}})
    for name, message in (("tuned", "tuned: was fine-tuned in quantization_training, at one bit-width for each layer"),
                          ("dense", "dense: holds a network in full precision; init_from starts from it")):
        assert f"resume.path: {message}" in complaint(capsys, main.main, "config.yaml", f"resume.path={name}", *words)


KINDS = {"a checkpoint": b"PK\3\4" + bytes(30), "an ONNX model": b"\x08\x0a\x12\x07pytorch" + bytes(range(256)),
         "an indicators file": pickle.dumps({"layer_name": ["a"], "weight": {}, "act": {}}, protocol=4),
         "a policy": b"arch: x\nlayer_name: [a]\nweight_bits: [3]\nact_bits: [3]\n", "text": "größe: 1\n".encode(),
         "a packed model": (30).to_bytes(8, "little") + b'{"__metadata__":{"limpqp":""}}', "an image": b"\x89PNG\r\n",
         "a safetensors file": (2).to_bytes(8, "little") + b"{}"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_in_the_place_of_another_is_called_by_its_kind(tmp_path, kind):
    path = tmp_path / "file"
    path.write_bytes(KINDS[kind])
    for read, wanted, own in ((read_indicators, "not an indicators file", ("an indicators file",)),
                              (read_policy, "not a policy", ("text", "a policy")),
                              (load_checkpoint, "not a checkpoint", ("a checkpoint", "a packed model", "a safetensors file")),
                              (lambda path: decode_yaml(read_bytes(path), path), "expected text", ("text", "a policy"))):
        if kind in own:
            assert kind == kind_of(KINDS[kind])
            continue
        with pytest.raises(UserError, match=f"file: is {kind}, {wanted}"):
            read(path)


@pytest.mark.parametrize(("variables", "message"), [
    ({}, "RANK is missing, WORLD_SIZE 2"),
    ({"RANK": "2"}, "RANK is 2, WORLD_SIZE 2"),
    ({"RANK": "0"}, "MASTER_PORT expected"),
    ({"RANK": "0", "WORLD_SIZE": "two"}, "'two'"),
    ({"RANK": "0", "MASTER_PORT": "99999"}, "99999"),
    ({"RANK": "0", "MASTER_PORT": "99999", "TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_WORLD_SIZE": "2"}, "99999"),
])
def test_an_environment_that_names_no_processes_to_meet(folder, capsys, monkeypatch, variables, message):
    for name in ("RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", **variables}.items():
        monkeypatch.setenv(name, value)
    assert message in complaint(capsys, main.main, "config.yaml", "training_device=cpu")
