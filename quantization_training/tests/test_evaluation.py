"""Evaluation: the last epoch and the best one, BatchNorm as it was saved or re-estimated, and what is said of either."""

import csv
import hashlib
import pathlib
import re

import pytest
import torch
import yaml

import export
import main
import process
from engine.checkpoint import load_checkpoint, save_checkpoint
from util.errors import UserError

pytestmark = pytest.mark.usefixtures("shallow")
RUN, LAST, BEST = "results/run", "results/run/run_checkpoint.pth.tar", "results/run/run_best.pth.tar"
CONFIG = """
name: run
arch: resnet20
weight_bits: 3
act_bits: 4
dataloader: {dataset: digits, input_size: 8, batch_size: 64, data_fraction: 0.15, val_split: 0.1, workers: 0}
wandb: {mode: disabled}
calibration_images: 100
epochs: 2
lr: 0.01
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("config.yaml").write_text(CONFIG)


def train(monkeypatch, best_epoch, *changes):
    """A run whose scores on validation are highest after best_epoch epochs."""
    validate = process.validate

    def scored(model, loaders, config, epoch, monitor):
        validate(model, loaders, config, epoch, monitor)
        return (90.0 if epoch + 1 == best_epoch else 10.0 - epoch), 95.0

    with monkeypatch.context() as patch:
        patch.setattr(process, "validate", scored)
        main.main(["config.yaml", *changes])
    return yaml.safe_load(pathlib.Path(f"{RUN}/summary.yaml").read_text())


def evaluated(capsys, *changes):
    """(the lines that `eval: true` prints, loss, top-1)."""
    capsys.readouterr()
    main.main(["config.yaml", "eval=true", *changes])
    lines = capsys.readouterr().out.splitlines()
    return lines, *re.search(r"loss (\S+)  top-1 (\S+)", lines[-1]).groups()


def shown(figures):
    return f"{figures['loss']:.4f}", f"{figures['top1']:.3f}"


def test_the_summary_and_evaluation_say_both_the_last_and_the_best(monkeypatch, capsys):
    summary = train(monkeypatch, 1)
    assert summary["epochs"] == 2 and summary["best"]["epoch"] == 1 == load_checkpoint(BEST)["epoch"]
    assert summary["best"].keys() == {"epoch", "loss", "top1", "top5"} and summary["best"]["loss"] != summary["loss"]
    rows = csv.DictReader(pathlib.Path(f"{RUN}/metrics.csv").read_text().splitlines())
    assert [row["epoch"] for row in rows if row["split"] == "val"] == ["1", "2"]
    said = capsys.readouterr().out
    for name, figures in (("best on validation (epoch 1) on the test set", summary["best"]),
                          ("final model (epoch 2) on the test set", summary)):
        assert "{}: loss {}  top-1 {}".format(name, *shown(figures)) in said
    lines, *best = evaluated(capsys)
    assert lines[0] == f"{BEST}: the best on validation, epoch 1; the last is run_checkpoint.pth.tar, epoch 2"
    assert tuple(best) == shown(summary["best"]) and lines[1].startswith(f"{BEST} (BatchNorm as saved): loss ")
    lines, *last = evaluated(capsys, f"resume.path={LAST}")
    assert lines[0] == f"{LAST}: the last, epoch 2; the best on validation is run_best.pth.tar, epoch 1"
    assert tuple(last) == shown(summary)
    export.main([BEST, "--output", "best.safetensors", "--report", "report.html"])
    assert f"{summary['best']['top1']:.2f} %" in pathlib.Path("report.html").read_text()


def test_where_the_last_epoch_is_the_best_it_is_evaluated_once(monkeypatch, capsys):
    calls, evaluate = [], process.evaluate
    monkeypatch.setattr(process, "evaluate", lambda *arguments: calls.append(1) or evaluate(*arguments))
    summary = train(monkeypatch, 2)
    assert len(calls) == 2 + 1
    assert summary["best"] == {"epoch": 2, **{key: summary[key] for key in ("loss", "top1", "top5")}}
    assert "&id" not in pathlib.Path(f"{RUN}/summary.yaml").read_text()
    assert "final model (epoch 2, the best on validation) on the test set" in capsys.readouterr().out
    assert evaluated(capsys)[0][0] == f"{BEST}: the best on validation and the last, epoch 2"


def test_the_evaluation_of_the_best_leaves_the_run_as_it_was(monkeypatch):
    seen = {}
    final = process.final_evaluation

    def watched(network, *arguments):
        before = {name: tensor.clone() for name, tensor in network.model.state_dict().items()}
        files = {path: path.read_bytes() for path in pathlib.Path(RUN).glob("*.tar")}
        final(network, *arguments)
        seen["model"] = all(torch.equal(tensor, before[name]) for name, tensor in network.model.state_dict().items())
        seen["files"] = files == {path: path.read_bytes() for path in pathlib.Path(RUN).glob("*.tar")}

    monkeypatch.setattr(process, "final_evaluation", watched)
    train(monkeypatch, 1)
    assert seen == {"model": True, "files": True}


def test_without_a_final_test_neither_is_evaluated_and_a_damaged_best_one_does_no_harm(monkeypatch, capsys):
    assert not {"best", "top1"} & train(monkeypatch, 1, "final_test=false").keys()
    pathlib.Path(f"{RUN}/summary.yaml").unlink()
    pathlib.Path(BEST).write_bytes(b"no checkpoint")
    summary = train(monkeypatch, 1)
    assert "best" not in summary and summary["top1"] > 0
    assert f"the best checkpoint is not evaluated: {BEST}" in capsys.readouterr().out
    assert evaluated(capsys, f"resume.path={LAST}")[0][0] == f"{LAST}: the last, epoch 2"


def test_batchnorm_is_re_estimated_where_it_is_asked_for(monkeypatch, capsys):
    summary = train(monkeypatch, 2)
    # As many images as validation took: the same statistics, and so the same figures.
    lines, *figures = evaluated(capsys, "eval_calibration=true")
    assert f"{BEST} (BatchNorm re-estimated on 100 training images): loss" in lines[1] and tuple(figures) == shown(summary)
    content = load_checkpoint(BEST)
    del content["config"]["eval_calibration"]  # as in files from before
    for name, tensor in content["state_dict"].items():
        if name.endswith("running_mean"):
            tensor.fill_(5.0)
    pathlib.Path("other").mkdir()
    save_checkpoint("other/spoilt.pth.tar", content)
    before = hashlib.sha256(pathlib.Path("other/spoilt.pth.tar").read_bytes()).digest()
    spoilt = evaluated(capsys, "resume.path=other/spoilt.pth.tar")[1:]
    mended = evaluated(capsys, "resume.path=other/spoilt.pth.tar", "eval_calibration=true")[1:]
    assert mended == shown(summary) != spoilt
    assert hashlib.sha256(pathlib.Path("other/spoilt.pth.tar").read_bytes()).digest() == before


def test_of_a_packed_model_too_unless_its_batchnorms_are_folded(monkeypatch, capsys):
    train(monkeypatch, 2)
    export.main([LAST, "--output", "plain.safetensors"])
    export.main([LAST, "--output", "folded.safetensors", "--fold-bn"])
    wanted = evaluated(capsys, "eval_calibration=true", f"resume.path={LAST}", "calibration_images=150")[1:]
    lines, *figures = evaluated(capsys, "eval_calibration=true", "resume.path=plain.safetensors", "calibration_images=150")
    assert lines[0].startswith("plain.safetensors: a packed model, ")
    assert "re-estimated on 150 training images" in lines[1]
    # A packed model does not say its epoch, whose images are others.
    assert float(figures[0]) == pytest.approx(float(wanted[0]), abs=0.2)
    assert "(no BatchNorm): loss" in evaluated(capsys, "resume.path=folded.safetensors")[0][1]
    for words in (["resume.path=folded.safetensors"], ["calibration_images=0"]):
        with pytest.raises(UserError, match="eval_calibration: "):
            evaluated(capsys, "eval_calibration=true", *words)
