"""Pruning level by level, by real small runs: what each level starts from, what it ends with, and what lies on disk."""

import copy
import csv
import pathlib
import random
import shutil

import numpy as np
import pytest
import torch
import yaml

import importance_extractor
import main
import pruning
import rewinding
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.loop import Training
from model import create_model
from model.layer_table import trace
from quan.config import ExceptionConfig, QuanConfig, QuantizerConfig
from quan.utils import joint_modules, replace_module_by_names, step_quantizers
from util.exchange import read_indicators

pytestmark = pytest.mark.usefixtures("shallow")
CONFIG = """
name: run
output_dir: out
arch: resnet20
target_bits: [4, 2]
dataloader: {dataset: digits, input_size: 8, batch_size: 32, data_fraction: 0.1}
wandb: {mode: disabled}
quan: {act: {all_positive: true}, excepts: {conv1: , bn1: , fc: }}
epochs: 2
lr: 0.05
weight_decay: 0.1
val_cycle: 2
prune: {amount: 0.3, levels: 2, rewind_epoch: 1}
"""
TOTAL = 73728  # weights of the network but for its first convolution and its last layer


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


def prune(*changes, name="run"):
    """Run pruning.py; return the checkpoints of its levels."""
    pruning.main(["config.yaml", f"name={name}", *changes])
    return levels(name)


def levels(name="run"):
    paths = sorted(pathlib.Path(f"out/{name}_pruning").glob("level_*"))
    assert [path.name for path in paths] == [f"level_{number}_checkpoint.pth.tar" for number in range(len(paths))]
    return [load_checkpoint(str(path)) for path in paths]


def rewind_file(name="run"):
    return pathlib.Path(f"out/{name}_pruning/rewind_checkpoint.pth.tar")


