"""The plots of a search: a policy layer by layer beside its indicators, and the trade-off curve of a sweep."""

import math

from util.figures import clear_panel, new_figure, spread_colours

KINDS = {"weight": "weights", "act": "activations"}

# Lengths in inches.
PER_LAYER = 0.24
NARROWEST, WIDEST = 10, 30  # of the whole plot
BESIDE = 2.6  # taken by the axis on the left and the legends on the right
PER_NAME = 0.13  # a layer's name, upright, in the small print
PER_CANDIDATE, LOWEST_MAP = 0.26, 0.55
BITS_HEIGHT, SHARES_HEIGHT, HEADINGS_HEIGHT = 3.0, 1.5, 2.9
SEEN_APART = 0.06  # layers closer than this get neither hatches nor lines between cells
COLOUR_BAR = 0.14  # its width
PER_TICK = 0.14

LONGEST_NAME = 32
SMALL = 7.5
SIZE_COLOUR, BITOPS_COLOUR = "#0072b2", "#e69f00"  # told apart by colour-blind readers too
NOT_POSITIVE_COLOUR = "0.72"
FIXED_COLOUR = "0.9"
MAP_DECADES = 4  # the heat map's colours reach this far below the largest indicator


def policy_figure(arch, shares, candidates, indicators, erased, title, fixed=frozenset()):
    """The bits of each layer, its shares of size and BitOPs, and its indicators, in panels one below the other.

    Args:
        arch: name of the network.
        shares: {layer: cost.Share} of all layers in network order.
        candidates: the bit-widths that were searched.
        indicators: {'weight': {layer: {bit: value}}, 'act': likewise}; fixed layers have none.
        erased: {'weight': {layer: [bit]}, 'act': likewise}, the indicators that break the order.
        title: what stands above the plot.
        fixed: names of the layers that were not searched.
    """
    width = min(max(BESIDE + PER_LAYER * len(shares), NARROWEST), WIDEST)
    pitch = (width - BESIDE) / len(shares)
    map_height = max(PER_CANDIDATE * len(candidates), LOWEST_MAP)
    heights = [BITS_HEIGHT, SHARES_HEIGHT, map_height, map_height]
    figure = new_figure(title, (width, sum(heights) + HEADINGS_HEIGHT))
    bits_axes, share_axes, *map_axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    draw_bits(bits_axes, shares, candidates, fixed, pitch)
    draw_shares(share_axes, shares.values())
    cell = min(pitch, map_height / len(candidates))
    for axes, kind in zip(map_axes, KINDS, strict=True):
        draw_indicators(axes, list(shares), sorted(candidates), indicators[kind], erased[kind], kind, cell)
    for axes in (bits_axes, share_axes, *map_axes):
        for index, name in enumerate(shares):
            if name in fixed:
                axes.axvspan(index - 0.5, index + 0.5, color=FIXED_COLOUR, linewidth=0, zorder=0)
    name_layers(map_axes[-1], arch, list(shares), pitch)
    return figure


