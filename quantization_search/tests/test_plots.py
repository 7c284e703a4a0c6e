"""The plots of a search: what stands in them, that nothing overlaps, and the bytes of the files."""

import itertools
import os
import pathlib
import struct
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ElementTree

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

import plots
from cost import Share
from util.figures import DPI, rendered, save_figure

STAGE = pathlib.Path(__file__).parents[1]
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def policy(layers=6, candidates=(6, 4, 3, 2), fixed_ends=True):
    """The arguments of policy_figure for a made-up network, with three erased indicators and two not positive."""
    names = [f"stage{i // 6}.block{i % 6}.conv" for i in range(layers)]
    fixed = frozenset({names[0], names[-1]} if fixed_ends else ())
    searched = [name for name in names if name not in fixed]
    weight_bits = {name: candidates[i % len(candidates)] for i, name in enumerate(names)}
    act_bits = {name: candidates[i // 2 % len(candidates)] for i, name in enumerate(names)}
    for bits in (weight_bits, act_bits):
        bits.update(dict.fromkeys(fixed, 8))
    indicators = {kind: {name: {bit: scale * (1 + i) / bit for bit in candidates} for i, name in enumerate(searched)}
                  for kind, scale in (("weight", 0.01), ("act", 0.1))}
    indicators["weight"][searched[1]][candidates[-1]] = -0.5
    indicators["weight"][searched[2]][candidates[0]] = 0.0
    erased = {"weight": {searched[0]: list(candidates[:1]), searched[1]: list(candidates[-1:])},
              "act": {searched[-1]: list(candidates[-1:])}}
    shares = {name: Share(1, weight_bits[name], act_bits[name], (i + 1) / sum(range(layers + 1)), 1 / layers, 0.0)
              for i, name in enumerate(names)}
    return {"arch": "made_up", "shares": shares, "candidates": list(candidates), "indicators": indicators, "erased": erased,
            "title": "A policy", "fixed": fixed}


def points(count=20):
    return [{"x": 8 + 0.4 * i, "y": 1.2**i, "label": f"point {i}"} for i in range(count)]


def marked(axes, label):
    """Where the marks of this name lie in a panel."""
    return [tuple(map(int, place)) for line in axes.lines if line.get_label() == label for place in line.get_xydata()]


def laid_out(figure):
    """The renderer of a figure whose layout is done."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    return renderer


def overlapping(boxes):
    return [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]


# ---------------------------------------------------------------------------------------------------------------------
# Files.


@pytest.mark.parametrize("name", ["plot.png", "new/plot.PNG"])
def test_png_by_the_ending_in_the_size_of_the_figure(tmp_path, name):
    save_figure(plots.policy_figure(**policy()), tmp_path / name)
    data = (tmp_path / name).read_bytes()
    assert data.startswith(PNG_SIGNATURE)
    width, height = plots.policy_figure(**policy()).get_size_inches() * DPI
    assert struct.unpack(">II", data[16:24]) == (int(width), int(height))


def test_svg_by_the_ending_is_well_formed(tmp_path):
    arguments = policy()
    save_figure(plots.policy_figure(**arguments | {"title": "sizes < 3 MB & $x_1$"}), tmp_path / "policy.svg")
    save_figure(plots.frontier_figure(points(), "ratio", "objective", "A sweep"), tmp_path / "frontier.svg")
    for name in ("policy.svg", "frontier.svg"):
        root = ElementTree.parse(tmp_path / name).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert sum(element.tag.endswith("}path") for element in root.iter()) > 20


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_same_input_gives_the_same_bytes(tmp_path, ending):
    written = set()
    for name in ("first", "second"):
        save_figure(plots.policy_figure(**policy()), tmp_path / f"{name}.{ending}")
        save_figure(plots.frontier_figure(points(), "x", "y", "A sweep"), tmp_path / f"{name}_sweep.{ending}")
        written.add(((tmp_path / f"{name}.{ending}").read_bytes(), (tmp_path / f"{name}_sweep.{ending}").read_bytes()))
    assert len(written) == 1
    assert all(b"dc:date" not in data for data in written.pop())
    assert len(os.listdir(tmp_path)) == 4


def test_importing_the_module_does_not_import_matplotlib():
    check = "import plots, sys; sys.exit('matplotlib' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=STAGE).returncode == 0


# ---------------------------------------------------------------------------------------------------------------------
# The policy.


@pytest.mark.parametrize("candidates", [(4,), (8, 2), tuple(range(16, 1, -1))])
def test_every_candidate_has_its_own_colour_on_the_bars_and_in_the_legend(candidates):
    arguments = policy(layers=len(candidates) + 3, candidates=candidates, fixed_ends=False)
    axes = plots.policy_figure(**arguments).axes[0]
    colours = {bit: set() for bit in candidates}
    for bars in axes.containers:
        for bar in bars:
            colours[abs(bar.get_height())].add(to_hex(bar.get_facecolor()))
    assert all(len(found) == 1 for found in colours.values())
    assert len(set.union(*colours.values())) == len(candidates)
    legend = axes.get_legend()
    named = {text.get_text(): to_hex(handle.get_facecolor())
             for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)}
    assert {f"{bit} bits": min(found) for bit, found in colours.items()}.items() <= named.items()


@pytest.mark.parametrize("layers", [5, 20])
def test_two_bars_for_each_layer_as_tall_as_its_bits_and_its_shares(layers):
    arguments = policy(layers)
    bits, shares = plots.policy_figure(**arguments).axes[:2]
    expected = arguments["shares"].values()
    weights, acts = ([bar.get_height() for bar in bars] for bars in bits.containers)
    assert weights == [share.weight_bits for share in expected]
    assert acts == [-share.act_bits for share in expected]
    assert not any(bar.get_hatch() for bar in bits.containers[0]) and all(bar.get_hatch() for bar in bits.containers[1])
    for bars, key in zip(shares.containers, ("size", "bitops"), strict=True):
        assert [bar.get_height() for bar in bars] == pytest.approx([getattr(share, key) for share in expected])


def test_fixed_layers_are_marked_and_have_no_indicators():
    axes = plots.policy_figure(**policy(9)).axes
    assert axes[0].collections[0].get_offsets()[:, 0].tolist() == [0, 8]
    for panel in axes[2:4]:
        cells = panel.collections[0].get_array()
        assert cells.mask[:, [0, 8]].all() and not cells.mask[:, 1:8].any()


def test_erased_and_not_positive_indicators_are_marked_in_their_cells():
    weights, acts = plots.policy_figure(**policy()).axes[2:4]
    # the highest of the four candidates stands in row 3, the lowest in row 0
    assert sorted(marked(weights, "erased")) == [(1, 3), (2, 0)]
    assert marked(acts, "erased") == [(4, 0)]
    assert sorted(marked(weights, "not positive")) == [(2, 0), (3, 3)]
    assert marked(acts, "not positive") == []
    below = weights.collections[0].get_array() < weights.collections[0].norm.vmin
    assert below.sum() == 2 and below[0, 2] and below[3, 3]  # these take the grey below the scale
    assert {text.get_text() for text in acts.get_legend().get_texts()} == {"erased"}


@pytest.mark.parametrize("value", [-1.0, 1.0])
def test_indicators_all_alike_or_none_positive_can_be_drawn(value):
    arguments = policy()
    for rows in arguments["indicators"].values():
        for row in rows.values():
            row.update(dict.fromkeys(row, value))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rendered(plots.policy_figure(**arguments), "png").startswith(PNG_SIGNATURE)


@pytest.mark.parametrize("layers", [10, 54, 150])
def test_names_and_panels_do_not_overlap_and_the_width_is_bounded(layers):
    figure = plots.policy_figure(**policy(layers, candidates=(8, 7, 6, 5, 4, 3, 2)))
    renderer = laid_out(figure)
    assert figure.get_figwidth() <= plots.WIDEST
    axes = figure.axes
    names = [label.get_window_extent(renderer) for label in axes[3].get_xticklabels()]
    assert len(names) >= min(layers, 100) and not overlapping(names)
    headings = [text for panel in axes[:4] for text in (panel._left_title, panel.get_legend()) if text]
    assert not overlapping([text.get_window_extent(renderer) for text in headings])
    for panel in axes[:4]:
        ticks = [label.get_window_extent(renderer) for label in panel.get_yticklabels()]
        assert not overlapping(ticks)
        assert min(box.x0 for box in ticks) >= 0
    assert all(panel.get_legend().get_window_extent(renderer).x1 <= figure.bbox.x1 for panel in axes[:4])


def test_hundreds_of_layers_are_named_in_part_and_the_axis_says_so():
    figure = plots.policy_figure(**policy(300, candidates=(4, 2)))
    assert figure.get_figwidth() == plots.WIDEST
    axes = figure.axes[3]
    step = axes.get_xticks()[1]
    assert step > 1 and axes.get_xlabel().endswith(f"one in {step} named")
    assert [label.get_text() for label in axes.get_xticklabels()] == list(policy(300)["shares"])[::int(step)]


def test_names_are_taken_as_they_are_and_shortened_in_the_middle():
    assert plots.shortened("layer1.$x_1$") == "layer1.$x_1$"
    short = plots.shortened("a" * 40 + "b" * 40)
    assert len(short) <= plots.LONGEST_NAME and short.startswith("aaa") and short.endswith("bbb")
    arguments = policy(3, candidates=(4, 2), fixed_ends=False)
    labels = plots.policy_figure(**arguments).axes[3].get_xticklabels()
    assert not any(label.get_parse_math() for label in labels)


# ---------------------------------------------------------------------------------------------------------------------
# The sweep.


def test_the_curve_goes_through_the_points_in_order_of_x():
    axes = plots.frontier_figure(points()[::-1], "ratio", "objective", "A sweep").axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[row["x"], row["y"]] for row in points()]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("ratio", "objective")


@pytest.mark.parametrize("count", [1, 40])
def test_labels_cover_neither_each_other_nor_a_point(count):
    figure = plots.frontier_figure(points(count), "ratio", "objective", "A sweep")
    axes = figure.axes[0]
    renderer = laid_out(figure)
    boxes = [text.get_window_extent(renderer) for text in axes.texts]
    assert len(boxes) >= min(count, 5) and not overlapping(boxes)
    places = axes.transData.transform(axes.lines[0].get_xydata())
    assert not any(box.count_contains(places) for box in boxes)
    assert {text.get_text() for text in axes.texts} <= {row["label"] for row in points(count)}
    for text in axes.texts:
        row = points(count)[int(text.get_text().split()[1])]
        assert text.xy == (row["x"], row["y"])


def test_points_without_labels_get_none():
    rows = [{**row, "label": ""} for row in points()]
    assert not plots.frontier_figure(rows, "x", "y", "A sweep").axes[0].texts
