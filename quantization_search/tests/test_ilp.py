"""The integer program against every policy there is, on problems small enough to list them."""

import itertools
import math
import time
from fractions import Fraction
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ilp
import solver

BITS = [5, 4, 2]
small = settings(derandomize=True, deadline=None, max_examples=60)


@st.composite
def layers(draw, indicator):
    """Two to four layers; coarse indicators and few sizes make for erased candidates and many ties."""
    count = draw(st.integers(2, 4))
    table = st.fixed_dictionaries(dict.fromkeys(BITS, indicator))
    return [ilp.Layer(f"layer{i}", draw(table), draw(table), draw(st.sampled_from([1, 2, 3, 7])),
                      draw(st.sampled_from([1, 1, 2, 5]))) for i in range(count)]


coarse = layers(st.integers(-1, 4).map(float))
fine = layers(st.floats(-1, 1, allow_nan=False, allow_subnormal=False))
close = layers(st.integers(0, 3).map(lambda step: 1.0 + step * 2.0**-50))  # differences far below any tolerance
budgets = st.tuples(st.sampled_from([None, "6", "8", "9.3", "12.2"]), st.sampled_from([None, "2", "2.5", "3", "4"]))
alphas = st.sampled_from([Fraction(0), Fraction(2), Fraction("0.3")])


def make_problem(searched, alpha, ratio, uniform, fixed_params=3):
    constraints = []
    if ratio:
        constraints.append(ilp.size_constraint(searched, BITS, fixed_params, Fraction(ratio)))
    if uniform or not ratio:
        constraints.append(ilp.bitops_constraint(searched, BITS, Fraction(uniform or 3), Fraction(3)))
    return ilp.make_problem(searched, BITS, alpha, constraints)


def rank(problem, searched, chosen):
    """What is compared, most important first: penalty, objective, BitOPs, size, then larger bits in network order."""
    picked = list(enumerate(chosen))
    pairs = [problem.pairs[i][p] for i, p in picked]
    return (sum(problem.penalties[i][p] for i, p in picked), sum(problem.costs[i][p] for i, p in picked),
            sum(layer.macs * w * a for layer, (w, a) in zip(searched, pairs, strict=True)),
            sum(layer.params * w for layer, (w, _) in zip(searched, pairs, strict=True)),
            [(-w, -a) for w, a in pairs])


def best_by_listing(problem, searched):
    every = itertools.product(*(range(len(pairs)) for pairs in problem.pairs))
    kept = [chosen for chosen in every
            if all(constraint.amount(chosen) <= constraint.bound for constraint in problem.constraints)]
    return min((rank(problem, searched, chosen), list(chosen)) for chosen in kept)[1] if kept else None


def check_against_listing(searched, alpha, budget, name=None):
    problem = make_problem(searched, alpha, *budget)
    expected = best_by_listing(problem, searched)
    if expected is None:
        with pytest.raises(ilp.Infeasible):
            ilp.solve(problem, name)
        return
    solution = ilp.solve(problem, name)
    assert solution.proven and solution.optimal and solution.gap == 0
    assert solution.chosen == expected
    assert (solution.penalty, solution.objective) == rank(problem, searched, expected)[:2]


@settings(derandomize=True, deadline=None, max_examples=120)
@given(coarse, alphas, budgets, st.sampled_from([1, 2, solver.BEAM_WIDTH]))
def test_coarse_indicators_with_ties_and_erased_ones(searched, alpha, budget, width):
    with mock.patch.object(solver, "BEAM_WIDTH", width):  # the narrower, the worse the first policy
        check_against_listing(searched, alpha, budget)


@small
@given(fine, alphas, budgets)
def test_fine_indicators(searched, alpha, budget):
    check_against_listing(searched, alpha, budget)


@small
@given(close, alphas, budgets)
def test_differences_below_the_tolerances_of_any_solver(searched, alpha, budget):
    check_against_listing(searched, alpha, budget)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(coarse, alphas, budgets, st.sampled_from(["HiGHS", "PULP_CBC_CMD"]))
