"""Checkpoints and the run folder: what a run leaves on disk, and how it is found again."""

import io
import os
import pickle
from dataclasses import dataclass

import torch
import yaml

from util import distributed
from util.config import differing_keys, to_plain
from util.errors import UserError, reason
from util.exchange import strip_prefix, write_atomically

FORMAT_VERSION = 1
HARMLESS_KEYS = ("name", "output_dir", "gpu", "training_device", "eval", "dataloader.workers", "dataloader.path",
                 "dataloader.serialized")
HARMLESS_SECTIONS = ("resume.", "log.", "wandb.")
SCHEDULE_KEYS = ("epochs", "cooldown_epochs")


def save_checkpoint(path, checkpoint):
    """Write a checkpoint (tensors and plain containers) so that a whole file lies at `path` at every moment."""
    buffer = io.BytesIO()
    torch.save({"version": FORMAT_VERSION, **checkpoint}, buffer)
    write_atomically(path, buffer.getbuffer())


def load_checkpoint(path):
    """Read a checkpoint onto the CPU; names in its state_dict lose a `module.` prefix. No code in the file is run.

    Returns:
        the dict in the file; a bare state_dict is returned as {'state_dict': ...}.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot read the checkpoint ({error.strerror})") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: not a checkpoint, or one that holds more than tensors and plain containers") from None
    except Exception as error:  # a damaged archive meets the reader with exceptions of many types
        raise UserError(f"{path}: damaged or not a checkpoint ({reason(error)[:100]})") from None
    if isinstance(content, dict) and content and all(isinstance(value, torch.Tensor) for value in content.values()):
        content = {"state_dict": content}
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"{path}: not a checkpoint (it has no state_dict)")
    if content.get("version", 0) > FORMAT_VERSION:
        raise UserError(f"{path}: written by a newer version of this project (format {content['version']})")
    content["state_dict"] = {strip_prefix(name): tensor for name, tensor in content["state_dict"].items()}
    return content


def load_state(model, state_dict, source):
    """Load a state_dict whose names and shapes have to be just those of the model."""
    own = model.state_dict()
    for name in own.keys() - state_dict.keys():
        raise UserError(f"{source}: the tensor {name} of this network is missing in the checkpoint")
    for name, tensor in state_dict.items():
        if name not in own:
            raise UserError(f"{source}: the tensor {name} is not part of this network")
        if tensor.shape != own[name].shape:
            raise UserError(f"{source}: {name} has shape {list(tensor.shape)}, this network's is {list(own[name].shape)}")
    model.load_state_dict(state_dict)


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
        return os.path.join(self.path, f"{self.name}_checkpoint.pth.tar")

    @property
    def best(self):
        return os.path.join(self.path, f"{self.name}_best.pth.tar")

    @property
    def summary(self):
        return os.path.join(self.path, "summary.yaml")

    def summarise(self, facts):
        """Write summary.yaml, the results of a finished run, from plain values."""
        write_atomically(self.summary, yaml.safe_dump(facts, sort_keys=False).encode())

    def save(self, checkpoint, is_best):
        """Write the newest checkpoint, and the best one where this is it."""
        save_checkpoint(self.last, checkpoint)
        if is_best:
            save_checkpoint(self.best, checkpoint)


def find_checkpoint(config, folder):
    """The path that resume.path stands for, or None where a run starts afresh.

    `auto` is the run folder's own checkpoint, for evaluation its best one; `none` refuses a folder that holds a run.
    """
    wanted = config.resume.path
    if wanted == "auto":
        names = (folder.best, folder.last) if config.eval else (folder.last,)
        found = next((path for path in names if os.path.exists(path)), None)
        if config.eval and not found:
            raise UserError(f"resume.path: nothing to evaluate in {folder.path}; name a checkpoint")
        return found
    if wanted == "none":
        if config.eval:
            raise UserError("resume.path: found none, but eval needs a checkpoint; name one")
        if os.path.exists(folder.last):
            raise UserError(f"resume.path: found none, but {folder.path} holds a run; take another name, or remove it")
        return None
    return wanted


def find_run(config, folder):
    """(path, checkpoint) of what resume.path names, read once by rank 0; (None, None) where a run starts afresh."""
    path = distributed.on_main(find_checkpoint, config, folder)
    return path, distributed.on_main(load_checkpoint, path) if path else None


@dataclass(frozen=True)
class Start:
    """Where a run begins: epochs completed, best top-1 so far, its wandb run, schedule keys that have changed."""

    epoch: int = 0
    best: float = -1.0
    wandb_id: str | None = None
    changed: tuple = ()


def restore(checkpoint, path, model, optimizer, config):
    """Load a checkpoint, if there is one, into a model; and unless resume.lean or eval is set, continue its run.

    Returns:
        the Start.

    Raises:
        UserError: where the checkpoint is of another network, or of a run that differs in what matters.
    """
    if checkpoint is None:
        return Start()
    if checkpoint.get("arch", config.arch) != config.arch:
        raise UserError(f"{path}: holds {checkpoint['arch']}, but arch is {config.arch}")
    if config.eval or config.resume.lean:
        load_state(model, checkpoint["state_dict"], path)
        return Start()
    changed = check_continues(checkpoint, config, path)
    load_state(model, checkpoint["state_dict"], path)
    try:
        optimizer.load_state_dict(checkpoint["optimizer"])
        distributed.set_random_states(checkpoint["random_states"])
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
        raise UserError(f"{path}: its optimizer or random states do not fit this run ({reason(error)})") from None
    return Start(checkpoint["epoch"], checkpoint["extras"]["top1"], checkpoint.get("wandb_id"), tuple(changed))


def check_continues(checkpoint, config, path):
    """Refuse to continue a run whose configuration differs in what matters.

    Returns:
        the schedule keys that differ; the continued run then does not equal an undisturbed one.
    """
    if "config" not in checkpoint or "epoch" not in checkpoint:
        raise UserError(f"{path}: holds no run to continue; set resume.lean to take its weights only")
    keys = differing_keys(checkpoint["config"], to_plain(config))
    keys = [key for key in keys if key not in HARMLESS_KEYS and not key.startswith(HARMLESS_SECTIONS)]
    serious = [key for key in keys if key not in SCHEDULE_KEYS]
    if serious:
        raise UserError(f"{path}: the run was started with another {', '.join(serious)}; "
                        "put these back, or start a new run under another name")
    return keys


def training_state(model, optimizer, epoch, extras, config, monitor):
    """What every stage's checkpoint holds: enough to continue the run and to rebuild the model."""
    return {"epoch": epoch, "arch": config.arch, "state_dict": model.state_dict(), "extras": extras,
            "optimizer": optimizer.state_dict(), "random_states": distributed.random_states(),
            "config": to_plain(config), "wandb_id": monitor.wandb_id}


def is_finished(epoch, config, folder):
    """Whether `epoch` completed epochs are all that the configuration asks for, and their results are written."""
    return epoch >= config.epochs + config.cooldown_epochs and os.path.exists(folder.summary)


def announce_finished(folder, config):
    if distributed.is_main():
        print(f"{folder.path}: this run is finished ({config.epochs + config.cooldown_epochs} epochs); "
              "give more epochs to go on, or another name to start anew")
