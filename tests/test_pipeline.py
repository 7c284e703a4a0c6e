"""The whole way by the commands of the README, each from its own folder, on a copy of the stages and small images."""

import csv
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
import yaml

from comparing import as_bytes

pytestmark = pytest.mark.xdist_group("pipeline")  # one process makes what all read
ROOT = Path(__file__).resolve().parents[1]
STAGES = ["indicators_pretraining", "quantization_search", "quantization_training"]
SMALL = ["dataloader.input_size=8", "dataloader.batch_size=32", "dataloader.data_fraction=0.1", "epochs=1"]
JOINT = "results/resnet20_digits/resnet20_digits_checkpoint.pth.tar"
BITS = ["6", "5", "4", "3", "2"]


def command(folder, *words, expect=0):
    """Run `python WORDS` in a stage folder; return stdout, or stderr where a failure is expected."""
    return ended(forked.run(folder, *words), expect)


def python(folder, *words):
    """The same in a process of its own, imports and all."""
    return ended(subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=300,
                                check=False))


def ended(done, expect=0):
    assert done.returncode == expect, f"{done.args}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stderr if expect else done.stdout


def launch(folder, *words):
    launcher = forked.torchrun(folder, *words)
    said = launcher.communicate(timeout=300)
    return ended(subprocess.CompletedProcess(words, launcher.returncode, *said))


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """The three stage folders, copied to a place of their own: nothing above them is needed."""
    place = tmp_path_factory.mktemp("project")
    for stage in STAGES:
        shutil.copytree(ROOT / stage, place / stage, ignore=shutil.ignore_patterns("results", "__pycache__", "tests"))
    return {"pretraining": place / STAGES[0], "search": place / STAGES[1], "training": place / STAGES[2]}


@pytest.fixture(scope="module")
def walked(stages):
    """What each command of the way printed."""
    said = {}
    said["dense"] = command(stages["training"], "main.py", "config_resnet20_digits.yaml", *SMALL, "warmup_epochs=0")
    said["joint"] = command(stages["pretraining"], "main.py", "config_resnet20_digits.yaml", *SMALL)
    said["extract"] = command(stages["pretraining"], "importance_extractor.py", JOINT, "--output", "results/i.pkl")
    said["search"] = command(stages["search"], "search.py", "--model", "resnet20",
                             "--i", "../indicators_pretraining/results/i.pkl", "--b", *BITS, "--wb", "3", "--ab", "3",
                             "--cr", "10.59", "--bops", "True", "--output", "results/policy_resnet20_digits_w3a3.yaml")
    said["finetune"] = command(stages["training"], "main.py", "finetune_resnet20_digits_w3a3.yaml", *SMALL)
    said["eval"] = command(stages["training"], "main.py", "eval_resnet20_digits_w3a3.yaml", *SMALL[:2])
    return said


