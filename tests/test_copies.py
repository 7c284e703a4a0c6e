"""The stages are self-contained: what they share is one piece of code, copied by `make sync`."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MASTER = ROOT / "indicators_pretraining"
SEARCH_UTIL = ["__init__.py", "command.py", "config.py", "errors.py", "exchange.py", "figures.py", "tables.py"]
LAYERS = ["util", "model", "sparsity", "quan", "engine"]
NOT_SEARCHED = Path("training_pass.py")  # of model/: a search trains nothing
TEST_HELPERS = {"fuzzing.py": ["quantization_search/tests", "quantization_training/tests"],
                "comparing.py": ["quantization_training/tests", "tests"],
                "small_networks.py": ["quantization_training/tests", "tests"], "shipped.py": ["quantization_training/tests"]}
STAGES = ["indicators_pretraining", "quantization_search", "quantization_training"]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and "__pycache__" not in path.parts}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_copy_equals_its_master_byte_for_byte(layer):
    assert contents(ROOT / "quantization_training" / layer) == contents(MASTER / layer), "run make sync"


def test_the_search_carries_equal_copies_of_what_it_needs():
    masters = contents(MASTER / "model")
    del masters[NOT_SEARCHED]
    assert contents(ROOT / "quantization_search" / "models") == masters, "run make sync"
    files = contents(ROOT / "quantization_search" / "util")
    assert sorted(map(str, files)) == SEARCH_UTIL, "run make sync"
    for name, content in files.items():
        assert content == (MASTER / "util" / name).read_bytes(), "run make sync"


@pytest.mark.parametrize(("name", "folders"), TEST_HELPERS.items())
def test_tests_share_what_helps_them(name, folders):
    for folder in folders:
        assert (ROOT / folder / name).read_bytes() == (MASTER / "tests" / name).read_bytes(), "run make sync"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_nothing_from_another_one(stage):
    others = set(STAGES) - {stage}
    for path in (ROOT / stage).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & others, path
