"""Every kind of constraint, pin and tie against every policy there is, on problems small enough to list them."""

import itertools
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ilp import coarse, rank

import ilp

BITS = [5, 4, 2]
PAIRS = list(itertools.product(BITS, BITS))
kinds = ["size", "BitOPs", "size budget", "BitOPs budget", "mean weight bits", "mean activation bits", "summed", "largest",
         "latency"]
tightness = st.dictionaries(st.sampled_from(kinds), st.integers(0, 8).map(lambda step: Fraction(step, 8)), min_size=1,
                            max_size=4)


def constraint_of(kind, searched):
    """A constraint without a bound, from the constructor that the commands use."""
    elements = [layer.macs + layer.params for layer in searched]
    times = [[Fraction(layer.macs * w + a, 1000) for w, a in PAIRS] for layer in searched]
    return {"size": lambda: ilp.size_constraint(searched, BITS, 3, Fraction(8)),
            "BitOPs": lambda: ilp.bitops_constraint(searched, BITS, Fraction(3), Fraction(3)),
            "size budget": lambda: ilp.size_budget(searched, BITS, 3, Fraction(1)),
            "BitOPs budget": lambda: ilp.bitops_budget(searched, BITS, 3, Fraction(1)),
            "mean weight bits": lambda: ilp.mean_bits_budget(searched, BITS, "weight", Fraction(3)),
            "mean activation bits": lambda: ilp.mean_bits_budget(searched, BITS, "act", Fraction(3)),
            "summed": lambda: ilp.memory_budget(elements, [1, 2], BITS, "summed", Fraction(1)),
            "largest": lambda: ilp.memory_budget(elements, [1, 2], BITS, "largest", Fraction(1)),
            "latency": lambda: ilp.latency_budget(times, Fraction("0.5"), Fraction(1))}[kind]()


def bounded(kind, searched, share):
    """The constraint with a bound from the least (0) to the most (1) that it can take."""
    constraint = constraint_of(kind, searched)
    join = max if constraint.largest else sum
    least, most = (join(extreme(row) for row in constraint.use) for extreme in (min, max))
    least, most = (max(value, constraint.offset) if constraint.largest else value for value in (least, most))
    return replace(constraint, bound=least + int((most - least) * share))


@st.composite
def problems(draw):
    searched = draw(coarse)
    constraints = [bounded(kind, searched, share) for kind, share in draw(tightness).items()]
    same_bits = draw(st.booleans())
    allowed = [[index for index, (w, a) in enumerate(PAIRS) if w == a or not same_bits] for _ in searched]
    pinned = draw(st.dictionaries(st.integers(0, len(searched) - 1), st.sampled_from(allowed[0]), max_size=1))
    for layer, pair in pinned.items():
        allowed[layer] = [pair]
    ties = draw(st.lists(st.sets(st.integers(0, len(searched) - 1), min_size=2), max_size=2))
    problem = ilp.make_problem(searched, BITS, Fraction(2), constraints, draw(st.sampled_from(["erase", "isotonic", "keep"])),
                               allowed, ilp.join(len(searched), ties))
    return problem, searched, ties


def permitted(problem, ties, constraints):
    """Every policy that respects pins, ties and these constraints."""
    for chosen in itertools.product(*problem.allowed):
        if all(len({chosen[layer] for layer in tie}) == 1 for tie in ties) \
                and all(constraint.amount(chosen) <= constraint.bound for constraint in constraints):
            yield chosen


@settings(derandomize=True, deadline=None, max_examples=120)
@given(problems())
def test_every_kind_of_constraint_with_pins_and_ties(made):
    problem, searched, ties = made
    kept = [(rank(problem, searched, chosen), list(chosen)) for chosen in permitted(problem, ties, problem.constraints)]
    if kept:
        solution = ilp.solve(problem)
        assert solution.chosen == min(kept)[1]
        assert solution.proven and solution.gap == 0 and solution.penalty_gap == 0
        return
    with pytest.raises(ilp.Infeasible) as caught:
        ilp.solve(problem)
    check_conflict(problem, ties, caught.value)


