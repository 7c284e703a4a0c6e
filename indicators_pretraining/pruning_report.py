"""What pruning came to: a row for each level, as CSV, as a plot of accuracy against sparsity, and as a summary."""

import csv
import os

from engine.run_folder import read_summary
from quan.cost import full_precision_cost, nonzero_macs
from sparsity.masks import weights_left
from util.exchange import write_atomically
from util.figures import clear_panel, new_figure, save_figure
from util.tables import csv_text

COLUMNS = ("level", "removed", "sparsity", "loss", "top1", "top5", "size_mb", "sparse_size_mb", "sparse_ratio", "macs",
           "nonzero_macs")
WHOLE = ("level", "macs", "nonzero_macs")  # numbers
PER_LAYER = "sparsity."  # begins the name of a column that belongs to one layer


def make_row(level, figures, graph, masks, removed):
    """The row of a level, {column: value}, from its masks, the share of the prunable weights or channels that they remove,
    and `figures` (loss, top1 and top5 in percent) on the test set.

    sparsity is the share of all weights of convolutions and linear layers that are zero, `sparsity.<layer>` that of one
    layer; sizes are those of 32-bit weights in MB (2^20 bytes), dense and with one bit per weight plus the non-zero ones
    where that is smaller; MACs are exact, of one image.
    """
    left = weights_left(graph.layers, masks)
    cost = full_precision_cost(graph.layers, left)
    row = {"level": level, "removed": removed, **{key: figures[key] for key in ("loss", "top1", "top5")},
           **{key: cost[key] for key in ("sparsity", "size_mb", "sparse_size_mb", "sparse_ratio")},
           "macs": sum(call.macs_exact for call in graph.layers.values()),
           "nonzero_macs": sum(nonzero_macs(call, left[name], call.macs_exact) for name, call in graph.layers.items())}
    return row | {f"{PER_LAYER}{name}": 1 - left[name] / call.params for name, call in graph.layers.items()}


def columns_of(layers):
    return [*COLUMNS, *(f"{PER_LAYER}{name}" for name in layers)]


def write(folder, title, rows):
    """Write pruning.csv and pruning.png into the run folder."""
    layers = [column.removeprefix(PER_LAYER) for column in rows[0] if column.startswith(PER_LAYER)]
    write_atomically(os.path.join(folder, "pruning.csv"), csv_text(columns_of(layers), rows).encode())
    draw(os.path.join(folder, "pruning.png"), title, rows)


def _read_row(texts):
    try:
        return {column: (int if column in WHOLE else float)(text) for column, text in texts.items()}
    except (ValueError, TypeError):
        return None


def read(folder, graph):
    """{level: row} of pruning.csv, without rows that cannot be read; {} where it is missing or another network's."""
    try:
        with open(os.path.join(folder, "pruning.csv"), encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(filter(None, map(_read_row, reader))) if reader.fieldnames == columns_of(graph.layers) else []
    except (OSError, UnicodeDecodeError, csv.Error):
        return {}
    return {row["level"]: row for row in rows}


def is_complete(folder, graph, last_level):
    """Whether report and summary are written up to the last level and no further."""
    levels = read_summary(os.path.join(folder, "summary.yaml")).get("levels") or []
    return set(read(folder, graph)) == set(range(last_level + 1)) and len(levels) == last_level + 1


def summarise(folder, config, rows):
    """Write summary.yaml: the levels without their layers."""
    levels = [{column: row[column] for column in COLUMNS} for row in rows]
    folder.summarise({"name": config.name, "arch": config.arch, "epochs_per_level": config.epochs, "levels": levels})


def draw(path, title, rows):
    """Draw top-1 on the test set against sparsity, one point per level, into a PNG file."""
    figure = new_figure(title, (6.4, 4.4))
    axes = figure.subplots()
    points = sorted((100 * row["sparsity"], row["top1"]) for row in rows)
    axes.axhline(rows[0]["top1"], color="0.6", linestyle="--", linewidth=1.2, label="level 0")
    axes.plot(*zip(*points, strict=True), marker="o", markersize=4.5, color="tab:blue", label="each level")
    axes.set_xlabel("weights that are zero (%)")
    axes.set_ylabel("top-1 accuracy on the test set (%)")
    clear_panel(axes)
    axes.legend(frameon=False)
    save_figure(figure, path)
