"""Checkpoints and the run folder: what a run leaves on disk, and how it is found again."""

import contextlib
import os
import re
import shutil
from dataclasses import dataclass, replace
from functools import partial

import torch
import yaml

from model.masks import checked_masks
from model.weights import fit, is_step, load_state
from quan.quantizer import kernel
from util import distributed, interruption
from util.archive import pack, unpack
from util.config import AUTO, differing_keys, flatten, read_yaml, to_plain
from util.entries import check_entries, from_elsewhere, is_ours
from util.errors import UserError, reason
from util.exchange import fit_names, same_arch, write_atomically

FORMAT_VERSION = 2
BEST, LAST = "_best.pth.tar", "_checkpoint.pth.tar"
KINDS = {BEST: "the best on validation", LAST: "the last"}
OTHER_FILE = re.compile(r"(epoch|level)_\d+_checkpoint\.pth\.tar$")
FIRST_WITH_CHECKSUM = 2
HARMLESS_KEYS = ("name", "output_dir", "gpu", "training_device", "eval", "eval_calibration", "final_test", "threads",
                 "kernels", "dataloader.workers", "dataloader.path", "dataloader.serialized")
HARMLESS_SECTIONS = ("resume.", "log.", "wandb.")
SCHEDULE_KEYS = ("epochs", "cooldown_epochs")
# What checkpoints from before a key was there were trained with; a stage that lacks a key passes over it.
NEW_KEYS = {"precision": "fp32", "compile": False, "random_pass": True, "lr_per": "step"}
PLAIN_MOMENTUM = "this run began when opt: sgd stood for plain momentum, and goes on with it; opt: momentum says the same"
MOMENTA = {torch.optim.SGD: {"momentum_buffer"}, **dict.fromkeys((torch.optim.Adam, torch.optim.AdamW),
                                                                 {"step", "exp_avg", "exp_avg_sq"})}  # by parameter
MODEL_KEYS = ("sat", "quan.")
IDLE_MODEL_KEYS = ("quan.weight.init", "quan.act.init", "quan.weight.bit", "quan.act.bit")


def save_checkpoint(path, checkpoint):
    """Write a checkpoint (tensors and plain containers) so that a whole file lies at `path` at every moment."""
    write_atomically(path, pack({"version": FORMAT_VERSION, **checkpoint}))


