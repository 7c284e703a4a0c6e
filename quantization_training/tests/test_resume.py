"""A run that stops and goes on ends with the same tensors as one that does not."""

import contextlib
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import main
import process
from comparing import assert_equal_folders
from engine import metrics
from engine.run_folder import RunFolder
from small_networks import SMALL
from util import distributed
from util.errors import Interrupted

CONFIG = """
arch: small.py:make
weight_bits: 3
act_bits: 4
dataloader: {dataset: digits, input_size: 8, batch_size: 32, data_fraction: 0.1, val_split: 0.1}
wandb: {mode: disabled}
quan: {act: {all_positive: true}, excepts: {'0': , '1': , '10': }}
epochs: 3
lr: 0.05
"""


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    """Each test in a folder with its configuration and a network small enough to be trained often."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "small.py").write_text(SMALL)


def test_batchnorm_statistics_are_averaged_over_ranks_after_every_epoch_and_every_calibration(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(distributed, "average_batchnorm_statistics", calls.append)
    main.main(["config.yaml", "epochs=2"])
    assert len(calls) == 4


def test_what_writes_is_alone_in_the_run_folder_and_what_reads_is_not(tmp_path, monkeypatch):
    entered = []
    monkeypatch.setattr(main, "run", lambda *_: None)
    monkeypatch.setattr(main, "alone_in", lambda *folder, reads_only: entered.append((*folder, reads_only))
                        or contextlib.nullcontext())
    for word in ("name=run", "eval=true", "--dry-run"):
        main.main(["config.yaml", "name=run", word])
    assert entered == [("results/run", False), ("results/run", True), ("results/run", True)]


class Stopped(Exception):
    pass


def test_a_run_that_goes_on_equals_an_undisturbed_one(tmp_path, monkeypatch):
    main.main(["config.yaml", "name=undisturbed"])
    save = RunFolder.save

    def save_and_stop(*arguments):
        save(*arguments)
        raise Stopped

    monkeypatch.setattr(RunFolder, "save", save_and_stop)
    for _ in range(2):
        with pytest.raises(Stopped):
            main.main(["config.yaml", "name=stopped"])
    monkeypatch.setattr(RunFolder, "save", save)
    main.main(["config.yaml", "name=stopped"])
    assert_equal_folders(tmp_path / "results" / "undisturbed", tmp_path / "results" / "stopped")


def send_signals(monkeypatch, place, function, after):
    """Let SIGTERM come after so many calls of a function of a module."""
    original, calls = getattr(place, function), [0]

    def counted(*arguments, **options):
        result = original(*arguments, **options)
        calls[0] += 1
        if calls[0] == after:
            signal.raise_signal(signal.SIGTERM)
        return result

    monkeypatch.setattr(place, function, counted)


STEP = (process, "training_step")


@pytest.mark.parametrize("moment", [(*STEP, 1), (*STEP, 3), (*STEP, 4), (metrics.Metrics, "result", 1),
                                    (metrics.Metrics, "result", 2)])
def test_a_run_that_a_signal_stops_again_and_again_equals_an_undisturbed_one(tmp_path, monkeypatch, moment):
    main.main(["config.yaml", "name=undisturbed"])
    stops = 0
    while True:
        with monkeypatch.context() as patch:
            send_signals(patch, *moment)
            try:
                main.main(["config.yaml", "name=stopped"])
                break
            except Interrupted as stop:
                assert stop.number == signal.SIGTERM
                stops += 1
        assert stops < 30
    assert stops >= 2
    assert_equal_folders(tmp_path / "results" / "undisturbed", tmp_path / "results" / "stopped")


def test_checkpoints_inside_an_epoch_are_gone_on_from(tmp_path, monkeypatch):
    main.main(["config.yaml", "name=undisturbed"])
    save, steps = RunFolder.save, []

    def save_and_stop(folder, checkpoint, *more):
        save(folder, checkpoint, *more)
        if "inside" in checkpoint:
            steps.append((checkpoint["epoch"], checkpoint["inside"]["step"]))
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", save_and_stop)
        for _ in range(3):
            with pytest.raises(Stopped):
                main.main(["config.yaml", "name=stopped", "log.checkpoint_steps=3"])
    assert steps == [(0, 3), (1, 3), (2, 3)]
    main.main(["config.yaml", "name=stopped", "log.checkpoint_steps=1"])
    assert_equal_folders(tmp_path / "results" / "undisturbed", tmp_path / "results" / "stopped")


def test_checkpoints_of_as_many_epochs_as_asked_for_stay(tmp_path, monkeypatch):
    main.main(["config.yaml", "name=run", "log.keep_checkpoints=2", "log.checkpoint_steps=2"])
    folder = tmp_path / "results" / "run"
    assert sorted(path.name for path in folder.glob("*epoch*")) == ["run_epoch_2_checkpoint.pth.tar",
                                                                    "run_epoch_3_checkpoint.pth.tar"]
    assert (folder / "run_epoch_3_checkpoint.pth.tar").read_bytes() == (folder / "run_checkpoint.pth.tar").read_bytes()
    assert torch.load(folder / "run_epoch_2_checkpoint.pth.tar", weights_only=True)["epoch"] == 2


def test_another_number_of_threads_is_taken_over_or_said(tmp_path, monkeypatch, capsys):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[-1] if chosen else 1)
    main.main(["config.yaml", "epochs=1", "warmup_epochs=0"])
    assert not chosen
    main.main(["config.yaml", "epochs=2", "warmup_epochs=0"])
    assert chosen == [1] and "threads" not in capsys.readouterr().out.partition("continuing after epoch 1")[2]
    main.main(["config.yaml", "epochs=3", "threads=2", "warmup_epochs=0"])
    assert chosen == [1, 2]
    assert "epochs, threads changed: the result will not equal that of an undisturbed run" in capsys.readouterr().out


def write_images(folder):
    """A small image folder: two classes, train/ and val/."""
    draws = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 4)):
        for label in ("one", "two"):
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = draws.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{number}.png")


@pytest.mark.parametrize("workers", [0, 2])
def test_image_files_read_by_workers_are_gone_on_with_inside_an_epoch(tmp_path, monkeypatch, workers):
    write_images(tmp_path / "images")
    words = ["config.yaml", "epochs=2", "dataloader.dataset=folder", "dataloader.path=images", "dataloader.input_size=16",
             "dataloader.batch_size=8", "dataloader.val_split=0", "dataloader.data_fraction=1", "accumulation=2",
             "log.checkpoint_steps=1", f"dataloader.workers={workers}"]
    main.main([*words, "name=undisturbed"])
    save, stops = RunFolder.save, []

    def save_and_stop(folder, checkpoint, *more):
        save(folder, checkpoint, *more)
        stops.append(checkpoint.get("inside", {}).get("step"))
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", save_and_stop)
        for _ in range(3):
            with pytest.raises(Stopped):
                main.main([*words, "name=stopped"])
    assert stops == [1, None, 1]
    main.main([*words, "name=stopped"])
    assert_equal_folders(tmp_path / "results" / "undisturbed", tmp_path / "results" / "stopped")