def metrics(folder, name):
    with open(folder / "results" / name / "metrics.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_candidate_has_real_figures_in_training_and_validation(walked, stages):
    rows = metrics(stages["pretraining"], "resnet20_digits")
    for split, labels in (("train", {*BITS, "random"}), ("val", set(BITS)), ("test", set(BITS))):
        found = {row["bits"]: row for row in rows if row["split"] == split}
        assert set(found) == labels
        assert all(0 < float(row["loss"]) < 20 and 0 <= float(row["top1"]) <= float(row["top5"]) <= 100
                   for row in found.values())
        assert len({row["loss"] for row in found.values()}) == len(labels)


def test_the_indicators_are_the_step_sizes_in_the_checkpoint(walked, stages):
    with open(stages["pretraining"] / "results" / "i.pkl", "rb") as file:
        indicators = pickle.load(file)
    state = torch.load(stages["pretraining"] / JOINT, weights_only=True)["state_dict"]
    assert len(indicators["layer_name"]) == 18 and indicators["layer_name"][0] == "layer1.0.conv1"
    for kind, quantizer in (("weight", "quan_w_fn"), ("act", "quan_a_fn")):
        for name in indicators["layer_name"]:
            assert list(indicators[kind][name].values()) == state[f"{name}.{quantizer}.s"].tolist()
    assert indicators["layers"]["layer1.0.conv1"]["macs_exact"] == 16 * 16 * 9 * 64
    assert list(indicators["fixed"]) == ["conv1", "fc"]


def test_the_policy_that_was_searched_is_the_one_that_was_trained(walked, stages):
    policy = yaml.safe_load((stages["search"] / "results/policy_resnet20_digits_w3a3.yaml").read_text())
    assert walked["search"].splitlines()[-2:] == [f"searched weight bit-widths {policy['weight_bits']}",
                                                  f"searched act bit-widths {policy['act_bits']}"]
    checkpoint = torch.load(stages["training"] / "results/resnet20_digits_w3a3/resnet20_digits_w3a3_checkpoint.pth.tar",
                            weights_only=True)
    assert list(checkpoint["weight_bits"].values()) == policy["weight_bits"]
    assert list(checkpoint["act_bits"].values()) == policy["act_bits"]


def test_search_and_fine_tuning_agree_on_what_the_policy_costs(walked, stages):
    policy = yaml.safe_load((stages["search"] / "results/policy_resnet20_digits_w3a3.yaml").read_text())
    summary = yaml.safe_load((stages["training"] / "results/resnet20_digits_w3a3/summary.yaml").read_text())
    assert summary["ratio"] >= 10.59
    assert f"{summary['gbitops']:.3f}" in walked["search"] and f"{summary['ratio']:.2f}" in walked["search"]
    assert policy["arch"] == summary["arch"] == "resnet20"


def test_evaluation_repeats_the_figures_of_training(walked, stages):
    summary = yaml.safe_load((stages["training"] / "results/resnet20_digits_w3a3/summary.yaml").read_text())
    assert f"top-1 {summary['top1']:.3f}" in walked["eval"] and f"loss {summary['loss']:.4f}" in walked["eval"]


def as_limpqs(path, to):
    """A checkpoint in LIMPQ's format: its names, which data parallelism leaves with a prefix, and nothing that says how."""
    content = torch.load(path, weights_only=True)
    state = {f"module.{name}": tensor for name, tensor in content["state_dict"].items()}
    torch.save({"epoch": 1, "arch": "resnet20", "state_dict": state, "extras": {"top1": 9.0, "top5": 50.0}}, to)
    return state


def test_limpqs_files_walk_all_stages_to_the_same_bytes(walked, stages):
    """The joint training of `walked` as LIMPQ would have saved it gives the same indicators, weights and figures."""
    state = as_limpqs(stages["pretraining"] / JOINT, stages["pretraining"] / "results/limpq.pth.tar")
    assert {"module.layer1.0.conv1.quan_w_fn.s", "module.layer1.0.conv1.quan_a_fn.init_state", "module.bn1.bn.weight",
            "module.layer1.0.bn1.bns.4.running_var", "module.fc.bias"} <= state.keys()
    command(stages["pretraining"], "importance_extractor.py", "results/limpq.pth.tar", "--b", *BITS,
            "--output", "results/limpq.pkl")
    tables = [pickle.loads((stages["pretraining"] / f"results/{name}.pkl").read_bytes()) for name in ("i", "limpq")]
    assert all(tables[0][key] == tables[1][key] for key in ("weight", "act", "layer_name"))
    command(stages["search"], "search.py", "--model", "resnet20", "--i", "../indicators_pretraining/results/limpq.pkl",
            "--b", *BITS, "--wb", "3", "--ab", "3", "--cr", "10.59", "--bops", "True", "--output", "results/limpq.yaml")
    for name, start in (("ours", JOINT), ("limpq", "results/limpq.pth.tar")):
        command(stages["training"], "main.py", "finetune_resnet20_digits_w3a3.yaml", *SMALL, f"name={name}",
                f"target_bits=[{', '.join(BITS)}]", "policy=../quantization_search/results/limpq.yaml",
                f"init_from=../indicators_pretraining/{start}")
    ours, limpqs = (torch.load(stages["training"] / f"results/{name}/{name}_checkpoint.pth.tar", weights_only=True)
                    for name in ("ours", "limpq"))
    policy = yaml.safe_load((stages["search"] / "results/limpq.yaml").read_text())
    assert list(limpqs["weight_bits"].values()) == policy["weight_bits"] and len(set(policy["weight_bits"])) > 1
    assert as_bytes(ours["state_dict"]) == as_bytes(limpqs["state_dict"])
    summary = yaml.safe_load((stages["training"] / "results/limpq/summary.yaml").read_text())
    figures = f"loss {summary['loss']:.4f}  top-1 {summary['top1']:.3f}"
    # and a fine-tuned one, evaluated and packed by a configuration that holds what the file does not
    state = as_limpqs(stages["training"] / "results/limpq/limpq_checkpoint.pth.tar",
                      stages["training"] / "results/limpq.pth.tar")
    assert "module.conv1.quan_w_fn.s" in state and "module.conv1.quan_a_fn.s" not in state
    (stages["training"] / "limpq.yaml").write_text("policy: ../quantization_search/results/limpq.yaml\n" + "".join(
        line for line in (stages["training"] / "finetune_resnet20_digits_w3a3.yaml").read_text().splitlines(keepends=True)
        if not line.startswith(("policy:", "init_from:"))))
    evaluate = ("main.py", "limpq.yaml", *SMALL[:2], "eval=true")
    said = command(stages["training"], *evaluate, "resume.path=results/limpq.pth.tar")
    assert figures in said.splitlines()[-1]
    said = command(stages["training"], "export.py", "results/limpq.pth.tar", "--config", "limpq.yaml",
                   "--output", "results/limpq.safetensors")
    assert "bit for bit" in said
    said = command(stages["training"], *evaluate, "resume.path=results/limpq.safetensors", "arithmetic=float")
    assert figures in said.splitlines()[-1]


def test_the_packed_model_repeats_the_figures_of_its_checkpoint(walked, stages):
    path = "results/resnet20_digits_w3a3/resnet20_digits_w3a3_checkpoint.pth.tar"
    said = python(stages["training"], "export.py", path, "--output", "results/model.safetensors")
    assert "bit for bit" in said
    said = command(stages["training"], "main.py", "eval_resnet20_digits_w3a3.yaml", *SMALL[:2],
                   "resume.path=results/model.safetensors", "arithmetic=float")
    which, *figures = said.replace("results/model.safetensors", path).splitlines()
    assert which == f"{path}: a packed model, float arithmetic" and figures == walked["eval"].splitlines()[1:]


def test_a_finished_run_is_left_alone_and_a_changed_one_refused(walked, stages):
    folder = stages["training"] / "results/resnet20_digits_w3a3"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    said = command(stages["training"], "main.py", "finetune_resnet20_digits_w3a3.yaml", *SMALL)
    assert "this run is finished" in said
    said = command(stages["training"], "main.py", "finetune_resnet20_digits_w3a3.yaml", *SMALL, "lr=0.5", expect=2)
    assert said.count("\n") == 1 and "another lr" in said
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_dry_runs_write_nothing(walked, stages):
    for stage, config in (("pretraining", "config_resnet20_digits.yaml"), ("training", "finetune_resnet20_digits_w3a3.yaml")):
        said = command(stages[stage], "main.py", config, *SMALL, "name=dry", "--dry-run")
        assert "nothing was written" in said and not (stages[stage] / "results" / "dry").exists()


def test_two_processes_walk_stages_one_and_three(walked, stages):
    python(stages["pretraining"], "-m", "torch.distributed.launch", "--nproc_per_node=2",
           f"--master_port={forked.free_port()}", "main.py", "config_resnet20_digits.yaml", *SMALL, "name=two")
    launch(stages["training"], "main.py", "finetune_resnet20_digits_w3a3.yaml", *SMALL, "name=two")
    rows = metrics(stages["training"], "two")
    assert {row["split"] for row in rows} == {"train", "val", "test"}
    alone = command(stages["training"], "main.py", "eval_resnet20_digits_w3a3.yaml", *SMALL[:2],
                    "resume.path=results/two/two_checkpoint.pth.tar")
    test = next(row for row in rows if row["split"] == "test")
    assert f"top-1 {float(test['top1']):.3f}" in alone  # metrics over two processes are those of one


def test_the_way_of_the_readme(stages):
    """The commands of the README, and of the demo, on fewer images."""
    name, indicators = "mobilenet_digits", "results/mobilenet_digits/fisher.pkl"
    tuned = f"results/{name}_w3a3/{name}_w3a3_checkpoint.pth.tar"
    command(stages["training"], "main.py", f"config_{name}.yaml", *SMALL, "warmup_epochs=0")
    command(stages["pretraining"], "main.py", f"config_{name}.yaml", *SMALL)
    command(stages["pretraining"], "sensitivity.py", f"config_{name}.yaml", *SMALL, "--of", "fisher", "--images", "16",
            "--output", indicators)
    command(stages["search"], "search.py", "--i", f"../indicators_pretraining/{indicators}", "--b", *BITS, "--wb", "3",
            "--ab", "3", "--cr", "0", "--bops", "True", "--output", f"results/policy_{name}_w3a3.yaml")
    command(stages["training"], "main.py", f"finetune_{name}_w3a3.yaml", *SMALL)
    said = command(stages["training"], "main.py", f"eval_{name}_w3a3.yaml", *SMALL[:2])
    summary = yaml.safe_load((stages["training"] / f"results/{name}_w3a3/summary.yaml").read_text())
    assert f"top-1 {summary['top1']:.3f}" in said
    said = command(stages["training"], "export.py", tuned, "--output", f"results/{name}_w3a3.safetensors")
    assert "bit for bit" in said


def test_a_pruned_network_walks_all_stages(stages):
    small, prune = [*SMALL, "pre_trained=", "name=pruned"], ["prune.amount=0.4", "prune.levels=2"]
    python(stages["pretraining"], "pruning.py", "config_resnet20_digits.yaml", *small, *prune)
    command(stages["pretraining"], "main.py", "config_resnet20_digits.yaml", *small,
            "init_from=results/pruned_pruning/level_2_checkpoint.pth.tar")
    command(stages["pretraining"], "importance_extractor.py", "results/pruned/pruned_checkpoint.pth.tar",
            "--output", "results/pruned.pkl")
    command(stages["search"], "search.py", "--model", "resnet20", "--i", "../indicators_pretraining/results/pruned.pkl",
            "--b", *BITS, "--wb", "3", "--ab", "3", "--cr", "10.59", "--bops", "True", "--output", "results/pruned.yaml")
    command(stages["training"], "main.py", "finetune_resnet20_digits_w3a3.yaml", *SMALL, "name=pruned",
            "policy=../quantization_search/results/pruned.yaml",
            "init_from=../indicators_pretraining/results/pruned/pruned_checkpoint.pth.tar")
    files = [stages["pretraining"] / "results/pruned_pruning/level_2_checkpoint.pth.tar",
             stages["training"] / "results/pruned/pruned_checkpoint.pth.tar"]
    pruned, tuned = (torch.load(path, weights_only=True) for path in files)
    assert sum(int((~mask).sum()) for mask in pruned["masks"].values()) == 171049  # 0.64 of 267264
    for name, mask in pruned["masks"].items():
        assert torch.equal(tuned["masks"][name], mask) and not tuned["state_dict"][name][~mask].any()
    with open(stages["pretraining"] / "results/pruned.pkl", "rb") as file:
        rows = pickle.load(file)["layers"]
    summary = yaml.safe_load((stages["training"] / "results/pruned/summary.yaml").read_text())
    assert summary["sparsity"] == pytest.approx(171049 / 268336) and summary["sparse_ratio"] > summary["ratio"]
    assert sum(row["sparsity"] * row["params"] for row in rows.values()) == pytest.approx(171049)


def test_two_processes_prune_to_the_same_masks(stages):
    launch(stages["pretraining"], "pruning.py", "config_resnet20_digits.yaml", *SMALL, "pre_trained=", "name=two",
           "epochs=2", "val_cycle=2", "prune.amount=0.3", "prune.levels=1", "prune.rewind_epoch=1")
    folder = stages["pretraining"] / "results/two_pruning"
    before, first, second = (torch.load(folder / f"{name}_checkpoint.pth.tar", weights_only=True)
                             for name in ("rewind", "level_0", "level_1"))
    assert len(before["random_states"]) == len(second["random_states"]) == 2
    sizes = torch.cat([first["state_dict"][name].abs().flatten() for name in second["masks"]])
    kept = torch.cat([mask.flatten() for mask in second["masks"].values()])
    assert int((~kept).sum()) == 80179 and sizes[~kept].max() <= sizes[kept].min()
    assert all(torch.equal(second["state_dict"][name] != 0, mask) for name, mask in second["masks"].items())
    tested = [row for row in metrics(stages["pretraining"], "two_pruning") if row["split"] == "test"]
    with open(folder / "pruning.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in tested] == ["2", "3"] and [row["level"] for row in rows] == ["0", "1"]
    for row in rows:
        assert 0 < float(row["loss"]) < 20 and 0 <= float(row["top1"]) <= float(row["top5"]) <= 100
    # Every rank holds the same network: figures over two processes are those of one that evaluates the checkpoint.
    said = command(stages["training"], "main.py", "config_resnet20_digits.yaml", *SMALL[:2], "eval=true",
                   f"resume.path={folder / 'level_1_checkpoint.pth.tar'}")
    assert f"loss {float(rows[1]['loss']):.4f}  top-1 {float(rows[1]['top1']):.3f}" in said
