"""What the kind of indicators decides, floors, and indicators by depth."""

import csv
import itertools

import pytest
from conftest import content
from hypothesis import given, settings
from hypothesis import strategies as st
from test_search import flags, refused

import ilp
import search
from baselines import by_depth
from util.exchange import read_policy

LAYERS = [f"block.conv{i}" for i in (1, 2, 3, 4)]
BUDGET = "--wb 3 --ab 3 --cr 0 --bops True"


def run(capsys, path, words, output):
    search.main(["--i", path, *flags(words), "--output", str(output)])
    return capsys.readouterr().out, read_policy(str(output))


@pytest.mark.parametrize(("kind", "words", "same_as"), [
    (None, "", "--alpha 2 --outliers erase"), ("steps", "", "--alpha 2 --outliers erase"),
    ("fisher", "", "--alpha 1 --outliers isotonic"), ("fisher", "--alpha 3", "--alpha 3 --outliers isotonic"),
    ("steps", "--outliers keep", "--alpha 2 --outliers keep"), ("kl", "--outliers erase", "--alpha 1 --outliers erase")])
def test_the_kind_decides_alpha_and_outliers_unless_they_are_typed(capsys, save, tmp_path, kind, words, same_as):
    value = content()
    row = value["weight"][f"module.{LAYERS[1]}"]
    row["3"] = row["4"] * 0.5  # an outlier
    plain = save(value, "plain.pkl")
    own = save({**value, **({"kind": kind} if kind else {})}, "own.pkl")
    printed, policy = run(capsys, own, f"{BUDGET} {words}", tmp_path / "own.yaml")
    _, wanted = run(capsys, plain, f"{BUDGET} {same_as}", tmp_path / "wanted.yaml")
    assert policy == wanted
    assert (f"indicators of the kind '{kind}'" in printed) == (kind not in (None, "steps"))


def test_zeros_are_right_where_they_say_what_bits_cost(capsys, save, tmp_path):
    value = content()
    for kind in ("weight", "act"):
        for row in value[kind].values():
            row[max(row, key=int)] = 0.0
    assert "not positive" in run(capsys, save(value, "steps.pkl"), BUDGET, tmp_path / "p.yaml")[0]
    printed = run(capsys, save({**value, "kind": "kl"}, "kl.pkl"), BUDGET, tmp_path / "p.yaml")[0]
    assert "not positive" not in printed and "negative" not in printed
    value["act"][f"module.{LAYERS[0]}"]["4"] = -1.0
    assert "1 of 12 act indicators are negative" in run(capsys, save({**value, "kind": "kl"}, "n.pkl"), BUDGET,
                                                        tmp_path / "p.yaml")[0]


@pytest.mark.parametrize("kind", [3, "", "a b", None, ["kl"]])
def test_a_kind_that_is_no_word_is_refused(capsys, save, kind):
    path = save({**content(), "kind": kind})
    assert f"{path}: kind: found {kind!r}, expected a word" in refused(capsys, search.main, ["--i", path])


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1, 50, 1e9])
def test_alpha_auto_brings_mean_bits_together(capsys, save, tmp_path, scale):
    value = content()
    value["weight"] = {name: {bit: scale * step for bit, step in row.items()} for name, row in value["weight"].items()}
    path = save(value)
    printed, policy = run(capsys, path, f"{BUDGET} --alpha auto", tmp_path / "auto.yaml")
    assert f"alpha {policy['alpha']:g} brings" in printed
    difference = abs(sum(policy["weight_bits"]) - sum(policy["act_bits"]))
    assert difference <= 2, "whatever the unit of weights"
    assert f"closest, of those tried: they differ by {difference / len(LAYERS):.3g}\n" in printed
    for alpha in (policy["alpha"] / 30, policy["alpha"] / 3, policy["alpha"] * 3, policy["alpha"] * 30):
        other = run(capsys, path, f"{BUDGET} --alpha {alpha:.6f}", tmp_path / "other.yaml")[1]
        assert difference <= abs(sum(other["weight_bits"]) - sum(other["act_bits"])), alpha
    again = run(capsys, path, f"{BUDGET} --alpha {policy['alpha']}", tmp_path / "again.yaml")[1]
    assert again == policy
    assert "they differ by 1\n" in run(capsys, path, f"{BUDGET} --alpha auto --fix *=4,3 --wb 4", tmp_path / "pinned.yaml")[0]
    table = tmp_path / "sweep.csv"
    search.main(["--i", path, *flags("--alpha auto --sweep cr=7:9:1"), "--sweep-output", str(table)])
    with open(table) as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    one = run(capsys, path, f"--alpha {rows[0]['alpha']} --cr 7", tmp_path / "one.yaml")[1]
    assert one["objective"] == pytest.approx(float(rows[0]["objective"]))
    assert run(capsys, path, "--avg-wb 3 --ab 32 --alpha auto", tmp_path / "p.yaml")[1]["alpha"] == 1


def test_alpha_is_a_number_or_auto(capsys, save):
    path = save(content())
    assert "--alpha: found 'most', expected a number" in refused(capsys, search.main, ["--i", path, "--alpha", "most"])
    assert "--alpha: found -1" in refused(capsys, search.main, ["--i", path, "--alpha", "-1"])


# ---------------------------------------------------------------------------------------------------------------------
# Floors.


