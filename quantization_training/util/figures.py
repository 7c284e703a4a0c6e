"""What all plots share: figures without pyplot, plain panels, a colour for each bit-width, and the files."""

import io
import textwrap

from util.exchange import write_atomically

DPI = 120
BRIGHTEST = 0.88  # the colour map's light end is hard to see on white
STYLE = {"hatch.linewidth": 0.7, "svg.hashsalt": "limpqp", "svg.fonttype": "path"}  # the salt: the same ids every time


def new_figure(title, size):
    """An empty figure, its size in inches, with a title above."""
    # The object interface, because pyplot keeps figures and a backend for the whole process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(title, int(size[0] * 9))), fontsize=13, parse_math=False)
    return figure


def rendered(figure, kind="png"):
    """The bytes of a figure as 'png' or 'svg', the same for the same figure."""
    import matplotlib

    plot = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(plot, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return plot.getvalue()


def save_figure(figure, path):
    """Write a figure into a file, whose ending, .png or .svg, says the format."""
    write_atomically(path, rendered(figure, str(path).rpartition(".")[2].lower()))


def spread_colours(bits):
    """Give each of these bit-widths a colour of its own, from dark to bright; {bit-width: colour} in their order."""
    from matplotlib import colormaps

    spread = BRIGHTEST / max(len(bits) - 1, 1)
    return {bit: colormaps["viridis"](index * spread) for index, bit in enumerate(bits)}


def clear_panel(axes, grid="both"):
    """A grid behind what is drawn, along the axis 'x', 'y' or 'both', or none (None), and no frame."""
    if grid:
        axes.grid(axis=grid, color="0.9")
        axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