def test_a_solver_asked_by_name_changes_nothing(searched, alpha, budget, name):
    check_against_listing(searched, alpha, budget, name)


@pytest.mark.parametrize(("middle", "expected"), [(0.0, (4, 2)), (0.5, (2, 5))])
def test_ties_go_to_lower_bitops_then_to_lower_size(middle, expected):
    """At most 12 BitOPs. With 0, (4, 2), (5, 2) and (2, 5) cost 1 each; with 0.5, only the two that have 10 BitOPs."""
    layer = ilp.Layer("layer", {5: 0.0, 4: middle, 2: 1.0}, {5: 0.0, 4: 0.75, 2: 1.0}, 1, 1)
    problem = ilp.make_problem([layer], BITS, Fraction(1),
                               [ilp.bitops_constraint([layer], BITS, Fraction(3), Fraction(4))])
    solution = ilp.solve(problem)
    assert (solution.weight_bits, solution.act_bits) == ([expected[0]], [expected[1]])
    assert solution.objective == 1


def test_the_last_ties_go_to_larger_bits_in_network_order():
    twins = [ilp.Layer(name, {4: 0.0, 2: 1.0}, {4: 0.0, 2: 1.0}, 1, 1) for name in ("first", "second")]
    constraints = [ilp.size_constraint(twins, [4, 2], 0, Fraction("10.6"))]  # 6 bits
    solution = ilp.solve(ilp.make_problem(twins, [4, 2], Fraction(1), constraints))
    assert (solution.weight_bits, solution.act_bits) == ([4, 2], [4, 4])


@pytest.mark.parametrize(("costs", "use", "bound", "known", "first"), [
    ([[0, 0], [0, 0]], [[1, 1], [1, 1]], 1, [1, 1], [0, 0]),
    ([[0, 10], [0, 10]], [[3, 0], [2, 0]], 4, [1, 0], [0, 1]),  # the relaxation lies at 3.33, the best policies at 10
])
def test_dynamic_programming_finds_the_first_of_the_policies_that_tie_with_a_known_one(costs, use, bound, known, first):
    program = solver._Program(costs, [solver.Budget(use, max(bound, 2))], ())
    program.price(solver._multipliers(program))
    assert program.best(known, 0.0, 1000) == first


def sized(count):
    """Layers of varied sizes and indicators, the same ones on every run."""
    made = []
    for i in range(count):
        weight = {bit: (1 + (7 * i) % 11) * 2.0**-bit for bit in BITS}
        act = {bit: (1 + (5 * i) % 13) * 3.0**-bit for bit in BITS}
        made.append(ilp.Layer(f"layer{i}", weight, act, 1 + (37 * i) % 101, 1 + (53 * i) % 89))
    return made


def test_where_dynamic_programming_would_be_long_the_mixed_integer_solver_leads_to_the_same_policy(monkeypatch):
    problem = make_problem(sized(30), Fraction(2), "9", "3")
    compared = ilp.solve(problem)
    monkeypatch.setattr(solver, "FEW_STEPS", 0)
    asked = ilp.solve(problem)
    assert compared.solver_status is None and asked.solver_status == "Optimal"
    assert compared.chosen == asked.chosen and compared.proven and asked.proven


def test_without_dynamic_programming_the_result_rests_on_the_solver_and_is_not_called_proven(monkeypatch):
    problem = make_problem(sized(12), Fraction(2), "9", "3")
    expected = ilp.solve(problem)
    monkeypatch.setattr(solver, "FEW_STEPS", 0)
    monkeypatch.setattr(solver, "MOST_STEPS", 0)
    solution = ilp.solve(problem)
    assert not solution.proven and solution.gap == 0 and solution.optimal
    assert solution.objective == expected.objective