def load_checkpoint(path):
    """Read a checkpoint onto the CPU. No code in the file is run.

    Returns:
        the dict in the file, where this project wrote it. Of any other file that holds weights, {'state_dict': ...} and those
        entries that are what ours are, without 'version'; its names lose the wrappers that all of them have.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe or a device may have no end
        raise UserError(f"{path}: cannot read the checkpoint (not a regular file)")
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot read the checkpoint ({error.strerror})") from None
    content, has_checksum = unpack(data, path)
    if not has_checksum and not is_ours(content):
        content = from_elsewhere(content, path)
    elif not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"{path}: not a checkpoint (it has no state_dict)")
    check_plain(content, path)
    if content.get("version", 0) >= FIRST_WITH_CHECKSUM and not has_checksum:
        raise UserError(f"{path}: damaged (its checksum is missing); use an earlier checkpoint")
    return content


def is_foreign(content):
    """Whether a checkpoint, as load_checkpoint gives it, was written by another program, such as LIMPQ."""
    return "version" not in content and "packed" not in content


def may_lack(content, name):
    """Whether the checkpoint of another program may lack the tensor of a name: what counts or marks, but computes nothing."""
    return is_foreign(content) and name.endswith((".num_batches_tracked", ".init_state"))


def check_plain(content, path):
    """Refuse a checkpoint whose entries are not of the types that they have to be."""
    check_entries(content, path)
    if content.get("version", 0) > FORMAT_VERSION:
        raise UserError(f"{path}: written by a newer version of this project (format {content['version']})")


@dataclass(frozen=True)
class RunFolder:
    """`<output_dir>/<name>/` and the files in it."""

    path: str
    name: str

    @classmethod
    def of(cls, config):
        return cls(os.path.join(config.output_dir, config.name), config.name)

    @property
    def last(self):
        return os.path.join(self.path, self.name + LAST)

    @property
    def best(self):
        return os.path.join(self.path, self.name + BEST)

    @property
    def summary(self):
        return os.path.join(self.path, "summary.yaml")

    def summarise(self, facts):
        """Write summary.yaml, the results of a finished run, from plain values."""
        write_atomically(self.summary, yaml.safe_dump(facts, sort_keys=False).encode())

    def epoch(self, number):
        return os.path.join(self.path, f"{self.name}_epoch_{number}_checkpoint.pth.tar")

    def save(self, checkpoint, is_best, keep=1):
        """Write the newest checkpoint, and the best one where this is it.

        Args:
            keep: of how many epochs the checkpoints stay; with more than one, each has a file of its own too.
        """
        if is_best:  # first: a run that ends in between comes to this epoch again
            save_checkpoint(self.best, checkpoint)
        save_checkpoint(self.last, checkpoint)
        if "inside" not in checkpoint:
            self._keep(checkpoint["epoch"], keep)

    def _keep(self, epoch, keep):
        """Give the newest epoch's checkpoint a file of its own, and remove those of epochs that are too long ago."""
        if keep > 1:
            copy_file(self.last, self.epoch(epoch))
        pattern = re.compile(re.escape(self.name) + r"_epoch_(\d+)_checkpoint\.pth\.tar")
        for name in os.listdir(self.path):
            match = pattern.fullmatch(name)
            if match and (keep == 1 or int(match[1]) <= epoch - keep):
                os.remove(os.path.join(self.path, name))


def evaluate_best(model, folder, last_epoch, evaluate_model, figures, monitor):
    """What the best checkpoint's weights reach, and their epoch; the model is left as it was.

    Args:
        evaluate_model: gives the figures of the model as it is.
        figures: those of the last epoch, which are taken where it is the best one.
        monitor: where to log that the best checkpoint cannot be read.

    Returns:
        (epoch, figures); None where no epoch counted as the best, or its checkpoint cannot be read.
    """
    try:
        content = distributed.on_main(load_checkpoint, folder.best) if distributed.on_main(os.path.exists, folder.best) else {}
        if content.get("epoch", last_epoch) == last_epoch:
            return (last_epoch, figures) if content else None
        own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        load_state(model, content["state_dict"], folder.best)
    except UserError as error:  # no reason to lose the results of the last epoch
        monitor.log(f"the best checkpoint is not evaluated: {error}")
        return None
    try:
        with interruption.put_off():
            return content["epoch"], evaluate_model()
    finally:
        model.load_state_dict(own)


def describe_evaluated(path, content):
    """A line on which checkpoint of its run is evaluated, the best or the last, and what the other one is."""
    own, epoch = _kind(path), content.get("epoch")
    if epoch is None:
        return f"{path}: a packed model" if "packed" in content else f"{path}: a checkpoint that does not say its epoch"
    if own is None:
        return f"{path}: a checkpoint after epoch {epoch}"
    other = path.removesuffix(own) + next(suffix for suffix in KINDS if suffix != own)
    try:
        there = load_checkpoint(other).get("epoch")
    except UserError:
        there = None
    if there == epoch:
        return f"{path}: {KINDS[BEST]} and {KINDS[LAST]}, epoch {epoch}"
    rest = f"; {KINDS[_kind(other)]} is {os.path.basename(other)}, epoch {there}" if there is not None else ""
    return f"{path}: {KINDS[own]}, epoch {epoch}{rest}"


def _kind(path):
    """Which of KINDS a file is by its name; None where it is neither."""
    return next((suffix for suffix in KINDS if path.endswith(suffix)), None) if not OTHER_FILE.search(path) else None


