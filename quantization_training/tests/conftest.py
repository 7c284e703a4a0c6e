"""Tests import the stage's modules as its commands do: with the stage's folder on the path."""

import sys
from pathlib import Path

import pytest
from hypothesis import settings

from small_networks import make_shallow

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """Curves take a third of the time of a small run; the tests of the monitor draw them."""
    if request.module.__name__ != "test_monitor":
        monkeypatch.setattr("engine.monitor.save_curves", lambda *_: None)


@pytest.fixture
def shallow(monkeypatch):
    make_shallow(monkeypatch)