def test_a_result_with_a_gap_is_not_called_optimal(monkeypatch):
    monkeypatch.setattr(solver, "FEW_STEPS", 0)
    monkeypatch.setattr(solver, "MOST_STEPS", 0)
    found = solver._solve_mixed_integer
    monkeypatch.setattr(solver, "_solve_mixed_integer", lambda *args: (found(*args)[0], "Time limit reached", 0.01, 0.0))
    assert not ilp.solve(make_problem(sized(12), Fraction(2), "9", "3")).optimal


def test_a_time_limit_leaves_a_gap_that_holds_the_optimum():
    problem = make_problem(sized(60), Fraction(2), "9", "3")
    best = ilp.solve(problem)
    with mock.patch.object(solver, "_solve_mixed_integer", lambda *args: (None, "Time limit reached", None, -math.inf)):
        hurried = ilp.solve(problem, time_limit=0)
    assert best.proven and not hurried.proven and not hurried.optimal
    assert 0 < hurried.gap < 0.1 and hurried.objective >= best.objective
    assert float(hurried.objective) * (1 - hurried.gap) <= float(best.objective) * (1 + 1e-12)


def test_highs_itself_says_that_it_ran_out_of_time(monkeypatch):
    """PuLP calls such a run optimal."""
    monkeypatch.setattr(solver, "SHORTEST_RUN", 1e-6)
    problem = make_problem(sized(40), Fraction(2), "9", "3")
    budgets = [solver.Budget(constraint.use, constraint.bound) for constraint in problem.constraints]
    _, status, _, _ = solver._solve_mixed_integer(solver._Program(problem.costs, budgets, ()), "HiGHS", time.monotonic())
    assert status == "Time limit reached" and status not in solver.OPTIMAL


def test_least_penalties_that_were_not_settled_are_not_called_optimal(monkeypatch):
    layers = [ilp.Layer(f"layer{i}", {5: 3.0, 4: 2.0, 2: 1.0}, {5: 1.0, 4: 2.0, 2: 3.0}, 1, 1 + i) for i in range(6)]
    problem = make_problem(layers, Fraction(2), "9", None)
    exact = ilp.solve(problem)
    least = ilp.least_total
    monkeypatch.setattr(ilp, "least_total", lambda *args: (least(*args)[0], solver.Result([], False, "Time limit", 0.2)))
    doubtful = ilp.solve(problem)
    assert exact.optimal and exact.penalty > 0
    assert doubtful.chosen == exact.chosen and not doubtful.optimal and doubtful.penalty_gap == 0.2


def test_many_layers_and_candidates_end_within_bounded_work():
    bits = [9, 8, 7, 6, 5, 4, 3, 2]
    layers = [ilp.Layer(f"layer{i}", {bit: (1 + (7 * i) % 11) * 2.0**-bit for bit in bits},
                        {bit: (1 + (5 * i) % 13) * 3.0**-bit for bit in bits}, 1 + (37 * i) % 101, 1 + (53 * i) % 89)
              for i in range(200)]
    constraints = [ilp.size_constraint(layers, bits, 3, Fraction(9)),
                   ilp.bitops_constraint(layers, bits, Fraction(3), Fraction(3))]
    begun = time.monotonic()
    solution = ilp.solve(ilp.make_problem(layers, bits, Fraction(2), constraints), time_limit=5)
    assert solution.gap < 1e-3 and time.monotonic() - begun < 15


def test_a_result_that_breaks_a_budget_is_not_taken(monkeypatch):
    program = solver._Program([[0, 1], [0, 1]], [solver.Budget([[2, 1], [2, 1]], 3)], ())
    assert program.keeps_budgets([0, 1]) and not program.keeps_budgets([0, 0])
    monkeypatch.setattr(program, "keeps_budgets", lambda chosen: False)
    assert solver._solve_mixed_integer(program, "HiGHS")[0] is None


