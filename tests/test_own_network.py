"""The user's own network of docs/networks_and_data.md: files and commands as they stand there, on a part of the images."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import pytest
import yaml

import demo

pytestmark = pytest.mark.xdist_group("own network")  # one process makes what all read
ROOT = Path(__file__).resolve().parents[1]
STAGES = ["indicators_pretraining", "quantization_search", "quantization_training"]
PAGE = (ROOT / "docs" / "networks_and_data.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("## A network of your own")[2].partition("\n## ")[0]
SOURCE, SETTINGS, COMMANDS = re.findall(r"^```\w*\n(.*?)^```$", SECTION, re.DOTALL | re.MULTILINE)
SMALLER = "epochs: 1\nwarmup_epochs: 0\ndataloader: {data_fraction: 0.1, input_size: 8}\n"
RECORD = bool(os.environ.get("LIMPQP_RECORD"))  # on all images, as the page says; what it says of the result is written down


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """(the folder of the stages, what the commands printed)"""
    home, place = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("project")
    for stage in STAGES:
        shutil.copytree(ROOT / stage, place / stage, ignore=shutil.ignore_patterns("results", "__pycache__", "tests"))
    (home / "nets").mkdir()
    (home / "nets" / "my_network.py").write_text(SOURCE)
    (home / "nets" / "my_network.yaml").write_text(SETTINGS if RECORD else SETTINGS + SMALLER)
    begun = time.time()
    done = subprocess.run(["bash", "-ec", 'python() { "$PYTHON" "$@"; }\n' + COMMANDS], cwd=place, capture_output=True,
                          text=True, timeout=3000 if RECORD else 300, check=False,
                          env=os.environ | {"HOME": str(home), "PYTHON": sys.executable,
                                            "MPLCONFIGDIR": matplotlib.get_cachedir()})
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert sorted(path.name for path in (home / "nets").iterdir()) == ["my_network.py", "my_network.yaml"]
    if RECORD:
        record(place / "quantization_training" / "results", time.time() - begun)
    return place, done.stdout


def record(results, seconds):
    dense, searched = (yaml.safe_load((results / name / "summary.yaml").read_text()) for name in ("mine", "mine_w3a3"))
    for name, value, unit in (("", round(seconds), "s"), (" dense", dense["top1"], "% top-1"),
                              (" searched", searched["top1"], "% top-1"), (" smaller", searched["ratio"], "times")):
        demo.note(f"own network{name}", value, unit, "LIMPQP_RECORD=1 python -m pytest tests/test_own_network.py")


def test_the_commands_of_the_page_bring_a_network_of_ones_own_through_all_stages(walked):
    place, said = walked
    policy = yaml.safe_load((place / "quantization_search/results/policy_mine.yaml").read_text())
    assert policy["arch"] == "~/nets/my_network.py:make"
    assert policy["layer_name"] == ["local.0", "local.3", "attention.in_proj", "attention.out_proj", "mlp.1", "mlp.3"]
    assert policy["act_signed"] == [True] * 6
    summary = yaml.safe_load((place / "quantization_training/results/mine_w3a3/summary.yaml").read_text())
    assert f"loss {summary['loss']:.4f}  top-1 {summary['top1']:.3f}" in said.splitlines()[-1]


def test_exceptions_and_the_products_of_attention_are_named(walked):
    _, said = walked
    assert said.count("exceptions found in the graph: stem.0 (first layer), stem.1 (its BatchNorm), head (classifier)") == 2
    assert said.count("non-layer MACs, of matrix products as in attention, in full precision and counted in no BitOPs") == 3
    assert re.search(r"^non-layer MACs: [\d.]+ G in full precision, in no BitOPs$", said, re.MULTILINE)
