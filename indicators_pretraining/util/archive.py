"""A checkpoint as bytes: torch's archive with a checksum, and what is looked at before torch reads one.

The checksum stands in the comment that ends a zip archive, so that whatever reads zip archives reads the file.
"""

import io
import os
import pickle
import pickletools
import re
import warnings
import zipfile

import torch

from util.errors import UserError, reason
from util.exchange import CHECKSUM, CHECKSUM_LENGTH, checksum

ZIP_BEGINNING, ZIP_ENDING = b"PK\3\4", b"PK\5\6"
ENDING_LENGTH = 22  # of a zip archive without a comment; the last two bytes give the length of the comment
NO_COMMENT, OUR_COMMENT = (0).to_bytes(2, "little"), CHECKSUM_LENGTH.to_bytes(2, "little")
LEGACY_PICKLES = 5  # that a file from before torch 1.6 begins with
PLAIN_GLOBALS = re.compile(r"collections (OrderedDict|Counter)|(__builtin__|builtins) set|_codecs encode|torch (Size|device)|"
                           r"torch \w+Storage|torch\.nn\.parameter Parameter|torch\._tensor _rebuild_from_type_v2|"
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

    Raises:
        UserError: naming the file, on damage and on what is more than tensors and plain containers.
    """
    has_checksum = check_ending(data, path)
    try:
        for stream in pickles(data):
            check_globals(stream)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        check_tensors(content, len(data))
    except pickle.UnpicklingError:
        raise UserError(f"{path}: not a checkpoint, or one that holds more than tensors and plain containers") from None
    except Exception as error:  # a damaged archive meets the reader with exceptions of many types
        raise UserError(f"{path}: damaged or not a checkpoint ({reason(error)[:100]})") from None
    return content, has_checksum


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


def check_globals(stream):
    """Refuse a pickle that names more than is needed for tensors and plain containers.

    torch runs no code from a file, but would let one take any amount of memory, as by bytearray(10**12).
    """
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name == "GLOBAL" and not PLAIN_GLOBALS.fullmatch(argument):
            raise pickle.UnpicklingError(argument)


def check_tensors(content, size):
    """Refuse what is nested without end, what is no plain value, and tensors that claim more than the file's bytes.

    Args:
        content: what torch read.
        size: of the file, in bytes.
    """
    for value in values_in(content):
        if isinstance(value, torch.Tensor):
            if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout != torch.strided or value.is_quantized \
                    or value.is_complex() or value.device.type != "cpu":
                raise pickle.UnpicklingError("a tensor of another kind")
            stored = value.untyped_storage().nbytes()
            if value.numel() * value.element_size() > stored or stored > size:
                raise ValueError("a tensor is larger than what the file holds of it")


def values_in(content, deepest=50, most=3_000_000):
    """Every value inside plain containers, one after the other."""
    waiting, count = [(content, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if depth > deepest or count > most:
            raise ValueError("it is nested too deeply, or in itself")
        if isinstance(value, dict):
            waiting.extend((inner, depth + 1) for pair in value.items() for inner in pair)
        elif isinstance(value, (list, tuple, set)):
            waiting.extend((inner, depth + 1) for inner in value)
        yield value
