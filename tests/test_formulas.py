"""What a pruned layer costs is counted by the search from the indicators file, and by training from the masks: alike."""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Call:
    params: int


def import_from(stage, name):
    """A module of a stage, by its path; what it imports of its stage is forgotten, for other stages have the same names."""
    spec = importlib.util.spec_from_file_location(f"{stage}_{name}", ROOT / stage / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    before, path = set(sys.modules), list(sys.path)
    sys.path.insert(0, str(ROOT / stage))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = path
        for imported in sys.modules.keys() - before:
            if imported.partition(".")[0] == "util":
                del sys.modules[imported]
    return module


@pytest.fixture(scope="module")
def search():
    return import_from("quantization_search", "network")


@pytest.fixture(scope="module")
def training():
    return import_from("quantization_training", "quan/cost")


@settings(derandomize=True, deadline=None, max_examples=500)
@given(data=st.data(), params=st.integers(1, 10**9), bit=st.integers(2, 8), uses=st.integers(1, 10**5))
def test_search_and_training_count_a_pruned_layer_alike(search, training, data, params, bit, uses):
    left = data.draw(st.integers(0, params))
    macs = params * uses
    sparsity = 1 - left / params  # as the indicators file has it
    row = search.Row("conv", [params, 1], 1, macs, macs + 1, params, 1, sparsity=sparsity)
    assert row.nonzero == left
    assert row.sparse_size(bit) == training.sparse_size(params, left, bit)
    assert row.nonzero_macs("published") == training.nonzero_macs(Call(params), left, macs)
    assert row.nonzero_macs("exact") == training.nonzero_macs(Call(params), left, macs + 1)
