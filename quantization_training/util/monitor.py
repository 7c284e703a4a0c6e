"""Watching a run: the log file, metrics.csv, the scoreboard, the progress bar, the curves and wandb.

Only the main process watches; on every other one each method of Monitor does nothing.
"""

import csv
import functools
import importlib.metadata
import io
import math
import netrc
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import torch
import yaml

from util.checkpoint import FORMAT_VERSION
from util.config import to_plain
from util.errors import UserError, reason
from util.exchange import write_atomically
from util.plots import name_label, save_curves

COLUMNS = ("epoch", "split", "bits", "loss", "top1", "top5", "lr", "seconds")
FIGURES = COLUMNS[3:]
SPLITS = ("train", "val", "test")

WANDB_INIT_TIMEOUT = 20  # seconds until a server out of reach is given up at the start
WANDB_FINISH_TIMEOUT = 60  # seconds for the last upload; what is left over stays on disk for `wandb sync`
WANDB_MODE_VARIABLE = {"online": "online", "run": "online", "shared": "online", "offline": "offline",
                       "dryrun": "offline", "disabled": "disabled"}


def on_main(method):
    """Let a method of Monitor run on the main process and do nothing on every other one."""

    @functools.wraps(method)
    def guarded(self, *args, **kwargs):
        return method(self, *args, **kwargs) if self.is_main else None

    return guarded


