"""Checkpoints and configurations that were changed at random: read as what they are, or refused in one line."""

import io
import os
import pickle
import zipfile
from functools import partial

import pytest
import torch
from torch import nn

import importance_extractor
import model
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.optim import create_optimizer
from engine.resume import find_run, restore
from engine.run_folder import RunFolder
from engine.schema import ResumeConfig
from engine.serialization import pack
from engine.training_state import ResumeState, training_state
from fuzzing import (
    CANARY,
    PLAIN_JUNK,
    Touch,
    changed_bytes,
    changed_pickle,
    changed_value,
    changed_yaml,
    inputs,
    outcome,
)
from network import build_network
from process import joint_step
from quan.config import ExceptionConfig, QuanConfig
from schema import IndicatorsConfig, PruningConfig
from util.config import load_config
from util.errors import UserError
from util.exchange import read_indicators

CPU, PATH = torch.device("cpu"), "c.pth.tar"
TENSORS = (
    torch.ones(0), torch.ones(()), torch.ones(3), torch.ones(2, 2), torch.tensor([4, 2]), torch.tensor(True),
    torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.half), torch.full((2,), float("nan")),
    torch.ones(2, device="meta"), torch.ones(2).to_sparse(), torch.ones(1).expand(10**9),
    torch.ones(2, dtype=torch.uint16), nn.Parameter(torch.ones(2)), torch.zeros(2),
    torch.ones(2, dtype=torch.float8_e4m3fn), torch.device("cuda"), torch.Size([1]), torch.float16)
JUNK = (*PLAIN_JUNK, *TENSORS, Touch())


CONFIG = """name: run
output_dir: out
gpu: '0,1'
arch: resnet20
target_bits: [4, 2]
pre_trained: false
seed: 3
dataloader: {dataset: folder, path: /data, num_classes: 10, input_size: 32, mean: [0.5, 0.5, 0.5], std: [1, 1, 1]}
resume:
  path: auto
  lean: false
wandb: {mode: disabled, tags: [a, b]}
quan:
  act: {mode: lsq, all_positive: true}
  weight: {bit: 4}
  excepts:
    conv1: {weight: {bit: 8}}
    fc:
epochs: 3
lr: 1e-2
prune: {levels: 2, amount: 0.5, excepts: [conv1]}
"""


class Tiny(nn.Sequential):
    """Every kind of layer that stage 1 knows, and little of each."""

    def __init__(self, num_classes):
        super().__init__(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3), nn.Linear(3, num_classes))


class Hidden:
    """monitor, as far as training_state asks it."""

    wandb_id = None


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "system", lambda command: (tmp_path / CANARY).touch())
    monkeypatch.setitem(model.OWN_MODELS, "tiny", Tiny)


def configuration():
    excepts = {name: ExceptionConfig() for name in ("0", "1", "8")}
    return IndicatorsConfig(arch="tiny", target_bits=[4, 2], quan=QuanConfig(excepts=excepts), resume=ResumeConfig(path=PATH))


@pytest.fixture
def checkpoint():
    """What a run of stage 1 saves after its first step, masks included."""
    config = configuration()
    torch.manual_seed(0)
    network = build_network(config, 10, 8, None, CPU)
    optimizer = create_optimizer(network.model, config)
    images, target, chosen = torch.randn(4, 3, 8, 8), torch.arange(4), dict.fromkeys(network.switch.layers, 2)
    joint_step(network.model, network.switch, images, target, nn.CrossEntropyLoss(), optimizer, chosen)
    masks = {"2.weight": torch.ones(3, 2, 1, 1, dtype=torch.bool), "3.bias": torch.tensor([True, False, True])}
    return {**training_state(network.model, optimizer, 1, (10.0, 50.0), config, Hidden()), **network.metadata, "masks": masks}


def start():
    """What main.py does with a checkpoint."""
    config = configuration()
    found = find_run(config, RunFolder.of(config))
    network = build_network(config, 10, 8, found, CPU)
    return restore(found, network.model, create_optimizer(network.model, config), config, harmless=("prune.",))


