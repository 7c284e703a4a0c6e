"""Every built-in network through all stages on a few small images: two steps of stage 1, extraction, search, two steps of
stage 3, evaluation."""

import csv
import json
import math
import pickle
import re
from pathlib import Path

import forked
import pytest
import torch
import yaml
from every_network import STAGES, write_images
from networks import PAGE, all_networks, page, read_rows, walk

ROOT = Path(__file__).resolve().parents[1]
# name: (input size, searched layers, what is excepted)
NETWORKS = {"resnet18": (32, 19, ["conv1", "fc"]), "resnet20": (16, 18, ["conv1", "fc"]),
            "resnet50": (32, 52, ["conv1", "fc"]), "mobilenetv1": (32, 26, ["stem.0", "fc"]),
            "mobilenet_v2": (32, 51, ["features.0.0", "classifier.1"]),
            "efficientnet_b0": (32, 80, ["features.0.0", "classifier.1"]), "regnet_y_400mf": (32, 84, ["stem.0", "fc"]),
            "convnext_tiny": (32, 57, ["features.0.0", "classifier.2"]),
            "vit_tiny_patch16_224": (32, 48, ["conv_proj", "heads.head"]),
            "vit_tiny_patch4_32": (8, 24, ["conv_proj", "heads.head"]), "swin_t": (32, 51, ["features.0.0", "head"])}


def walked(place, name):
    """{stage: what it printed}"""
    write_images(place / "images")
    (place / "networks.json").write_text(json.dumps([[name, name, NETWORKS[name][0]]]))
    said = {}
    for stage, folder in STAGES.items():
        done = forked.run(ROOT / folder, ROOT / "tests" / "every_network.py", stage, place)
        assert done.returncode == 0, f"{stage}: {done.stdout[-1500:]}\n{done.stderr[-3000:]}"
        said[stage] = done.stdout
    return said


def losses(folder, split):
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        return {row["bits"]: float(row["loss"]) for row in csv.DictReader(file) if row["split"] == split}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_walks_all_stages(name, tmp_path):
    place, said = tmp_path, walked(tmp_path, name)
    _, searched, excepted = NETWORKS[name]
    for stage in ("pretraining", "training"):
        assert re.findall(r"^.*epoch 1 \[(\d/\d)\]", said[stage], re.MULTILINE) == ["1/2", "2/2"], stage
    joint = losses(place / "pretraining" / name, "train")
    assert joint.keys() == {"4", "2", "random"} and all(map(math.isfinite, joint.values()))
    assert len(set(joint.values())) == 3
    with open(place / f"{name}.pkl", "rb") as file:
        indicators = pickle.load(file)
    assert len(indicators["layer_name"]) == searched and list(indicators["fixed"]) == excepted
    assert all(f"{layer} (" in said["pretraining"] for layer in excepted)
    policy = yaml.safe_load((place / f"{name}.yaml").read_text())
    assert set(policy["weight_bits"]) == {4, 2} and policy["act_signed"] == [True] * searched
    checkpoint = torch.load(place / "training" / name / f"{name}_checkpoint.pth.tar", weights_only=True)
    assert list(checkpoint["weight_bits"].values()) == policy["weight_bits"]
    summary = yaml.safe_load((place / "training" / name / "summary.yaml").read_text())
    assert math.isfinite(summary["loss"]) and f"BitOPs {summary['gbitops']:.3f} G" in said["search"]
    assert f"loss {summary['loss']:.4f}" in said["training"].splitlines()[-1]


def test_the_table_of_networks_is_made_of_its_rows_and_none_failed():
    rows = read_rows()
    assert list(rows) == [name for name in all_networks() if name in rows]
    assert [name for name, row in rows.items() if row["result"] == "failed"] == []
    assert sum(name.startswith("timm:") and row["result"] == "passed" for name, row in rows.items()) >= 30
    assert PAGE.read_text(encoding="utf-8") == page(list(rows.values()))


def test_a_crash_is_a_row(tmp_path):
    (tmp_path / "net.py").write_text("import os\n\ndef make(num_classes):\n    os.abort()\n")
    row, _ = walk(f"{tmp_path}/net.py:make", 8, 300)
    assert (row["result"], row["line"]) == ("failed", "pretraining: died of SIGABRT")
