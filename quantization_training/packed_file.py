"""The packed model as a file: safetensors whose header says, in JSON, what a network is rebuilt from. Needs no torch.

Tensors: `LAYER.weight`, uint8, the integers as packing.pack gives them; beside it `LAYER.weight.map` where only some are
stored; everything else under its name in the network's state_dict, bfloat16 as float32, which holds it exactly. The one entry
of the metadata, `limpqp`, is the header, which holds a SHA-256 of the whole file, taken with zeros in its own place.
"""

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass

import numpy as np

from packing import packed_length
from util import formats
from util.config import describe, kind_of, read_bytes
from util.errors import UserError, advising, naming, reason

VERSION = 1
KEY = "limpqp"
PACK_FIRST = "python export.py CHECKPOINT --output FILE.safetensors packs one"
NO_CHECKSUM = "0" * 64
MAP = ".map"
MOST_PIXELS = 4096
NUMPY_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1",
               "BOOL": "?"}
KINDS = ("conv", "linear")


@dataclass(frozen=True)
class PackedLayer:
    """What the header says of a layer.

    kind: conv or linear. shape: of its weight. bits, signed: of its weight; act_bits, act_signed: of its input, None where
    that is not quantized. searched: whether the policy chose the bits. zeros: integers that are zero. kept: how many
    integers are stored, with a map that says which; None where all are.
    """

    kind: str
    shape: tuple
    bits: int
    signed: bool
    act_bits: int | None
    act_signed: bool | None
    searched: bool
    zeros: int
    kept: int | None = None

    @property
    def count(self):
        return math.prod(self.shape)

    @property
    def why_float(self):
        """Why integers cannot compute the layer exactly on every CPU, or ''.

        oneDNN multiplies uint8 by int8 and adds up in int32; CPUs without VNNI add two products in int16 first.
        """
        if self.act_bits is None:
            return "its input is not quantized"
        weight, entering = 2 ** (self.bits - self.signed), 2**self.act_bits - 1
        if 2 * weight * entering >= 2**15:
            return f"{self.bits} by {self.act_bits} bits: two products may exceed 16 bits"
        if math.prod(self.shape[1:]) * weight * entering >= 2**31:
            return "sums may exceed 32 bits"
        return ""

    @property
    def packed_bytes(self):
        """Bytes of the weight in the file."""
        if self.kept is None:
            return packed_length(self.count, self.bits)
        return packed_length(self.count, 1) + packed_length(self.kept, self.bits)


@dataclass(frozen=True)
class PackedFile:
    """A packed model. header: what HEADER names. layers: {name: PackedLayer}. tensors: {name: array}. size: of the file."""

    path: str
    header: dict
    layers: dict
    tensors: dict
    size: int


def serialize(header, layers, tensors):
    """The bytes of a packed model; header: what HEADER names, but for version, sha256 and layers."""
    from safetensors.numpy import save

    rows = {name: {key: value for key, value in asdict(layer).items() if value is not None}
            for name, layer in layers.items()}
    whole = {"version": VERSION, "sha256": NO_CHECKSUM, **header, "layers": rows}
    in_order = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}  # save() passes over strides
    data = save(in_order, {KEY: json.dumps(whole, separators=(",", ":"))})
    return _with_checksum(data, hashlib.sha256(data).hexdigest())


def _with_checksum(data, digits):
    """The bytes of a file with another checksum in the place of the one that is there; None where there is no such place."""
    key, beginning = b'\\"sha256\\":\\"', formats.SAFETENSORS_LENGTH
    start = data.find(key, beginning, beginning + 200) + len(key)
    place = slice(start, start + len(NO_CHECKSUM))
    if data[place.stop:place.stop + 2] != b'\\"':
        return None
    return data[:place.start] + digits.encode() + data[place.stop:]


def is_packed(path):
    """Whether a file is to be read as a packed model: it begins like safetensors, or is named so, and is not one that plainly
    holds something else."""
    is_named = str(path).endswith(".safetensors")
    if not os.path.isfile(path):
        return is_named
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(formats.SAFETENSORS_LENGTH), "little")
            beginning = file.read(min(length, os.path.getsize(path)))
        if not beginning.startswith(b"{"):
            return is_named
        return bool((json.loads(beginning).get("__metadata__") or {}).get(KEY))
    except OSError:
        return is_named
    except (ValueError, RecursionError, AttributeError):  # it begins like safetensors, and is damaged
        return True


def read_packed(path):
    """Read a packed model. No code in the file is run.

    A UserError names the file and what is wrong: damage, another kind, a newer version, a header unlike the tensors.
    """
    with advising(path, PACK_FIRST):
        return parse_packed(read_bytes(path, "the packed model", limit=None), path)


def parse_packed(data, path):
    """The PackedFile that the bytes of a file hold; `path` and errors are those of read_packed."""
    with naming(path):
        header, tensors = _read_header(data), _read_tensors(data)
        _check_header(header)
        layers = {name: PackedLayer(**{**dict.fromkeys(OPTIONAL), **row, "shape": tuple(row["shape"])})
                  for name, row in header["layers"].items()}
        _check_tensors(layers, tensors)
        values = sum(layer.count for layer in layers.values()) + sum(tensor.size for tensor in tensors.values())
        if header["num_classes"] > values:  # what gives the output need not be a packed layer, nor one layer
            raise UserError(f"num_classes: found {header['num_classes']}, the file holds {values} values in all")
    return PackedFile(str(path), header, layers, tensors, len(data))