def report(name="run"):
    with open(f"out/{name}_pruning/pruning.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def same(one, other):
    """Whether two nested containers hold equal values, tensors to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))
    return one == other


def zeros(masks):
    """{layer: number of weights removed}, of what is removed at all."""
    return {name.removesuffix(".weight"): int((~mask).sum()) for name, mask in masks.items() if mask.dim() > 1}


@pytest.fixture
def watched(monkeypatch):
    """What each epoch began with, and each step: lists of dicts. Each step draws random numbers, as dropout does."""
    epochs, steps = [], []
    train, training_step = Training.train, rewinding.training_step

    def noted_epoch(training, epoch, inside=None):
        state = copy.deepcopy({"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()["state"],
                               "torch": torch.get_rng_state(), "python": random.getstate(),
                               "numpy": np.random.get_state()[1].tolist()})
        epochs.append({"epoch": epoch, "number": training.hooks.epochs_before + epoch, **state})
        train(training, epoch, inside)

    def noted_step(model, batches, criterion, optimizer, metrics, passes):
        torch.rand(1), random.random(), np.random.rand()
        [(images, target)] = batches
        steps.append({"rates": [group["lr"] for group in optimizer.param_groups], "images": images.clone(),
                      "target": target.clone(), "momentum": [group.get("momentum") for group in optimizer.param_groups]})
        training_step(model, batches, criterion, optimizer, metrics, passes)

    monkeypatch.setattr(Training, "train", noted_epoch)
    monkeypatch.setattr(rewinding, "training_step", noted_step)
    return epochs, steps


def masked(state, masks):
    return {name: tensor * masks[name] if name in masks else tensor for name, tensor in state.items()}


# ---------------------------------------------------------------------------------------------------------------------
# What a level starts from.


@pytest.mark.parametrize("changes", [[], ["prune.rewind_epoch=0", "prune.type=structured", "opt=adamw"],
                                     ["prune.method=one_shot", "prune.scope=layer"]])
def test_a_level_starts_from_the_early_state_to_the_bit(folder, watched, changes):
    epochs, steps = watched
    checkpoints = prune(*changes)
    rewind_epoch = checkpoints[0]["config"]["prune"]["rewind_epoch"]
    early, starts = epochs[rewind_epoch], [entry for entry in epochs if entry["epoch"] == rewind_epoch][1:]
    assert len(starts) == len(checkpoints) - 1 == (1 if "prune.method=one_shot" in changes else 2)
    assert [entry["number"] for entry in epochs] == list(range(len(epochs)))
    assert not same(early["model"], checkpoints[0]["state_dict"])
    for start, checkpoint in zip(starts, checkpoints[1:], strict=True):
        assert same(start["model"], masked(early["model"], checkpoint["masks"]))
        for key in ("optimizer", "torch", "python", "numpy"):
            assert same(start[key], early[key]), key
    per_epoch = len(steps) // len(epochs)
    first = steps[rewind_epoch * per_epoch:2 * per_epoch]
    assert len({rate for step in first for rate in step["rates"]}) == len(first)  # the schedule goes on within the epochs
    for level in range(1, len(checkpoints)):
        begin = 2 * per_epoch + (level - 1) * len(first)
        assert same(steps[begin:begin + len(first)], first), f"batches or learning rates of level {level}"


def test_the_early_state_on_disk_is_the_one_passed_and_is_never_written_again(folder, watched, monkeypatch):
    epochs, _ = watched
    written, save = [], rewinding.save_checkpoint

    def noted(path, content):
        save(path, content)
        written.append((pathlib.Path(path).name, rewind_file().read_bytes() if rewind_file().exists() else None))

    monkeypatch.setattr(rewinding, "save_checkpoint", noted)
    prune()
    assert [name for name, _ in written] == ["rewind_checkpoint.pth.tar",
                                             *(f"level_{level}_checkpoint.pth.tar" for level in (0, 0, 1, 2))]
    assert len({content for _, content in written}) == 1 and written[-1][1] == rewind_file().read_bytes()
    content = load_checkpoint(str(rewind_file()))
    assert content["epoch"] == 1 and same(content["state_dict"], dict(epochs[1]["model"]))
    assert same(content["optimizer"]["state"], epochs[1]["optimizer"])


def test_iterative_goes_on_from_where_it_is(folder, watched):
    epochs, _ = watched
    iterative = prune("prune.method=iterative")
    starts = [entry for entry in epochs if entry["epoch"] == 1][1:]
    assert len(starts) == 2
    for start, before, checkpoint in zip(starts, iterative, iterative[1:], strict=False):
        assert same(start["model"], masked(before["state_dict"], checkpoint["masks"]))
        assert same(start["optimizer"], before["optimizer"]["state"])
    rewound = prune(name="rewound")
    assert same(rewound[0]["state_dict"], iterative[0]["state_dict"]) and same(rewound[1]["masks"], iterative[1]["masks"])
    assert not same(rewound[1]["state_dict"], iterative[1]["state_dict"])


# ---------------------------------------------------------------------------------------------------------------------
# What a level removes.


def smallest(checkpoint, masks, count):
    """Masks without the `count` smallest of the weights that remain, by one sort over all layers."""
    names = [name for name, tensor in checkpoint["state_dict"].items() if tensor.dim() > 1 and name not in
             ("conv1.weight", "fc.weight")]
    flat = np.concatenate([checkpoint["state_dict"][name].abs().numpy().ravel() for name in names])
    kept = np.concatenate([masks[name].numpy().ravel() if name in masks else np.ones(checkpoint["state_dict"][name].numel(),
                                                                                    dtype=bool) for name in names])
    positions = np.flatnonzero(kept)
    kept[positions[np.argsort(flat[positions], kind="stable")[:count]]] = False
    return dict(zip(names, np.split(kept, np.cumsum([checkpoint["state_dict"][name].numel() for name in names])[:-1]),
                    strict=True))


def test_what_goes_is_smallest_at_the_end_of_the_level_before(folder):
    checkpoints = prune("prune.amount=[0.3, 0.46]", "prune.levels=")
    counts = [22118, 23741]  # 0.3 of 73728, 0.46 of the 51610 that are left
    for before, checkpoint, count in zip(checkpoints, checkpoints[1:], counts, strict=False):
        wanted = smallest(before, before["masks"], count)
        assert set(checkpoint["masks"]) == set(wanted)
        for name, kept in wanted.items():
            assert (checkpoint["masks"][name].numpy().ravel() == kept).all(), name
    assert [sum(zeros(checkpoint["masks"]).values()) for checkpoint in checkpoints] == [0, 22118, 22118 + 23741]


@pytest.mark.parametrize("changes", [["momentum=0.9"], ["opt=adamw"], ["prune.type=structured", "momentum=0.9"],
                                     ["prune.method=iterative"]])
def test_at_the_end_of_each_level_what_is_removed_is_zero_and_nothing_else_is(folder, changes):
    checkpoints = prune(*changes)
    for before, checkpoint in zip(checkpoints, checkpoints[1:], strict=False):
        state, masks = checkpoint["state_dict"], checkpoint["masks"]
        assert masks.keys() >= before["masks"].keys()
        assert all(not (masks[name] & ~mask).any() for name, mask in before["masks"].items())
        for name, mask in masks.items():
            assert mask.dim() > 1 or "prune.type=structured" in changes
            if mask.dim() > 1 or name.endswith("weight"):
                assert torch.equal(state[name] != 0, mask), name
            assert not state[name][~mask].any()
        assert "conv1.weight" not in masks and "fc.weight" not in masks
    if "prune.type=structured" in changes:
        channels = {name: mask.flatten(1).any(1) for name, mask in masks.items() if mask.dim() > 1}
        assert sum(int((~kept).sum()) for kept in channels.values()) == 67 + 47  # 0.3 of 224, 0.3 of 157
        # every BatchNorm of a channel goes with it
        for name, kept in channels.items():
            assert torch.equal(masks[name].flatten(1).all(1), kept) and kept.any()
            batchnorm = name.replace("conv", "bn").replace("downsample.0", "downsample.1")
            assert torch.equal(masks[batchnorm], kept)
            assert torch.equal(masks[batchnorm.replace("weight", "bias")], kept)


def test_a_target_is_met_to_the_weight(folder):
    checkpoints = prune("prune.levels=", "prune.target_sparsity=0.55")
    removed = [sum(zeros(checkpoint["masks"]).values()) for checkpoint in checkpoints]
    assert removed == [0, 22118, 22118 + 15483, 40550]  # round(0.55 * 73728) in the last


def test_a_target_that_each_layer_rounds_for_itself_can_be_continued(folder, capsys):
    changes = ["prune.levels=", "prune.target_sparsity=0.7321", "prune.amount=0.9", "prune.scope=layer", "val_cycle=9"]
    checkpoints = prune(*changes)
    wanted = {name: int(0.7321 * mask.numel() + 0.5) for name, mask in checkpoints[1]["masks"].items()}
    assert {name: int((~mask).sum()) for name, mask in checkpoints[1]["masks"].items()} == wanted
    assert sum(wanted.values()) > round(0.7321 * TOTAL)
    capsys.readouterr()
    prune(*changes)
    assert "this run is finished" in capsys.readouterr().out


def test_one_shot_takes_what_the_levels_would_take_together(folder):
    checkpoints = prune("prune.method=one_shot", "prune.levels=3")
    assert [sum(zeros(checkpoint["masks"]).values()) for checkpoint in checkpoints] == [0, 48439]  # (1 - 0.7**3) * 73728


def test_layer_by_layer_each_gives_its_share_and_all_layers_are_pruned_on_request(folder):
    checkpoint = prune("prune.scope=layer", "prune.excepts=[]", "prune.levels=1")[1]
    model = create_model("resnet20", 10)
    wanted = {name: int(0.3 * call.params + 0.5) for name, call in trace(model, 8).layers.items()}
    assert zeros(checkpoint["masks"]) == wanted and {"conv1", "fc"} <= wanted.keys()


# ---------------------------------------------------------------------------------------------------------------------
# What is reported.


def test_the_report_says_what_the_checkpoints_hold(folder):
    checkpoints = prune()
    rows, summary = report(), yaml.safe_load(pathlib.Path("out/run_pruning/summary.yaml").read_text())
    graph = trace(create_model("resnet20", 10), 8)
    whole = sum(call.params for call in graph.layers.values())
    assert whole == TOTAL + 432 + 640
    for level, (row, checkpoint) in enumerate(zip(rows, checkpoints, strict=True)):
        state = checkpoint["state_dict"]
        left = {name: int((state[f"{name}.weight"] != 0).sum()) for name in graph.layers}
        assert int(row["level"]) == level and float(row["removed"]) == 1 - (sum(left.values()) - 1072) / TOTAL
        assert float(row["sparsity"]) == pytest.approx(1 - sum(left.values()) / whole)
        assert {name: float(row[f"sparsity.{name}"]) for name in graph.layers} == pytest.approx(
            {name: 1 - left[name] / call.params for name, call in graph.layers.items()})
        assert int(row["macs"]) == sum(call.macs_exact for call in graph.layers.values())
        assert int(row["nonzero_macs"]) == sum(left[name] * call.macs_exact // call.params
                                               for name, call in graph.layers.items())
        assert float(row["size_mb"]) == pytest.approx(whole * 4 / 2**20)
        assert float(row["sparse_size_mb"]) == pytest.approx(
            sum(min(call.params * 32, call.params + 32 * left[name]) for name, call in graph.layers.items()) / 8 / 2**20)
        assert 0 <= float(row["top1"]) <= float(row["top5"]) <= 100
        assert summary["levels"][level] == pytest.approx({key: float(row[key]) for key in summary["levels"][level]})
    assert [float(row["removed"]) for row in rows] == pytest.approx([0, 0.3, 0.51], abs=1e-5)
    with open("out/run_pruning/pruning.png", "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    with open("out/run_pruning/metrics.csv", encoding="utf-8", newline="") as file:
        tested = {row["epoch"]: row for row in csv.DictReader(file) if row["split"] == "test"}
    assert list(tested) == ["2", "3", "4"]
    for row, figures in zip(rows, tested.values(), strict=True):
        assert float(figures["top1"]) == pytest.approx(float(row["top1"]), rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Stopping and going on.


class Stopped(Exception):
    pass


def assert_same_run(name, other):
    for one, two in zip(levels(name), levels(other), strict=True):
        for key in one.keys() - {"config"}:
            assert same(one[key], two[key]), (one["level"], key)
    assert same(load_checkpoint(str(rewind_file(name)))["state_dict"], load_checkpoint(str(rewind_file(other)))["state_dict"])
    texts = [pathlib.Path(f"out/{run}_pruning/pruning.csv").read_bytes() for run in (name, other)]
    assert texts[0] == texts[1]
    rows = [sorted(line.rpartition(",")[0] for line in
                   pathlib.Path(f"out/{run}_pruning/metrics.csv").read_text().splitlines()) for run in (name, other)]
    assert rows[0] == rows[1]
    found = [yaml.safe_load(pathlib.Path(f"out/{run}_pruning/summary.yaml").read_text())["levels"] for run in (name, other)]
    assert found[0] == found[1]


@pytest.mark.parametrize("changes", [["epochs=3"], ["prune.method=iterative", "prune.rewind_epoch=0"]])
def test_a_run_stopped_at_every_checkpoint_ends_as_an_undisturbed_one(folder, monkeypatch, changes):
    prune(*changes)
    save, stops = rewinding.save_checkpoint, []

    def save_and_stop(path, content):
        save(path, content)
        stops.append(path)
        raise Stopped

    monkeypatch.setattr(rewinding, "save_checkpoint", save_and_stop)
    while True:
        try:
            prune(*changes, name="stopped")
            break
        except Stopped:
            random.random(), torch.rand(1), np.random.rand()
            monkeypatch.setattr(rewinding, "save_checkpoint", save if len(stops) > 12 else save_and_stop)
            if stops[-1].endswith("rewind_checkpoint.pth.tar"):  # the level's own checkpoint comes next
                monkeypatch.setattr(rewinding, "save_checkpoint", lambda path, content: (
                    save(path, content), monkeypatch.setattr(rewinding, "save_checkpoint", save_and_stop)))
    assert len(stops) >= 6
    assert_same_run("run", "stopped")


def test_a_run_stopped_before_its_report_ends_as_an_undisturbed_one(folder, monkeypatch):
    prune()
    write = rewinding.pruning_report.write

    def stop(*arguments):
        raise Stopped

    for place in ("write", "summarise"):
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(rewinding.pruning_report, place, stop)
            prune(name="stopped")
    prune(name="stopped")
    assert write is rewinding.pruning_report.write
    assert_same_run("run", "stopped")


def test_finished_levels_are_left_alone_and_more_of_them_equal_a_run_that_asked_at_once(folder, capsys):
    prune("prune.levels=3", name="at_once")
    prune("prune.levels=1")
    paths = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in pathlib.Path("out/run_pruning").iterdir()}
    capsys.readouterr()
    prune("prune.levels=1")
    assert "this run is finished" in capsys.readouterr().out
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths} == paths
    prune("prune.levels=3")
    for path in (rewind_file(), *(pathlib.Path(f"out/run_pruning/level_{level}_checkpoint.pth.tar") for level in (0, 1))):
        assert (path.read_bytes(), path.stat().st_mtime_ns) == paths[path]
    assert_same_run("run", "at_once")


def test_a_list_of_amounts_may_grow_at_its_end_only(folder, capsys):
    prune("prune.amount=[0.3, 0.2]", "prune.levels=", name="at_once")
    prune("prune.amount=[0.3]", "prune.levels=")
    prune("prune.amount=[0.3, 0.2]", "prune.levels=")
    assert_same_run("run", "at_once")
    capsys.readouterr()
    for amount in ("[0.3, 0.25]", "[0.3]", "0.3"):
        levels_asked = "prune.levels=2" if amount == "0.3" else "prune.levels="
        with pytest.raises(ValueError, match="prune.amount|prune.levels"):
            prune(f"prune.amount={amount}", levels_asked)


def test_a_lost_report_is_written_anew_the_same(folder):
    prune()
    path = pathlib.Path("out/run_pruning/pruning.csv")
    whole, checkpoints = path.read_bytes(), {file: file.read_bytes() for file in path.parent.glob("*.tar")}
    shutil.copytree("out/run_pruning", "out/kept_pruning")
    for damage in (path.unlink, lambda: path.write_bytes(whole[:len(whole) // 2]), lambda: path.write_bytes(b"\xff\x00")):
        damage()
        prune()
        assert path.read_bytes() == whole
    assert {file: file.read_bytes() for file in checkpoints} == checkpoints
    assert_same_run("run", "kept")


# ---------------------------------------------------------------------------------------------------------------------
# What comes after: joint training on what remains.


def quantized_weights(checkpoint):
    """[(name, bit, quantized weight)] of every searchable layer at every candidate."""
    model, excepts = create_model("resnet20", 10), {name: ExceptionConfig() for name in ("conv1", "bn1", "fc")}
    config = QuanConfig(act=QuantizerConfig(all_positive=True), excepts=excepts)
    replace_module_by_names(model, joint_modules(model, trace(model, 8), config, checkpoint["bits"]))
    model.load_state_dict(checkpoint["state_dict"])
    found = []
    for name, quantizer in step_quantizers(model).items():
        if name.endswith("quan_w_fn"):
            for bit in checkpoint["bits"]:
                quantizer.select(bit)
                layer = name.removesuffix(".quan_w_fn")
                found.append((layer, bit, quantizer.quantize(model.get_submodule(layer).weight).detach()))
    return found


@pytest.mark.parametrize("changes", [["prune.type=structured", "opt=sgd", "momentum=0.9"], ["opt=adamw"]])
def test_joint_training_keeps_what_is_removed_at_zero(folder, capsys, changes):
    pruned = prune("prune.levels=1", *changes)[-1]
    source = "init_from=out/run_pruning/level_1_checkpoint.pth.tar"
    main.main(["config.yaml", source, *changes])
    joint = load_checkpoint("out/run/run_checkpoint.pth.tar")
    assert same(joint["masks"], pruned["masks"]) and joint["epoch"] == 2
    state = joint["state_dict"]
    for name, mask in pruned["masks"].items():
        if mask.dim() > 1:
            assert torch.equal(state[name] != 0, mask), name
            continue
        copies = [entry for entry in state if entry.startswith(f"{name.rpartition('.')[0]}.bns.")
                  and entry.endswith(f".{name.rpartition('.')[2]}")]
        assert len(copies) == 2
        for entry in copies:
            assert not state[entry][~mask].any() and state[entry][mask].all()
    for name, bit, weight in quantized_weights(joint):
        assert not weight[~pruned["masks"][f"{name}.weight"]].any(), (name, bit)
        assert weight.any()
    importance_extractor.main(["out/run/run_checkpoint.pth.tar", "--output", "i.pkl"])
    rows = {**read_indicators("i.pkl")["layers"], **read_indicators("i.pkl")["fixed"]}
    for name, row in rows.items():
        assert row["sparsity"] == 1 - int((state[f"{name}.weight"] != 0).sum()) / row["params"]
    assert rows["conv1"]["sparsity"] == 0 < rows["layer3.0.conv1"]["sparsity"]
    capsys.readouterr()
    main.main(["config.yaml", source, *changes])  # the masks are found in the run's own checkpoint
    assert "this run is finished" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["init_from", "pre_trained"])
def test_joint_training_begins_with_the_weights_and_steps_of_what_remains(folder, monkeypatch, key):
    pruned = prune("prune.levels=1", "epochs=2")[-1]
    for tensor in (pruned["state_dict"][name] for name in pruned["masks"]):
        tensor[tensor == 0] = 3.0  # a file that does not hold its own masks
    save_checkpoint("dirty", pruned)
    begun = {}
    monkeypatch.setattr(main.process, "pretrain", lambda network, *arguments: begun.update(
        copy.deepcopy(network.model.state_dict())) or (_ for _ in ()).throw(Stopped))
    with pytest.raises(Stopped):
        main.main(["config.yaml", f"{key}=dirty", "quan.weight.init=three_sigma"])
    for name, mask in pruned["masks"].items():
        weight = pruned["state_dict"][name]
        assert torch.equal(begun[name], weight * mask)
        left = weight[mask].double()
        three_sigma = max(abs(left.mean() - 3 * left.std()), abs(left.mean() + 3 * left.std()))
        steps = begun[name.replace(".weight", ".quan_w_fn.s")].double()
        torch.testing.assert_close(steps, torch.stack([three_sigma / 8, three_sigma / 2]), rtol=1e-5, atol=0)


def test_a_stopped_joint_training_goes_on_under_its_masks(folder, monkeypatch):
    prune("prune.levels=1")
    source = "init_from=out/run_pruning/level_1_checkpoint.pth.tar"
    main.main(["config.yaml", source])
    save = main.RunFolder.save

    def save_and_stop(*arguments):
        save(*arguments)
        raise Stopped

    monkeypatch.setattr(main.RunFolder, "save", save_and_stop)
    with pytest.raises(Stopped):
        main.main(["config.yaml", source, "name=stopped"])
    monkeypatch.setattr(main.RunFolder, "save", save)
    main.main(["config.yaml", source, "name=stopped"])
    one, two = (load_checkpoint(f"out/{name}/{name}_checkpoint.pth.tar") for name in ("run", "stopped"))
    assert same(one["state_dict"], two["state_dict"]) and same(one["masks"], two["masks"])
