"""Policies, checkpoints and configurations that were changed at random: read as what they are, or refused in one line."""

import os
import pickle

import pytest
import torch
import yaml
from torch import nn

import model
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
    changed_value,
    changed_yaml,
    inputs,
    outcome,
)
from model.layer_table import trace
from network import build_network
from policy import Policy, resolve_policy
from quan.config import ExceptionConfig, QuanConfig
from quan.utils import joint_modules, replace_module_by_names, searchable_layers
from schema import FinetuneConfig
from util.config import load_config
from util.errors import UserError
from util.exchange import read_policy, write_policy

CPU, PATH = torch.device("cpu"), "c.pth.tar"
NAMES = [PATH, "resume.path", "the checkpoint"]
QUAN = QuanConfig(excepts={name: ExceptionConfig() for name in ("0", "1", "8")})
JUNK = (*PLAIN_JUNK, Touch(), torch.ones(0), torch.ones(()), torch.ones(3), torch.ones(2, 2), torch.tensor([4, 2]),
        torch.tensor(True), torch.ones(2, dtype=torch.complex64), torch.full((2,), float("nan")), torch.ones(2, device="meta"),
        torch.ones(2).to_sparse(), torch.ones(1).expand(10**9), torch.zeros(2), torch.Size([1]))
POLICY = {"arch": "tiny", "layer_name": ["2", "7"], "weight_bits": [4, 2], "act_bits": [3, 4], "act_signed": [False, True],
          "candidates": [4, 3, 2], "constraints": {"cr": 9.5, "bops": True}, "cost": {"size_mb": 1.5}, "optimal": True}
CONFIG = """name: run
output_dir: out
gpu: '0,1'
arch: resnet20
policy: p.yaml
init_from: c.pth.tar
seed: 3
sat: true
dataloader: {dataset: folder, path: /data, num_classes: 10, input_size: 32, mean: [0.5, 0.5, 0.5], std: [1, 1, 1]}
distillation: {teacher: t.pth.tar, weight: 0.5}
quan:
  act: {mode: lsq, all_positive: true}
  excepts:
    conv1: {weight: {bit: 8}}
    fc:
epochs: 3
lr: 1e-2
prune: {target_sparsity: 0.5, end_epoch: 2, excepts: [conv1]}
"""


class Tiny(nn.Sequential):
    """Every kind of layer that a network has, and little of each."""

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


def configuration(**changes):
    return FinetuneConfig(arch="tiny", quan=QUAN, weight_bits=4, act_bits=3, **changes)


def write(data, path=PATH):
    with open(path, "wb") as file:
        file.write(data)


def resolve():
    """The policy file as main.py takes it."""
    config = FinetuneConfig(arch="tiny", quan=QUAN, policy="p.yaml")
    return resolve_policy(config, ["2", "7"], read_policy("p.yaml"))


def test_any_change_of_our_policy_is_taken_or_refused():
    write_policy("p.yaml", POLICY)
    with open("p.yaml", "rb") as file:
        whole = file.read()
    assert outcome(resolve, ["p.yaml"], "whole") == Policy({"2": 4, "7": 2}, {"2": 3, "7": 4}, {"2": False, "7": True})
    for number, rng in inputs(35):
        write(changed_bytes(rng, whole), "p.yaml")
        check_policy(outcome(resolve, ["p.yaml"], number), number)


def test_a_changed_policy_written_by_hand_is_taken_or_refused():
    text = yaml.safe_dump(POLICY, sort_keys=False, default_flow_style=None)
    for number, rng in inputs(35):
        write(changed_yaml(rng, text), "p.yaml")
        check_policy(outcome(resolve, ["p.yaml"], number), number)


def test_a_policy_with_wrong_entries_is_taken_or_refused():
    for number, rng in inputs(15):
        try:
            write_policy("p.yaml", changed_value(rng, POLICY))
        except (yaml.YAMLError, RecursionError, ValueError, AttributeError):
            continue
        check_policy(outcome(resolve, ["p.yaml"], number), number)


def check_policy(policy, number):
    if not isinstance(policy, UserError):
        assert policy.weight_bits.keys() == policy.act_bits.keys() == {"2", "7"}, number
        bits = [*policy.weight_bits.values(), *policy.act_bits.values()]
        assert all(type(bit) is int and 2 <= bit <= 8 for bit in bits), number


def test_a_changed_configuration_is_read_or_refused():
    for number, rng in inputs(15):
        write(changed_yaml(rng, CONFIG), "c.yaml")
        read = outcome(lambda: load_config(FinetuneConfig, ["c.yaml"]), ["c.yaml"], number)
        assert isinstance(read, (FinetuneConfig, UserError)), number


def joint_checkpoint():
    """What stage 1 saves of the network."""
    torch.manual_seed(0)
    dense = Tiny(10)
    graph = trace(dense, 8)
    joint = replace_module_by_names(dense, joint_modules(dense, graph, QUAN, [4, 3]))
    layers = {name: {"kind": "conv", "signed": {"weight": True, "act": False}}
              for name in searchable_layers(graph, QUAN.excepts)}
    return {"arch": "tiny", "bits": [4, 3], "batchnorms": dict(graph.batchnorms), "layers": layers, "num_classes": 10,
            "state_dict": joint.state_dict(), "masks": {"2.weight": torch.ones(3, 2, 1, 1, dtype=torch.bool)}}


def tuned_checkpoint():
    """What a run of this stage saves."""
    torch.manual_seed(0)
    config = configuration(resume=ResumeConfig(path=PATH))
    network = build_network(config, 10, 8, None, CPU)
    optimizer = create_optimizer(network.model, config)
    network.model(torch.randn(4, 3, 8, 8)).sum().backward()
    optimizer.step()
    return {**training_state(network.model, optimizer, 1, (10.0, 50.0), config, Hidden()), **network.metadata,
            "masks": {"2.weight": torch.ones(3, 2, 1, 1, dtype=torch.bool)}}


def start_joint():
    return build_network(configuration(init_from=PATH), 10, 8, None, CPU)


def start_tuned():
    config = configuration(resume=ResumeConfig(path=PATH))
    found = find_run(config, RunFolder.of(config))
    network = build_network(config, 10, 8, found.content, CPU)
    return restore(found, network.model, create_optimizer(network.model, config), config)


@pytest.mark.parametrize(("make", "start", "kind"), [(joint_checkpoint, start_joint, object),
                                                     (tuned_checkpoint, start_tuned, ResumeState)], ids=["joint", "tuned"])
def test_a_checkpoint_with_wrong_entries_is_started_from_or_refused(make, start, kind):
    checkpoint = make()
    write(pack({"version": 2, **checkpoint}))
    assert not isinstance(outcome(start, NAMES, "whole"), UserError)
    for number, rng in inputs(20):
        try:
            write(pack({"version": 2, **changed_value(rng, checkpoint, JUNK)}))
        except (RuntimeError, RecursionError, NotImplementedError, OverflowError, pickle.PicklingError):
            continue
        assert isinstance(outcome(start, NAMES, number), (kind, UserError)), number
