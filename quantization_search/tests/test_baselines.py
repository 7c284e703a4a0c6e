"""What a search is compared with: random policies under the same budgets, and the search with reversed indicators."""

import csv
import itertools
import time
from dataclasses import replace
from fractions import Fraction

import pytest
from conftest import STAGE, content
from hypothesis import given, settings
from hypothesis import strategies as st
from test_budgets import BITS, PAIRS, permitted, problems
from test_ilp import coarse, fine
from test_search import flags, refused, searched

import ilp
import main as yaml_main
import search
from baselines import NoneDrawn, draw, mirrored
from options import LARGEST_SEED, SearchConfig
from study import Study
from util.errors import UserError
from util.exchange import read_policy

few = settings(derandomize=True, deadline=None, max_examples=100)
RESNETS = [("resnet20_digits", 18, {"cr": 10.59, "wb": 3, "ab": 3}), ("resnet50", 52, {}),
           ("resnet50", 52, {"avg_wb": 2.5, "avg_ab": 4.5, "bops": True, "fix": {"layer1.*": [4, 5]}})]


def in_use(constraint, chosen):
    """Whether a sum is at least 99% of its bound, both as they are printed."""
    return constraint.exactly(constraint.amount(chosen)) >= Fraction(99, 100) * constraint.exactly(constraint.bound)


# ---------------------------------------------------------------------------------------------------------------------
# Random.


@st.composite
def reachable(draw_from):
    """A problem in which some policy uses all of every budget."""
    problem, _, ties = draw_from(problems())
    chosen = [None] * len(problem.names)
    for group, pairs in problem.choices():
        pair = draw_from(st.sampled_from(pairs))
        for layer in group:
            chosen[layer] = pair
    constraints = [replace(constraint, bound=constraint.amount(chosen)) for constraint in problem.constraints]
    return replace(problem, constraints=constraints), ties


def inside(problem, ties):
    """Every policy that may be drawn."""
    return {chosen for chosen in permitted(problem, ties, problem.constraints)
            if all(constraint.largest or in_use(constraint, chosen) for constraint in problem.constraints)}


@few
@given(reachable(), st.integers(0, LARGEST_SEED))
def test_where_policies_are_inside_the_budgets_one_is_drawn_with_pins_and_ties(made, seed):
    problem, ties = made
    solution = draw(problem, seed)
    assert tuple(solution.chosen) in inside(problem, ties)
    assert solution == draw(problem, seed)
    check_what_is_said_of_it(problem, solution, seed)


@settings(few, max_examples=25)
@given(problems())
def test_where_there_are_none_that_is_said(made):
    problem, _, ties = made
    if not inside(problem, ties):
        with pytest.raises((NoneDrawn, ilp.Infeasible)):
            draw(problem, 0)


def check_what_is_said_of_it(problem, solution, seed):
    picked = list(enumerate(solution.chosen))
    assert list(zip(solution.weight_bits, solution.act_bits, strict=True)) == [PAIRS[pair] for _, pair in picked]
    assert solution.objective == sum(problem.costs[layer][pair] for layer, pair in picked)
    assert solution.penalty == sum(problem.penalties[layer][pair] for layer, pair in picked)
    assert solution.seed == seed and not solution.proven and not solution.optimal


@pytest.mark.parametrize(("name", "layers", "asked"), RESNETS)
def test_whole_networks_in_less_than_a_second_each(name, layers, asked):
    config = SearchConfig(str(STAGE / f"indicators/importance_indicators_{name}.pkl"), bits=[6, 5, 4, 3, 2], **asked)
    problem = Study.read(config).problem(config)
    started = time.process_time()
    drawn = [draw(problem, seed) for seed in range(10)]
    assert time.process_time() - started < 10
    assert len({tuple(solution.chosen) for solution in drawn}) == 10 and len(drawn[0].chosen) == layers
    for solution in drawn:
        for constraint in problem.constraints:
            assert constraint.amount(solution.chosen) <= constraint.bound and in_use(constraint, solution.chosen)
        for index, name in enumerate(problem.names):
            if "fix" in asked and name.startswith("layer1."):
                assert (solution.weight_bits[index], solution.act_bits[index]) == (4, 5)