def copy_file(source, target):
    """Make `target` hold what `source` holds, whole at every moment, without using more of the disk where that can be."""
    partial = f"{target}.partial"
    with contextlib.suppress(FileNotFoundError):
        os.remove(partial)
    try:
        try:
            os.link(source, partial)
        except OSError:  # not every file system has links
            shutil.copyfile(source, partial)
        os.replace(partial, target)
    except OSError as error:
        raise UserError(f"{target}: cannot write the file ({error.strerror})") from None


def find_checkpoint(config, folder):
    """What resume.path stands for.

    `auto` is the run folder's own checkpoint, for evaluation its best one; `none` refuses a folder that holds a run. A
    path names where a run starts; where it has started from there already, it goes on from its own checkpoint. A path that
    an existing run has not started from takes it back to a checkpoint of its own folder.

    Returns:
        (path or None where a run starts afresh, whether only the weights are taken).
    """
    wanted, own = config.resume.path, os.path.exists(folder.last)
    if config.eval:
        return _find_for_evaluation(config, folder), True
    if wanted == "auto":
        return (folder.last if own else None), False
    if wanted == "none":
        if own:
            raise UserError(f"resume.path: found none, but {folder.path} holds a run; take another name, or remove it")
        return None, False
    if not own:
        return wanted, config.resume.lean
    if config.resume.lean or _has_started_from(wanted, folder):
        return folder.last, False
    if os.path.realpath(os.path.dirname(wanted)) != os.path.realpath(folder.path):
        raise UserError(f"resume.path: found {wanted}, but {folder.path} holds a run, which would be overwritten; "
                        "take another name, or auto")
    return wanted, False


def _has_started_from(wanted, folder):
    """Whether the newest checkpoint of a run was written after the run had started from a checkpoint, weights and all."""
    try:
        config = flatten(load_checkpoint(folder.last).get("config", {}))
    except UserError:  # a damaged one is a reason to go back
        return False
    return config.get("resume.path") == wanted and config.get("resume.lean") is False


def _find_for_evaluation(config, folder):
    wanted = config.resume.path
    if wanted == "none":
        raise UserError("resume.path: found none, but eval needs a checkpoint; name one")
    if wanted != "auto":
        return wanted
    found = next((path for path in (folder.best, folder.last) if os.path.exists(path)), None)
    if not found:
        raise UserError(f"resume.path: nothing to evaluate in {folder.path}; name a checkpoint")
    return found


@dataclass(frozen=True)
class Found:
    """A checkpoint that a run starts from: its path, its content, and whether only its weights are taken."""

    path: str
    content: dict
    lean: bool


def find_run(config, folder, read=load_checkpoint):
    """What resume.path names, looked for and read once, by rank 0; None where a run starts afresh.

    Args:
        read: what reads it.

    Raises:
        UserError: where there is no such checkpoint, or it is one of another network.
    """
    path, lean = distributed.on_main(find_checkpoint, config, folder)
    if path is None:
        return None
    content = distributed.on_main(read, path)
    check_arch(content, config.arch, path)
    if config.eval:
        check_same_quantizers(content, config, path)
    return Found(path, content, lean)


def check_arch(checkpoint, arch, path):
    """Refuse a checkpoint that says it is one of another network. Other programs call networks otherwise; of theirs, names
    and shapes of tensors decide."""
    if not is_foreign(checkpoint) and not same_arch(checkpoint.get("arch", arch), arch):
        raise UserError(f"{path}: holds {checkpoint['arch']}, but arch is {arch}")


def decided_keys(config):
    """Keys that say nothing of a network whose checkpoint says what was decided."""
    return ("quan.act.all_positive",) if config.quan.act.all_positive == AUTO else ()


def check_same_quantizers(checkpoint, config, path):
    """Refuse to evaluate a quantized checkpoint with other quantizers than it was trained with.

    Exceptions that are still to be found in the graph are compared once they are.
    """
    if "config" not in checkpoint or not any(name.endswith(".quan_w_fn.s") for name in checkpoint["state_dict"]):
        return
    unknown = (("quan.excepts",) if config.quan.excepts == AUTO else ()) + decided_keys(config)
    keys = [key for key in differing_keys(checkpoint["config"], to_plain(config))
            if key.startswith(MODEL_KEYS) and key not in IDLE_MODEL_KEYS and not key.startswith(unknown)]
    if keys:
        raise UserError(f"{path}: was trained with another {', '.join(keys)}; put these back")