def draw_bits(axes, shares, candidates, fixed, pitch):
    """Two bars for each layer, on either side of one line: weights upwards, activations downwards and hatched."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    hatch = "///" if pitch >= SEEN_APART else None
    weight_bits = [share.weight_bits for share in shares.values()]
    act_bits = [share.act_bits for share in shares.values()]
    colours = spread_colours(sorted({*candidates, *weight_bits, *act_bits}, reverse=True))
    for bits, sign, pattern in ((weight_bits, 1, None), (act_bits, -1, hatch)):
        axes.bar(range(len(bits)), [sign * bit for bit in bits], width=0.84 if hatch else 1, hatch=pattern,
                 color=[colours[bit] for bit in bits], edgecolor="white", linewidth=0)
    top = max(colours)
    marked = [index for index, name in enumerate(shares) if name in fixed]
    axes.scatter(marked, [top * 1.12] * len(marked), marker="v", s=22, color="black", zorder=3, clip_on=False)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylim(-top * 1.06, top * 1.2)
    ticks = apart([*colours, 0], PER_TICK * top * 2.26 / BITS_HEIGHT)
    axes.set_yticks([*ticks, *(-tick for tick in ticks if tick)], [*ticks, *(tick for tick in ticks if tick)])
    finish_panel(axes, "bit-width of each layer: weights upwards, activations downwards", "bits")
    handles = [Patch(color=colour, label=f"{bit} bit" + "s" * (bit > 1)) for bit, colour in colours.items()]
    if hatch:
        handles += [Patch(facecolor="0.45", label="weights"),
                    Patch(facecolor="0.45", edgecolor="white", linewidth=0, hatch=hatch, label="activations")]
    if fixed:
        handles.append(Line2D([], [], linestyle="", marker="v", markersize=5, color="black", label="fixed, not searched"))
    add_legend_beside(axes, handles)


def apart(descending, distance):
    """The numbers without those that lie closer than `distance` to the last one kept."""
    kept = []
    for number in descending:
        if not kept or kept[-1] - number >= distance:
            kept.append(number)
    return kept


def draw_shares(axes, shares):
    """Two bars for each layer: what part of the network's size and of its BitOPs it takes."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for values, shift, colour, label in (([share.size for share in shares], -0.21, SIZE_COLOUR, "size"),
                                         ([share.bitops for share in shares], 0.21, BITOPS_COLOUR, "BitOPs")):
        axes.bar([index + shift for index in range(len(values))], values, width=0.42, color=colour, label=label)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g}%"))
    finish_panel(axes, "share of the whole network", "share")
    add_legend_beside(axes, axes.containers)


def draw_indicators(axes, names, candidates, table, erased, kind, cell):
    """A heat map of indicators, {layer: {bit: value}}, candidates over layers; those erased or not positive are marked.

    The highest of the candidates, which ascend, stands on top. cell: the shorter side of a cell, in inches.
    """
    import numpy as np

    values = np.array([[table.get(name, {}).get(bit, math.nan) for name in names] for bit in candidates])
    mesh, lowest, highest = paint(axes, values, lines=cell >= SEEN_APART)
    if highest:
        add_colour_bar(axes, mesh, lowest, highest, values)
    mark_suspects(axes, cell, {
        "erased": [(place, row) for place, name in enumerate(names) for row, bit in enumerate(candidates)
                   if bit in erased.get(name, ())],
        "not positive": [(place, row) for row, place in np.argwhere(values <= 0)],
    })
    axes.set_yticks(range(len(candidates)), candidates)
    finish_panel(axes, f"indicators of the {KINDS[kind]}, on a logarithmic scale", "bits", grid=None)


def mark_suspects(axes, cell, places):
    """A cross or a ring on cells of the heat map, and a legend that says what they mean; places: {mark: [(x, y)]}."""
    cell *= 72  # in points, as markers are
    styles = {
        "erased": {"marker": "X", "markersize": min(max(0.5 * cell, 3), 8), "markerfacecolor": "white",
                   "markeredgewidth": min(0.05 * cell, 0.7), "zorder": 4},
        "not positive": {"marker": "o", "markersize": min(max(0.78 * cell, 3), 12), "markerfacecolor": "none",
                         "markeredgewidth": min(0.06 * cell, 1), "zorder": 3},
    }
    for mark, found in places.items():
        if found:
            axes.plot(*zip(*found, strict=True), linestyle="", markeredgecolor="black", label=mark, **styles[mark])
    if axes.lines:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=SMALL, borderpad=0.1,
                    handletextpad=0.1)


