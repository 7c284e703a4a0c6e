"""The training state in a checkpoint: all that an exact resume needs, between two epochs or inside one."""

from dataclasses import dataclass
from functools import partial

import torch

from model.weights import load_state
from quan.quantizer import kernel
from util import distributed
from util.config import to_plain
from util.errors import UserError, reason

from .checkpoint import may_lack


@dataclass(frozen=True)
class MidEpochState:
    """A place inside an epoch: how many steps it has had, seconds spent in it, images per step over all ranks, whether only
    validation is still to come, sums of the Metrics (this rank's own as a list of tensors, or a list of those of all ranks),
    running statistics of the BatchNorms of each rank, [] for a single one."""

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
class ResumeState:
    """Where a run begins: epochs completed, (top-1, top-5) of the best one, its wandb run, what changed so that the result
    will not equal that of an undisturbed run, the place inside the epoch that follows, or None, and a remark or ''."""

    epoch: int = 0
    best: tuple = (-1.0, -1.0)
    wandb_id: str | None = None
    changed: tuple = ()
    inside: MidEpochState | None = None
    remark: str = ""

    @property
    def epochs_logged(self):
        """Epochs whose training stands in the log and in metrics.csv."""
        return self.epoch + (self.inside is not None and self.inside.is_trained)


def load_training_state(content, model, optimizer, path):
    """Put model, optimizer and random generators into the state that a checkpoint holds; return the ResumeState it says."""
    load_state(model, content["state_dict"], path, partial(may_lack, content))
    try:
        optimizer.load_state_dict(content["optimizer"])
        check_optimizer(optimizer)
        distributed.set_random_states(content["random_states"])
        inside = MidEpochState(**content["inside"]) if "inside" in content else None
        if inside is not None:
            distributed.set_batchnorm_statistics(model, inside.batchnorms)
        changed = tuple(key for key, value in machine().items() if content.get("machine", {}).get(key, value) != value)
        return ResumeState(content["epoch"], (float(content["extras"]["top1"]), float(content["extras"]["top5"])),
                     content.get("wandb_id"), changed, inside)
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path}: what it holds does not fit this run ({reason(error)})") from None


def check_optimizer(optimizer):
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


def training_state(model, optimizer, epoch, best, config, monitor):
    """What every stage's checkpoint holds, after `epoch` completed epochs, the `best` of which has this (top-1, top-5)."""
    return {"epoch": epoch, "arch": config.arch, "state_dict": model.state_dict(),
            "extras": {"top1": best[0], "top5": best[1]},
            "optimizer": optimizer.state_dict(), "random_states": distributed.random_states(), "machine": machine(),
            "config": to_plain(config), "wandb_id": monitor.wandb_id}