def test_erased_compares_original_values_also_beside_an_erased_one():
    assert ilp.erased({6: 1.0, 5: 0.5, 4: 0.7, 3: 0.6, 2: 0.6}, [6, 5, 4, 3, 2]) == [5, 3]
    assert ilp.erased({6: 1.0, 5: 0.5, 4: 0.7}, [6, 4]) == [4]  # neighbours in the list in use


def test_an_erased_candidate_adds_its_penalty_and_nothing_else():
    layer = ilp.Layer("layer", {4: 3.0, 2: 1.0}, {4: 7.0, 2: 5.0}, 1, 1)
    problem = ilp.make_problem([layer], [4, 2], Fraction(2), [])
    assert problem.pairs[0] == [(4, 4), (4, 2), (2, 4), (2, 2)]
    assert problem.costs[0] == [13, 6, 7, 0]
    assert problem.penalties[0] == [0, 1, 2, 3]


def test_the_bounds_are_rounded_down_from_exact_fractions():
    searched = [ilp.Layer("layer", {4: 1.0}, {4: 1.0}, macs=50, params=279)]
    assert ilp.size_constraint(searched, [4], 0, Fraction("9.3")).bound == 960  # 959.9999999999999 in doubles
    assert ilp.size_constraint(searched, [4], 2, Fraction("9.3")).bound == 966 - 16
    assert ilp.bitops_constraint(searched, [4], Fraction("2.3"), Fraction(3)).bound == 345  # 344.99999999999994
    assert ilp.bitops_constraint(searched, [4], Fraction("2.55"), Fraction("2.55")).bound == 325


def test_a_relaxed_constraint_is_rounded_down_and_counts_what_is_printed():
    constraint = ilp.Constraint("size", [[1]], 100, "", 8, offset=50)
    assert constraint.relaxed(Fraction("1.01")).bound == 101  # 150 * 1.01 - 50 = 101.5
    assert ilp.Constraint("memory", [[1]], 100, "", 8, offset=50, largest=True).relaxed(Fraction("1.019")).bound == 101


@small
@given(coarse)
def test_an_infeasible_budget_names_the_least_that_would_do(searched):
    problem = make_problem(searched, Fraction(2), "100", "2")
    with pytest.raises(ilp.Infeasible) as caught:
        ilp.solve(problem)
    for constraint, least in caught.value.conflict:
        every = itertools.product(*(range(len(pairs)) for pairs in problem.pairs))
        assert least == min(constraint.amount(chosen) for chosen in every) > constraint.bound
    assert caught.value.conflict


def test_constraints_that_conflict_only_together_are_both_named():
    first = ilp.Constraint("first", [[0, 3]], 1, "", 1)
    second = ilp.Constraint("second", [[4, 0]], 2, "", 1)
    problem = ilp.Problem(["layer"], [[(4, 4), (2, 2)]], [[0, 1]], [[0, 0]], [], [first, second])
    with pytest.raises(ilp.Infeasible) as caught:
        ilp.solve(problem)
    assert [(constraint.name, least) for constraint, least in caught.value.conflict] == [("first", 3), ("second", 4)]


def test_the_least_of_a_largest_amount_is_that_at_which_all_others_hold_together():
    """Of three layers one may take the first pair, beside `one`, and one the second, beside `other`."""
    memory = ilp.Constraint("memory", [[1, 1, 5]] * 3, 2, "", 1, largest=True)
    one, other = (ilp.Constraint(name, [use] * 3, 2, "", 1) for name, use in (("one", [2, 0, 0]), ("other", [0, 2, 0])))
    problem = ilp.Problem(list("abc"), [[(2, 2), (3, 2), (4, 4)]] * 3, [[0, 0, 0]] * 3, [[0, 0, 0]] * 3, [],
                          [memory, one, other])
    with pytest.raises(ilp.Infeasible) as caught:
        ilp.solve(problem)
    assert {constraint.name: least for constraint, least in caught.value.conflict} == {"memory": 5, "one": 4, "other": 4}