class Monitor:
    """Everything that tells how a run goes. Use it as a context manager, or call finish() at the end.

    Args:
        folder: the run folder, made where it is missing.
        config: the resolved RunConfig.
        is_main: whether this process is the one that watches.
        wandb_id: the wandb run to continue, from the checkpoint.
        resumed_epoch: epochs completed in the checkpoint that the run continues from, 0 for a fresh run.
        device_name, world_size: for the head of the log.

    Attributes:
        wandb_id: the id of the wandb run, to be stored in checkpoints; None where there is none.

    Raises:
        UserError: where the folder cannot be written or the wandb mode that was asked for cannot be had.
    """

    def __init__(self, folder, config, is_main, wandb_id=None, resumed_epoch=0, device_name="cpu", world_size=1):
        self.is_main = is_main
        self.wandb_id = wandb_id
        if is_main:
            self._open(Path(folder), config, resumed_epoch, device_name, world_size)

    def _open(self, folder, config, resumed_epoch, device_name, world_size):
        self.folder, self.config = folder, config
        self._bar = self._wandb = None
        self._finished = False
        # Refused before anything is written.
        wandb, mode, remark = choose_wandb(config.wandb)
        make_folder(folder)
        self._log_path = folder / f"{config.name}.log"
        for line in describe_start(device_name, world_size):
            self.log(line)
        # An evaluation adds to the history of the run whose folder it uses and cuts nothing off it.
        self._metrics = MetricsFile(folder / "metrics.csv", math.inf if config.eval else resumed_epoch, self.log)
        self._scoreboard = Scoreboard(config.log.num_best_scores, self._metrics.scores())
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

    @on_main
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

    def progress(self, iterable, title, images_per_step, total):
        """Iterate under a progress bar on stderr with images per second and the time left.

        Args:
            iterable: the batches.
            title: what stands before the bar.
            images_per_step: images that all processes together take in one step.
            total: the number of steps.
        """
        if not self.is_main or not sys.stderr.isatty():
            yield from iterable
            return
        from tqdm import tqdm

        self._bar = tqdm(iterable, desc=title, total=total, unit=" images", unit_scale=images_per_step, leave=False,
                         dynamic_ncols=True, file=sys.stderr)
        try:
            yield from self._bar
        finally:
            self._close_bar()

    def _close_bar(self):
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    @on_main
    def step(self, epoch, step, steps, **figures):
        """Write how a step went to the log file, and to stdout where no bar is shown."""
        text = f"epoch {epoch} [{step:>{len(str(steps))}}/{steps}] {describe_figures(figures)}"
        self._write(text)
        if self._bar is None:
            self._show(text)

    @on_main
    def epoch(self, epoch, split, figures, bits=None):
        """Record the figures after `epoch` completed epochs in metrics.csv, the log and wandb.

        There is one row per epoch, split and bits; a second one for the same takes the place of the first.

        Args:
            epoch: the number of completed epochs, 0 before training.
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

    @on_main
    def scores(self, epoch, top1, top5):
        """Put an epoch on the scoreboard and log the best epochs so far."""
        self._scoreboard.add(int(epoch), float(top1), float(top5))
        for line in self._scoreboard.lines():
            self.log(line)

    @on_main
    def save_plots(self):
        """Draw curves.png from the rows so far."""
        try:
            save_curves(self.folder / "curves.png", self._metrics.rows, self.config.name)
        except ImportError as error:
            self.log(f"no curves.png: {reason(error)}")  # a missing plotting library is no reason to lose a run

    @on_main
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


# ---------------------------------------------------------------------------------------------------------------------
# Text.


def describe_start(device_name, world_size):
    """The lines every start of the program puts at the head of the log: versions, device, command."""
    versions = [f"python {platform.python_version()}"]
    for package in ("torch", "torchvision", "numpy"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    versions.append(f"checkpoint format {FORMAT_VERSION}")
    return [
        "versions: " + ", ".join(versions),
        f"device: {device_name}, {count(world_size, 'process', 'processes')}, "
        f"{count(torch.get_num_threads(), 'thread', 'threads')} each",
        f"command: {shlex.join(sys.argv)}",
    ]


def count(number, singular, plural):
    return f"{number} {singular if number == 1 else plural}"


def describe_figures(figures):
    """{'loss': 1.2341, 'lr': 0.01} -> 'loss 1.234 lr 0.01'"""
    return " ".join(f"{name} {describe_figure(name, value)}" for name, value in figures.items())


def describe_figure(name, value):
    if isinstance(value, (str, int)):
        return str(value)
    value = float(value)
    return f"{value:.4g}" if name == "lr" or 0 < abs(value) < 1e-3 else f"{value:.3f}"


# ---------------------------------------------------------------------------------------------------------------------
# Files of the run folder.


def make_folder(folder):
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot make the run folder ({error.strerror})") from None


def append(path, text):
    """Add text to the end of a file of the run folder, in one write."""
    try:
        with open(path, "a", encoding="utf-8", newline="") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot write into the run folder ({path.name}: {error.strerror})") from None


def write_args(folder, config):
    """Write the whole resolved configuration to args.yaml in the run folder."""
    text = yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True)
    write_atomically(Path(folder) / "args.yaml", text.encode())


class MetricsFile:
    """metrics.csv: one row per epoch, split and bits, in the order in which they were first recorded.

    Rows beyond `last_epoch` (all, for a fresh run, but those from before training) and lines that a crash left
    torn are cut off. `rows` holds the rest as dicts; a missing figure is None.
    """

    def __init__(self, path, last_epoch, log):
        self.path = path
        found, rows, unreadable = read_metrics(path)
        if unreadable:
            log(f"{path.name}: dropped {count(unreadable, 'unreadable line', 'unreadable lines')}")
        self.rows = [row for row in rows if row["epoch"] <= last_epoch]
        if not found or unreadable or len(self.rows) < len(rows):
            self._rewrite()

    def record(self, epoch, split, bits, figures):
        """Add a row, or replace the row of the same epoch, split and bits where it stands."""
        row = {"epoch": epoch, "split": split, "bits": bits, **{name: figures.get(name) for name in FIGURES}}
        key = (epoch, split, bits)
        for position, other in enumerate(self.rows):
            if (other["epoch"], other["split"], other["bits"]) == key:
                self.rows[position] = row
                self._rewrite()
                return
        self.rows.append(row)
        append(self.path, to_csv([row]))

    def scores(self):
        """{epoch: (top1, top5)} on the validation split; the mean over the candidates where an epoch has several."""
        epochs = {}
        for row in self.rows:
            if row["split"] == "val" and row["top1"] is not None:
                epochs.setdefault(row["epoch"], {})[row["bits"]] = (row["top1"], row["top5"] or 0.0)
        return {epoch: summarize(candidates) for epoch, candidates in epochs.items()}

    def _rewrite(self):
        write_atomically(self.path, (",".join(COLUMNS) + "\n" + to_csv(self.rows)).encode())


def summarize(candidates):
    """One (top1, top5) from {bits: (top1, top5)}: of the whole model, else the mean over the bit-widths."""
    for label in ("", "mean"):
        if label in candidates:
            return candidates[label]
    chosen = [score for label, score in candidates.items() if label.isdecimal()] or list(candidates.values())
    return tuple(sum(column) / len(chosen) for column in zip(*chosen, strict=True))


def to_csv(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    for row in rows:
        writer.writerow({**row, **{name: "" if row[name] is None else f"{row[name]:.8g}" for name in FIGURES}})
    return text.getvalue()


def read_metrics(path):
    """Read metrics.csv.

    Returns:
        (whether there is a file with its header, the rows, the number of lines that could not be read).

    Raises:
        UserError: where the file is something else, which must not be overwritten.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return False, [], 0
    except OSError as error:
        raise UserError(f"{path}: cannot read the file ({error.strerror})") from None
    header = ",".join(COLUMNS)
    first, _, rest = text.partition("\n")
    if "\n" not in text and header.startswith(text):  # the very first write was cut short
        return False, [], 0
    if first.rstrip("\r") != header:
        raise UserError(f"{path}: not a metrics file (expected the header {header}, found {first[:60]!r})")
    lines = rest.splitlines(keepends=True)
    rows = [row for row in map(parse_row, lines) if row is not None]
    return True, rows, len(lines) - len(rows)


def parse_row(line):
    """The row in a line of metrics.csv, or None where the line is torn."""
    try:
        values = next(csv.reader([line]))
        if not line.endswith("\n") or len(values) != len(COLUMNS) or values[1] not in SPLITS:
            return None
        figures = {name: float(value) if value else None for name, value in zip(FIGURES, values[3:], strict=True)}
        return {"epoch": int(values[0]), "split": values[1], "bits": values[2], **figures}
    except (ValueError, StopIteration, csv.Error):
        return None


