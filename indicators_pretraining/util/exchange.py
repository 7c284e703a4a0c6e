"""The small files that stages hand to each other: indicators (.pkl) and policies (.yaml)."""

import contextlib
import hashlib
import io
import itertools
import math
import os
import pickle
import pickletools
import re

import yaml

from util.config import decode_yaml, describe, plain, read_bytes, unshared, written
from util.errors import UserError, reason

MAX_INDICATOR_FILE = 64 * 2**20
FORMAT = 2  # from here on a file ends in its checksum, so that damage is told from what never fitted
CHECKSUM = b"sha256:"
CHECKSUM_LENGTH = len(CHECKSUM) + 64


def checksum(*pieces):
    """The checksum of bytes that come in pieces, as files carry it: b"sha256:" and 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return CHECKSUM + digest.hexdigest().encode()


def needs_checksum(path, content):
    """Whether a file says that it ends in its checksum; one that is newer than this project is refused."""
    version = content.get("format", 1)
    if type(version) is not int or version < 1:
        raise UserError(f"{path}: format: found {describe(version)}, expected a whole number")
    if version > FORMAT:
        raise UserError(f"{path}: written by a newer version of this project (format {version})")
    return version == FORMAT


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
    data = read_bytes(path, MAX_INDICATOR_FILE, "the indicators file")
    body, ending = data[:-CHECKSUM_LENGTH - 1], data[-CHECKSUM_LENGTH - 1:]
    has_checksum = ending.startswith(CHECKSUM)
    if has_checksum and ending != checksum(body) + b"\n":
        raise UserError(f"{path}: damaged (its checksum does not fit); extract the indicators again")
    try:
        content = unshared(_unpickle(body if has_checksum else data), itertools.count())
    except Exception as error:  # bad bytes meet the unpickler with exceptions of many types
        raise UserError(f"{path}: not an indicators file ({reason(error)})") from None
    try:
        return _checked_indicators(path, content, has_checksum)
    except UserError:
        raise
    except (ValueError, OverflowError, RecursionError) as error:  # such as a whole number of thousands of digits
        raise UserError(f"{path}: not an indicators file ({reason(error)})") from None


def _unpickle(data):
    """What a pickle of plain values holds. Sizes that it claims are compared with what is there before memory is taken."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if opcode.name in ("PUT", "LONG_BINPUT") and argument > count:
            raise pickle.UnpicklingError(f"{opcode.name} skips places")
    stream = io.BytesIO(data)
    content = _PlainUnpickler(stream).load()
    if stream.tell() != len(data):
        raise pickle.UnpicklingError(f"{len(data) - stream.tell()} bytes follow its end")
    return content


def _checked_indicators(path, content, has_checksum):
    if not isinstance(content, dict) or not {"weight", "act", "layer_name"} <= content.keys():
        raise UserError(f"{path}: not an indicators file (expected a dict with 'weight', 'act' and 'layer_name')")
    if needs_checksum(path, content) and not has_checksum:
        raise UserError(f"{path}: damaged (its checksum is missing); extract the indicators again")
    names = content["layer_name"]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: layer_name: expected a list of layer names, found {describe(names)}")
    result = {key: value for key, value in content.items() if key not in ("format", "weight", "act")}
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
                raise UserError(f"{path}: {kind}: {name}: {describe(bit)} is not a bit-width")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise UserError(f"{path}: {kind}: {name}: the indicator at {bit} bits is {describe(value)}, "
                                "expected a finite number")
            checked[name][int(bit)] = float(value)
    return checked


def strip_prefix(name):
    """Drop the `module.` that a data-parallel wrapper puts before names; other names stay as they are."""
    return name.removeprefix("module.")


def split_arch(arch):
    """(path of a Python file, name in it) of an `arch:` of that kind, path/to/file.py:factory; None of any other."""
    path, colon, name = arch.rpartition(":")
    return (path, name) if colon and path.endswith(".py") else None


def same_arch(one, other):
    """Whether two `arch:` mean one network. A file may lie elsewhere for each stage: its own name and the factory count."""
    if not (isinstance(one, str) and isinstance(other, str)):
        return one == other
    files = [split_arch(arch) for arch in (one, other)]
    if None in files:
        return one == other
    (path, name), (other_path, other_name) = files
    return name == other_name and _file_name(path) == _file_name(other_path)


def _file_name(path):
    return re.split(r"[\\/]", path)[-1]


def write_indicators(path, content):
    """Write an indicators file: plain types only, bits as text, as published. Its checksum follows the pickle's end."""
    plain = {"format": FORMAT, **content}
    for kind in ("weight", "act"):
        plain[kind] = {name: {str(bit): float(value) for bit, value in row.items()}
                       for name, row in content[kind].items()}
    data = pickle.dumps(plain, protocol=4)
    write_atomically(path, data + checksum(data) + b"\n")


def read_policy(path):
    """Read a policy file.

    Returns:
        the mapping in the file; 'layer_name', 'weight_bits' and 'act_bits' are there, aligned and checked.
    """
    data = read_bytes(path)
    start = data.rfind(b"# " + CHECKSUM)
    has_checksum = start >= 0
    as_it_is = "to take it as it is, remove its last line and the entry format"
    if has_checksum and data[start:] != b"# " + checksum(data[:start]) + b"\n":
        raise UserError(f"{path}: edited by hand, or damaged (its checksum does not fit); {as_it_is}")
    content = decode_yaml(data, path)
    policy = plain(content)
    if needs_checksum(path, policy) and not has_checksum:
        raise UserError(f"{path}: edited by hand, or damaged (its checksum is missing); {as_it_is}")
    for key in ("layer_name", "weight_bits", "act_bits"):
        if not isinstance(policy.get(key), list) or not policy[key]:
            raise UserError(f"{path}: {key}: not a policy file (expected a list under this key)")
    names = policy["layer_name"] = [strip_prefix(written(name) or describe(name)) for name in content["layer_name"]]
    if len(set(names)) != len(names):
        raise UserError(f"{path}: layer_name: a layer stands twice")
    for key in ("weight_bits", "act_bits"):
        if len(policy[key]) != len(names):
            raise UserError(f"{path}: {key}: found {len(policy[key])} values for {len(names)} layers")
        for name, bit in zip(names, policy[key], strict=True):
            if type(bit) is not int or not 2 <= bit <= 8:
                raise UserError(f"{path}: {key}: {name}: found {describe(bit)}, expected a bit-width from 2 to 8")
    signed = policy.get("act_signed")
    if signed is not None and (not isinstance(signed, list) or len(signed) != len(names)
                               or not all(isinstance(sign, bool) for sign in signed)):
        raise UserError(f"{path}: act_signed: expected true or false for each of the {len(names)} layers")
    return policy


def write_policy(path, policy):
    """Write a policy file; lists stand on one line each, fit for pasting into a fine-tuning YAML. It ends in its checksum."""
    text = yaml.safe_dump({"format": FORMAT, **policy}, sort_keys=False, default_flow_style=None, width=10**6).encode()
    write_atomically(path, text + b"# " + checksum(text) + b"\n")


def write_atomically(path, data):
    """Write bytes so that at every moment, also after a power cut, either the old or the new file lies there, whole."""
    partial, folder = f"{path}.partial", os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(folder, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot write the file ({error.strerror}; {len(data) / 2**20:.1f} MB are needed)") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(partial)
    _sync_folder(folder)


def _sync_folder(folder):
    """Bring the names in a folder to the disk, where the platform can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
