"""Every shipped configuration of this stage runs, on a few small images in the place of its own."""

from pathlib import Path

import pytest
from shipped import SMALL, images_in_folders, without_timm

import main
import pruning
from engine.schema import describe_defaults
from schema import IndicatorsConfig, PruningConfig
from util.config import load_config

HERE = Path(__file__).parents[1]
PAGE = HERE.parent / "docs/coming_from_limpq.md"
FILES = sorted(HERE.glob("*.yaml"))
AS_OTHERS = ("config_resnet18_fashion_mnist", "config_resnet50_fashion_mnist")  # the networks and layers of other files


@pytest.mark.parametrize("path", [path for path in FILES if path.stem not in AS_OTHERS], ids=lambda path: path.stem)
def test_it_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images_in_folders()
    words = [str(path), *SMALL, *without_timm(path)]
    is_pruned = "prune:" in path.read_text()
    if not path.name.startswith("prune_"):
        main.main([*words, "--dry-run"])
        assert "loss at 6 bits" in capsys.readouterr().out
    if is_pruned:
        pruning.main([*words, "--dry-run"])
        assert "left to prune" in capsys.readouterr().out
    assert sorted(Path().iterdir()) == [Path("images")]
    assert is_pruned or "digits" in path.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_says_what_limpq_has_another_default_for(path):
    """A line on defaults is for files that come from LIMPQ."""
    schema = PruningConfig if path.name.startswith("prune_") else IndicatorsConfig
    assert describe_defaults(load_config(schema, [path])) == ""


def test_the_names_of_the_published_configurations_are_there():
    assert {"config_resnet18", "config_resnet50", "config_vit_tiny_patch16_224"} <= {path.stem for path in FILES}


def test_the_page_on_limpq_says_its_template_and_our_defaults():
    rows = [line.split("|")[1:5] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    table = {row[0].strip(" `"): row[1:] for row in rows if len(row) == 4}
    ours = IndicatorsConfig()
    for key, value in IndicatorsConfig.LIMPQ_TEMPLATE.items():
        assert [float(table[key][0]), float(table[key][2])] == [value, getattr(ours, key)]
