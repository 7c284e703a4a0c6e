"""The plots of a run: loss and accuracy over the epochs."""

from util.figures import clear_panel, new_figure, save_figure, spread_colours

SPLIT_STYLES = {
    "train": {"linestyle": "--", "linewidth": 1.2, "alpha": 0.75},
    "val": {"linestyle": "-", "linewidth": 1.8, "marker": "o", "markersize": 3.5},
}
PANELS = (("loss", "loss"), ("top1", "top-1 accuracy (%)"))
PLAIN_COLOUR = "tab:blue"
RANDOM_COLOUR = "0.55"  # a grey, outside the order of the bit-widths


def save_curves(path, rows, title):
    """Draw loss and top-1 over the epochs, one line per split and candidate bit-width, into a PNG file.

    Args:
        rows: dicts with epoch (int), split, bits (label or '') and the numbers loss and top1, or None where missing.

    Returns:
        False where there is nothing to draw, and no file is written.
    """
    figure = draw_curves(rows, title)
    if figure is not None:
        save_figure(figure, path)
    return figure is not None


def draw_curves(rows, title):
    """The figure that save_curves writes, None where there is nothing to draw."""
    rows = [row for row in rows if row["split"] in SPLIT_STYLES]
    if not rows:
        return None
    figure = new_figure(title, (11, 4.4))
    colours = colour_labels({row["bits"] for row in rows})
    for axes, (key, name) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        draw_panel(axes, rows, key, name, colours)
    add_legend(figure, colours, [split for split in SPLIT_STYLES if any(row["split"] == split for row in rows)])
    return figure


def colour_labels(labels):
    """Give each bit-width a colour, dark for wide and bright for narrow; {label: colour}, highest first."""
    bits = sorted((label for label in labels if label.isdecimal()), key=int, reverse=True)
    others = sorted(label for label in labels if not label.isdecimal() and label not in ("", "mean", "random"))
    colours = spread_colours(bits + others)
    if "random" in labels:
        colours["random"] = RANDOM_COLOUR
    for whole in ("mean", ""):
        if whole in labels:
            colours[whole] = PLAIN_COLOUR if len(labels) == 1 else "black"
    return colours


def draw_panel(axes, rows, key, name, colours):
    """Draw one figure over the epochs, one line for each bit-width and split."""
    from matplotlib.ticker import MaxNLocator

    for label, colour in colours.items():
        for split, style in SPLIT_STYLES.items():
            points = sorted((row["epoch"], row[key]) for row in rows
                            if row["bits"] == label and row["split"] == split and row[key] is not None)
            if points:
                # One point makes no line, so it needs a marker to be seen.
                single = {"marker": "o", "markersize": 3.5} if len(points) == 1 else {}
                axes.plot(*zip(*points, strict=True), color=colour, **{**style, **single})
    axes.set_xlabel("epochs completed")
    axes.set_ylabel(name)
    epochs = {row["epoch"] for row in rows}
    if len(epochs) == 1:
        axes.set_xticks(list(epochs))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02)
    clear_panel(axes)


def add_legend(figure, colours, splits):
    """Say beside the panels what the line styles (splits) and the colours (bit-widths) mean."""
    from matplotlib.lines import Line2D

    plain = PLAIN_COLOUR if list(colours) == [""] else "black"
    handles = [Line2D([], [], color=plain, label=split, **SPLIT_STYLES[split]) for split in splits]
    handles += [Line2D([], [], color=colour, linewidth=3, label=name_label(label))
                for label, colour in colours.items() if len(colours) > 1 or label]
    figure.legend(handles=handles, loc="outside right center", frameon=False)


def name_label(label):
    """'6' -> '6 bits', 'random' -> 'random bits', '' -> 'all'."""
    if not label:
        return "all"
    return f"{label} bits" if label.isdecimal() or label == "random" else label