def warn_of_signs(checkpoint, config, path):
    """Say that inputs count as not negative where neither checkpoint nor configuration says so, and no training will show."""
    if (decided_keys(config) and is_foreign(checkpoint) and not signs_of(checkpoint)
            and any(map(is_step, checkpoint["state_dict"])) and distributed.is_main()):
        print(f"warning: {path}: does not say which inputs are signed; they are taken as all positive. If they were trained "
              "as signed, give quan.act.all_positive: false")


@dataclass(frozen=True)
class Inside:
    """A place inside an epoch.

    step: of how many steps the epoch has had. seconds: spent in it. images_per_step: over all ranks. is_trained: whether
    only validation is still to come. sums: of the Metrics, on each rank; while it is this rank's own, a list of tensors.
    batchnorms: running statistics of each rank, [] for a single one.
    """

    step: int
    seconds: float
    images_per_step: int
    is_trained: bool
    sums: list
    batchnorms: list = ()

    def as_plain(self):
        return {**vars(self), "batchnorms": list(self.batchnorms)}

    def own_sums(self):
        """This rank's sums; with another number of ranks than before, the first takes them all."""
        ranks = distributed.world_size()
        if len(self.sums) == ranks:
            return self.sums[distributed.rank()]
        together = [torch.stack(label).sum(0) for label in zip(*self.sums, strict=True)]
        return together if distributed.is_main() else [torch.zeros_like(sums) for sums in together]


@dataclass(frozen=True)
class Start:
    """Where a run begins: epochs completed, (top-1, top-5) of the best one, its wandb run, what changed so that the result
    will not equal that of an undisturbed run, the place inside the epoch that follows, or None, and a remark or ''."""

    epoch: int = 0
    best: tuple = (-1.0, -1.0)
    wandb_id: str | None = None
    changed: tuple = ()
    inside: Inside | None = None
    remark: str = ""

    @property
    def epochs_logged(self):
        """Epochs whose training stands in the log and in metrics.csv."""
        return self.epoch + (self.inside is not None and self.inside.is_trained)


def masks_of(content, model, path):
    """The pruning masks that a checkpoint carries, {} where it has none; `model` is its full-precision network."""
    masks = content.get("masks", {})
    if is_foreign(content):
        names = fit_names(dict(model.named_parameters()), masks)
        masks = {names[name]: mask for name, mask in masks.items()}
    return checked_masks(model, masks, path)


def signs_of(content):
    """{layer: whether its activations are signed}, as far as a checkpoint of either stage says; the first batch decided."""
    if "signed" in content:
        return content["signed"]
    return {name: row["signed"]["act"] for name, row in content.get("layers", {}).items() if row.get("signed")}


def restore(found, model, optimizer, config, harmless=(), schedule_may_change=True):
    """Load a checkpoint, if there is one, into a model; and unless only its weights are taken, continue its run.

    Args:
        harmless: keys, or beginnings of keys, that may differ besides those that always may.
        schedule_may_change: whether the number of epochs may.

    Returns:
        the Start.

    Raises:
        UserError: where the checkpoint does not fit the network, or is of a run that differs in what matters.
    """
    if found is None:
        return Start()
    if is_foreign(found.content) and not found.lean:
        return continue_from_elsewhere(found.content, model, optimizer, found.path)
    changed = [] if found.lean else check_continues(found.content, config, found.path, harmless,
                                                       schedule_may_change)
    if found.lean:
        if config.eval:
            check_same_quantizers(found.content, config, found.path)
            warn_of_signs(found.content, config, found.path)
        load_state(model, found.content["state_dict"], found.path, partial(may_lack, found.content))
        return Start()
    start = load_training_state(found.content, model, optimizer, found.path)
    # The options of the optimizer come from the checkpoint, so that the run goes on as it began.
    is_plain = config.opt == "sgd" and has_plain_momentum_as_sgd(found.content)
    return replace(start, changed=(*changed, *start.changed), remark=PLAIN_MOMENTUM if is_plain else "")


