"""The keys of a configuration, with type, range, default and meaning, for --help-config and docs/configuration.md."""

import dataclasses
import textwrap
import typing

from util.config import describe_bounds, expected

LAYER = "LAYER"  # stands for the name of a layer, or BatchNorm, under quan.excepts


def keys_of(section, prefix=""):
    """[(dotted key, allowed values, default, meaning)] of a schema, or of a section of its defaults."""
    hints, rows = typing.get_type_hints(section if isinstance(section, type) else type(section)), []
    for item in dataclasses.fields(section):
        made = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        value, hint, key = getattr(section, item.name, made), hints[item.name], f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            rows += keys_of(value, f"{key}.")
            continue
        allowed = " ".join(filter(None, [expected(hint), describe_bounds(item.metadata)]))
        rows.append((key, allowed, "blank" if value is None else str(value).lower() if isinstance(value, bool) else str(value),
                     item.metadata["help"]))
        for beneath, inner in _sections_in(hint):
            rows += keys_of(inner, f"{key}.{beneath}")
    return rows


def _sections_in(hint):
    """[(what stands between a key and the keys of a section, the section)] of the sections that a type may hold."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is dict:
        return [(f"{LAYER}.", arguments[1])]
    return [("", hint)] if dataclasses.is_dataclass(hint) else [pair for arm in arguments for pair in _sections_in(arm)]


def help_config(schema):
    """All keys of a schema as the text that --help-config prints."""
    lines = ["Keys of a YAML file, or of dotted.key=value:", ""]
    for key, allowed, default, meaning in keys_of(schema):
        lines += [f"{key}: {allowed} (default: {default})",
                  *textwrap.wrap(meaning, 110, initial_indent="    ", subsequent_indent="    ")]
    return "\n".join(lines)
