"""Watching a run: the log file, metrics.csv, the scoreboard, the progress bar, the curves and wandb.

Only the main process watches; on every other one each method of Monitor does nothing.
"""

import functools
import importlib.metadata
import os
import platform
import shlex
import sys
import time
from pathlib import Path

import torch
import yaml

from quan.quantizer import kernel
from util import distributed
from util.config import to_plain
from util.errors import UserError, reason
from util.exchange import write_atomically

from .checkpoint import FORMAT_VERSION
from .metrics_file import SPLITS, MetricsFile, append, best_epochs
from .plots import SPLIT_STYLES, name_label, save_curves
from .wandb_run import choose_wandb, start_wandb


def main_rank_only(method):
    """Let a method of Monitor run on the main process and do nothing on every other one."""

    @functools.wraps(method)
    def guarded(self, *args, **kwargs):
        return method(self, *args, **kwargs) if self.is_main else None

    return guarded


class Monitor:
    """Everything that tells how a run goes. Use it as a context manager, or call finish() at the end.

    Args:
        folder: the run folder, made where it is missing.
        is_main: whether this process is the one that watches.
        wandb_id: of the wandb run to continue; afterwards that of this run, or None.
        resumed_epoch: epochs completed in the checkpoint that the run continues from, 0 for a fresh run.
        device_name, world_size: for the head of the log.
    """

    def __init__(self, folder, config, is_main, wandb_id=None, resumed_epoch=0, device_name="cpu", world_size=1):
        self.is_main = is_main
        self.wandb_id = wandb_id
        if is_main:
            self._open(Path(folder), config, resumed_epoch, device_name, world_size)

    def _open(self, folder, config, resumed_epoch, device_name, world_size):
        self.folder, self.config, self._finished = folder, config, False
        self._bar = self._wandb = None
        self._drawn = []  # rows that curves.png shows
        wandb, mode, remark = choose_wandb(config.wandb)  # what it refuses comes before anything is written
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot make the run folder ({error.strerror})") from None
        self._log_path = folder / f"{config.name}.log"
        for line in describe_start(device_name, world_size):
            self.log(line)
        self._metrics = MetricsFile(folder / "metrics.csv", resumed_epoch, self.log)
        if remark:
            self.log(remark)
        if wandb is not None:
            self._wandb = start_wandb(wandb, mode, folder, config, self.wandb_id, self.log)
            self.wandb_id = self._wandb.id if self._wandb is not None else self.wandb_id

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self.finish()
        elif self.is_main:
            self._close_after(error)

    def _close_after(self, error):
        try:
            self._write(f"stopped by {type(error).__name__}: {reason(error)}")
            self.finish(exit_code=1)
        except Exception as another:  # the error that stopped the run is the one to report
            print(f"the run could not be closed: {reason(another)}", file=sys.stderr)

    @main_rank_only
    def log(self, text):
        """Write a line to the log file, with the time, and to stdout."""
        self._write(text)
        self._show(text)

    def _write(self, text):
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        append(self._log_path, "".join(f"{stamp} {line}\n" for line in str(text).splitlines()))

    def _show(self, text):
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(str(text), file=sys.stdout)  # takes the bar away, writes, and puts it back

    def progress(self, iterable, title, images_per_step, total, done=0):
        """Iterate under a progress bar on stderr with images per second, over all processes, and the time left; `done` of the
        `total` steps lie behind already."""
        if not self.is_main or not sys.stderr.isatty():
            yield from iterable
            return
        from tqdm import tqdm

        self._bar = tqdm(iterable, desc=title, total=total, initial=done, unit=" images", unit_scale=images_per_step,
                         leave=False, dynamic_ncols=True, file=sys.stderr)
        try:
            yield from self._bar
        finally:
            self._close_bar()

    def _close_bar(self):
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    @main_rank_only
    def step(self, epoch, step, steps, **figures):
        """Write how a step went to the log file, and to stdout where no bar is shown."""
        text = f"epoch {epoch} [{step:>{len(str(steps))}}/{steps}] {describe_figures(figures)}"
        self._write(text)
        if self._bar is None:
            self._show(text)

    @main_rank_only
    def epoch(self, epoch, split, figures, bits=None):
        """Record figures after so many completed epochs in metrics.csv, the log and wandb; a second row for the same takes the
        place of the first.

        Args:
            split: 'train', 'val' or 'test'.
            figures: {name: number}; metrics.csv has columns for loss, top1, top5 (in percent), lr and seconds.
            bits: the candidate the figures belong to, such as 6 or 'random'; None or '' for the model as it is.
        """
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
        label = "" if bits is None else str(bits)
        numbers = {name: float(value) for name, value in figures.items() if value is not None}
        self._metrics.record(int(epoch), split, label, numbers)
        title = f"{split} {name_label(label)}" if label else split
        self.log(f"epoch {epoch} {title}: {describe_figures(numbers)}")
        suffix = f"_{name_label(label).replace(' ', '_')}" if label else ""
        self._send({f"{split}/{name}{suffix}": value for name, value in numbers.items()} | {"epoch": int(epoch)})

    @main_rank_only
    def send(self, group, figures):
        """Send figures that belong to no epoch to wandb, under `group`/."""
        self._send({f"{group}/{name}": value for name, value in figures.items()})

    @main_rank_only
    def scores(self, epoch, top1, top5):
        """Log the best epochs so far, this one included, and draw curves.png."""
        best = best_epochs(self._metrics.scores() | {epoch: (top1, top5)}, self.config.log.num_best_scores)
        for place, (number, first, fifth) in enumerate(best, 1):
            self.log(f"Scoreboard best {place} ==> Epoch [{number}][Top1: {first:.3f}   Top5: {fifth:.3f}]")
        self.save_plots()

    @main_rank_only
    def save_plots(self):
        """Draw curves.png from the rows so far, unless it shows them already."""
        rows = [row for row in self._metrics.rows if row["split"] in SPLIT_STYLES]
        if rows == self._drawn:
            return
        self._drawn = rows
        try:
            save_curves(self.folder / "curves.png", rows, self.config.name)
        except ImportError as error:
            self.log(f"no curves.png: {reason(error)}")  # a missing plotting library is no reason to lose a run

    @main_rank_only
    def finish(self, exit_code=0):
        """Draw the curves and close wandb; a second call does nothing."""
        if self._finished:
            return
        self._finished = True
        self._close_bar()
        try:
            self.save_plots()
        finally:
            self._call_wandb("could not be closed (`wandb sync` sends what the run folder holds)",
                             lambda run: run.finish(exit_code=exit_code))
            self._wandb = None

    def _send(self, figures):
        self._call_wandb("is switched off", lambda run: run.log(figures))

    def _call_wandb(self, outcome, action):
        """Do something with the wandb run; the first failure is logged and ends the use of wandb, not the training."""
        if self._wandb is None:
            return
        try:
            action(self._wandb)
        except Exception as error:
            self._wandb = None
            self.log(f"wandb {outcome}: {reason(error)}")


