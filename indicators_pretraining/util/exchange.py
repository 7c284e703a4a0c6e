"""The small files that stages hand to each other: indicators (.pkl) and policies (.yaml)."""

import contextlib
import errno
import fnmatch
import hashlib
import io
import itertools
import math
import os
import pickle
import pickletools
import re
import tempfile
from pathlib import Path

import yaml

from util.config import Scalar, decode_yaml, describe, other_kind, plain, read_bytes, unshared
from util.errors import UserError, advising, reason

STEPS = "steps"  # the kind of indicators that are learned step sizes, in the units of their tensors; where none is said
FLOAT_BIT = 32  # of an input that is left alone
BITS_OF = {"weight_bits": "a bit-width from 2 to 8",
           "act_bits": f"a bit-width from 2 to 8, or {FLOAT_BIT} for an input that is left alone"}
MAX_INDICATOR_FILE = 64 * 2**20
FORMAT = 2  # from here on a file ends in its checksum, so that damage is told from what never fitted
WRAPPERS = ("module.", "_orig_mod.")  # of a data-parallel and of a compiled network
# LIMPQ's names of MobileNetV1, and where our network has them.
MOBILENET_STAGES = (0, 1, 3, 5, 11)  # the unit that begins each
MOBILENET_PLACES = {"dw_conv.conv": 0, "dw_conv.bn": 1, "pw_conv.conv": 3, "pw_conv.bn": 4}  # in a unit
MOBILENET_NAME = re.compile(r"features\.stage([1-5])\.unit([1-6])\.([dp]w_conv\.(?:conv|bn))(?=\.|$)")
# What files are, and how their names end; an output is refused the ending of another kind.
ENDINGS = {"indicators": (".pkl",), "policies": (".yaml", ".yml"), "packed models": (".safetensors",),
           "ONNX models": (".onnx",), "reports": (".html", ".htm"), "tables": (".csv",), "plots": (".png", ".svg", ".pdf"),
           "checkpoints": (".pth.tar", ".tar", ".pth", ".pt", ".ckpt"), "Python files": (".py",)}
INDICATORS_FIRST = "in indicators_pretraining, python importance_extractor.py CHECKPOINT --output FILE.pkl makes one"
POLICY_FIRST = "in quantization_search, python search.py --i FILE.pkl --output POLICY.yaml makes one"
FOLDER = "a folder"  # stands for a kind where files are written into one
OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CHECKSUM = b"sha256:"
CHECKSUM_LENGTH = len(CHECKSUM) + 64


