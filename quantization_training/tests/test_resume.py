"""A run that stops and goes on ends with the same tensors as one that does not."""

import pytest
import torch

import main
from util import distributed
from util.checkpoint import RunFolder

CONFIG = """
arch: resnet20
weight_bits: 3
act_bits: 4
dataloader: {dataset: digits, input_size: 8, batch_size: 32, data_fraction: 0.1, val_split: 0.1}
wandb: {mode: disabled}
quan: {act: {all_positive: true}, excepts: {conv1: , bn1: , fc: }}
epochs: 3
lr: 0.05
"""


def test_batchnorm_statistics_are_averaged_over_ranks_after_every_epoch_and_every_calibration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)
    calls = []
    monkeypatch.setattr(distributed, "average_batchnorm_statistics", calls.append)
    main.main(["config.yaml", "epochs=2"])
    assert len(calls) == 4


class Stopped(Exception):
    pass


def test_a_run_that_goes_on_equals_an_undisturbed_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)
    main.main(["config.yaml", "name=undisturbed"])
    save = RunFolder.save

    def save_and_stop(folder, checkpoint, is_best):
        save(folder, checkpoint, is_best)
        raise Stopped

    monkeypatch.setattr(RunFolder, "save", save_and_stop)
    for _ in range(2):
        with pytest.raises(Stopped):
            main.main(["config.yaml", "name=stopped"])
    monkeypatch.setattr(RunFolder, "save", save)
    main.main(["config.yaml", "name=stopped"])
    states = {}
    for name in ("undisturbed", "stopped"):
        states[name] = torch.load(f"results/{name}/{name}_checkpoint.pth.tar", weights_only=True)
    assert states["stopped"]["epoch"] == 3
    for name, tensor in states["undisturbed"]["state_dict"].items():
        assert torch.equal(tensor, states["stopped"]["state_dict"][name]), name
    assert states["undisturbed"]["extras"] == states["stopped"]["extras"]
    rows = [(tmp_path / "results" / name / "metrics.csv").read_text().splitlines() for name in states]
    without_seconds = [[line.rpartition(",")[0] for line in lines] for lines in rows]
    assert without_seconds[0] == without_seconds[1]
