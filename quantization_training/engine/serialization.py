"""The bytes of a checkpoint: torch's archive with a checksum, what is looked at before torch reads one, and what each entry
may be. Everything that reads a checkpoint relies on it. Errors do not name the file; checkpoint.py does.

The checksum stands in the comment that ends a zip archive, so that whatever reads zip archives reads the file.
"""

import io
import itertools
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from functools import partial

import torch

from util.config import MAX_NUMBER_BITS, describe, other_kind
from util.errors import UserError, reason
from util.exchange import CHECKSUM, CHECKSUM_LENGTH, checksum, is_bit, without_wrappers
from util.formats import (
    SAFETENSORS_LENGTH,
    is_bool,
    is_count,
    is_name,
    is_positive,
    list_of,
    number,
    optional,
    record,
    safetensors_metadata,
    sequence,
    table_of,
    whole,
)

ZIP_BEGINNING, ZIP_ENDING = b"PK\3\4", b"PK\5\6"
ENDING_LENGTH = 22  # of a zip archive without a comment; the last two bytes give the length of the comment
NO_COMMENT, OUR_COMMENT = (0).to_bytes(2, "little"), CHECKSUM_LENGTH.to_bytes(2, "little")
MOST_VALUES, MOST_LEVELS = 3_000_000, 50
LEGACY_PICKLES = 5  # that a file from before torch 1.6 begins with
PACKED = "limpqp"  # the entry of the metadata of safetensors which marks a packed model
SHOWN = 3
PLAIN_GLOBALS = re.compile(r"collections (OrderedDict|Counter)|(__builtin__|builtins) set|_codecs encode|torch (Size|device)|"
                           r"torch \w+Storage|torch\.nn\.parameter Parameter|torch\._tensor _rebuild_from_type_v2|"
                           r"torch (float|bfloat|int|uint)\d+|torch bool|"
                           r"torch\._utils _rebuild_(tensor|tensor_v2|parameter|parameter_with_state)")
PLAIN = (str, int, float, bool, type(None))
# Under which names programs keep weights in a checkpoint; what comes first is taken.
CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "module", "state_dict_ema",
              "model_ema", "ema_state_dict", "ema", "params_ema")
NO_WEIGHTS = ("optim", "sched", "scaler", "amp", "loss", "criterion", "args", "config", "hyper", "rng", "random", "mask")
LEVELS = 3  # of containers around weights
OURS = frozenset({"version", "arch", "state_dict", "config", "random_states"})  # in every checkpoint that this project wrote