def check_conflict(problem, ties, found):
    """No smaller group conflicts, and each least amount is the true one beside the others."""
    named, alone = [constraint for constraint, _ in found.conflict], not found.together
    assert alone == all(not list(permitted(problem, ties, [constraint])) for constraint in named)
    assert alone or not list(permitted(problem, ties, named))
    smaller = 1 if alone else len(named)
    for count in range(1, smaller):
        for group in itertools.combinations(problem.constraints, count):
            assert list(permitted(problem, ties, group))
    for constraint, least in found.conflict:
        others = [] if alone else [other for other in named if other is not constraint]
        assert least == min(constraint.amount(chosen) for chosen in permitted(problem, ties, others))


def test_tied_layers_take_the_same_bits_and_overlapping_ties_are_one():
    assert ilp.join(5, [[0, 2], [3, 4], [2, 3]]) == [(0, 2, 3, 4), (1,)]
    assert ilp.join(3, []) == [(0,), (1,), (2,)]


@pytest.mark.parametrize(("budget", "shown"), [
    (lambda layers: ilp.size_budget(layers, BITS, 2**20, Fraction(3)), 3.0),
    (lambda layers: ilp.bitops_budget(layers, BITS, 10**6, Fraction("0.5")), 0.5),
    (lambda layers: ilp.mean_bits_budget(layers, BITS, "weight", Fraction("3.5")), 3.5),
    (lambda layers: ilp.latency_budget([[Fraction("0.25")] * 9] * 2, Fraction("0.1"), Fraction("0.7")), 0.7),
])
def test_a_bound_is_printed_in_the_unit_in_which_it_was_asked(budget, shown):
    layers = [ilp.Layer(name, {}, {}, 10**6, 2**20) for name in ("first", "second")]
    constraint = budget(layers)
    assert constraint.shown(constraint.bound) == shown
    assert constraint.relaxed(Fraction("1.01")).shown(constraint.relaxed(Fraction("1.01")).bound) >= shown


def test_times_are_added_exactly():
    constraint = ilp.latency_budget([[Fraction("0.1")], [Fraction("0.2")]], Fraction(0), Fraction("0.3"))
    assert constraint.amount([0, 0]) == constraint.bound  # 0.1 + 0.2 > 0.3 in doubles


def test_fixed_layers_count_in_activation_memory():
    summed = ilp.memory_budget([2**20], [2**20, 2**20], [8], "summed", Fraction(3))
    assert summed.shown(summed.amount([0])) == 3 and summed.amount([0]) == summed.bound
    largest = ilp.memory_budget([2**20], [2**21], [8], "largest", Fraction(2))
    assert largest.shown(largest.amount([0])) == 2 and largest.amount([0]) == largest.bound


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=4))
def test_isotonic_is_the_nearest_monotone_sequence(values):
    """By the optimality conditions: it rises, and keeps the sum of each stretch; and no listed sequence lies nearer."""
    bits = list(range(8, 8 - len(values), -1))
    fitted = ilp.isotonic(dict(zip(bits, map(float, values), strict=True)), bits)
    found = [fitted[bit] for bit in bits]
    assert found == sorted(found)
    distance = sum((a - b)**2 for a, b in zip(found, values, strict=True))
    assert found == min_max_formula(values)
    for other in itertools.combinations_with_replacement(range(-6, 7), len(values)):
        assert distance <= sum((Fraction(a, 2) - b)**2 for a, b in zip(other, values, strict=True))


def min_max_formula(values):
    """max over starts i <= k of the min over ends j >= k of the mean of values[i..j]."""
    places = range(len(values))
    return [max(min(Fraction(sum(values[i:j + 1]), j + 1 - i) for j in places if j >= k) for i in places if i <= k)
            for k in places]


def test_the_three_rules_for_outliers():
    layer = ilp.Layer("layer", {4: 3.0, 2: 1.0}, {4: 5.0, 2: 7.0}, 1, 1)
    kept = ilp.make_problem([layer], [4, 2], Fraction(2), [], "keep")
    assert kept.costs[0] == [11, 13, 7, 9] and not any(kept.penalties[0])
    nearest = ilp.make_problem([layer], [4, 2], Fraction(2), [], "isotonic")
    assert nearest.costs[0] == [9, 11, 9, 11] and not any(nearest.penalties[0])