def with_depthwise():
    """Indicators of four layers, the second and the fourth depthwise."""
    value = content()
    for name in (LAYERS[1], LAYERS[3]):
        row = value["layers"][name]
        channels = row["shape"][0]
        row.update(shape=[channels, 1, *row["shape"][2:]], groups=channels, params=row["params"] // row["shape"][1])
    return value


def test_floors_hold_by_name_pattern_and_for_depthwise_convolutions(capsys, save, tmp_path):
    path = save(with_depthwise())
    free = run(capsys, path, "--avg-wb 3 --avg-ab 3", tmp_path / "free.yaml")[1]
    for words, names, pair in (("--at-least depthwise=4,3", [LAYERS[1], LAYERS[3]], (4, 3)),
                               ("--at-least block.conv1=3,4", LAYERS[:1], (3, 4)),
                               ("--at-least block.conv[23]=4,2 --at-least *3=2,4", LAYERS[1:3], (4, 2))):
        policy = run(capsys, path, f"--avg-wb 3 --avg-ab 3 {words}", tmp_path / "p.yaml")[1]
        for name, w, a in zip(LAYERS, policy["weight_bits"], policy["act_bits"], strict=True):
            assert name not in names or (w >= pair[0] and a >= pair[1]), (words, name)
        assert policy["constraints"]["at_least"] and policy["objective"] >= free["objective"]
    assert policy["act_bits"][2] >= 4  # both of the last floors
    pinned = run(capsys, path, "--avg-wb 3 --avg-ab 3 --fix depthwise=4,4", tmp_path / "p.yaml")[1]
    assert [pinned["weight_bits"][i] for i in (1, 3)] == [4, 4]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(floors=st.lists(st.tuples(st.integers(2, 4), st.integers(2, 4)), min_size=4, max_size=4)
       .filter(lambda floors: all(sum(side) <= 15 for side in zip(*floors, strict=True))))
def test_no_policy_above_the_floors_is_better(made_with_floors, floors):
    layers, solve, objective = made_with_floors
    found = solve(dict(zip(LAYERS, map(list, floors), strict=True)))
    bits = [2, 3, 4]
    best = min(objective(chosen) for chosen in itertools.product(itertools.product(bits, bits), repeat=4)
               if all(w >= floor[0] and a >= floor[1] for (w, a), floor in zip(chosen, floors, strict=True))
               and sum(w for w, _ in chosen) <= 15 and sum(a for _, a in chosen) <= 15)
    assert found == best


@pytest.fixture(scope="module")
def made_with_floors(tmp_path_factory):
    """(layers, {floors} -> least objective by the search, objective of a choice), all in fractions."""
    from options import SearchConfig
    from study import Study, solve
    from util.exchange import write_indicators

    path = str(tmp_path_factory.mktemp("floors") / "i.pkl")
    write_indicators(path, content())
    base = {"indicators": path, "bits": [4, 3, 2], "avg_wb": "3.75", "avg_ab": "3.75"}
    study = Study.read(SearchConfig(**base))

    def searched(floors):
        config = SearchConfig(**base, at_least=floors)
        return solve(study.problem(config), config).objective

    costs = study.problem(SearchConfig(**base)).costs
    pairs = ilp.pairs_of([4, 3, 2])
    return study.layers, searched, lambda chosen: sum(row[pairs.index(pair)] for row, pair in zip(costs, chosen, strict=True))


@pytest.mark.parametrize(("words", "message"), [
    ("--at-least nothing=3,3", "--at-least: nothing matches no layer"),
    ("--at-least depthwise=3,3", "--at-least: depthwise matches no layer"),
    ("--at-least block.conv1=3", "--at-least: found 'block.conv1=3', expected a layer and its bits"),
    ("--at-least block.conv1=7,3", "--at-least: block.conv1 has to have 7,3, of the candidates 2 3 4"),
    ("--at-least block.conv1=4,4 --fix block.conv1=3,3", "--at-least: block.conv1 has to have 4,4"),
    ("--tie block.conv1 block.conv2 --at-least block.conv1=4,4 --fix block.conv2=3,3", "share their bits"),
    ("--at-least *=4,4 --avg-wb 3", "with at-least as given")])
def test_floors_that_cannot_be_kept_are_refused(capsys, save, words, message):
    assert message.lstrip("-") in refused(capsys, search.main, ["--i", save(content()), *flags(words)])


# ---------------------------------------------------------------------------------------------------------------------
# By depth.


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.tuples(*[st.floats(0, 10, width=32)] * 4), min_size=1, max_size=8))
def test_earlier_layers_have_the_larger_rows_and_no_row_is_lost(rows):
    layers = [ilp.Layer(f"l{i}", {4: a, 2: b}, {4: c, 2: d}, 1, 1) for i, (a, b, c, d) in enumerate(rows)]
    found = by_depth(layers, [4, 2])
    assert [layer.name for layer in found] == [layer.name for layer in layers]
    for kind in ("weight", "act"):
        own, exchanged = ([getattr(layer, kind) for layer in each] for each in (layers, found))
        totals = [sum(row.values()) for row in exchanged]
        assert totals == sorted(totals, reverse=True) and sorted(map(str, own)) == sorted(map(str, exchanged))


def test_the_baseline_by_depth_is_printed_and_recorded(capsys, save, tmp_path):
    printed, policy = run(capsys, save(content()), f"{BUDGET} --baseline depth", tmp_path / "p.yaml")
    assert "baseline: the earlier a layer, the larger the indicators" in printed
    assert policy["constraints"]["baseline"] == "depth"
