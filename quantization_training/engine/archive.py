"""A checkpoint as bytes: torch's archive with a checksum, and what is looked at before torch reads one.

The checksum stands in the comment that ends a zip archive, so that whatever reads zip archives reads the file.
"""

import io
import itertools
import json
import math
import os
import pickle
import pickletools
import re
import warnings
import zipfile

import torch

from util.config import MAX_NUMBER_BITS
from util.errors import UserError, reason
from util.exchange import CHECKSUM, CHECKSUM_LENGTH, checksum

from .entries import CONTAINERS

ZIP_BEGINNING, ZIP_ENDING = b"PK\3\4", b"PK\5\6"
ENDING_LENGTH = 22  # of a zip archive without a comment; the last two bytes give the length of the comment
NO_COMMENT, OUR_COMMENT = (0).to_bytes(2, "little"), CHECKSUM_LENGTH.to_bytes(2, "little")
MOST_VALUES, MOST_LEVELS = 3_000_000, 50
LEGACY_PICKLES = 5  # that a file from before torch 1.6 begins with
LENGTH_BYTES = 8  # a safetensors file begins with the length of its header, which is JSON
PACKED = "limpqp"  # the entry of that header which marks a packed model
SHOWN = 3
PLAIN_GLOBALS = re.compile(r"collections (OrderedDict|Counter)|(__builtin__|builtins) set|_codecs encode|torch (Size|device)|"
                           r"torch \w+Storage|torch\.nn\.parameter Parameter|torch\._tensor _rebuild_from_type_v2|"
                           r"torch (float|bfloat|int|uint)\d+|torch bool|"
                           r"torch\._utils _rebuild_(tensor|tensor_v2|parameter|parameter_with_state)")


def pack(content):
    """The bytes of a checkpoint, with their checksum."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    comment = checksum(buffer.getbuffer())
    buffer.seek(-len(NO_COMMENT), os.SEEK_END)
    buffer.write(OUR_COMMENT + comment)
    return buffer.getbuffer()


def unpack(data, path):
    """What the bytes of a checkpoint hold, on the CPU, and whether they carry a checksum. No code in them is run.

    Safetensors are read as well, as a dict of tensors.

    Raises:
        UserError: naming the file, on damage and on what is more than tensors and plain containers.
    """
    has_checksum = check_ending(data, path)
    try:
        content = _safetensors(data, path) if data[LENGTH_BYTES:LENGTH_BYTES + 1] == b"{" else _torch_archive(data, path)
        check_values(content, len(data))
    except UserError:
        raise
    except pickle.UnpicklingError:
        raise UserError(f"{path}: not a checkpoint, or one that holds more than tensors and plain containers") from None
    except Exception as error:  # a damaged archive meets the reader with exceptions of many types
        raise UserError(f"{path}: damaged or not a checkpoint ({reason(error)[:100]})") from None
    return content, has_checksum


def _torch_archive(data, path):
    for stream in pickles(data):
        check_globals(stream, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _safetensors(data, path):
    from safetensors.torch import load

    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    if PACKED in (json.loads(data[LENGTH_BYTES:LENGTH_BYTES + length]).get("__metadata__") or {}):
        raise UserError(f"{path}: is a packed model, whose weights are integers; name the checkpoint that it was packed from")
    return load(bytes(data))


def check_ending(data, path):
    """Whether the bytes end in a checksum; refused are one that does not fit, and an archive that ends in anything else."""
    start = max(0, len(data) - CHECKSUM_LENGTH)
    if data.startswith(CHECKSUM, start):
        with memoryview(data) as view:
            found, length, whole = view[start:], view[:start][-2:], view[:start][:-2]
            if length != OUR_COMMENT or found != checksum(whole, NO_COMMENT):
                raise UserError(f"{path}: damaged (its checksum does not fit); use an earlier checkpoint")
        return True
    is_whole = data[-ENDING_LENGTH:].startswith(ZIP_ENDING) and data.endswith(NO_COMMENT)
    if data.startswith(ZIP_BEGINNING) and not is_whole:
        raise UserError(f"{path}: damaged or not a checkpoint (its end is missing); use an earlier checkpoint")
    return False


def pickles(data):
    """The pickles that torch is going to read, one stream after the other."""
    if not data.startswith(ZIP_BEGINNING):
        stream = io.BytesIO(data)
        for _ in range(LEGACY_PICKLES):
            yield stream
        return
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or \
                sum(entry.file_size for entry in entries) > len(data):
            raise ValueError("its entries are larger than the file")
        for entry in entries:
            if entry.filename.lower().endswith("data.pkl"):
                yield io.BytesIO(archive.read(entry))


def check_globals(stream, path):
    """Refuse a pickle that names more than is needed for tensors and plain containers.

    torch runs no code from a file, but would let one take any amount of memory, as by bytearray(10**12).
    """
    found, container = {}, None
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name == "GLOBAL" and not PLAIN_GLOBALS.fullmatch(argument):
            found[argument.replace(" ", ".")] = None
        elif container is None and argument in CONTAINERS and argument != "module":  # a word of old archives too
            container = argument
    if found:
        names = list(found)
        weights = f"checkpoint[{container!r}]" if container else "checkpoint.state_dict()"
        raise UserError(f"{path}: not a checkpoint of tensors and plain values alone; it holds {', '.join(names[:SHOWN])}"
                        f"{', ...' if len(names) > SHOWN else ''}. Reading that could run code; where you trust the file, "
                        f"save its weights alone: checkpoint = torch.load({os.path.basename(path)!r}, weights_only=False); "
                        f"torch.save({weights}, 'weights.pth')")


def check_values(content, size):
    """Refuse what is nested without end, and tensors that claim more than the file's bytes or are of another kind.

    Args:
        content: what torch read. Written out without aliases, it has to stay small: whoever reads it may do so.
        size: of the file, in bytes.
    """
    known = {}

    def visit(value):
        """(number of values, levels of containers) of a value written out."""
        if isinstance(value, torch.Tensor):
            check_tensor(value, size)
        if isinstance(value, int) and value.bit_length() > MAX_NUMBER_BITS:
            raise ValueError(f"a number of {value.bit_length()} bits")
        if not isinstance(value, (dict, list, tuple, set)):
            return 1, 0
        if id(value) not in known:
            known[id(value)] = math.inf, math.inf  # while it is visited: what contains itself has no end
            count, levels = 1, 0
            for inner in itertools.chain(value, value.values()) if isinstance(value, dict) else value:
                inside, below = visit(inner)
                count, levels = count + inside, max(levels, below)
            if count > MOST_VALUES or levels >= MOST_LEVELS:
                raise ValueError("it is nested too deeply, or in itself")
            known[id(value)] = count, levels + 1
        return known[id(value)]

    visit(content)


def check_tensor(tensor, size):
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_quantized \
            or tensor.is_complex() or tensor.device.type != "cpu":
        raise pickle.UnpicklingError("a tensor of another kind")
    stored = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > stored or stored > size:
        raise ValueError("a tensor is larger than what the file holds of it")
