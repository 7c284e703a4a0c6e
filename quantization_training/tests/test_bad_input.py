"""What a newcomer gets wrong: one clear line on stderr, exit status 2, nothing written."""

import pathlib

import pytest
import torch

import main
from engine.checkpoint import save_checkpoint
from util.errors import user_errors_on_one_line
from util.exchange import write_policy

pytestmark = pytest.mark.usefixtures("shallow")
CONFIG = """
name: run
output_dir: out
arch: resnet20
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


def complaint(capsys, *arguments):
    """The one line the command says to stderr when it refuses; the folder stays as it was."""
    before = contents()
    with pytest.raises(SystemExit) as stop, user_errors_on_one_line():
        main.main(["config.yaml", *arguments])
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
    assert contents() == before, "something was written"
    return said.err


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "policy: a policy file, or weight_bits and act_bits, are needed"),
    (["weight_bit=3"], "weight_bit: unknown key; did you mean 'weight_bits'?"),
    (["weight_bits=[3, 3]", "act_bits=3"], "weight_bits: found 2 values"),
    (["weight_bits=12", "act_bits=3"], "weight_bits: found 12"),
    (["policy=nowhere.yaml"], "error: policy: nowhere.yaml: cannot read the file"),
    (["policy=config.yaml"], "error: policy: config.yaml: layer_name: not a policy file"),
    (["weight_bits=3", "act_bits=3", "quan.excepts.fcc.weight.bit=8"], "quan.excepts.fcc: the network has no such layer"),
    (["weight_bits=3", "act_bits=3", "accumulation=99"], "accumulation: found 99"),
    (["fp_model=true", "dataloader.dataset=folder", "dataloader.path=missing", "dataloader.num_classes=3",
      "dataloader.input_size=32"], "missing"),
    (["fp_model=true", "eval=true"], "resume.path: nothing to evaluate"),
])
def test_training(folder, capsys, arguments, message):
    assert message in complaint(capsys, *arguments)


@pytest.mark.parametrize(("words", "message"), [
    (["quan.excepts.conv9.weight.bit=4"], "quan.excepts.conv9: the network has no such layer; did you mean 'conv1'?"),
    (["quan.excepts.nothere.weight.bit=4"], "no such layer; what is named under quan.excepts replaces auto"),
    ([], "says nothing of the layer layer1.0.conv2 of resnet20, nor does quan.excepts (conv1, bn1, fc)"),
    (["policy=none.yaml"], "(No such file or directory); in quantization_search, python search.py --i FILE.pkl --output"),
    (["init_from=none.pth"], "(No such file or directory); main.py of indicators_pretraining trains one"),
    (["distillation.teacher=none.pth"], "(No such file or directory); train the network in full precision first")])
def test_what_is_missing_is_named_with_what_makes_it(folder, capsys, words, message):
    rows = {"layer_name": ["layer1.0.conv1"], "weight_bits": [3], "act_bits": [3]}
    if "distillation.teacher=none.pth" in words:
        words = [*words, "weight_bits=3", "act_bits=3"]
    else:
        (folder / "p.yaml").write_text(str(rows))
        words = ["policy=p.yaml", *words]
    assert message in complaint(capsys, *words)


@pytest.mark.parametrize("words", [["pre_trained"], ["init_from"], ["distillation.teacher"], ["resume.path"],
                                   ["resume.path", "resume.lean=true"], ["resume.path", "eval=true"]])
def test_a_file_that_is_no_checkpoint_is_named_with_the_key_that_brought_it(folder, capsys, words):
    key, *others = words
    torch.save({"epoch": 1}, "empty.pth")
    for path, message in (("nowhere.pth", "cannot read the checkpoint"), ("config.yaml", "is text, not a checkpoint"),
                          ("empty.pth", "not a checkpoint")):
        said = complaint(capsys, "weight_bits=3", "act_bits=3", f"{key}={path}", *others)
        assert said.startswith(f"error: {key}: {path}: {message}"), said


def test_a_policy_of_another_network(folder, capsys):
    write_policy("policy.yaml", {"arch": "resnet18", "layer_name": ["layer1.0.conv1"], "weight_bits": [3], "act_bits": [3]})
    assert "policy.yaml: the policy is for resnet18, but arch is resnet20" in complaint(capsys, "policy=policy.yaml")


def test_evaluation_under_other_quantizers_or_exceptions(folder, capsys):
    main.main(["config.yaml", "weight_bits=3", "act_bits=3"])
    capsys.readouterr()
    for change, key in (("sat=false", "sat"), ("quan.excepts.fc.weight.bit=2", "quan.excepts.fc"),
                        ("quan.excepts=none", "quan.excepts")):
        assert f"was trained with another {key}" in complaint(capsys, "eval=true", change)
    main.main(["config.yaml", "eval=true", "accumulation=99", "dataloader.batch_size=5000"])
    assert "top-1" in capsys.readouterr().out


@pytest.mark.parametrize("signs", [5, [True], "yes", [1, 0]])
def test_a_policy_with_signs_that_are_none(folder, capsys, signs):
    write_policy("policy.yaml", {"layer_name": ["a", "b"], "weight_bits": [3, 3], "act_bits": [3, 3], "act_signed": signs})
    assert "policy.yaml: act_signed: expected true or false" in complaint(capsys, "policy=policy.yaml")


def test_checkpoints_of_other_runs(folder, capsys):
    main.main(["config.yaml", "fp_model=true"])
    capsys.readouterr()
    dense = "out/run/run_checkpoint.pth.tar"
    said = complaint(capsys, f"resume.path={dense}", "weight_bits=3", "act_bits=3", "name=other")
    assert "the checkpoint is in full precision, the configuration asks for a network quantized" in said
    said = complaint(capsys, f"init_from={dense}", "weight_bits=3", "act_bits=3", "name=other")
    assert "not a checkpoint of indicators_pretraining" in said
    save_checkpoint("joint", {"state_dict": {"layer1.0.conv1.quan_w_fn.s": torch.ones(2)}, "arch": "resnet20"})
    save_checkpoint("stage1", {"state_dict": {"conv1.quan_w_fn.s": torch.ones(2)}, "arch": "resnet20", "bits": [4, 2],
                               "config": {"sat": False, "quan": {"act": {"per_channel": True}}}})
    for words in (["weight_bits=3", "act_bits=3"], ["eval=true"], ["eval=true", "weight_bits=3", "act_bits=3"]):
        assert "stage1: it is a checkpoint of indicators_pretraining, at all bits together; init_from" in complaint(
            capsys, "resume.path=stage1", "name=other", *words)
    assert "joint: it is a quantized checkpoint" in complaint(capsys, "pre_trained=joint", "fp_model=true", "name=other")
    with open(dense, "rb") as file:
        whole = file.read()
    with open(dense, "wb") as file:
        file.write(whole[:-3000])
    assert "run_checkpoint.pth.tar: damaged" in complaint(capsys, "fp_model=true")