def load_training_state(content, model, optimizer, path):
    """Put model, optimizer and random generators into the state that a checkpoint holds; return the Start it says."""
    load_state(model, content["state_dict"], path, partial(may_lack, content))
    try:
        optimizer.load_state_dict(content["optimizer"])
        _check_optimizer(optimizer)
        distributed.set_random_states(content["random_states"])
        inside = Inside(**content["inside"]) if "inside" in content else None
        if inside is not None:
            distributed.set_batchnorm_statistics(model, inside.batchnorms)
        return Start(content["epoch"], (float(content["extras"]["top1"]), float(content["extras"]["top5"])),
                     content.get("wandb_id"), other_machine(content), inside)
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path}: what it holds does not fit this run ({reason(error)})") from None


def continue_from_elsewhere(content, model, optimizer, path):
    """Go on from a checkpoint that LIMPQ's fine-tuning wrote; return the Start. Its epochs count from 0, and its optimizer
    has the parameters without weight decay in a group before the others.

    Raises:
        UserError: where it holds no such run, or its optimizer is not of the kind, or of the parameters, that this run has.
    """
    def stop(why):
        return UserError(f"{path}: holds no run to continue ({why}); resume.lean: true takes its weights only")

    if not {"epoch", "optimizer"} <= content.keys() or not any(map(is_step, content["state_dict"])):
        raise stop("it is not one of this project's, nor one of LIMPQ's fine-tuning with its epoch and optimizer")
    try:
        weights = fit(model.state_dict(), content["state_dict"])
        state = _momenta_by_name(content["optimizer"], weights, dict(model.named_parameters()))
        positions = _positions(model, optimizer)
        if any(entry.keys() != MOMENTA.get(type(optimizer)) for entry in state.values()):
            raise ValueError("its optimizer is another one")
        load_state(model, content["state_dict"], path, partial(may_lack, content))
        optimizer.load_state_dict({"state": {positions[name]: entry for name, entry in state.items()},
                                   "param_groups": optimizer.state_dict()["param_groups"]})
        _check_optimizer(optimizer)
    except UserError:
        raise
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError, AttributeError) as error:
        raise stop(reason(error)) from None
    scores = content.get("extras", {})
    best = tuple(float(scores[key]) if isinstance(scores.get(key), (int, float)) else -1.0 for key in ("top1", "top5"))
    return Start(content["epoch"] + 1, best, remark=f"{path} is LIMPQ's: epoch, weights, step sizes and optimizer go on, "
                                                    "random numbers begin anew")


