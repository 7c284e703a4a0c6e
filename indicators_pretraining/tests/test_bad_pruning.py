"""What goes wrong with pruning: one clear line on stderr, exit status 2, nothing written."""

import pathlib

import pytest
import torch
from test_bad_input import complaint

import main
import pruning
from engine.checkpoint import load_checkpoint, save_checkpoint
from model import create_model
from util.errors import user_errors_on_one_line

pytestmark = pytest.mark.usefixtures("shallow")
CONFIG = """
name: run
output_dir: out
arch: resnet20
target_bits: [4, 2]
dataloader: {dataset: digits, input_size: 8, batch_size: 64, data_fraction: 0.1}
wandb: {mode: disabled}
quan: {act: {all_positive: true}, excepts: {conv1: , bn1: , fc: }}
epochs: 1
prune: {amount: 0.3, levels: 1}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


def prune(*changes):
    pruning.main(["config.yaml", *changes])


def refused(capsys, *changes):
    return complaint(capsys, pruning.main, "config.yaml", *changes)


def stopped(capsys, *changes):
    """The one line of a run that stops on the way, when some of it is written already."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop, user_errors_on_one_line():
        prune(*changes)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    return said


@pytest.mark.parametrize(("changes", "message"), [
    *(([f"prune.amount={amount}"], "prune.amount") for amount in (
        0, 1, -0.2, 1.5, ".nan", ".inf", "true", "x", "[]", "[0.2, 1]", "[0.2, 0]", "[.nan]", "[0.2, x]", "[[0.2]]", "[true]",
        "{a: 1}")),
    (["prune.levels=0"], "prune.levels"),
    (["prune.levels=1.5"], "prune.levels"),
    (["prune.levels="], "prune.levels: missing; give levels or target_sparsity"),
    (["prune.target_sparsity=0.5"], "prune.target_sparsity: levels says where to stop already"),
    *((["prune.levels=", f"prune.target_sparsity={target}"], "prune.target_sparsity") for target in (0, 1, ".nan", 2)),
    (["prune.amount=[0.2, 0.3]", "prune.levels=3"], "prune.amount: found 2 shares for 3 levels"),
    (["prune.rewind_epoch=1"], "prune.rewind_epoch: found 1, which is never reached"),
    (["prune.rewind_epoch=-1"], "prune.rewind_epoch"),
    (["prune.epochs_per_level=3", "prune.rewind_epoch=3"], "allowed is less than 3"),
    (["prune.epochs_per_level=0"], "prune.epochs_per_level"),
    (["prune.excepts=[layer1.0.con1]"], "prune.excepts: layer1.0.con1 is not a layer of this network; did you mean"),
    (["prune.excepts=conv1"], "prune.excepts"),
    (["prune.method=lottery"], "prune.method"),
    (["prune.type=channels"], "prune.type"),
    (["prune.scope=all"], "prune.scope"),
    (["prune.ammount=0.2"], "prune.ammount: unknown key; did you mean"),
    (["prune=0.2"], "prune"),
    (["eval=true"], "eval: "),
    (["resume.path=none"], "resume.path: "),
    (["resume.path=config.yaml"], "resume.path: "),
    (["resume.lean=true"], "resume.path: "),
    (["freeze_weights=true"], "freeze_weights: "),
    (["final_test=false"], "final_test: "),
    (["init_from=nowhere"], "nowhere: cannot read the checkpoint"),
    (["init_from=config.yaml"], "config.yaml: "),
    (["init_from=a", "pre_trained=b"], "init_from: weights come from pre_trained already"),
    (["warmup_epochs=2", "epochs=5", "prune.epochs_per_level=2"], "warmup_epochs: found 2"),
])
def test_what_the_configuration_says(folder, capsys, changes, message):
    assert message in refused(capsys, *changes)


def test_an_amount_that_removes_nothing(folder, capsys):
    assert "prune.amount: level 1 would remove none of the 73728 weights" in stopped(capsys, "prune.amount=0.000001")


def test_a_list_that_ends_below_the_target(folder, capsys):
    said = stopped(capsys, "prune.amount=[0.2]", "prune.levels=", "prune.target_sparsity=0.5")
    assert "prune.amount: its 1 levels end below target_sparsity (0.5)" in said