def checksum(*pieces):
    """The checksum of bytes that come in pieces, as files carry it: b"sha256:" and 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return CHECKSUM + digest.hexdigest().encode()


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, text and containers; refuses every class and function, so a file cannot run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it refers to {module}.{name}; only plain numbers, text, lists and dicts are read")

    def persistent_load(self, identifier):
        raise pickle.UnpicklingError("it refers to objects outside the file")


def read_indicators(path):
    """Read an indicators file.

    Returns:
        {'weight': {layer: {bit: float}}, 'act': {layer: {bit: float}}, 'layer_name': [layer, ...]} with int bits and names
        without wrappers, plus what else the file carries, such as 'arch', 'input_size', 'bits', 'layers' and 'fixed'.
    """
    with advising(path, INDICATORS_FIRST):
        data = read_bytes(path, "the indicators file", MAX_INDICATOR_FILE)
    if kind := other_kind(data, "an indicators file"):
        raise UserError(f"{path}: is {kind}, not an indicators file; {INDICATORS_FIRST}")
    body, ending = data[:-CHECKSUM_LENGTH - 1], data[-CHECKSUM_LENGTH - 1:]
    has_checksum = ending.startswith(CHECKSUM)
    if has_checksum and ending != checksum(body) + b"\n":
        raise UserError(f"{path}: damaged (its checksum does not fit); extract the indicators again")
    try:
        content = unshared(_unpickle(body if has_checksum else data), itertools.count())
    except Exception as error:  # bad bytes meet the unpickler with exceptions of many types
        raise UserError(f"{path}: not an indicators file ({reason(error)})") from None
    if not isinstance(content, dict) or not {"weight", "act", "layer_name"} <= content.keys():
        raise UserError(f"{path}: not an indicators file (expected a dict with 'weight', 'act' and 'layer_name')")
    version, names = content.get("format", 1), content["layer_name"]
    if type(version) is not int or version < 1:
        raise UserError(f"{path}: format: found {describe(version)}, expected a whole number")
    if version > FORMAT:
        raise UserError(f"{path}: written by a newer version of this project (format {version})")
    if version == FORMAT and not has_checksum:
        raise UserError(f"{path}: damaged (its checksum is missing); extract the indicators again")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: layer_name: expected a list of layer names, found {describe(names)}")
    if len(set(names)) != len(names):
        raise UserError(f"{path}: layer_name: a layer stands twice")
    if not isinstance(content.get("kind", STEPS), str) or not content.get("kind", STEPS).isidentifier():
        raise UserError(f"{path}: kind: found {describe(content['kind'])}, expected a word")
    # What our own extractor wrote has the network's names as they are; one may begin with a wrapper's.
    own = dict(zip(names, names if "format" in content else without_wrappers(names), strict=True))
    tables = {kind: _checked_table(f"{path}: {kind}", content[kind], own) for kind in ("weight", "act")}
    content.pop("format", None)
    return {**content, "layer_name": list(own.values()), **tables}


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


def stands_for(pattern, name, shape, groups):
    """Whether a pattern of --fix, --tie or --at-least means a layer: its name, a glob pattern, or "depthwise"."""
    pattern = pattern.removeprefix("module.")
    is_depthwise = groups > 1 and shape[1] == 1
    return fnmatch.fnmatchcase(name, pattern) or (pattern == "depthwise" and is_depthwise)


def _checked_table(where, table, own):
    """One table of an indicators file, {layer: {bit: indicator}}; own: {layer, as the file has it: the network's name}."""
    if not isinstance(table, dict) or not all(isinstance(row, dict) for row in table.values()):
        raise UserError(f"{where}: expected {{layer: {{bit: indicator}}}}")
    rows = {own.get(str(name), str(name)): row for name, row in table.items()}
    for name in own.values():
        if name not in rows:
            raise UserError(f"{where}: no indicators for the layer {name}")
        for bit, value in rows[name].items():
            if not str(bit).isdecimal() or len(str(bit)) > 2 or not 1 <= int(bit) <= 32:
                raise UserError(f"{where}: {name}: {describe(bit)} is not a bit-width")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise UserError(f"{where}: {name}: the indicator at {bit} bits is {describe(value)}, expected a finite number")
    return {name: {int(bit): float(value) for bit, value in rows[name].items()} for name in own.values()}


def usual_alpha(kind):
    """The weight of the weights' indicators against the inputs' where none is typed: LIMPQ's for step sizes; 1 for others."""
    return 2 if kind == STEPS else 1


def write_indicators(path, content):
    """Write an indicators file: plain types only, bits as text, as published. Its checksum follows the pickle's end."""
    tables = {kind: {name: {str(bit): float(value) for bit, value in row.items()} for name, row in content[kind].items()}
              for kind in ("weight", "act")}
    data = pickle.dumps({"format": FORMAT, **content, **tables}, protocol=4)
    write_atomically(path, data + checksum(data) + b"\n")


def without_wrappers(names):
    """Names without the wrappers before them that every name has; what some names lack is no wrapper's."""
    names = list(names)
    while names and (common := [wrapper for wrapper in WRAPPERS if all(name.startswith(wrapper) for name in names)]):
        names = [name.removeprefix(common[0]) for name in names]
    return names


def fit_names(own, names):
    """{name in a file: name in the network} of layers or tensors that come from elsewhere.

    Wrappers (`module.`, `_orig_mod.`) that stand before every name, or inside a name, are dropped or added as the network's
    `own` names ask for, and LIMPQ's names of MobileNetV1 change to ours. A name that fits nothing only gets the wrappers that
    all of the network's names have.
    """
    names, own = list(names), dict.fromkeys(own)
    if all(name in own for name in names):
        return dict(zip(names, names, strict=True))
    prefix = next(iter(own), "").removesuffix(next(iter(without_wrappers(own)), ""))
    short_names = without_wrappers(names)
    if sum(name in own for name in names) > sum(prefix + name in own for name in short_names):
        short_names, prefix = names, ""
    bare = {_bare(name): name for name in own}
    taken = {prefix + name for name in short_names} & own.keys()
    fitted = {}
    for name, short in zip(names, short_names, strict=True):
        fitted[name] = prefix + short
        if fitted[name] not in own:
            others = (prefix + own_name(short), bare.get(_bare(short)))
            fitted[name] = next((other for other in others if other in own and other not in taken), fitted[name])
        taken.add(fitted[name])
    return fitted


def _bare(name):
    """A name without wrappers after its beginning."""
    first, *others = name.split(".")
    return ".".join([first, *(part for part in others if f"{part}." not in WRAPPERS)])


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
    return _without_folder(one) == _without_folder(other)


def _without_folder(arch):
    file = split_arch(arch) if isinstance(arch, str) else None
    return (re.split(r"[\\/]", file[0])[-1], file[1]) if file else arch


def is_bit(key, bit):
    """Whether a policy may have a bit-width under this key, weight_bits or act_bits."""
    return type(bit) is int and (2 <= bit <= 8 or (bit == FLOAT_BIT and key == "act_bits"))


def read_policy(path):
    """The mapping in a policy file; 'layer_name', 'weight_bits' and 'act_bits' are there, aligned and checked."""
    with advising(path, POLICY_FIRST):
        data = read_bytes(path)
    if kind := other_kind(data, "text", "a policy"):
        raise UserError(f"{path}: is {kind}, not a policy; {POLICY_FIRST}")
    content = decode_yaml(data, path)
    policy = plain(content)
    policy.pop("format", None)  # of files that ended in a checksum once; a policy is there to be edited
    for key in ("layer_name", "weight_bits", "act_bits"):
        if not isinstance(policy.get(key), list) or not policy[key]:
            raise UserError(f"{path}: {key}: not a policy file (expected a list under this key)")
    texts = [name.text if isinstance(name, Scalar) else name for name in content["layer_name"]]  # as they stand in the file
    names = policy["layer_name"] = [text if text and isinstance(text, str) else describe(text) for text in texts]
    if len(set(names)) != len(names):
        raise UserError(f"{path}: layer_name: a layer stands twice")
    for key in ("weight_bits", "act_bits"):
        if len(policy[key]) != len(names):
            raise UserError(f"{path}: {key}: found {len(policy[key])} values for {len(names)} layers")
        for name, bit in zip(names, policy[key], strict=True):
            if not is_bit(key, bit):
                raise UserError(f"{path}: {key}: {name}: found {describe(bit)}, expected {BITS_OF[key]}")
    signed = policy.get("act_signed")
    if signed is not None and not (isinstance(signed, list) and [type(sign) for sign in signed] == [bool] * len(names)):
        raise UserError(f"{path}: act_signed: expected true or false for each of the {len(names)} layers")
    return policy


def write_policy(path, policy):
    """Write a policy file; lists stand on one line each, fit for editing and for pasting into a fine-tuning YAML."""
    write_atomically(path, yaml.safe_dump(policy, sort_keys=False, default_flow_style=None, width=10**6).encode())


def check_outputs(outputs, read):
    """Refuse, before anything is computed, to write what would replace a file of another kind or one that is in use here, and
    what cannot be written.

    Args:
        outputs: [(flag or key, path, what it is: a key of ENDINGS, or FOLDER)]; None for a path that is not given.
        read: paths that the command reads; what is no text among them is none.
    """
    taken = [(path, "is also read by this command") for path in read if isinstance(path, str)]
    for flag, path, kind in outputs:
        if path is None:
            continue
        if not path:
            raise UserError(f"{flag}: found '', expected a name for {'the folder' if kind == FOLDER else 'the file'}")
        if kind != FOLDER and os.path.isdir(path):
            raise UserError(f"{flag}: {path} is a folder; name a file")
        if kind != FOLDER and os.path.exists(path) and not os.path.isfile(path):  # which the superuser would replace
            raise UserError(f"{flag}: {path} is a device or a pipe; name a file")
        for other, why in taken:
            if _is_same(path, other):
                raise UserError(f"{flag}: {path} {why}; give another name for what is written")
        if kind != FOLDER:
            _check_ending(flag, path, kind)
        _check_writable(flag, path, path if kind == FOLDER else os.path.dirname(path))
        taken.append((path, f"is also written by {flag}"))


def _is_same(path, other):
    return (os.path.realpath(path) == os.path.realpath(other)
            or (os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other)))


