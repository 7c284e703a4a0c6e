"""What each entry of a checkpoint may be. Everything that reads a checkpoint relies on it."""

import torch

from util.config import describe
from util.errors import UserError
from util.exchange import is_bit, is_bool, is_count, is_name, is_table, without_wrappers

PLAIN = (str, int, float, bool, type(None))
NUMBERS_OF_OPTIMIZERS = ("lr", "momentum", "dampening", "weight_decay", "eps")
UNSIGNED = range(2**32)
# Under which names programs keep weights in a checkpoint; what comes first is taken.
CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "module", "state_dict_ema",
              "model_ema", "ema_state_dict", "ema", "params_ema")
NO_WEIGHTS = ("optim", "sched", "scaler", "amp", "loss", "criterion", "args", "config", "hyper", "rng", "random", "mask")
LEVELS = 3  # of containers around weights
OURS = frozenset({"version", "arch", "state_dict", "config", "random_states"})  # in every checkpoint that this project wrote
NUMPY_STATE, PYTHON_STATE = 624, 625  # words of a Mersenne twister, and those with its position


def check_entries(content, path):
    """Refuse a checkpoint with an entry that is not what it has to be.

    Args:
        content: a dict with a dict under 'state_dict'.
        path: for messages.

    Raises:
        UserError: naming the file and the entry.
    """
    if not is_table(content["state_dict"], torch.is_tensor):
        raise UserError(f"{path}: state_dict: expected names and tensors only")
    expected = ENTRIES | (ENTRIES_OF_A_RUN if "config" in content else {})
    for key, fits in expected.items():
        if key in content and not fits(content[key]):
            raise UserError(f"{path}: {key}: found {describe(content[key])}, not what a checkpoint holds there")
    if "config" in content and not _fits_weights(content.get("optimizer", {}), content["state_dict"]):
        raise UserError(f"{path}: optimizer: holds a state of another shape than the weights")
    if ("weight_bits" in content) != ("act_bits" in content):
        raise UserError(f"{path}: weight_bits, act_bits: found one without the other")


def is_ours(content):
    """Whether a checkpoint, though it carries no checksum, was written by this project, by the entries it has."""
    return isinstance(content, dict) and content.keys() >= OURS and type(content["version"]) is int


def from_external(content, path):
    """A checkpoint of another program as one of ours: its weights, and of its other entries those that are what ours are.

    Raises:
        UserError: naming the file, where it holds no weights, or several sets of them and none under a usual name.
    """
    weights = _find_weights(content, path)
    kept = {key: content[key] for key, fits in ENTRIES.items()
            if key in content and key not in ("version", "config") and fits(content[key])}
    if not kept.keys() >= {"weight_bits", "act_bits"}:
        kept = {key: value for key, value in kept.items() if key not in ("weight_bits", "act_bits")}
    if not all(name in weights for name in kept.get("masks", {})):
        del kept["masks"]
    return {**kept, "state_dict": dict(zip(without_wrappers(weights), weights.values(), strict=True))}


def _find_weights(content, path):
    """{name: tensor} inside what a file holds."""
    for _ in range(LEVELS):
        if not isinstance(content, dict):
            break
        tensors = {name: value for name, value in content.items() if torch.is_tensor(value)}
        inner = {name: value for name, value in content.items() if isinstance(value, dict)
                 and not str(name).lower().startswith(NO_WEIGHTS) and _count_tensors(value) >= max(len(tensors), 1)}
        usual = [name for name in CONTAINERS if name in inner]
        if not inner and tensors:
            return {str(name): tensor for name, tensor in tensors.items()}
        if not usual and len(inner) > 1:
            raise UserError(f"{path}: holds several sets of weights ({', '.join(map(str, list(inner)[:5]))}); save one alone: "
                            f"torch.save(checkpoint[{next(iter(inner))!r}], 'weights.pth')")
        if not inner:
            break
        content = inner[usual[0] if usual else next(iter(inner))]
    held = f"; it holds {', '.join(map(str, list(content)[:5]))}" if isinstance(content, dict) and content else ""
    raise UserError(f"{path}: not a checkpoint (it has no state_dict with tensors{held})")


def _count_tensors(value, levels=LEVELS):
    """The number of tensors in nested dicts."""
    return sum(_count_tensors(element, levels - 1) if isinstance(element, dict) and levels > 1 else torch.is_tensor(element)
               for element in value.values())


def _is_number(value, low, high):
    return type(value) in (int, float) and low <= value <= high


def _is_bit(value):
    return type(value) is int and 2 <= value <= 8


def _is_plain(value):
    """Whether a value is made of just these types; classes that are derived from them bring their class along."""
    if type(value) is dict:
        return all(type(key) in PLAIN and _is_plain(element) for key, element in value.items())
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return type(value) in PLAIN


