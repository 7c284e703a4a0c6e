"""The plot of a table: a point per run, a bar at their mean; and of predictions against what came of them."""

import itertools

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")


def save_plot(path, title, rows, summary, plot, measure):
    """Draw `measure` against the axis plot['x'], one colour for each value of plot['colour'].

    Args:
        rows, summary: as report.py has them.
        plot: {x, colour (optional), label (of the y axis)}; x may name a measured column, which is then drawn to scale, or be
            a list of axes of which each row has one.
    """
    x, colour = plot["x"], plot.get("colour")
    axes_of_x = x if isinstance(x, list) else [x]

    def x_of(row):
        return next((str(row[axis]) for axis in axes_of_x if row.get(axis, "") != ""), "")

    series = list(dict.fromkeys(str(row.get(colour, "")) for row in summary)) if colour else [""]
    names = None if is_number(x_of(summary[0])) else list(dict.fromkeys(map(x_of, summary)))
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for index, name in enumerate(series):
        shift = (index - (len(series) - 1) / 2) * 0.8 / len(series) if names else 0
        place = (lambda row, shift=shift: names.index(x_of(row)) + shift) if names else lambda row: float(x_of(row))
        own = [row for row in rows if not colour or str(row.get(colour, "")) == name]
        means = sorted((place(row), row[measure]) for row in summary if not colour or str(row.get(colour, "")) == name)
        tint = COLOURS[index % len(COLOURS)]
        axes.scatter([place(row) for row in own], [float(row[measure]) for row in own], s=14, color=tint, alpha=0.5)
        axes.plot(*zip(*means, strict=True), "_" if names else "-", markersize=16, markeredgewidth=2.5, color=tint, label=name)
    if names:
        crowded = sum(map(len, names)) > 80
        axes.set_xticks(range(len(names)), names, rotation=30 if crowded else 0, ha="right" if crowded else "center")
    axes.set(title=title, ylabel=plot.get("label", measure), xlabel="" if names else plot.get("x_label", x))
    axes.grid(axis="y", alpha=0.3)
    if colour:
        axes.legend(frameon=False, ncols=2)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def save_scatter(path, title, rows, summary):
    """Draw top-1 against the sums of each kind of indicators, of predictions as report.py has them; one panel for each."""
    shape = 2, -(-len(summary) // 2)
    figure, panels = pyplot.subplots(*shape, figsize=(11, 6), sharey=True, squeeze=False, layout="constrained")
    for axes, line in itertools.zip_longest(panels.flat, summary):
        if line is None:
            axes.axis("off")
            continue
        axes.scatter([row[f"sum_{line['indicators']}"] for row in rows], [row["top1"] for row in rows], s=14, color=COLOURS[0])
        axes.set(title=f"{line['indicators']}: {line['top1_rank']:.2f} ± {line['top1_rank_sd']:.2f}",
                 xlabel="sum of indicators")
        axes.grid(alpha=0.3)
    for axes in panels[:, 0]:
        axes.set_ylabel("top-1 on the test set in %")
    figure.suptitle(f"{title}: rank correlation with top-1")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True