def open_monitor(folder, config, start, device):
    """The Monitor of a training run that begins from a ResumeState, whose configuration it writes to args.yaml; every rank
    meets the UserError that rank 0 meets."""
    opened = []

    def open_on_main():
        text = yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True)
        write_atomically(Path(folder.path) / "args.yaml", text.encode())
        opened.append(Monitor(folder.path, config, True, start.wandb_id, start.epochs_logged,
                              distributed.describe_device(device), distributed.world_size()))

    distributed.on_main(open_on_main)
    return opened[0] if opened else Monitor(folder.path, config, False, start.wandb_id)


def log_start(monitor, start, remark):
    """Log where a run begins, by its ResumeState, and a remark on its network, or ''."""
    if start.epoch or start.inside:
        monitor.log(f"continuing after epoch {start.epoch}" + (f" and {start.inside.step} steps" if start.inside else ""))
    if start.changed:
        monitor.log(f"{', '.join(start.changed)} changed: the result will not equal that of an undisturbed run")
    for line in filter(None, [start.remark, remark]):
        monitor.log(line)


def describe_start(device_name, world_size):
    """The lines every start of the program puts at the head of the log: versions, device, command."""
    packages = [f"{package} {importlib.metadata.version(package)}" for package in ("torch", "torchvision", "numpy")]
    threads = torch.get_num_threads()
    return [f"versions: python {platform.python_version()}, {', '.join(packages)}, checkpoint format {FORMAT_VERSION}",
            f"device: {device_name}, {world_size} process{'es' * (world_size != 1)}, {threads} thread{'s' * (threads != 1)} "
            f"each, quantizers by {kernel.describe()}",
            f"command: {shlex.join(sys.argv)}"]


def describe_figures(figures):
    """{'loss': 1.2341, 'lr': 0.01} -> 'loss 1.234 lr 0.01'"""
    return " ".join(f"{name} {describe_figure(name, value)}" for name, value in figures.items())


def describe_figure(name, value):
    if isinstance(value, (str, int)):
        return str(value)
    value = float(value)
    return f"{value:.4g}" if name == "lr" or 0 < abs(value) < 1e-3 else f"{value:.3f}"
