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

from util.config import (
    decode_yaml,
    describe,
    plain,
    read_bytes,
    unshared,
    written,
)
from util.errors import UserError, reason

FLOAT_BIT = 32  # of an input that is left alone
BITS_OF = {"weight_bits": "a bit-width from 2 to 8",
           "act_bits": f"a bit-width from 2 to 8, or {FLOAT_BIT} for an input that is left alone"}
MAX_INDICATOR_FILE = 64 * 2**20
FORMAT = 2  # from here on a file ends in its checksum, so that damage is told from what never fitted
WRAPPERS = ("module", "_orig_mod")
# LIMPQ's names of MobileNetV1, and where our network has them: the unit that begins each stage, the place in a unit.
MOBILENET_STAGES = (0, 1, 3, 5, 11)  # the unit that begins each
MOBILENET_PLACES = {"dw_conv.conv": 0, "dw_conv.bn": 1, "pw_conv.conv": 3, "pw_conv.bn": 4}
MOBILENET_NAME = re.compile(r"features\.stage([1-5])\.unit([1-6])\.([dp]w_conv\.(?:conv|bn))(?=\.|$)")
CHECKSUM = b"sha256:"
CHECKSUM_LENGTH = len(CHECKSUM) + 64


def checksum(*pieces):
    """The checksum of bytes that come in pieces, as files carry it: b"sha256:" and 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return CHECKSUM + digest.hexdigest().encode()


def needs_checksum(path, content):
    """Whether an indicators file says that it ends in its checksum; one that is newer than this project is refused."""
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
        names without wrappers, plus, where the file carries them, 'arch', 'input_size', 'bits', 'layers' and 'fixed'.

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
    if len(set(names)) != len(names):
        raise UserError(f"{path}: layer_name: a layer stands twice")
    # What our own extractor wrote has the network's names as they are; one may begin with a wrapper's.
    plain = dict(zip(names, names if "format" in content else without_wrappers(names), strict=True))
    result = {key: value for key, value in content.items() if key not in ("format", "weight", "act")}
    result["layer_name"] = list(plain.values())
    for kind in ("weight", "act"):
        result[kind] = _checked_table(path, kind, content[kind], plain)
    return result


def _checked_table(path, kind, table, plain):
    """One table of an indicators file; plain: {layer, as the file has it: its name without wrappers}."""
    if not isinstance(table, dict) or not all(isinstance(row, dict) for row in table.values()):
        raise UserError(f"{path}: {kind}: expected {{layer: {{bit: indicator}}}}")
    rows = {plain.get(str(name), str(name)): row for name, row in table.items()}
    names = list(plain.values())
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


def without_wrappers(names):
    """Names without the `module.` of a data-parallel wrapper and the `_orig_mod.` of a compiled network before them.

    A beginning goes only where every name has it, however often and in whatever order: what some names lack is no wrapper's.
    """
    names = list(names)
    while names:
        wrapper = next((wrapper for wrapper in WRAPPERS if all(name.startswith(f"{wrapper}.") for name in names)), None)
        if wrapper is None:
            break
        names = [name[len(wrapper) + 1:] for name in names]
    return names


def fit_names(own, names):
    """{name in a file: name in the network} of layers or tensors that come from elsewhere.

    Wrappers (`module.`, `_orig_mod.`) that stand before every name, or inside a name, are dropped or added as the network's
    own names ask for, and LIMPQ's names of MobileNetV1 change to ours. A name that fits nothing only gets the wrappers that
    all of the network's names have.

    Args:
        own: names of the network.
        names: names in the file.
    """
    names, own = list(names), dict.fromkeys(own)
    if all(name in own for name in names):
        return dict(zip(names, names, strict=True))
    prefix = _common_wrappers(own)
    plain = without_wrappers(names)
    if sum(name in own for name in names) > sum(prefix + name in own for name in plain):
        plain, prefix = names, ""
    bare = {_bare(name): name for name in own}
    taken = {prefix + name for name in plain} & own.keys()
    fitted = {}
    for name, short in zip(names, plain, strict=True):
        choices = (prefix + short, prefix + own_name(short), bare.get(_bare(short)))
        found = choices[0] if choices[0] in own else next(
            (choice for choice in choices[1:] if choice in own and choice not in taken), choices[0])
        taken.add(found)
        fitted[name] = found
    return fitted


def _common_wrappers(names):
    """What without_wrappers takes from each of these names."""
    first = next(iter(names), "")
    return first[:len(first) - len(next(iter(without_wrappers(names)), ""))]


def _bare(name):
    """A name without wrappers after its beginning."""
    first, *others = name.split(".")
    return ".".join([first, *(part for part in others if part not in WRAPPERS)])


def own_name(name):
    """The name of a layer or tensor here for its name in LIMPQ's MobileNetV1; any other name as it is."""
    if name.startswith("first_conv."):
        return f"stem.{name.removeprefix('first_conv.')}"
    match = MOBILENET_NAME.match(name)
    if match is None:
        return name
    unit = MOBILENET_STAGES[int(match[1]) - 1] + int(match[2]) - 1
    return f"features.{unit}.{MOBILENET_PLACES[match[3]]}{name[match.end():]}"


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


def is_bit(key, bit):
    """Whether a policy may have a bit-width under this key, weight_bits or act_bits."""
    return type(bit) is int and (2 <= bit <= 8 or (bit == FLOAT_BIT and key == "act_bits"))


def read_policy(path):
    """Read a policy file.

    Returns:
        the mapping in the file; 'layer_name', 'weight_bits' and 'act_bits' are there, aligned and checked.
    """
    content = decode_yaml(read_bytes(path), path)
    policy = plain(content)
    policy.pop("format", None)  # of files that ended in a checksum once; a policy is there to be edited
    for key in ("layer_name", "weight_bits", "act_bits"):
        if not isinstance(policy.get(key), list) or not policy[key]:
            raise UserError(f"{path}: {key}: not a policy file (expected a list under this key)")
    names = policy["layer_name"] = [written(name) or describe(name) for name in content["layer_name"]]
    if len(set(names)) != len(names):
        raise UserError(f"{path}: layer_name: a layer stands twice")
    for key in ("weight_bits", "act_bits"):
        if len(policy[key]) != len(names):
            raise UserError(f"{path}: {key}: found {len(policy[key])} values for {len(names)} layers")
        for name, bit in zip(names, policy[key], strict=True):
            if not is_bit(key, bit):
                raise UserError(f"{path}: {key}: {name}: found {describe(bit)}, expected {BITS_OF[key]}")
    signed = policy.get("act_signed")
    if signed is not None and (not isinstance(signed, list) or len(signed) != len(names)
                               or not all(isinstance(sign, bool) for sign in signed)):
        raise UserError(f"{path}: act_signed: expected true or false for each of the {len(names)} layers")
    return policy


def write_policy(path, policy):
    """Write a policy file; lists stand on one line each, fit for editing and for pasting into a fine-tuning YAML."""
    write_atomically(path, yaml.safe_dump(policy, sort_keys=False, default_flow_style=None, width=10**6).encode())


def read_file(path, what):
    """The bytes of a file of any size; `what` it holds is said in errors."""
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe or a device may have no end
        raise UserError(f"{path}: cannot read {what} (not a regular file)")
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot read {what} ({error.strerror})") from None


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
