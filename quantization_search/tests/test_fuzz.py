"""Indicators, policies and configurations that were changed at random: read as what they are, or refused in one line."""

import os
import pickle

import pytest
from conftest import content

import search
from fuzzing import (
    CANARY,
    PLAIN_JUNK,
    Touch,
    can_be_pickled,
    changed_bytes,
    changed_pickle,
    changed_value,
    changed_yaml,
    inputs,
    outcome,
)
from network import trace_rows
from options import SearchConfig
from util.config import load_config
from util.errors import UserError
from util.exchange import write_indicators

NAMES = ["i.pkl", "infeasible: "]
FLAGS = ["--wb", "3", "--ab", "3", "--cr", "9.5", "--bops", "yes", "--time-limit", "2"]
CONFIG = """indicators: i.pkl
model: made_up
bits: [4, 3, 2]
wb: 3
ab: 3.5
cr: 9.5
bops: true
fix: {block.conv1: [4, 4]}
tie: [[block.conv2, block.conv3]]
sweep: cr=8:10:0.5
output: p.yaml
"""


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "system", lambda command: (tmp_path / CANARY).touch())


def write(data):
    with open("i.pkl", "wb") as file:
        file.write(data)


def search_it():
    search.main(["--i", "i.pkl", *FLAGS])


def written():
    write_indicators("i.pkl", content())
    with open("i.pkl", "rb") as file:
        return file.read()


def test_any_change_of_our_indicators_is_refused():
    whole = written()
    assert outcome(search_it, ["i.pkl"], "whole") is None
    for number, rng in inputs(35):
        write(changed_bytes(rng, whole))
        assert isinstance(outcome(search_it, ["i.pkl"], number), UserError), number


def test_a_changed_pickle_is_searched_or_refused():
    pickles = [pickle.dumps(content(), protocol) for protocol in range(5)]
    for number, rng in inputs(60):
        data = rng.choice(pickles)
        write(changed_bytes(rng, data) if rng.random() < 0.3 else changed_pickle(rng, data))
        outcome(search_it, NAMES, number)


def test_changed_entries_are_searched_or_refused():
    trace_rows("resnet20", 32, 10)  # what it imports takes longer than one input may
    for number, rng in inputs(50):
        changed = changed_value(rng, content(), (*PLAIN_JUNK, Touch()))
        if can_be_pickled(changed):
            write(pickle.dumps(changed))
            outcome(search_it, NAMES, number)


def test_a_changed_configuration_is_read_or_refused():
    for number, rng in inputs(25):
        with open("c.yaml", "wb") as file:
            file.write(changed_yaml(rng, CONFIG))
        read = outcome(lambda: load_config(SearchConfig, ["c.yaml"]), ["c.yaml"], number)
        assert isinstance(read, (SearchConfig, UserError)), number