def _read_header(data):
    """The header in the bytes of a file, of this version, its checksum compared."""
    kind = kind_of(data)
    if kind == "a checkpoint":
        raise UserError(f"not a packed model, but perhaps a checkpoint; {PACK_FIRST}")
    if len(data) < formats.SAFETENSORS_LENGTH + 2 or data[formats.SAFETENSORS_LENGTH:formats.SAFETENSORS_LENGTH + 1] != b"{":
        why = f"is {kind}" if kind else "does not begin like safetensors"
        raise UserError(f"damaged or not a packed model (it {why})")
    if formats.SAFETENSORS_LENGTH + int.from_bytes(data[:formats.SAFETENSORS_LENGTH], "little") > len(data):
        raise UserError("damaged (it ends inside its header); export it again")
    try:
        header = json.loads(formats.safetensors_metadata(data)[KEY])
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"not a packed model of this project (safetensors without the entry {KEY!r}); export.py writes one") \
            from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"damaged or not a packed model ({reason(error)[:100]})") from None
    header = header if isinstance(header, dict) else {}
    if formats.is_count(header.get("version")) and header["version"] > VERSION:
        raise UserError(f"written by a newer version of this project (format {header['version']})")
    blank = _with_checksum(data, NO_CHECKSUM)
    if blank is None or header.get("sha256") != hashlib.sha256(blank).hexdigest():
        raise UserError("damaged (its checksum does not fit); export it again")
    return header


def _read_tensors(data):
    """{name: numpy array} of the bytes of a file."""
    from safetensors import SafetensorError, deserialize

    try:
        return {name: np.frombuffer(entry["data"], NUMPY_TYPES[entry["dtype"]]).reshape(entry["shape"])
                for name, entry in deserialize(data)}
    except KeyError as error:
        raise UserError(f"holds a tensor of a type that a packed model does not have ({reason(error)})") from None
    except (SafetensorError, ValueError) as error:
        raise UserError(f"damaged or not a packed model ({reason(error)[:100]})") from None


def _check_tensors(layers, tensors):
    """Refuse a header that says something else than the tensors do."""
    for name, layer in layers.items():
        weight, chart = tensors.get(f"{name}.weight"), tensors.get(f"{name}.weight{MAP}")
        if weight is None or (chart is None) != (layer.kept is None):
            raise UserError(f"header and tensors disagree ({name}: the packed weight or its map is missing)")
        packed = [weight] if chart is None else [weight, chart]
        if any(part.dtype != np.uint8 or part.ndim != 1 for part in packed) \
                or sum(part.nbytes for part in packed) != layer.packed_bytes:
            raise UserError(f"header and tensors disagree ({name}: {list(layer.shape)} at {layer.bits} bits takes "
                            f"{layer.packed_bytes} bytes, found {sum(part.nbytes for part in packed)})")
        step = tensors.get(f"{name}.quan_w_fn.s")
        if step is None or step.dtype != np.float32 or step.shape not in ((1,), (1, layer.shape[0])):
            raise UserError(f"header and tensors disagree ({name}: no step size fits its weight)")
        if not np.isfinite(step).all() or not step.all():
            raise UserError(f"{name}: a step size is zero or no finite number")


def _check_header(header):
    for key, fits in HEADER.items():
        if key == "scaled" and key not in header:  # files of before do not say it
            continue
        if key not in header:
            raise UserError(f"its header lacks {key}")
        if not fits(header[key]):
            raise UserError(f"{key}: found {describe(header[key])}, not what a packed model holds there")
    names = header["class_names"]
    if names is not None and len(names) != header["num_classes"]:
        raise UserError(f"class_names: found {len(names)}, the network has {header['num_classes']} classes")


def _is_bit(value):
    return type(value) is int and 1 <= value <= 8


def _is_row(value):
    """A layer: every entry there is of its type, and the counts fit the shape."""
    if not ROW(value):
        return False
    count = math.prod(value["shape"])
    return value["zeros"] <= count and value.get("kept", 0) <= count and ("act_bits" in value) == ("act_signed" in value)


OPTIONAL = {"act_bits": _is_bit, "act_signed": formats.is_bool, "kept": formats.is_count}
ROW = formats.record({
    "kind": KINDS.__contains__, "shape": lambda value: formats.list_of(formats.is_positive)(value) and len(value) in (2, 4),
    "bits": _is_bit, "signed": formats.is_bool, "searched": formats.is_bool, "zeros": formats.is_count}, OPTIONAL)
THREE = formats.sequence(*[formats.number()] * 3)
NAMES = formats.table_of(formats.is_name)
HEADER = {
    "version": formats.is_positive, "sha256": formats.is_name, "arch": formats.is_name, "num_classes": formats.is_positive,
    "input_size": formats.whole(MOST_PIXELS, low=1), "class_names": formats.optional(formats.list_of(formats.is_name)),
    "preprocessing": formats.record({
        "mean": THREE, "std": lambda value: THREE(value) and all(value), "resize": ("crop", "square").__contains__,
        "padding": formats.whole(MOST_PIXELS), "grey": formats.is_bool}),
    "config": lambda value: isinstance(value, dict), "cost": formats.table_of(formats.number()), "folded": NAMES,
    "shared": NAMES, "scaled": formats.list_of(formats.is_name),
    "layers": lambda value: bool(value) and formats.table_of(_is_row)(value)}