def test_each_of_the_policies_inside_the_budgets_can_be_drawn():
    layers = [ilp.Layer(f"layer{i}", dict.fromkeys(BITS, 1.0), dict.fromkeys(BITS, 1.0), 1, 1) for i in range(3)]
    problem = ilp.make_problem(layers, BITS, Fraction(2), [ilp.mean_bits_budget(layers, BITS, "weight", Fraction(4)),
                                                           ilp.mean_bits_budget(layers, BITS, "act", Fraction(11, 3))])
    there = {chosen for chosen in itertools.product(range(9), repeat=3)
             if [sum(PAIRS[pair][kind] for pair in chosen) for kind in (0, 1)] == [12, 11]}
    assert len(there) > 5 and {tuple(draw(problem, seed).chosen) for seed in range(40 * len(there))} == there


def test_no_layer_is_above_the_largest_use():
    """Inputs of 1, 2 and 4 x 2^20 elements and 1 MB for the largest allow at most 8, 4 and 2 bits."""
    layers = [ilp.Layer(f"layer{i}", dict.fromkeys(BITS, 1.0), dict.fromkeys(BITS, 1.0), 1, 1) for i in range(3)]
    limit = ilp.memory_budget([2**20, 2**21, 2**22], [], BITS, "largest", Fraction(1))
    problem = ilp.make_problem(layers, BITS, Fraction(2), [limit])
    drawn = [draw(problem, seed).act_bits for seed in range(50)]
    assert [set(bits) for bits in zip(*drawn, strict=True)] == [{5, 4, 2}, {4, 2}, {2}]


def test_what_fixed_layers_take_counts_as_used():
    """99% of the 200 bits that are asked are 198; with the 100 of the fixed layer, 98 in the searched ones are enough."""
    layer = ilp.Layer("layer", {7: 1.0, 2: 1.0}, {7: 1.0, 2: 1.0}, 1, 14)

    def drawn(fixed):
        use = ilp.size_use([layer], [7, 2])
        constraint = ilp.Constraint("size", use, 100, "bits", 1, fixed)
        return draw(ilp.make_problem([layer], [7, 2], Fraction(2), [constraint]), 0).weight_bits

    assert drawn(100) == [7]
    with pytest.raises(NoneDrawn, match="even the largest bits use only 98 bits of the 100 bits of size, less than 99%"):
        drawn(0)


# ---------------------------------------------------------------------------------------------------------------------
# Reversed.


def layer_of(name, weight, act):
    return ilp.Layer(name, *({4: value, 2: 2 * value, 8: away} for value, away in (weight, act)), 1, 1)


def test_a_hand_made_reversal():
    """The row at 8 bits, which is no candidate, moves along and does not count. Equal means rank in network order."""
    layers = [layer_of("a", (5.0, 0.0), (1.0, 0.0)), layer_of("b", (1.0, 99.0), (1.0, 1.0)),
              layer_of("c", (3.0, 1.0), (1.0, 2.0)), layer_of("d", (4.0, 2.0), (0.5, 3.0))]
    found = mirrored(layers, [4, 2])
    assert [layer.name for layer in found] == ["a", "b", "c", "d"]
    assert [layer.weight[4] for layer in found] == [1.0, 5.0, 4.0, 3.0]
    assert [layer.weight[8] for layer in found] == [99.0, 0.0, 2.0, 1.0]
    assert [layer.act[8] for layer in found] == [1.0, 0.0, 3.0, 2.0]  # the ranks are d, a, b, c


@few
@given(st.one_of(coarse, fine))
def test_rows_only_change_places_and_the_ranks_are_reversed(layers):
    found = mirrored(layers, BITS)
    for kind in ("weight", "act"):
        before, after = ([getattr(layer, kind) for layer in some] for some in (layers, found))
        assert sorted(map(str, after)) == sorted(map(str, before))
        totals, reversed_totals = ([sum(map(Fraction, row.values())) for row in rows] for rows in (before, after))
        for one, other in itertools.permutations(range(len(layers)), 2):
            if totals[one] < totals[other]:
                assert reversed_totals[one] >= reversed_totals[other]
        if len(set(totals)) == len(totals):
            assert [getattr(layer, kind) for layer in mirrored(found, BITS)] == before
    assert [(layer.name, layer.macs, layer.params) for layer in found] \
        == [(layer.name, layer.macs, layer.params) for layer in layers]


