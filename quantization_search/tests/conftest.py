"""Puts the stage folder on the path, and makes small indicator files."""

import pathlib
import pickle
import sys

import pytest

STAGE = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(STAGE))

REFERENCE = STAGE.parents[1] / "shared" / "reference"


def pytest_configure(config):
    # what PuLP 4 will no longer know, PuLP 3.3 has no other name for
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:pulp")


def pytest_collection_modifyitems(items):
    absent = pytest.mark.skip(reason=f"needs the published reference data in {REFERENCE}")
    for item in items:
        if "reference" in item.fixturenames and not REFERENCE.is_dir():
            item.add_marker(absent)


@pytest.fixture
def reference():
    return REFERENCE


def row(out, into, kernel, side):
    """A layer's row of the table: a convolution on `side` x `side` outputs, published MACs a little larger."""
    params = out * into * kernel * kernel
    return {"kind": "conv", "shape": [out, into, kernel, kernel], "groups": 1, "macs_published": params * (side**2 + 1),
            "macs_exact": params * side**2, "params": params, "act_elements": into * side**2,
            "signed": {"weight": True, "act": False}, "sparsity": 0.0}


def content():
    """An indicators file of a made-up network: four searched layers, two fixed ones, three candidates."""
    names = ["block.conv1", "block.conv2", "block.conv3", "block.conv4"]
    scale = dict(zip(names, (1.0, 0.5, 0.25, 0.125), strict=True))
    return {
        "weight": {f"module.{name}": {"4": 0.1 * scale[name], "3": 0.2 * scale[name], "2": 0.45 * scale[name]}
                   for name in names},
        "act": {f"module.{name}": {"4": 0.3 * scale[name], "3": 0.6 * scale[name], "2": 1.3 * scale[name]}
                for name in names},
        "layer_name": [f"module.{name}" for name in names],
        "arch": "made_up", "input_size": 16, "bits": [4, 3, 2],
        "layers": {name: row(8 * 2**i, 4 * 2**i, 3, 16 // 2**i) for i, name in enumerate(names)},
        "fixed": {"stem": row(4, 3, 3, 16), "head": row(10, 64, 1, 1)},
    }


@pytest.fixture
def save(tmp_path):
    def write(value=None, name="indicators.pkl"):
        path = tmp_path / name
        path.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value))
        return str(path)
    return write