def write(data, path=PATH):
    with open(path, "wb") as file:
        file.write(data)


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def test_any_change_of_our_checkpoint_is_refused(checkpoint):
    save_checkpoint(PATH, checkpoint)
    with open(PATH, "rb") as file:
        whole = file.read()
    assert isinstance(outcome(start, [PATH], "whole"), ResumeState)
    for number, rng in inputs(40):
        write(changed_bytes(rng, whole))
        assert isinstance(outcome(lambda: load_checkpoint(PATH), [PATH], number), UserError), number


def test_a_changed_archive_without_a_checksum_is_loaded_or_refused(checkpoint):
    content = {"version": 1, **checkpoint, "random_states": []}
    archive, legacy = saved(content), saved(content, _use_new_zipfile_serialization=False)
    for number, rng in inputs(50):
        write(changed_bytes(rng, legacy) if rng.random() < 0.2 else changed_archive(rng, archive))
        read = outcome(lambda: load_checkpoint(PATH), [PATH], number)
        assert isinstance(read, UserError) or all(map(torch.is_tensor, read["state_dict"].values())), number


def changed_archive(rng, data):
    """A zip archive with an entry changed, taken out, added, doubled or compressed."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    position = rng.randrange(len(entries)) if rng.random() < 0.4 else 0
    name, entry = entries[position]
    kind = rng.random()
    if kind < 0.6:
        is_pickle = name.endswith("data.pkl") and rng.random() < 0.7
        entries[position] = name, changed_pickle(rng, entry) if is_pickle else changed_bytes(rng, entry or b"\0")
    elif kind < 0.75:
        del entries[position]
    else:
        new = rng.choice([f"../../{CANARY}", f"/{CANARY}", "archive/data/99", f"{name} ", name.upper(), "x" * 60_000])
        entries.insert(rng.choice([0, len(entries)]), (new, rng.choice([entry, b"", bytes(10**6)])))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", rng.choice([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED])) as archive:
        for name, entry in entries:
            archive.writestr(name, entry)
    return buffer.getvalue()


def with_junk(rng, checkpoint):
    """The bytes of a checkpoint with wrong entries, whole as an archive, or None where torch cannot save it."""
    changed = changed_value(rng, checkpoint, JUNK)
    try:
        return pack({"version": 2, **changed}) if rng.random() < 0.5 else saved(changed)
    except (RuntimeError, RecursionError, NotImplementedError, OverflowError, pickle.PicklingError):
        return None


def test_a_run_goes_on_from_a_checkpoint_with_wrong_entries_or_refuses_it(checkpoint):
    for number, rng in inputs(50):
        data = with_junk(rng, checkpoint)
        if data is not None:
            write(data)
            assert isinstance(outcome(start, [PATH], number), (ResumeState, UserError)), number


EXTRACTED = ("arch", "state_dict", "bits", "layers", "fixed", "input_size")


def test_indicators_come_from_a_checkpoint_with_wrong_entries_or_it_is_refused(checkpoint):
    for number, rng in inputs(25):
        data = with_junk(rng, {key: checkpoint[key] for key in EXTRACTED})
        if data is not None:
            write(data)
            outcome(extract, [PATH], number)


def extract():
    """The extractor's file, read again and taken away."""
    importance_extractor.main([PATH, "--output", "i.pkl"])
    try:
        return read_indicators("i.pkl")
    except UserError as error:
        raise AssertionError(f"it wrote what it does not read: {error}") from None
    finally:
        os.remove("i.pkl")


def test_a_changed_configuration_is_read_or_refused(tmp_path):
    for number, rng in inputs(25):
        schema = rng.choice([IndicatorsConfig, PruningConfig])
        write(changed_yaml(rng, CONFIG), "c.yaml")
        read = outcome(partial(load_config, schema, ["c.yaml"]), ["c.yaml"], number)
        assert isinstance(read, (schema, UserError)), number