# ---------------------------------------------------------------------------------------------------------------------
# The commands.


@pytest.fixture
def path(save):
    return save(content())


def run(capsys, path, words, output):
    """(printout, policy file) of a search."""
    search.main(["--i", path, *flags(words), "--output", str(output)])
    out, policy = capsys.readouterr().out, read_policy(str(output))
    assert searched(out) == [policy["weight_bits"], policy["act_bits"]]
    return out, policy


def test_a_random_policy_from_the_command_line(capsys, path, tmp_path):
    words = "--cr 9.5 --wb 3 --ab 3 --baseline random"
    policies = []
    for seed in ("", "--seed 0", "--seed 3"):
        out, policy = run(capsys, path, f"{words} {seed}", tmp_path / "policy.yaml")
        assert f"drawn at random with seed {seed[-1:] or 0}, at least 99% of each budget in use\n" in out
        assert "optimal" not in out and policy["optimal"] is False and f"objective {policy['objective']:.9f}, " in out
        for line in out.splitlines():
            if " constraint: " in line:
                used, bound = (float(line.split()[place]) for place in (2, 4))
                assert 0.989 * bound < used <= bound
        policies.append(policy)
    assert policies[0] == policies[1] and policies[1]["weight_bits"] != policies[2]["weight_bits"]
    assert policies[2]["constraints"] == {"cr": 9.5, "bops": True, "wb": 3, "ab": 3, "macs": "published",
                                          "baseline": "random", "seed": 3}


def test_pins_ties_and_equal_bits_hold_in_a_random_policy(capsys, path, tmp_path):
    for seed in range(5):
        _, policy = run(capsys, path, f"--avg-wb 3 --baseline random --seed {seed} --fix *conv1=2,2 --tie *conv2 *conv3 "
                        "--same-bits", tmp_path / "policy.yaml")
        bits = policy["weight_bits"]
        assert bits == policy["act_bits"] and bits[0] == 2 and bits[1] == bits[2] and sum(bits) == 12


def test_the_largest_activation_memory_is_only_kept(capsys, path, tmp_path):
    alone, _ = run(capsys, path, "--act-mem 0.1 --baseline random --seed 1", tmp_path / "policy.yaml")
    assert "drawn at random with seed 1, largest activation memory kept\n" in alone
    both, _ = run(capsys, path, "--act-mem 0.1 --avg-wb 3 --baseline random --seed 1", tmp_path / "policy.yaml")
    assert "seed 1, at least 99% of each other budget in use, largest activation memory kept\n" in both


def test_a_reversed_search_from_the_command_line(capsys, path, save, tmp_path):
    words = "--cr 9.5 --wb 3 --ab 3"
    out, policy = run(capsys, path, f"{words} --baseline reversed", tmp_path / "policy.yaml")
    assert "baseline: each layer has the indicators of its mirror rank" in out and "optimal, gap 0" in out
    assert policy["constraints"]["baseline"] == "reversed" and "seed" not in policy["constraints"]
    made = content()  # whose layers have ever smaller indicators
    for kind in ("weight", "act"):
        made[kind] = dict(zip(made[kind], reversed(made[kind].values()), strict=True))
    _, expected = run(capsys, save(made, "by_hand.pkl"), words, tmp_path / "by_hand.yaml")
    assert policy["constraints"].pop("baseline") and policy == expected
    _, usual = run(capsys, path, words, tmp_path / "usual.yaml")
    assert usual["weight_bits"] != policy["weight_bits"] and "baseline" not in usual["constraints"]


