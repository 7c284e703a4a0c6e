"""Tests import the stage's modules as its commands do: with the stage's folder on the path."""

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
