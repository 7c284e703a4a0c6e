"""The small files that stages hand to each other: indicators (.pkl) and policies (.yaml)."""

import contextlib
import io
import math
import os
import pickle

import yaml

from util.config import read_yaml
from util.errors import UserError, reason

MAX_INDICATOR_FILE = 64 * 2**20


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, text and containers; refuses every class and function, so a file cannot run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it refers to {module}.{name}; only plain numbers, text, lists and dicts are read")

    def persistent_load(self, identifier):
        raise pickle.UnpicklingError("it refers to objects outside the file")


def read_indicators(path):
    """Read an indicators file.

    Returns:
        {'weight': {layer: {bit: float}}, 'act': {layer: {bit: float}}, 'layer_name': [layer, ...]} with int bits and
        names without `module.`, plus, where the file carries them, 'arch', 'input_size', 'bits', 'layers' and 'fixed'.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_INDICATOR_FILE + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot read the indicators file ({error.strerror})") from None
    if len(data) > MAX_INDICATOR_FILE:
        raise UserError(f"{path}: not an indicators file (larger than {MAX_INDICATOR_FILE // 2**20} MiB)")
    try:
        content = _PlainUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # bad bytes meet the unpickler with exceptions of many types
        raise UserError(f"{path}: not an indicators file ({reason(error)})") from None
    try:
        return _checked_indicators(path, content)
    except UserError:
        raise
    except (ValueError, OverflowError, RecursionError) as error:  # such as a whole number of thousands of digits
        raise UserError(f"{path}: not an indicators file ({reason(error)})") from None


def _checked_indicators(path, content):
    if not isinstance(content, dict) or not {"weight", "act", "layer_name"} <= content.keys():
        raise UserError(f"{path}: not an indicators file (expected a dict with 'weight', 'act' and 'layer_name')")
    names = content["layer_name"]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: layer_name: expected a list of layer names, found {str(names)[:60]}")
    result = {key: value for key, value in content.items() if key not in ("weight", "act")}
    result["layer_name"] = [strip_prefix(name) for name in names]
    if len(set(result["layer_name"])) != len(names):
        raise UserError(f"{path}: layer_name: a layer stands twice")
    for kind in ("weight", "act"):
        result[kind] = _checked_table(path, kind, content[kind], result["layer_name"])
    return result


def _checked_table(path, kind, table, names):
    if not isinstance(table, dict) or not all(isinstance(row, dict) for row in table.values()):
        raise UserError(f"{path}: {kind}: expected {{layer: {{bit: indicator}}}}")
    rows = {strip_prefix(str(name)): row for name, row in table.items()}
    for name in names:
        if name not in rows:
            raise UserError(f"{path}: {kind}: no indicators for the layer {name}")
    checked = {}
    for name in names:
        checked[name] = {}
        for bit, value in rows[name].items():
            if not str(bit).isdecimal() or not 1 <= int(bit) <= 32:
                raise UserError(f"{path}: {kind}: {name}: {str(bit)[:20]!r} is not a bit-width")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise UserError(f"{path}: {kind}: {name}: the indicator at {bit} bits is {str(value)[:40]!r}, "
                                "expected a finite number")
            checked[name][int(bit)] = float(value)
    return checked


def strip_prefix(name):
    """Drop the `module.` that a data-parallel wrapper puts before names; other names stay as they are."""
    return name.removeprefix("module.")


def write_indicators(path, content):
    """Write an indicators file: plain types only, bits as text, as published."""
    plain = dict(content)
    for kind in ("weight", "act"):
        plain[kind] = {name: {str(bit): float(value) for bit, value in row.items()}
                       for name, row in content[kind].items()}
    write_atomically(path, pickle.dumps(plain, protocol=4))


def read_policy(path):
    """Read a policy file.

    Returns:
        the mapping in the file; 'layer_name', 'weight_bits' and 'act_bits' are there, aligned and checked.
    """
    policy = read_yaml(path)
    for key in ("layer_name", "weight_bits", "act_bits"):
        if not isinstance(policy.get(key), list) or not policy[key]:
            raise UserError(f"{path}: {key}: not a policy file (expected a list under this key)")
    names = policy["layer_name"] = [strip_prefix(str(name)) for name in policy["layer_name"]]
    if len(set(names)) != len(names):
        raise UserError(f"{path}: layer_name: a layer stands twice")
    for key in ("weight_bits", "act_bits"):
        if len(policy[key]) != len(names):
            raise UserError(f"{path}: {key}: found {len(policy[key])} values for {len(names)} layers")
        for name, bit in zip(names, policy[key], strict=True):
            if type(bit) is not int or not 2 <= bit <= 8:
                raise UserError(f"{path}: {key}: {name}: found {str(bit)[:20]!r}, expected a bit-width from 2 to 8")
    signed = policy.get("act_signed")
    if signed is not None and (not isinstance(signed, list) or len(signed) != len(names)
                               or not all(isinstance(sign, bool) for sign in signed)):
        raise UserError(f"{path}: act_signed: expected true or false for each of the {len(names)} layers")
    return policy


def write_policy(path, policy):
    """Write a policy file; lists stand on one line each, fit for pasting into a fine-tuning YAML."""
    text = yaml.safe_dump(policy, sort_keys=False, default_flow_style=None, width=10**6)
    write_atomically(path, text.encode())


def write_atomically(path, data):
    """Write bytes so that at every moment either the old or the new file lies there, whole."""
    partial = f"{path}.partial"
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise UserError(f"{path}: cannot write the file ({error.strerror})") from None