def _positions(model, optimizer):
    """{name: position in the optimizer} of the parameters that it trains."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {names[id(parameter)]: position for position, parameter in enumerate(trained)}


def _momenta_by_name(optimizer, state, parameters):
    """{name: what the optimizer keeps of a parameter}, from what a file says of LIMPQ's.

    Args:
        optimizer: its state_dict.
        state: {name: tensor} of the network in the file, in its order.
        parameters: {name: parameter} of the network.
    """
    ordered = [name for name in state if name in parameters]
    groups = [group["params"] for group in optimizer["param_groups"]]
    plain = [name for name in ordered if parameters[name].dim() <= 1 or name.endswith(".bias")]
    names = [ordered] if len(groups) == 1 else [plain, [name for name in ordered if name not in set(plain)]]
    if [len(group) for group in groups] != [len(group) for group in names]:
        raise ValueError("its optimizer has other parameters")
    owners = {index: name for group, part in zip(groups, names, strict=True) for index, name in zip(group, part, strict=True)}
    return {owners[index]: entry for index, entry in optimizer["state"].items()}


def _check_optimizer(optimizer):
    """Raise ValueError where what was loaded into an optimizer is of another kind of it, or of other parameters."""
    if not all(optimizer.defaults.keys() <= group.keys() for group in optimizer.param_groups):
        raise ValueError("it is of another optimizer")
    for parameter, state in optimizer.state.items():
        if any(isinstance(value, torch.Tensor) and value.dim() and value.shape != parameter.shape for value in state.values()):
            raise ValueError("the optimizer is of other parameters")


def machine():
    """What the last bits of a result depend on besides the configuration."""
    return {"threads": torch.get_num_threads(), "processes": distributed.world_size(),
            "kernels": "compiled" if kernel.is_compiled() else "plain"}


def other_machine(content):
    """Which of these are not as they were when a checkpoint was written."""
    return tuple(key for key, value in machine().items() if content.get("machine", {}).get(key, value) != value)


def recorded_threads(found):
    """The number of threads that a run was computed with; None where it starts afresh or does not say."""
    threads = found.content.get("machine", {}).get("threads") if found and not found.lean else None
    return threads if type(threads) is int and threads > 0 else None


def check_continues(checkpoint, config, path, harmless=(), schedule_may_change=True):
    """Refuse to continue a run whose configuration differs in what matters.

    Args:
        harmless: keys, or beginnings of keys, that may differ besides those that always may.

    Returns:
        the schedule keys that differ; the continued run then does not equal an undisturbed one.
    """
    if "config" not in checkpoint or "epoch" not in checkpoint:
        raise UserError(f"{path}: holds no run to continue; set resume.lean to take its weights only")
    wanted = to_plain(config)
    earlier = {key: value for key, value in NEW_KEYS.items() if key in wanted}
    keys = differing_keys({**earlier, **checkpoint["config"]}, wanted)
    idle = ("quan.",) if config.fp_model and checkpoint["config"].get("fp_model") is True else decided_keys(config)
    if config.opt == "momentum" and has_plain_momentum_as_sgd(checkpoint):
        idle = (*idle, "opt")
    keys = [key for key in keys if key not in HARMLESS_KEYS and not key.startswith((*HARMLESS_SECTIONS, *harmless, *idle))
            and not (key == "arch" and same_arch(checkpoint["config"].get("arch"), config.arch))]
    serious = [key for key in keys if not schedule_may_change or key not in SCHEDULE_KEYS]
    if serious:
        raise UserError(f"{path}: the run was started with another {', '.join(serious)}; "
                        "put these back, or start a new run under another name")
    return keys


def has_plain_momentum_as_sgd(checkpoint):
    """Whether a run began when `opt: sgd` stood for plain momentum, as it was before it came to mean Nesterov's."""
    groups = checkpoint.get("optimizer", {}).get("param_groups", [])
    return checkpoint["config"].get("opt") == "sgd" and any(group.get("momentum") and not group.get("nesterov")
                                                            for group in groups)


def training_state(model, optimizer, epoch, best, config, monitor):
    """What every stage's checkpoint holds: enough to continue the run and to rebuild the model.

    Args:
        epoch: epochs completed.
        best: (top-1, top-5) of the best epoch so far.
    """
    return {"epoch": epoch, "arch": config.arch, "state_dict": model.state_dict(),
            "extras": {"top1": best[0], "top5": best[1]},
            "optimizer": optimizer.state_dict(), "random_states": distributed.random_states(), "machine": machine(),
            "config": to_plain(config), "wandb_id": monitor.wandb_id}


def is_finished(epoch, config, folder):
    """Whether `epoch` completed epochs are all that the configuration asks for, and their results are written."""
    last = config.last_epoch
    return epoch >= last and distributed.on_main(read_summary, folder.summary).get("epochs") == last


def read_summary(path):
    """What summary.yaml says, {} where it is missing or is none."""
    try:
        return read_yaml(path)
    except UserError:
        return {}


def announce_finished(folder, config):
    if distributed.is_main():
        print(f"{folder.path}: this run is finished ({config.last_epoch} epochs); give more epochs to go on, "
              "or another name to start anew")