def _is_list_of_bits(value):
    return isinstance(value, list) and all(map(_is_bit, value)) and len(set(value)) == len(value)


def _is_row(value):
    """A row of the layer table: plain values, and signs where it has any."""
    if not isinstance(value, dict) or not _is_plain(value):
        return False
    signed = value.get("signed")
    return signed is None or (is_table(signed, is_bool) and signed.keys() == {"weight", "act"})


def _are_scores(value):
    return isinstance(value, dict) and all(_is_number(value[key], -1, 100) for key in ("top1", "top5") if key in value)


def _is_optimizer(value):
    return (isinstance(value, dict) and isinstance(value.get("state"), dict) and isinstance(value.get("param_groups"), list)
            and all(is_count(index) and is_table(entry, lambda part: torch.is_tensor(part) or _is_plain(part))
                    for index, entry in value["state"].items())
            and all(map(_is_group, value["param_groups"])))


def _is_group(value):
    return (isinstance(value, dict) and is_table(value, _is_plain) and isinstance(value.get("params"), list)
            and all(map(is_count, value["params"]))
            and all(_is_number(value[key], 0, float("inf")) for key in NUMBERS_OF_OPTIMIZERS if key in value))


def _fits_weights(optimizer, weights):
    shapes = {(), *(tensor.shape for tensor in weights.values())}
    return all(part.shape in shapes for entry in optimizer.get("state", {}).values() for part in entry.values()
               if torch.is_tensor(part))


def _are_random_states(value):
    return isinstance(value, list) and all(map(_is_random_state, value))


def _is_random_state(value):
    """The generators of one process. numpy and Python take what they are given unseen."""
    return (isinstance(value, dict) and value.keys() - {"cuda"} == {"torch", "python", "numpy"}
            and all(torch.is_tensor(value[key]) and value[key].dtype == torch.uint8 and value[key].dim() == 1
                    for key in ("torch", "cuda") if key in value)
            and _is_python_state(value["python"]) and _is_numpy_state(value["numpy"]))


def _is_python_state(value):
    return (isinstance(value, list) and len(value) == 3 and is_count(value[0]) and _are_words(value[1], PYTHON_STATE)
            and value[1][-1] <= NUMPY_STATE and (value[2] is None or type(value[2]) is float))


def _is_numpy_state(value):
    return (isinstance(value, list) and len(value) == 5 and is_name(value[0]) and _are_words(value[1], NUMPY_STATE)
            and all(map(is_count, value[2:4])) and value[2] <= NUMPY_STATE and value[3] <= 1 and type(value[4]) is float)


def _is_place(value):
    """A place inside an epoch, as engine.training_state.MidEpochState has it."""
    return (isinstance(value, dict)
            and value.keys() == {"step", "seconds", "images_per_step", "is_trained", "sums", "batchnorms"}
            and is_count(value["step"]) and is_count(value["images_per_step"]) and value["images_per_step"] > 0
            and _is_number(value["seconds"], 0, float("inf")) and is_bool(value["is_trained"])
            and isinstance(value["sums"], list) and all(map(_are_sums, value["sums"]))
            and isinstance(value["batchnorms"], list)
            and all(is_table(statistics, torch.is_tensor) for statistics in value["batchnorms"]))


def _are_sums(value):
    return isinstance(value, list) and all(torch.is_tensor(sums) and sums.shape == (4,) for sums in value)


def _are_words(value, count):
    return isinstance(value, list) and len(value) == count and all(type(word) is int and word in UNSIGNED for word in value)


ENTRIES = {
    "version": is_count, "epoch": is_count, "level": is_count, "arch": is_name,
    "wandb_id": lambda value: value is None or is_name(value),
    "config": lambda value: isinstance(value, dict) and _is_plain(value),
    "extras": lambda value: isinstance(value, dict), "optimizer": lambda value: isinstance(value, dict),
    "bits": _is_list_of_bits,
    **{key: lambda value, key=key: is_table(value, lambda bit: is_bit(key, bit)) for key in ("weight_bits", "act_bits")},
    "signed": lambda value: is_table(value, is_bool), "layers": lambda value: is_table(value, _is_row),
    "fixed": lambda value: is_table(value, _is_row), "products": lambda value: is_table(value, is_count),
    "scaled": lambda value: isinstance(value, list) and all(map(is_name, value)),
    "batchnorms": lambda value: is_table(value, lambda name: name is None or is_name(name)),
    "masks": lambda value: isinstance(value, dict), "initial_sparsity": lambda value: _is_number(value, 0, 1),
    "num_classes": lambda value: is_count(value) and value > 0, "input_size": lambda value: is_count(value) and value > 0}
ENTRIES_OF_A_RUN = {"extras": _are_scores, "optimizer": _is_optimizer, "random_states": _are_random_states,
                    "inside": _is_place,
                    "machine": lambda value: is_table(value, lambda entry: is_count(entry) or is_name(entry))}
