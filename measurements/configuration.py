"""Prints docs/configuration.md, made from the schemas of both training stages: python measurements/configuration.py"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "indicators_pretraining"))
from engine.keys import keys_of  # noqa: E402  of the stage


def schema(stage, name):
    """A schema of a stage, whose layers are equal in both."""
    spec = importlib.util.spec_from_file_location(f"schema_of_{stage}", ROOT / stage / "schema.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def table(rows):
    cells = [[f"`{row[0]}`", row[1], f"`{row[2]}`", row[3]] for row in rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in
                     [["key", "value", "default", "meaning"], ["---"] * 4, *cells])


def page():
    first = keys_of(schema("indicators_pretraining", "IndicatorsConfig"))
    last = keys_of(schema("quantization_training", "FinetuneConfig"))
    parts = {"Both stages": [row for row in first if row in last],
             "Stage 1: `indicators_pretraining`; `pruning.py` alone reads `prune`": [row for row in first if row not in last],
             "Stage 3: `quantization_training`": [row for row in last if row not in first]}
    text = ["# Configuration", "",
            "This page says which keys a YAML file of a training stage may have. It is made from the schemas, by",
            "`python measurements/configuration.py`; `--help-config` of each command prints its own keys.", "",
            "On the command line a key is `dotted.key=value`. A blank value means the default. `LAYER` is the name of",
            "a layer.", ""]
    for title, rows in parts.items():
        text += [f"## {title}", "", table(rows), ""]
    return "\n".join(text)


if __name__ == "__main__":
    print(page(), end="")
