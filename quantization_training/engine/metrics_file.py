"""metrics.csv: the figures of a run, one row per epoch, split and bit-width."""

import csv
import math
from statistics import fmean

from util.errors import UserError
from util.exchange import write_atomically
from util.tables import csv_text

COLUMNS = ("epoch", "split", "bits", "loss", "top1", "top5", "lr", "seconds")
FIGURES = COLUMNS[3:]
SPLITS = ("train", "val", "test")


class MetricsFile:
    """metrics.csv: one row per epoch, split and bits, in the order in which they were first recorded. Rows beyond `last_epoch`
    and lines that a crash left torn are cut off. `rows` are dicts; a missing figure is None."""

    def __init__(self, path, last_epoch, log):
        self.path = path
        found, rows, unreadable = read_metrics(path)
        if unreadable:
            log(f"{path.name}: unreadable lines dropped: {unreadable}")
        self.rows = [row for row in rows if row["epoch"] <= last_epoch]
        if not found or unreadable or len(self.rows) < len(rows):
            self._rewrite()

    def record(self, epoch, split, bits, figures):
        """Add a row, or replace the row of the same epoch, split and bits where it stands."""
        key = {"epoch": epoch, "split": split, "bits": bits}
        row = {**key, **{name: figures.get(name) for name in FIGURES}}
        for position, other in enumerate(self.rows):
            if key.items() <= other.items():
                self.rows[position] = row
                self._rewrite()
                return
        self.rows.append(row)
        append(self.path, to_csv([row]).partition("\n")[2])

    def scores(self):
        """{epoch: (top1, top5)} on the validation split; the mean over the candidates where an epoch has several."""
        epochs = {}
        for row in self.rows:
            if row["split"] == "val" and row["top1"] is not None:
                epochs.setdefault(row["epoch"], {})[row["bits"]] = (row["top1"], row["top5"] or 0.0)
        return {epoch: summarize(candidates) for epoch, candidates in epochs.items()}

    def _rewrite(self):
        write_atomically(self.path, to_csv(self.rows).encode())


def summarize(candidates):
    """One (top1, top5) from {bits: (top1, top5)}: of the whole model, else the mean over the bit-widths."""
    for label in ("", "mean"):
        if label in candidates:
            return candidates[label]
    chosen = [score for label, score in candidates.items() if label.isdecimal()] or list(candidates.values())
    return tuple(map(fmean, zip(*chosen, strict=True)))


def best_epochs(scores, size):
    """[(epoch, top1, top5)] of the best epochs by top-1, the best first; of equal ones the earlier, because that one became
    the best checkpoint. Scores are {epoch: (top1, top5)}; NaN, which compares with nothing, comes last."""
    ranked = sorted(scores.items(), key=lambda item: (-math.inf if math.isnan(item[1][0]) else item[1][0], -item[0]))
    return [(epoch, *score) for epoch, score in reversed(ranked[-size:])]


def to_csv(rows):
    return csv_text(COLUMNS, [{**row, **{name: "" if row[name] is None else f"{row[name]:.8g}" for name in FIGURES}}
                              for row in rows])


def read_metrics(path):
    """(whether metrics.csv is there with its header, its rows, the number of lines that could not be read). A file that is
    something else, which must not be overwritten, is refused."""
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
    rows = list(filter(None, map(parse_row, lines)))
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


def append(path, text):
    """Add text to the end of a file of the run folder, in one write."""
    try:
        with open(path, "a", encoding="utf-8", newline="") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot write into the run folder ({path.name}: {error.strerror})") from None