@pytest.mark.parametrize(("changes", "message"), [
    (["prune.target_sparsity=0.98"], "218 of 224 channels of all layers can go (0.9732)"),
    (["prune.target_sparsity=0.97", "prune.scope=layer"], "15 of 16 channels of layer1.0.conv1 can go (0.9375)"),
    (["prune.amount=0.98", "prune.method=one_shot", "prune.levels=1"], "218 of 224 channels of all layers can go (0.9732)")])
def test_a_target_that_needs_the_last_channel_of_a_layer(folder, capsys, changes, message):
    said = refused(capsys, "prune.type=structured", "prune.levels=", *changes)
    assert "prune.target_sparsity: found 0.9" in said and "but one channel of each layer stays; " + message in said


def test_all_but_one_channel_of_each_layer_can_be_removed(folder):
    prune("prune.type=structured", "prune.levels=", "prune.target_sparsity=0.9732", "prune.amount=0.9732")
    masks = load_checkpoint("out/run_pruning/level_1_checkpoint.pth.tar")["masks"]
    assert {int(mask.flatten(1).any(1).sum()) for mask in masks.values() if mask.dim() > 1} == {1}


def test_less_than_is_there_already(folder, capsys):
    prune("prune.levels=2")
    capsys.readouterr()
    assert "prune.levels: found 1, but level 2 is there already" in refused(capsys)
    said = refused(capsys, "prune.levels=", "prune.target_sparsity=0.4")
    assert "prune.target_sparsity: found 0.4, but 51.00 % of the weights are removed already" in said
    said = refused(capsys, "name=other", "init_from=out/run_pruning/level_2_checkpoint.pth.tar", "prune.levels=",
                   "prune.target_sparsity=0.4")
    assert "51.00 % of the weights are removed already" in said
    for change, key in (("prune.amount=0.4", "prune.amount"), ("prune.type=structured", "prune.type"),
                        ("prune.excepts=[]", "prune.excepts"), ("lr=0.3", "lr"), ("epochs=2", "epochs")):
        assert key in refused(capsys, "prune.levels=2", change)


UNFIT = "does not fit this run|optimizer: |random_states: |extras: "


def test_an_early_state_that_is_lost_or_another_one(folder, capsys):
    rewind_epoch, levels = ["epochs=2", "prune.rewind_epoch=1"], ["epochs=2", "prune.rewind_epoch=1", "prune.levels=2"]
    prune(*rewind_epoch)
    path = pathlib.Path("out/run_pruning/rewind_checkpoint.pth.tar")
    early = load_checkpoint(str(path))
    path.unlink()
    assert "rewind_checkpoint.pth.tar: cannot read the checkpoint" in stopped(capsys, *levels)
    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    adamw.param_groups[0]["params"][0].grad = torch.ones(3)
    adamw.step()
    momentum = [{**state, "momentum_buffer": torch.ones(1)} for state in early["optimizer"]["state"].values()]
    for content, message in (
            ({**early, "epoch": 3}, "holds the state after epoch 3, not 1"),
            ({"state_dict": create_model("mobilenetv1", 10).state_dict()}, "epoch None"),
            ({**early, "config": {**early["config"], "seed": 5}}, "was started with another seed"),
            ({**early, "optimizer": {**early["optimizer"], "param_groups": [
                {key: value for key, value in group.items() if key != "momentum"}
                for group in early["optimizer"]["param_groups"]]}}, UNFIT),
            ({**early, "state_dict": create_model("mobilenetv1", 10).state_dict()}, f"is not part of|is missing|{UNFIT}"),
            ({**early, "arch": "resnet18"}, "holds resnet18"),
            ({**early, "optimizer": adamw.state_dict()}, UNFIT),
            ({**early, "optimizer": {**early["optimizer"], "state": dict(enumerate(momentum))}}, UNFIT),
            ({**early, "optimizer": {"param_groups": 3}}, UNFIT),
            ({**early, "random_states": [3]}, UNFIT),
            ({key: value for key, value in early.items() if key != "random_states"}, UNFIT)):
        save_checkpoint(str(path), content)
        said = stopped(capsys, *levels)
        assert "rewind_checkpoint.pth.tar: " in said and any(part in said for part in message.split("|")), said
    path.write_bytes(b"PK")
    assert "rewind_checkpoint.pth.tar: damaged or not a checkpoint" in stopped(capsys, *levels)