def paint(axes, values, lines):
    """Colour the cells, those not positive grey; (the mesh, the smallest and the largest value of the scale, or 0 and 0)."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    positive = values[values > 0]
    highest = positive.max() if positive.size else 0
    lowest = max(positive.min(), highest / 10**MAP_DECADES) if positive.size else 0
    scale = LogNorm(lowest / 1.01, highest * 1.01) if highest else LogNorm(1, 10)
    shown = np.where(values > 0, np.maximum(values, lowest), np.where(values <= 0, scale.vmin / 2, math.nan))
    colours = colormaps["magma_r"].with_extremes(under=NOT_POSITIVE_COLOUR, bad=(0, 0, 0, 0))
    edges = {"edgecolors": "white", "linewidth": 0.6} if lines else {"edgecolors": "face", "linewidth": 0.1}
    rows, columns = values.shape
    mesh = axes.pcolormesh(np.arange(columns + 1) - 0.5, np.arange(rows + 1) - 0.5, np.ma.masked_invalid(shown),
                           norm=scale, cmap=colours, zorder=1, **edges)
    return mesh, lowest, highest


def add_colour_bar(axes, mesh, lowest, highest, values):
    import numpy as np

    inch = 1 / (axes.figure.get_figwidth() - BESIDE)  # the panel is 1 wide
    bar = axes.figure.colorbar(mesh, cax=axes.inset_axes([1 + 0.1 * inch, 0, COLOUR_BAR * inch, 1]))
    ticks = [lowest, math.sqrt(lowest * highest), highest] if highest > 1.1 * lowest else [highest]
    labels = [f"{tick:.2g}" for tick in ticks]
    if np.any((values > 0) & (values < lowest)):
        labels[0] = f"≤ {labels[0]}"
    bar.set_ticks(ticks, labels=labels)
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=SMALL)
    bar.outline.set_visible(False)


def name_layers(axes, arch, names, pitch):
    """Names below the layers, all of them or every second, third, ... where they would touch each other."""
    step = math.ceil(PER_NAME / pitch)
    axes.set_xticks(range(0, len(names), step), [shortened(name) for name in names[::step]], rotation=90, fontsize=SMALL,
                    parse_math=False)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_xlabel(f"layers of {arch} in network order" + (f", one in {step} named" if step > 1 else ""),
                    parse_math=False)


def shortened(name):
    """The name, without its middle where it is long."""
    if len(name) <= LONGEST_NAME:
        return name
    half = (LONGEST_NAME - 1) // 2
    return f"{name[:half]}…{name[-half:]}"


def finish_panel(axes, heading, y_label, grid="y"):
    axes.set_title(heading, loc="left", fontsize=10)
    axes.set_ylabel(y_label)
    axes.tick_params(labelsize=SMALL + 0.5)
    axes.tick_params(axis="x", length=2)
    clear_panel(axes, grid)


def add_legend_beside(axes, handles):
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=SMALL + 0.5)


def frontier_figure(rows, x_label, y_label, title):
    """A trade-off curve; rows: one dict for each point: the numbers x and y, and label, a text or ''.

    A label is left out where it would cover another one or the curve.
    """
    figure = new_figure(title, (8.5, 5.2))
    axes = figure.subplots()
    rows = sorted(rows, key=lambda row: (row["x"], row["y"]))
    axes.plot([row["x"] for row in rows], [row["y"] for row in rows], color=SIZE_COLOUR, linewidth=1.6, marker="o",
              markersize=5, markeredgecolor="white", markeredgewidth=0.6)
    axes.set_xlabel(x_label, parse_math=False)
    axes.set_ylabel(y_label, parse_math=False)
    axes.margins(0.06, 0.1)
    clear_panel(axes)
    place_labels(figure, axes, rows)
    return figure


def place_labels(figure, axes, rows):
    """Write each point's label on the first side of it where it covers neither the curve nor another label, and its middle
    is closer to its own point than to others."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()  # so that the layout, and with it where things lie, is known
    curve = axes.lines[0].get_path().transformed(axes.transData)
    room, taken = axes.get_window_extent(renderer), []
    sides = [(0, 6, "center", "bottom"), (5, 5, "left", "bottom"), (-5, 5, "right", "bottom"), (7, 0, "left", "center"),
             (-7, 0, "right", "center"), (0, -6, "center", "top"), (5, -5, "left", "top"), (-5, -5, "right", "top")]
    for index, row in enumerate(rows):
        for dx, dy, across, along in sides if row["label"] else ():
            text = axes.annotate(row["label"], (row["x"], row["y"]), (dx, dy), textcoords="offset points", ha=across,
                                 va=along, fontsize=SMALL, color="0.2", parse_math=False)
            text.set_in_layout(False)
            box = text.get_window_extent(renderer).padded(1.5)
            inside = room.count_contains(box.corners()) == 4
            middle = (box.min + box.max) / 2
            is_nearest = np.hypot(*(curve.vertices - middle).T).argmin() == index
            if inside and is_nearest and not curve.intersects_bbox(box, filled=False) and not box.count_overlaps(taken):
                taken.append(box)
                break
            text.remove()