def _check_ending(flag, path, kind):
    for other, endings in ENDINGS.items():
        found = next((ending for ending in endings if path.lower().endswith(ending)), None)
        if found and other != kind:
            raise UserError(f"{flag}: {path} ends in {found}, as {other} do; {kind} end in {ENDINGS[kind][0]}")


def _check_writable(flag, path, folder):
    """Refuse a folder that takes no files; one that is missing is made in the first one above it that is there."""
    folder = Path(folder).absolute()
    there = next(str(place) for place in (folder, *folder.parents) if os.path.lexists(place))
    try:
        with tempfile.TemporaryFile(dir=there):  # since the superuser may write anywhere, but not for example in /proc
            pass
    except OSError:
        raise UserError(f"{flag}: {path} cannot be written, since {there} is no folder that is writable") from None


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
        needed = f"; {len(data) / 2**20:.1f} MB are needed" if error.errno in OUT_OF_SPACE and len(data) > 2**20 // 20 else ""
        raise UserError(f"{path}: cannot write the file ({error.strerror}{needed})") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(partial)
    with contextlib.suppress(OSError):  # the file's name to the disk too, where the platform can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def no_empty_folders(folder):
    """Afterwards the folders on the way to `folder` that were missing before are gone again, where nothing lies in them."""
    folder = Path(folder).absolute()
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        yield
    finally:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