class Scoreboard:
    """The best epochs by top-1; of equal ones the earlier, because that one became the best checkpoint."""

    def __init__(self, size, scores):
        self.size = size
        self.entries = dict(scores)

    def add(self, epoch, top1, top5):
        self.entries[epoch] = (top1, top5)

    def best(self):
        """[(epoch, top1, top5), ...], the best first."""
        ranked = sorted(self.entries.items(), key=lambda item: (-comparable(item[1][0]), item[0]))
        return [(epoch, *score) for epoch, score in ranked[:self.size]]

    def lines(self):
        return [f"Scoreboard best {place} ==> Epoch [{epoch}][Top1: {top1:.3f}   Top5: {top5:.3f}]"
                for place, (epoch, top1, top5) in enumerate(self.best(), start=1)]


def comparable(number):
    """NaN compares with nothing and would leave the order to chance."""
    return -math.inf if math.isnan(number) else number


# ---------------------------------------------------------------------------------------------------------------------
# wandb. Nothing here asks a question, and nothing here stops a training that has begun.


def choose_wandb(config):
    """Decide, without writing anything, whether and how a run is sent to wandb.

    Returns:
        (the wandb module or None, 'online', 'offline' or 'disabled', a remark for the log or '').

    Raises:
        UserError: where the mode that the configuration asks for cannot be had.
    """
    mode = config.mode
    if mode == "auto":
        mode = WANDB_MODE_VARIABLE.get(os.environ.get("WANDB_MODE", "").lower(), "auto")
    if mode == "disabled":
        return None, mode, ""
    wandb, problem = import_wandb()
    if wandb is None:
        if config.mode != "auto":
            raise UserError(f"wandb.mode: {config.mode!r} needs the package wandb ({problem}): pip install wandb, "
                            "or set wandb.mode to auto or disabled")
        return None, "disabled", f"no wandb ({problem}; pip install wandb)"
    if mode == "offline" or has_credentials(wandb):
        return wandb, "offline" if mode == "offline" else "online", ""
    if config.mode == "online":
        raise UserError("wandb.mode: 'online' needs an API key: run `wandb login`, set WANDB_API_KEY, "
                        "or set wandb.mode to auto or offline")
    return wandb, "offline", "wandb keeps the run offline (no API key configured)"


def import_wandb():
    """Return (the wandb module, '') or (None, why not)."""
    try:
        import wandb
    except Exception as error:  # a package broken by its dependencies fails in many ways
        return None, "not installed" if isinstance(error, ModuleNotFoundError) else reason(error)
    # A folder called wandb in the working directory imports as an empty package.
    return (wandb, "") if hasattr(wandb, "init") else (None, "not installed")


def has_credentials(wandb):
    """Whether a key for the wandb server is configured: by environment, wandb's settings, or a netrc file."""
    try:
        # Silent from here on: finding a key is announced on stderr otherwise.
        settings = wandb.setup(wandb.Settings(silent=True)).settings
        named = settings.api_key or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")
        return bool(named) or in_netrc(urlsplit(settings.base_url).netloc)
    except Exception:  # settings that wandb cannot read will do no better when the run starts
        return False


def in_netrc(host):
    candidates = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    paths = [Path(path).expanduser() for path in candidates if path]
    path = paths[0] if os.environ.get("NETRC") else next((path for path in paths if path.exists()), None)
    try:
        entry = netrc.netrc(path).authenticators(host) if path else None
    except (OSError, netrc.NetrcParseError):
        return False
    return bool(entry and entry[2])


def start_wandb(wandb, mode, folder, config, wandb_id, log):
    """Start or continue the wandb run, offline where the server is out of reach; None where that fails too."""
    for attempt in [mode, "offline"] if mode == "online" else ["offline"]:
        try:
            run = init_wandb(wandb, attempt, folder, config, wandb_id)
        except Exception as error:
            log(f"wandb does not start {attempt}: {reason(error)}")
            continue
        log(f"wandb: {attempt}, run {run.id}" + (f", {run.url}" if attempt == "online" and run.url else ""))
        return run
    return None


def init_wandb(wandb, mode, folder, config, wandb_id):
    wanted = {"silent": True, "console": "off", "init_timeout": WANDB_INIT_TIMEOUT,
              "finish_timeout": WANDB_FINISH_TIMEOUT, "finish_timeout_raises": True}
    # Older releases of wandb lack some of the settings.
    settings = wandb.Settings(**{name: value for name, value in wanted.items() if hasattr(wandb.Settings(), name)})
    run = wandb.init(mode=mode, dir=str(folder), id=wandb_id, name=config.name, config=to_plain(config),
                     resume="allow" if wandb_id and mode == "online" else None, project=config.wandb.project,
                     entity=config.wandb.entity, tags=config.wandb.tags, settings=settings)
    run.define_metric("epoch")
    run.define_metric("*", step_metric="epoch")
    return run