def pack(content):
    """The bytes of a checkpoint, with their checksum."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    comment = checksum(buffer.getbuffer())
    buffer.seek(-len(NO_COMMENT), os.SEEK_END)
    buffer.write(OUR_COMMENT + comment)
    return buffer.getbuffer()


def unpack(data, name):
    """(what the bytes of a checkpoint, or of safetensors, hold, on the CPU; whether they carry a checksum). No code in them is
    run; what is more than tensors and plain containers is refused. `name` of the file stands in advice."""
    if kind := other_kind(data, "a checkpoint", "a packed model", "a safetensors file"):
        raise UserError(f"is {kind}, not a checkpoint")
    has_checksum = check_ending(data)
    try:
        is_safetensors = data[SAFETENSORS_LENGTH:SAFETENSORS_LENGTH + 1] == b"{"
        content = _safetensors(data) if is_safetensors else _torch_archive(data, name)
        check_values(content, len(data))
    except UserError:
        raise
    except pickle.UnpicklingError:
        raise UserError("not a checkpoint, or one that holds more than tensors and plain containers") from None
    except Exception as error:  # a damaged archive meets the reader with exceptions of many types
        raise UserError(f"damaged or not a checkpoint ({reason(error)[:100]})") from None
    return content, has_checksum


def _torch_archive(data, name):
    for stream in pickles(data):
        check_globals(stream, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _safetensors(data):
    from safetensors.torch import load

    if PACKED in safetensors_metadata(data):
        raise UserError("is a packed model, whose weights are integers; name the checkpoint that it was packed from")
    return load(bytes(data))


def check_ending(data):
    """Whether the bytes end in a checksum; refused are one that does not fit, and an archive that ends in anything else."""
    start = max(0, len(data) - CHECKSUM_LENGTH)
    if data.startswith(CHECKSUM, start):
        with memoryview(data) as view:
            found, length, whole = view[start:], view[:start][-2:], view[:start][:-2]
            if length != OUR_COMMENT or found != checksum(whole, NO_COMMENT):
                raise UserError("damaged (its checksum does not fit); use an earlier checkpoint")
        return True
    is_whole = data[-ENDING_LENGTH:].startswith(ZIP_ENDING) and data.endswith(NO_COMMENT)
    if data.startswith(ZIP_BEGINNING) and not is_whole:
        raise UserError("damaged or not a checkpoint (its end is missing); use an earlier checkpoint")
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


def check_globals(stream, name):
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
        weights = f"checkpoint[{container!r}]" if container else "checkpoint.state_dict()"
        raise UserError(f"not a checkpoint of tensors and plain values alone; it holds {', '.join(list(found)[:SHOWN])}"
                        f"{', ...' if len(found) > SHOWN else ''}. Reading that could run code; where you trust the file, "
                        f"save its weights alone: checkpoint = torch.load({name!r}, weights_only=False); "
                        f"torch.save({weights}, 'weights.pth')")


def check_values(content, size):
    """Refuse what is nested without end, or large when it is written out without aliases, as whoever reads it may do, and
    tensors that claim more than the `size` of the file in bytes or are of another kind."""
    counted = itertools.count(1)

    def visit(value, level):
        if next(counted) > MOST_VALUES or level > MOST_LEVELS:
            raise ValueError("it is nested too deeply, or in itself")
        if isinstance(value, torch.Tensor):
            check_tensor(value, size)
        elif isinstance(value, int) and value.bit_length() > MAX_NUMBER_BITS:
            raise ValueError(f"a number of {value.bit_length()} bits")
        elif isinstance(value, (dict, list, tuple, set)):
            for inner in itertools.chain(value, value.values()) if isinstance(value, dict) else value:
                visit(inner, level + 1)

    visit(content, 0)


def check_tensor(tensor, size):
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_quantized \
            or tensor.is_complex() or tensor.device.type != "cpu":
        raise pickle.UnpicklingError("a tensor of another kind")
    stored = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > stored or stored > size:
        raise ValueError("a tensor is larger than what the file holds of it")


def is_plain(value):
    """Whether a value is made of just these types; classes that are derived from them bring their class along."""
    if type(value) is dict:
        return all(type(key) in PLAIN and is_plain(element) for key, element in value.items())
    return all(map(is_plain, value)) if type(value) in (list, tuple) else type(value) in PLAIN


def is_dict(value):
    return isinstance(value, dict)


def _are_candidates(value):
    return list_of(partial(is_bit, "weight_bits"))(value) and len(set(value)) == len(value)


def _are_taylor_sums(value):
    """One tensor for each process, all of one shape."""
    return (list_of(torch.is_tensor)(value) and len({each.shape for each in value}) == 1
            and all(each.dtype == torch.float64 and each.dim() == 3 and each.shape[2] == 3 for each in value))


def _is_torch_state(value):
    return torch.is_tensor(value) and value.dtype == torch.uint8 and value.dim() == 1


def _is_float(value):
    return type(value) is float


# The words of a Mersenne twister, and the position in them; Python keeps them in one list.
WORDS, POSITION = [whole(2**32 - 1)] * 624, whole(624)
AMOUNT, PERCENT = number(0), number(-1, 100)  # -1: none yet
LAYERS = table_of(record({}, {"signed": optional(record({"weight": is_bool, "act": is_bool}))}, others=is_plain))
ENTRIES = {
    "version": is_count, "epoch": is_count, "level": is_count, "arch": is_name, "wandb_id": optional(is_name),
    "config": lambda value: is_dict(value) and is_plain(value), "extras": is_dict, "optimizer": is_dict,
    "bits": _are_candidates, "weight_bits": table_of(partial(is_bit, "weight_bits")),
    "act_bits": table_of(partial(is_bit, "act_bits")), "signed": table_of(is_bool), "layers": LAYERS, "fixed": LAYERS,
    "products": table_of(is_count), "scaled": list_of(is_name), "batchnorms": table_of(optional(is_name)), "masks": is_dict,
    "initial_sparsity": number(0, 1), "num_classes": is_positive, "input_size": is_positive}
ENTRIES_OF_A_RUN = {
    "extras": record({}, {"top1": PERCENT, "top5": PERCENT}, others=lambda value: True),
    "optimizer": record({
        "state": table_of(table_of(lambda value: torch.is_tensor(value) or is_plain(value)), is_key=is_count),
        "param_groups": list_of(record(
            {"params": list_of(is_count)},
            dict.fromkeys(("lr", "momentum", "dampening", "weight_decay", "eps"), AMOUNT), others=is_plain))}),
    "random_states": list_of(record({  # one for each process; numpy and Python take what they are given unseen
        "torch": _is_torch_state,
        "python": sequence(is_count, sequence(*WORDS, POSITION), optional(_is_float)),
        "numpy": sequence(is_name, sequence(*WORDS), POSITION, whole(1), _is_float)}, {"cuda": _is_torch_state})),
    "inside": record({  # as training_state.MidEpochState has it
        "step": is_count, "seconds": AMOUNT, "images_per_step": is_positive, "is_trained": is_bool,
        "sums": list_of(list_of(lambda value: torch.is_tensor(value) and value.shape == (4,))),
        "batchnorms": list_of(table_of(torch.is_tensor))}),
    "taylor": record({"images": is_positive, "sums": _are_taylor_sums}),
    "machine": table_of(lambda value: is_count(value) or is_name(value))}


def check_entries(content):
    """Refuse a checkpoint, a dict with a dict under 'state_dict', with an entry that is not what it has to be."""
    weights = content["state_dict"]
    if not table_of(torch.is_tensor)(weights):
        raise UserError("state_dict: expected names and tensors only")
    expected = ENTRIES | (ENTRIES_OF_A_RUN if "config" in content else {})
    for key, fits in expected.items():
        if key in content and not fits(content[key]):
            raise UserError(f"{key}: found {describe(content[key])}, not what a checkpoint holds there")
    if "config" in content and "optimizer" in content:
        shapes = {(), *(tensor.shape for tensor in weights.values())}
        kept = [value for entry in content["optimizer"]["state"].values() for value in entry.values()]
        if any(torch.is_tensor(value) and value.shape not in shapes for value in kept):
            raise UserError("optimizer: holds a state of another shape than the weights")
    if ("weight_bits" in content) != ("act_bits" in content):
        raise UserError("weight_bits, act_bits: found one without the other")


def is_ours(content):
    """Whether a checkpoint, though it carries no checksum, was written by this project, by the entries it has."""
    return isinstance(content, dict) and content.keys() >= OURS and type(content["version"]) is int


def from_external(content):
    """A checkpoint of another program as one of ours: its weights, and of its other entries those that are what ours are.
    One without weights, or with several sets of them and none under a usual name, is refused."""
    weights = _find_weights(content)
    kept = {key: content[key] for key, fits in ENTRIES.items()
            if key in content and key not in ("version", "config") and fits(content[key])}
    if not kept.keys() >= {"weight_bits", "act_bits"}:
        kept = {key: value for key, value in kept.items() if key not in ("weight_bits", "act_bits")}
    if not all(name in weights for name in kept.get("masks", {})):
        del kept["masks"]
    return {**kept, "state_dict": dict(zip(without_wrappers(weights), weights.values(), strict=True))}


def _find_weights(content):
    """{name: tensor} inside what a file holds."""
    for _ in range(LEVELS):
        if not isinstance(content, dict):
            break
        tensors = {str(name): value for name, value in content.items() if torch.is_tensor(value)}
        inner = {name: value for name, value in content.items() if isinstance(value, dict)
                 and not str(name).lower().startswith(NO_WEIGHTS) and _count_tensors(value) >= max(len(tensors), 1)}
        usual = [name for name in CONTAINERS if name in inner]
        if not inner and tensors:
            return tensors
        if not usual and len(inner) > 1:
            raise UserError(f"holds several sets of weights ({', '.join(map(str, list(inner)[:5]))}); save one alone: "
                            f"torch.save(checkpoint[{next(iter(inner))!r}], 'weights.pth')")
        if not inner:
            break
        content = inner[usual[0] if usual else next(iter(inner))]
    held = f"; it holds {', '.join(map(str, list(content)[:5]))}" if isinstance(content, dict) and content else ""
    raise UserError(f"not a checkpoint (it has no state_dict with tensors{held})")


def _count_tensors(value, levels=LEVELS):
    """The number of tensors in nested dicts."""
    return sum(_count_tensors(element, levels - 1) if isinstance(element, dict) and levels > 1 else torch.is_tensor(element)
               for element in value.values())
