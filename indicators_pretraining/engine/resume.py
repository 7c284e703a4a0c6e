"""Resuming: what may differ from the run that wrote a checkpoint, and how its state is restored."""

from dataclasses import dataclass, replace
from functools import partial

from model.model import create_traced
from model.weights import is_step, load_state, load_weights
from util import distributed
from util.config import AUTO, differing_keys, to_plain, with_defaults
from util.errors import UserError, advising, naming
from util.exchange import same_arch

from .checkpoint import is_foreign, load_checkpoint, masks_of, may_lack, signedness_of
from .limpq import continue_limpq_run
from .run_folder import find_checkpoint
from .training_state import ResumeState, load_training_state

HARMLESS_KEYS = ("name", "output_dir", "gpu", "training_device", "eval", "eval_calibration", "final_test", "threads",
                 "kernels", "cuda_graphs", "compile", "keep_freed_memory", "arithmetic", "dataloader.workers",
                 "dataloader.path", "dataloader.serialized")
HARMLESS_SECTIONS = ("resume.", "log.", "wandb.")
SCHEDULE_KEYS = ("epochs", "cooldown_epochs")
TRAIN_FIRST = "train the network in full precision first, by main.py of quantization_training with fp_model: true"
MODEL_KEYS = ("sat", "quan.")
IDLE_MODEL_KEYS = ("quan.weight.init", "quan.act.init", "quan.weight.bit", "quan.act.bit")


@dataclass(frozen=True)
class ResumeCheckpoint:
    """A checkpoint that a run starts from: its path, its content, and whether only its weights are taken."""

    path: str
    content: dict
    lean: bool


def find_run(config, folder, read=load_checkpoint):
    """The ResumeCheckpoint that resume.path stands for, found and read by rank 0; None where a run starts afresh."""
    path, lean = distributed.on_main(find_checkpoint, config, folder)
    if path is None:
        return None
    with naming("resume.path" if path == config.resume.path else ""):
        content = distributed.on_main(read, path)
        check_arch(content, config.arch, path)
        if config.eval:
            check_same_quantizers(content, config, path)
    return ResumeCheckpoint(path, content, lean)


def check_arch(checkpoint, arch, path):
    """Refuse a checkpoint that says it is one of another network. Other programs call networks otherwise; of theirs, names
    and shapes of tensors decide."""
    if not is_foreign(checkpoint) and not same_arch(checkpoint.get("arch", arch), arch):
        raise UserError(f"{path}: holds {checkpoint['arch']}, but arch is {arch}")


def create_dense(arch, num_classes, input_size, pre_trained=False, init_from=None, found=None):
    """(the full-precision network that a run starts from, its Graph, its pruning masks).

    Args:
        pre_trained: False, True (torchvision's weights) or the path of a checkpoint, whose classifier may have other classes.
        init_from: the path of a checkpoint of this very network, or None.
        found: the ResumeCheckpoint that is going to be loaded into it, or None; only its masks are taken here.
    """
    source, key = found is None and (init_from or pre_trained), "init_from" if init_from else "pre_trained"
    if not isinstance(source, str):
        model, graph = create_traced(arch, num_classes, source, input_size)
        return model, graph, masks_of(found.content, model, found.path) if found else {}
    model, graph = create_traced(arch, num_classes, False, input_size)
    with naming(key):
        with advising(source, TRAIN_FIRST):
            content = load_checkpoint(source)
        if init_from:
            check_arch(content, arch, source)
        if not load_weights(model, content["state_dict"], source, graph.heads) and init_from:
            raise UserError(f"{source}: has another number of classes than the data ({num_classes}), which pre_trained allows")
        return model, graph, masks_of(content, model, source)


def decided_keys(config):
    """Keys that say nothing of a network whose checkpoint says what was decided."""
    return ("quan.act.all_positive",) if config.quan.act.all_positive == AUTO else ()


def check_same_quantizers(checkpoint, config, path):
    """Refuse to evaluate a quantized checkpoint with other quantizers than it was trained with. Exceptions that are still to
    be found in the graph are compared once they are."""
    if "config" not in checkpoint or not any(map(is_step, checkpoint["state_dict"])):
        return
    unknown = (("quan.excepts",) if config.quan.excepts == AUTO else ()) + decided_keys(config)
    keys = [key for key in differing_keys(checkpoint["config"], to_plain(config))
            if key.startswith(MODEL_KEYS) and key not in IDLE_MODEL_KEYS and not key.startswith(unknown)]
    if keys:
        raise UserError(f"{path}: was trained with another {', '.join(keys)}; put these back")


def warn_of_signedness(checkpoint, config, path):
    """Say that inputs count as not negative where neither checkpoint nor configuration says so, and no training will show."""
    if (decided_keys(config) and is_foreign(checkpoint) and not signedness_of(checkpoint)
            and any(map(is_step, checkpoint["state_dict"])) and distributed.is_main()):
        print(f"warning: {path}: does not say which inputs are signed; they are taken as all positive. If they were trained "
              "as signed, give quan.act.all_positive: false")


def restore(found, model, optimizer, config, harmless=(), schedule_may_change=True):
    """Load a checkpoint, if there is one, into a model; unless only its weights are taken, continue its run, where
    check_continues allows that. Return the ResumeState."""
    if found is None:
        return ResumeState()
    content, path = found.content, found.path
    if found.lean:
        if config.eval:
            check_same_quantizers(content, config, path)
            warn_of_signedness(content, config, path)
        load_state(model, content["state_dict"], path, partial(may_lack, content))
        return ResumeState()
    if is_foreign(content):
        return continue_limpq_run(content, model, optimizer, path)
    changed = check_continues(content, config, path, harmless, schedule_may_change)
    start = load_training_state(content, model, optimizer, path)
    return replace(start, changed=(*changed, *start.changed))


def recorded_threads(found):
    """The number of threads that a run was computed with; None where it starts afresh or does not say."""
    threads = found.content.get("machine", {}).get("threads") if found and not found.lean else None
    return threads if type(threads) is int and threads > 0 else None


def check_continues(checkpoint, config, path, harmless=(), schedule_may_change=True):
    """Refuse to continue a run whose configuration differs in what matters; return the schedule keys that differ, where they
    may: the continued run then does not equal an undisturbed one. `harmless` are keys, or beginnings of keys, that may differ
    besides those that always may."""
    if "config" not in checkpoint or "epoch" not in checkpoint:
        raise UserError(f"{path}: holds no run to continue; set resume.lean to take its weights only")
    earlier = checkpoint["config"]
    idle = ("quan.",) if config.fp_model and earlier.get("fp_model") is True else decided_keys(config)
    keys = [key for key in differing_keys(with_defaults(earlier, type(config)), to_plain(config))
            if key not in HARMLESS_KEYS and not key.startswith((*HARMLESS_SECTIONS, *harmless, *idle))
            and not (key == "arch" and same_arch(earlier.get("arch"), config.arch))]
    serious = [key for key in keys if not schedule_may_change or key not in SCHEDULE_KEYS]
    if serious:
        raise UserError(f"{path}: the run was started with another {', '.join(serious)}; "
                        "put these back, or start a new run under another name")
    return keys