def test_yaml_has_the_same_keys(capsys, path, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(f"indicators: {path}\navg_wb: 3\nbaseline: random\nseed: 3\noutput: {tmp_path / 'policy.yaml'}\n")
    yaml_main.main([str(config)])
    capsys.readouterr()
    policy = read_policy(str(tmp_path / "policy.yaml"))
    assert (policy["constraints"]["baseline"], policy["constraints"]["seed"]) == ("random", 3)
    assert policy["weight_bits"] == run(capsys, path, "--avg-wb 3 --baseline random --seed 3",
                                        tmp_path / "again.yaml")[1]["weight_bits"]
    for line, expected in (("baseline: best", "baseline: expected one of random, reversed, depth, found 'best'"),
                           ("baseline: reversed", "seed: belongs to baseline random"), ("seed: -1", "seed: found -1"),
                           ("seed: 1.5", "seed: expected a whole number")):
        word, value = line.split(": ")
        assert expected in refused(capsys, yaml_main.main, [str(config), f"{word}={value}"])


@pytest.mark.parametrize("baseline", ["random --seed 2", "reversed"])
def test_a_sweep_draws_or_searches_each_point(capsys, path, tmp_path, baseline):
    table, policies = tmp_path / "table.csv", tmp_path / "policies"
    search.main(["--i", path, *flags(f"--sweep cr=7:20:1 --sweep-output {table} --sweep-policies {policies} --baseline "
                                     f"{baseline}")])
    out, rows = capsys.readouterr().out, list(csv.DictReader(table.open()))
    random = baseline != "reversed"
    assert {row["status"] for row in rows} == ({"random", "none drawn"} if random else {"optimal", "infeasible"})
    assert ("points have a policy drawn at random" in out) == random
    for row in rows:
        if row["policy"]:
            asked = read_policy(row["policy"])["constraints"]
            assert (asked["baseline"], asked.get("seed")) == (("random", 2) if random else ("reversed", None))
            assert float(row["compression_ratio"]) >= asked["cr"]
            assert not random or float(row["compression_ratio"]) <= asked["cr"] / 0.99


@pytest.mark.parametrize(("words", "expected"), [
    ("--seed 3", "--seed: belongs to baseline random"),
    ("--seed 0", "--seed: belongs to baseline random"),
    ("--seed 3 --baseline reversed", "--seed: belongs to baseline random"),
    ("--seed -1 --baseline random", "--seed: found -1, allowed is 0 to"),
    ("--seed 9223372036854775808 --baseline random", "--seed: found 9223372036854775808"),
    ("--seed x --baseline random", "argument --seed"),
    ("--baseline worst", "argument --baseline"),
    ("--baseline random --shadow", "--shadow: cannot be had together with baseline random"),
    ("--baseline random --cr 100", "infeasible: no policy keeps size; size takes at least"),
    ("--baseline random --act-mem 0.0001", "infeasible: no policy keeps largest activation memory"),
    ("--baseline random --avg-wb 5", "baseline: even the largest bits use only 4 bits of the 5 bits of mean weight bits"),
    ("--baseline random --avg-wb 3 --fix *=2,2", "baseline: even the largest bits use only 2 bits of the 3 bits of mean "
                                                 "weight bits, less than 99%; with fix as given"),
    ("--baseline random --avg-wb 2 --avg-ab 4 --same-bits", "baseline: no policy that keeps mean weight bits and mean "
                                                            "activation bits and uses at least 99% of each was found"),
    ("--baseline random --sweep cr=100:101:1", "infeasible: no policy keeps size"),
])
def test_bad_flags(capsys, path, tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    assert expected in refused(capsys, search.main, ["--i", path, "--output", "policy.yaml", *flags(words)])
    assert [entry.name for entry in tmp_path.iterdir()] == ["indicators.pkl"]


def test_a_configuration_refuses_what_the_command_line_does():
    with pytest.raises(UserError, match="^seed: "):
        SearchConfig("some.pkl", seed=1)
    with pytest.raises(UserError, match="^shadow: "):
        SearchConfig("some.pkl", shadow=True, baseline="random")
    assert SearchConfig("some.pkl", shadow=True, baseline="reversed").seed is None
