"""Every shipped configuration of this stage runs, on a few small images in the place of its own."""

import re
from pathlib import Path

import pytest
from shipped import SMALL, images_in_folders, without_timm

import main
from engine.schema import describe_defaults
from schema import FinetuneConfig
from util.config import load_config

HERE = Path(__file__).parents[1]


PAGE = HERE.parent / "docs/coming_from_limpq.md"
FILES = sorted(HERE.glob("*.yaml"))
AS_OTHERS = ("config_resnet18_fashion_mnist", "config_resnet50_fashion_mnist", "eval_resnet50_w3a4_12.2compression_ratio",
             "eval_mobilenetv2_w4a4", "finetune_resnet20_digits_uniform3")  # the networks and layers of other files


@pytest.mark.parametrize("path", [path for path in FILES if path.stem not in AS_OTHERS], ids=lambda path: path.stem)
def test_it_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images_in_folders()
    text = path.read_text()
    bits = [] if "fp_model: true" in text or "weight_bits:" in text else ["policy=", "weight_bits=4", "act_bits=3"]
    main.main([str(path), *SMALL, *without_timm(path), "init_from=", "eval=false", *bits, "--dry-run"])
    said = capsys.readouterr().out
    assert "dry run: nothing was written" in said and (("BitOPs" in said) or "fp_model" in text)
    assert sorted(Path().iterdir()) == [Path("images")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_says_what_limpq_has_another_default_for(path):
    """A line on defaults is for files that come from LIMPQ."""
    config = load_config(FinetuneConfig, [path])
    assert config.eval or describe_defaults(config) == ""


def test_the_policy_pasted_in_costs_what_limpq_published(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images_in_folders(classes=4, images=1)
    path = HERE / "finetune_resnet50_w3a4_12.2compression_ratio.yaml"
    main.main([str(path), *SMALL, "dataloader.input_size=224", "--dry-run"])
    said = capsys.readouterr().out
    classifier = 2048 * (1000 - 4) * 8 * 8 / 1e9  # LIMPQ's has 1000 classes
    assert "52 searched layers" in said
    assert float(re.search(r"BitOPs (\S+) G", said)[1]) + classifier == pytest.approx(56.035, abs=1e-3)


def test_the_page_on_limpq_says_its_template_and_our_defaults():
    rows = [line.split("|")[1:5] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    table = {row[0].strip(" `"): row[1:] for row in rows if len(row) == 4}
    ours = FinetuneConfig(fp_model=True)
    for key, value in FinetuneConfig.LIMPQ_TEMPLATE.items():
        assert [float(table[key][1]), float(table[key][2])] == [value, getattr(ours, key)]
