"""A report on a packed model: one HTML page that needs no other file, from the packed model and the run that it comes from."""

import base64
import html
from pathlib import Path

import yaml

from engine.metrics_file import read_metrics
from engine.plots import draw_curves
from engine.run_folder import read_summary
from util.figures import clear_panel, new_figure, rendered

WEIGHT_COLOUR, INPUT_COLOUR = "#3b6ea8", "#d08c3c"
ROW_HEIGHT = 0.21  # inches of the plot for each layer
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 0 auto; padding: 1rem; }}
pre {{ background: #f2f4f7; padding: .8rem; overflow-x: auto; font-size: .85rem; }}
img {{ width: 100%; }}
</style></head><body>
<h1>{title}</h1>
{body}</body></html>
"""


def make_page(packed, layers, sizes, checkpoint, content):
    """The page about a PackedFile, as text.

    Args:
        layers, sizes: what export.py prints of its layers and of what it takes.
        checkpoint: its path; in its folder lie summary and metrics of the run, where there is one. content: what it holds.
    """
    folder = Path(checkpoint).parent
    summary, rows = read_summary(folder / "summary.yaml"), read_metrics(folder / "metrics.csv")[1]
    if summary.get("epochs") != content.get("epoch"):  # its figures are those of the last epoch, and of the best
        best = summary.get("best")
        summary = best if isinstance(best, dict) and best.get("epoch") == content.get("epoch") else {}
    curves = draw_curves(rows, "")
    commands = f"python main.py args.yaml\npython export.py {checkpoint} --output {packed.path}"
    configuration = yaml.safe_dump(content["config"], sort_keys=False)
    parts = {
        "Accuracy and cost": text(describe(packed, summary)), "Size": text(sizes),
        "Bits of each layer's weight and input": image(policy_figure(packed.layers), "bits of each layer's weight and input"),
        "Layers": text(layers),
        "Training": curves and image(curves, "loss and top-1 over the epochs"),
        "How it was made, from the configuration below as args.yaml": text(commands) + text(configuration)}
    body = "".join(f"<h2>{html.escape(title)}</h2>\n{part}\n" for title, part in parts.items() if part)
    return PAGE.format(title=html.escape(f"{packed.header['arch']}, packed"), body=body)


def text(words):
    return f"<pre>{html.escape(words)}</pre>"


def image(figure, words):
    """A figure inside the page, described in words."""
    return f'<img alt="{html.escape(words)}" src="data:image/png;base64,{base64.b64encode(rendered(figure)).decode()}">'


def describe(packed, summary):
    """Accuracy, BitOPs and sparsity, a line each, of what is known."""
    cost, layers = packed.header["cost"], packed.layers.values()
    scores = {words: summary.get(key) for words, key in (("top-1 on the test set", "top1"), ("top-5", "top5"))}
    lines = [f"{words}: {value:.2f} %" for words, value in scores.items() if isinstance(value, (int, float))]
    lines.append(f"BitOPs: {cost['gbitops']:.3f} G")
    if "sparsity" in cost:
        lines.append(f"pruned: {100 * cost['sparsity']:.2f} %")
    zeros = sum(layer.zeros for layer in layers) / sum(layer.count for layer in layers)
    return "\n".join([*lines, f"integers that are zero: {100 * zeros:.2f} %"])


def policy_figure(layers):
    """A figure of two bars for each layer, the bits of its weight and of its input, in network order from the top."""
    figure = new_figure("", (9, 1.2 + ROW_HEIGHT * len(layers)))
    axes = figure.subplots()
    for shift, colour, label, bits in ((-0.2, WEIGHT_COLOUR, "weight", [layer.bits for layer in layers.values()]),
                                       (0.2, INPUT_COLOUR, "input", [layer.act_bits or 0 for layer in layers.values()])):
        axes.barh([index + shift for index in range(len(bits))], bits, 0.4, color=colour, label=label)
    axes.set_yticks(range(len(layers)), list(layers), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("bits")
    axes.set_xlim(0, 8)
    axes.margins(y=0.01)
    clear_panel(axes, "x")
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    return figure
