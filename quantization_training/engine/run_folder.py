"""The run folder: what a run leaves on disk, and where it is found again."""

import os
import re
from dataclasses import dataclass

import yaml

from util import distributed
from util.config import decode_yaml, flatten, plain, read_bytes
from util.errors import UserError
from util.exchange import write_atomically

from .checkpoint import load_checkpoint, save_checkpoint

BEST, LAST = "_best.pth.tar", "_checkpoint.pth.tar"
KINDS = {BEST: "the best on validation", LAST: "the last"}
BEST_OR_LAST = re.compile(r"(?!.*(?:epoch|level)_\d+_checkpoint\.pth\.tar$)(.*)(_best\.pth\.tar|_checkpoint\.pth\.tar)")


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

    def summarise(self, results):
        """Write summary.yaml, the results of a finished run, from plain values."""
        write_atomically(self.summary, yaml.safe_dump(results, sort_keys=False).encode())

    def epoch(self, number):
        return os.path.join(self.path, f"{self.name}_epoch_{number}_checkpoint.pth.tar")

    def save(self, checkpoint, is_best, keep=1):
        """Write the newest checkpoint, and the best one where this is it; of `keep` epochs, where more than one, the
        checkpoints stay in files of their own too."""
        if is_best:  # first: a run that ends in between comes to this epoch again
            save_checkpoint(self.best, checkpoint)
        save_checkpoint(self.last, checkpoint)
        if "inside" not in checkpoint:
            self._keep(checkpoint["epoch"], keep)

    def _keep(self, epoch, keep):
        """Give the newest epoch's checkpoint a file of its own, and remove those of epochs that are too long ago."""
        if keep > 1:
            write_atomically(self.epoch(epoch), read_bytes(self.last, "the checkpoint", limit=None))
        pattern = re.compile(re.escape(self.name) + r"_epoch_(\d+)_checkpoint\.pth\.tar")
        for name in os.listdir(self.path):
            match = pattern.fullmatch(name)
            if match and (keep == 1 or int(match[1]) <= epoch - keep):
                os.remove(os.path.join(self.path, name))


def describe_evaluated(path, content):
    """A line on which checkpoint of its run is evaluated, the best or the last, and what the other one is."""
    epoch, match = content.get("epoch"), BEST_OR_LAST.fullmatch(path)
    if epoch is None:
        return f"{path}: a packed model" if "packed" in content else f"{path}: a checkpoint that does not say its epoch"
    if not match:
        return f"{path}: a checkpoint after epoch {epoch}"
    own, other = match[2], LAST if match[2] == BEST else BEST
    try:
        there = load_checkpoint(match[1] + other).get("epoch")
    except UserError:
        there = None
    if there == epoch:
        return f"{path}: {KINDS[BEST]} and {KINDS[LAST]}, epoch {epoch}"
    rest = f"; {KINDS[other]} is {os.path.basename(match[1]) + other}, epoch {there}" if there is not None else ""
    return f"{path}: {KINDS[own]}, epoch {epoch}{rest}"


def find_checkpoint(config, folder):
    """(the path that resume.path stands for, None where a run starts afresh; whether only the weights are taken).

    `auto` is the run folder's own checkpoint, for evaluation its best one; `none` refuses a folder that holds a run. A path
    names where a run starts; where it has started from there already, it goes on from its own checkpoint. A path that an
    existing run has not started from takes it back to a checkpoint of its own folder.
    """
    wanted, own = config.resume.path, os.path.exists(folder.last)
    if config.eval:
        return _find_for_evaluation(config, folder), True
    if wanted == "none" and own:
        raise UserError(f"resume.path: found none, but {folder.path} holds a run; take another name, or remove it")
    if wanted in ("auto", "none"):
        return (folder.last if own else None), False
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
    if config.resume.path == "none":
        raise UserError("resume.path: found none, but eval needs a checkpoint; name one")
    if config.resume.path != "auto":
        return config.resume.path
    for path in (folder.best, folder.last):
        if os.path.exists(path):
            return path
    raise UserError(f"resume.path: nothing to evaluate in {folder.path}; train first, by the same command without eval, "
                    "or name a checkpoint")


def is_finished(epoch, config, folder):
    """Whether `epoch` completed epochs are all that the configuration asks for, and their results are written."""
    last = config.last_epoch
    return epoch >= last and distributed.on_main(read_summary, folder.summary).get("epochs") == last


def read_summary(path):
    """What summary.yaml says, {} where it is missing or is none."""
    try:
        return plain(decode_yaml(read_bytes(path), path))
    except UserError:
        return {}


def announce_finished(folder, config):
    distributed.on_main(print, f"{folder.path}: this run is finished ({config.last_epoch} epochs); give more epochs to go on, "
                               "or another name to start anew")
