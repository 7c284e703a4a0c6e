"""A report on a packed model: one HTML page that holds all it shows, from the packed model and the run that it comes from."""

import base64
import html
import io
import os
import tempfile
from pathlib import Path

import yaml

from engine.metrics_file import read_metrics
from engine.plots import save_curves
from engine.run_folder import read_summary

WEIGHT_COLOUR, INPUT_COLOUR = "#3b6ea8", "#d08c3c"
ROW_HEIGHT = 0.21  # inches of the plot for each layer
STYLE = """
:root { color-scheme: light; font: 16px/1.5 system-ui, sans-serif; color: #1d232b; background: #fff; }
body { max-width: 64rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .7rem; margin: 0; }
.facts div { background: #f2f4f7; border-radius: .4rem; padding: .6rem .8rem; }
dt { color: #5a6572; font-size: .85rem; } dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { padding: .22rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e3e7ec; }
th:first-child, td:first-child { text-align: left; }
img { width: 100%; min-width: 40rem; height: auto; }
pre { background: #f2f4f7; padding: .8rem; border-radius: .4rem; overflow-x: auto; font-size: .85rem; }
"""


def write_report(packed, sizes, promised, checkpoint, content):
    """The page, as text.

    Args:
        packed: the PackedFile.
        sizes: {part: bytes} of it.
        promised: bytes of the weights as the search counts them.
        checkpoint: path of the checkpoint; its folder holds the summary and the metrics of the run, where there is one.
        content: what the checkpoint holds.
    """
    folder = Path(checkpoint).parent
    summary, rows = read_summary(folder / "summary.yaml"), read_metrics(folder / "metrics.csv")[1]
    if summary.get("epochs") != content.get("epoch"):  # its figures are those of the last epoch, and of the best
        best = summary.get("best")
        summary = best if isinstance(best, dict) and best.get("epoch") == content.get("epoch") else {}
    title = f"{packed.header['arch']}, packed"
    parts = [
        facts(packed, promised, sizes, summary), section("Where the bits went", plot(policy_figure(packed.layers))),
        section("Layers", layer_table(packed.layers)),
        section("What the file takes", size_table(sizes, packed.size, promised)), section("Training", training_plot(rows)),
        section("How it was made", commands(checkpoint, packed.path) + configuration(content["config"]))]
    return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style>\n</head>\n<body>\n'
            f"<h1>{html.escape(title)}</h1>\n{''.join(parts)}</body>\n</html>\n")


def section(title, body):
    """A part of the page; '' where it has nothing to show."""
    return f"<h2>{html.escape(title)}</h2>\n{body}\n" if body else ""


def facts(packed, promised, sizes, summary):
    """Accuracy, size and cost in one glance."""
    cost, count = packed.header["cost"], sum(layer.count for layer in packed.layers.values())
    zeros = sum(layer.zeros for layer in packed.layers.values())
    shown = {
        "top-1 on the test set": percent(summary.get("top1")), "top-5": percent(summary.get("top5")),
        "weights promised": f"{promised:,.0f} bytes", "weights packed": f"{sizes['packed weights']:,} bytes",
        "the file": f"{packed.size:,} bytes",
        "weights, against 32 bits": f"{4 * count / sizes['packed weights']:.2f}x smaller",
        "BitOPs": f"{cost['gbitops']:.3f} G", "pruned": percent(100 * cost["sparsity"] if "sparsity" in cost else None),
        "integers that are zero": percent(100 * zeros / count)}
    return '<dl class="facts">' + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in shown.items()
                                          if value is not None) + "</dl>\n"


def percent(value):
    """A number with its sign, None where there is none."""
    return f"{value:.2f} %" if isinstance(value, (int, float)) else None


def table(head, rows):
    """A table of text, its first column to the left; wider than the window, it scrolls by itself."""
    cells = [f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows]
    names = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return f'<div class="wide"><table>\n<tr>{names}</tr>\n' + "\n".join(cells) + "\n</table></div>"


def layer_table(layers):
    def row(name, layer):
        entering = "–" if layer.act_bits is None else f"{layer.act_bits}{' signed' if layer.act_signed else ''}"
        return (name, layer.kind, "×".join(map(str, layer.shape)), layer.bits, entering,
                f"{100 * layer.zeros / layer.count:.2f}", f"{layer.packed_bytes:,}",
                "dense" if layer.kept is None else "map")

    head = ("layer", "kind", "shape", "weight bits", "input bits", "zeros %", "bytes", "stored")
    return table(head, [row(name, layer) for name, layer in layers.items()])


def size_table(sizes, whole, promised):
    rows = [(part, f"{size:,}", f"{promised:,.0f}" if part == "packed weights" else "") for part, size in sizes.items()]
    return table(("part", "bytes", "promised"), [*rows, ("the file", f"{whole:,}", "")])


# ---------------------------------------------------------------------------------------------------------------------
# Pictures.


def policy_figure(layers):
    """A figure of two bars for each layer, the bits of its weight and of its input, in network order from the top."""
    from matplotlib.figure import Figure

    names = list(layers)
    figure = Figure(figsize=(9, 1.2 + ROW_HEIGHT * len(names)), layout="constrained")
    axes, places = figure.subplots(), range(len(names))
    axes.barh([place - 0.2 for place in places], [layer.bits for layer in layers.values()], 0.4, color=WEIGHT_COLOUR,
              label="weight")
    axes.barh([place + 0.2 for place in places], [layer.act_bits or 0 for layer in layers.values()], 0.4, color=INPUT_COLOUR,
              label="input")
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("bits")
    axes.set_xlim(0, 8)
    axes.margins(y=0.01)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    return figure


def plot(figure):
    """A figure as an image inside the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return image(buffer.getvalue(), "bits of each layer's weight and input")


def image(data, words):
    """A PNG file inside the page, described in words; wider than a narrow window, it scrolls by itself."""
    encoded = base64.b64encode(data).decode()
    return f'<div class="wide"><img alt="{html.escape(words)}" src="data:image/png;base64,{encoded}"></div>'


def training_plot(rows):
    """Loss and accuracy over the epochs, '' where the run left none."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "curves.png")
        if not save_curves(path, rows, ""):
            return ""
        return image(Path(path).read_bytes(), "loss and top-1 over the epochs")


# ---------------------------------------------------------------------------------------------------------------------
# How it was made.


def commands(checkpoint, packed):
    """The commands that train the network again, from the configuration below as args.yaml, and pack it."""
    return f"<pre>{html.escape(f'python main.py args.yaml{chr(10)}python export.py {checkpoint} --output {packed}')}</pre>\n"


def configuration(config):
    return f"<p>args.yaml:</p>\n<pre>{html.escape(yaml.safe_dump(config, sort_keys=False))}</pre>"
