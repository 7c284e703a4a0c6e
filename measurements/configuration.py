"""Writes docs/configuration.md, and docs/schemas, JSON schemas that editors complete and check YAML files with.

All is made from the schemas of the stages: python measurements/configuration.py [FOLDER, by default docs]
"""

import dataclasses
import importlib.util
import json
import sys
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "indicators_pretraining"), str(ROOT / "quantization_search")]
from util.command import keys_of  # noqa: E402  of the stages, whose layers are equal in all
from util.config import default_of  # noqa: E402

TYPES = {bool: "boolean", int: "integer", float: "number", type(None): "null",
         str: ["string", "number", "boolean"]}  # `name: 1.10` is text
BOUNDS = {"low": "minimum", "high": "maximum", "above": "exclusiveMinimum", "below": "exclusiveMaximum"}


def schema(stage, name, file="schema"):
    """A schema of a stage."""
    spec = importlib.util.spec_from_file_location(f"schema_of_{stage}", ROOT / stage / f"{file}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def table(rows):
    cells = [[f"`{row[0]}`", row[1], f"`{row[2]}`", row[3]] for row in rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in
                     [["key", "value", "default", "meaning"], ["---"] * 4, *cells])


def page(first, last):
    """The page of all keys of the training stages, from their schemas."""
    first, last = keys_of(first), keys_of(last)
    parts = {"Both stages": [row for row in first if row in last],
             "Stage 1: `indicators_pretraining`; `pruning.py` alone reads `prune`": [row for row in first if row not in last],
             "Stage 3: `quantization_training`": [row for row in last if row not in first]}
    text = ["# Configuration", "",
            "This page says which keys a YAML file of a training stage may have. It is made from the schemas, by",
            "`python measurements/configuration.py`; `--help-config` of each command prints its own keys. Editors that know",
            "JSON schemas complete and check the keys: the first line of each YAML file names its schema in docs/schemas.", "",
            "On the command line a key is `dotted.key=value`. A blank value means the default. `LAYER` is the name of",
            "a layer.", ""]
    for title, rows in parts.items():
        text += [f"## {title}", "", table(rows), ""]
    return "\n".join(text)


def json_schema(section):
    """The JSON schema of a section: its keys, their types, bounds and meanings. Each may be blank, and none is needed."""
    hints, properties = typing.get_type_hints(section), {}
    for item in dataclasses.fields(section):
        bounds = {word: item.metadata[name] for name, word in BOUNDS.items() if name in item.metadata}
        text = item.metadata["help"].replace("%%", "%")  # as argparse has it for a flag of the search
        meaning = {"description": text}
        default = default_of(item)
        if default is not None and not dataclasses.is_dataclass(default):
            meaning["default"] = default
        properties[item.name] = {**meaning, **json_type(hints[item.name] | None), **bounds}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def json_type(hint):
    """A type hint as a JSON schema."""
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind is typing.Literal:
        return {"enum": list(arguments)}
    if kind is list:
        return {"type": "array", "items": json_type(arguments[0])}
    if kind is dict:
        return {"type": "object", "additionalProperties": json_type(arguments[1] | None)}
    if kind:
        return {"anyOf": [json_type(arm) for arm in arguments]}
    if dataclasses.is_dataclass(hint):
        return json_schema(hint)
    return {} if hint is typing.Any else {"type": TYPES[hint]}


def write(folder):
    schemas = {"indicators_pretraining": schema("indicators_pretraining", "IndicatorsConfig"),
               "quantization_training": schema("quantization_training", "FinetuneConfig"),
               "quantization_search": schema("quantization_search", "SearchConfig", "options")}
    (folder / "schemas").mkdir(parents=True, exist_ok=True)
    (folder / "configuration.md").write_text(page(*list(schemas.values())[:2]), encoding="utf-8")
    for stage, described in schemas.items():
        text = json.dumps({"$schema": "http://json-schema.org/draft-07/schema#", **json_schema(described)}, indent=1)
        (folder / "schemas" / f"{stage}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs")