def test_a_level_that_is_damaged_or_another_one(folder, capsys):
    prune()
    path = pathlib.Path("out/run_pruning/level_1_checkpoint.pth.tar")
    whole, content = path.read_bytes(), load_checkpoint(str(path))
    path.write_bytes(whole[:-3000])
    assert "level_1_checkpoint.pth.tar: damaged" in refused(capsys)
    for change, message in (({"level": 0}, "is not the checkpoint of level 1"), ({"level": None}, "level"),
                            ({"arch": "resnet18"}, "holds resnet18"), ({"config": {}}, "was started with another"),
                            ({"masks": [1]}, "masks"), ({"masks": {3: 4}}, "masks: 3 is not part"), ({"epoch": "1"}, "epoch"),
                            ({"random_states": None}, "random_states"), ({"extras": {}}, "does not fit")):
        save_checkpoint(str(path), {**content, **change})
        said = refused(capsys)
        assert "level_1_checkpoint.pth.tar: " in said and message in said
    path.write_bytes(whole)
    first = pathlib.Path("out/run_pruning/level_0_checkpoint.pth.tar")
    first.write_bytes(b"PK")
    pathlib.Path("out/run_pruning/pruning.csv").unlink()
    assert "level_0_checkpoint.pth.tar: damaged or not a checkpoint" in stopped(capsys)


WRONG_MASKS = [
    ({"layer1.0.con1.weight": torch.ones(16, 16, 3, 3, dtype=torch.bool)}, "did you mean 'layer1.0.conv1.weight'"),
    ({"layer1.0.conv1.weight": torch.ones(16, 16, 1, 1, dtype=torch.bool)}, "has shape [16, 16, 1, 1]"),
    ({"layer1.0.conv1.weight": torch.ones(0, dtype=torch.bool)}, "has shape [0]"),
    ({"layer1.0.conv1.weight": torch.ones(16, 16, 3, 3)}, "is not a mask"),
    ({"layer1.0.conv1.weight": "all"}, "is not a mask"),
    ({5: None}, "5 is not part of this network"),
    (7, "masks: found 7"), (None, "masks: found"), (["a"], "masks: found"),
]


@pytest.mark.parametrize(("masks", "message"), WRONG_MASKS)
def test_masks_of_another_network(folder, capsys, masks, message):
    save_checkpoint("dense", {"arch": "resnet20", "state_dict": create_model("resnet20", 10).state_dict(), "masks": masks})
    for command in (main.main, pruning.main):
        for key in ("init_from", "pre_trained"):
            said = complaint(capsys, command, "config.yaml", f"{key}=dense")
            assert said.startswith(f"error: {key}: dense: masks") and message in said


@pytest.mark.parametrize(("masks", "message"), WRONG_MASKS)
def test_masks_of_another_network_in_a_run_that_goes_on(folder, capsys, masks, message):
    save_checkpoint("joint", {"arch": "resnet20", "state_dict": {}, "masks": masks})
    assert message in complaint(capsys, main.main, "config.yaml", "resume.path=joint")
    assert message in complaint(capsys, main.main, "config.yaml", "resume.path=joint", "eval=true")


def test_a_start_from_another_network(folder, capsys):
    save_checkpoint("dense", {"arch": "resnet18", "state_dict": create_model("resnet20", 10).state_dict()})
    assert "dense: holds resnet18" in refused(capsys, "init_from=dense")
    save_checkpoint("dense", {"arch": "resnet20", "state_dict": create_model("resnet20", 7).state_dict()})
    assert "has another number of classes than the data (10)" in refused(capsys, "init_from=dense")


def test_a_dry_run_says_what_there_is_to_prune_and_writes_nothing(folder, capsys):
    prune("--dry-run", "epochs=3", "prune.rewind_epoch=1", "target_bits=[7, 3]")
    said = capsys.readouterr().out
    assert "without effect here: target_bits (main.py reads it)" in said
    assert "73,728 of 73,728 weights left to prune in 6 of 8 layers; 3 epochs per level, 2 of them" in said
    assert not pathlib.Path("out").exists()
