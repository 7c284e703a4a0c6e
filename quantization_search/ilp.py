"""The search as an integer program: one pair (weight bits, activation bits) per layer, least cost, under constraints.

minimize sum (act[i][k] + alpha * weight[i][j]) x[i,j,k] (LIMPQ, arXiv 2203.08368), after the least penalty for erased
indicators. Ties go to lower BitOPs, then to lower size, both those of the dense network, then to larger bits in network
order: layer by layer, weights before activations. All sums are of integers or fractions, so nothing is lost to rounding. No
files, no printing.
"""

import bisect
import contextlib
import itertools
import math
import time
from dataclasses import dataclass, replace
from fractions import Fraction

from solver import OPTIMAL, Budget, NoPolicy, SolverError, least_total, minimise, over_common_denominator

BITS_PER_MB = 8 * 2**20
BITOPS_PER_G = 10**9
FULL_PRECISION_BITS = 32
FIXED_BITS = 8
ZERO_GAP = 1e-12
CONFLICT_SECONDS = 10  # for each constraint of a conflict, to find the least it could take


@dataclass(frozen=True)
class Layer:
    """A layer to be searched. weight, act: {bit: indicator}. macs: per image. params: number of weights."""

    name: str
    weight: dict
    act: dict
    macs: int
    params: int


@dataclass(frozen=True)
class Constraint:
    """The sum of use[layer][pair chosen] <= bound; with `largest`, the largest of them instead of the sum.

    use, bound and offset are integers in the smallest unit, such as bits; (amount + offset) / per_unit is printed, in `unit`.
    The offset is what the fixed layers add (with `largest`: what they take, a part of the amount).
    key: the option that asked for it. whole: what its number divides (cr: full-precision bits) or multiplies (bops: MACs).
    """

    name: str
    use: list
    bound: int
    unit: str
    per_unit: int
    offset: int = 0
    largest: bool = False
    key: str = ""
    whole: int = 0

    def shown(self, amount):
        return float(self.exactly(amount))

    def exactly(self, amount):
        """What is printed for an amount, as a Fraction."""
        return Fraction(amount + (0 if self.largest else self.offset), self.per_unit)

    def amount(self, chosen):
        used = [row[pair] for row, pair in zip(self.use, chosen, strict=True)]
        return max(self.offset, *used) if self.largest else sum(used)

    def counting(self, name, use, offset):
        """The same limit on the whole, but with these amounts of the layers and of the fixed layers held to it."""
        return replace(self, name=name, use=use, offset=offset, bound=self.bound + self.offset - offset)

    def relaxed(self, factor):
        """The same constraint with `factor` times as much of what is printed."""
        return replace(self, bound=math.floor(self.exactly(self.bound) * factor * self.per_unit)
                       - (0 if self.largest else self.offset))


@dataclass(frozen=True)
class Problem:
    """Layers, the pairs each may take, what each pair costs, and the constraints on all of them together.

    Tables are indexed [layer][pair]; pairs stand in descending order, costs and penalties are Fractions. allowed: for each
    layer the indices of the pairs it may take, ascending; by default all. groups: tuples of layer indices that share one pair,
    in the order of their first layers, every layer in one; by default each layer chooses for itself.
    """

    names: list
    pairs: list
    costs: list
    penalties: list
    ties: list
    constraints: list
    allowed: list | None = None
    groups: list | None = None

    def choices(self):
        """[(layers of a group, indices of the pairs they may take together)] of all groups."""
        allowed = self.allowed or [range(len(pairs)) for pairs in self.pairs]
        return [(group, [pair for pair in allowed[group[0]] if all(pair in allowed[layer] for layer in group)])
                for group in self.groups or [(layer,) for layer in range(len(self.names))]]


@dataclass(frozen=True)
class Solution:
    """A policy, what it costs exactly, and how well it is known to be the best.

    proven, solver_status, gap: as solver.Result has them, of the objective. penalty_gap: of the penalty; where it is not 0,
    the objective is the best found at that penalty. seed: of a policy that was drawn at random; None where it was searched.
    """

    chosen: list
    weight_bits: list
    act_bits: list
    penalty: Fraction
    objective: Fraction
    proven: bool
    solver_status: str | None
    gap: float | None
    penalty_gap: float | None = 0.0
    seed: int | None = None

    @property
    def optimal(self):
        """Proven, or solved without a gap by a solver that says so itself."""
        closed = all(gap is not None and gap <= ZERO_GAP for gap in (self.gap, self.penalty_gap))
        return self.proven or (self.solver_status in OPTIMAL and closed)


class Infeasible(Exception):
    """No policy keeps the constraints.

    conflict: list of (constraint, smallest amount it could take), None for an amount that was not found in time. together:
    whether each of them could be kept alone, and the amounts are those beside the others named here.
    """

    def __init__(self, conflict, together=False):
        super().__init__("no policy keeps " + " and ".join(constraint.name for constraint, _ in conflict))
        self.conflict = conflict
        self.together = together


def erased(indicators, bits):
    """The candidates whose indicator is smaller than that of the next larger candidate, original values compared.

    Args:
        indicators: {bit: value}. bits: the candidates in use, descending.
    """
    return [bit for larger, bit in itertools.pairwise(bits) if indicators[bit] < indicators[larger]]


def isotonic(indicators, bits):
    """{bit: Fraction}, the nearest sequence in least squares that does not fall as bits shrink; by pooling adjacent violators.

    Args:
        indicators: {bit: value}. bits: the candidates in use, descending.
    """
    pools = []  # (sum, bits) of neighbours that share their mean
    for bit in bits:
        total, members = Fraction(indicators[bit]), [bit]
        while pools and pools[-1][0] * len(members) > total * len(pools[-1][1]):
            before, earlier = pools.pop()
            total, members = before + total, earlier + members
        pools.append((total, members))
    return {bit: total / len(members) for total, members in pools for bit in members}


def pairs_of(bits):
    """The pairs (weight bits, activation bits) of candidates, in the order of Problem.

    Here and below, `bits` are candidates of both, descending, or ([those of weights], [those of activations]).
    """
    weight_bits, act_bits = bits if isinstance(bits, tuple) and not isinstance(bits[0], int) else (bits, bits)
    return list(itertools.product(weight_bits, act_bits))


def make_problem(layers, bits, alpha, constraints, outliers="erase", allowed=None, groups=None):
    """The Problem with alpha (a Fraction >= 0) as the weight of the weights; allowed and groups as there.

    An erased candidate adds its penalty (alpha for a weight indicator, 1 for an activation indicator) and nothing else.

    Args:
        outliers: "erase" the candidates that `erased` finds, make the sequences "isotonic", or "keep" them as they are.
    """
    pairs = pairs_of(bits)
    weight_bits, act_bits = (list(dict.fromkeys(side)) for side in zip(*pairs, strict=True))
    costs, penalties = [], []
    for layer in layers:
        (weight, weight_erased), (act, act_erased) = (
            _costs_of(*side, outliers) for side in ((layer.weight, weight_bits), (layer.act, act_bits)))
        costs.append([act[a] + alpha * weight[w] for w, a in pairs])
        penalties.append([(a in act_erased) + alpha * (w in weight_erased) for w, a in pairs])
    return Problem([layer.name for layer in layers], [pairs] * len(layers), costs, penalties,
                   [bitops_use(layers, bits), size_use(layers, bits)], constraints, allowed, groups)


def _costs_of(indicators, bits, outliers):
    """({bit: cost}, the erased bits)."""
    if outliers == "isotonic":
        return isotonic(indicators, bits), []
    gone = erased(indicators, bits) if outliers == "erase" else []
    return {bit: Fraction(0 if bit in gone else indicators[bit]) for bit in bits}, gone


def join(count, ties):
    """Groups of layer indices for Problem: each of `ties` belongs together, and what overlaps is one group."""
    first = list(range(count))
    for tie in ties:
        joined = {first[layer] for layer in tie}
        first = [min(joined) if root in joined else root for root in first]
    return [tuple(layer for layer in range(count) if first[layer] == root) for root in sorted(set(first))]


def bitops_use(layers, bits):
    """BitOPs of every pair, [layer][pair]: MACs times weight bits times activation bits."""
    return [[layer.macs * w * a for w, a in pairs_of(bits)] for layer in layers]


def size_use(layers, bits):
    """Bits of weight storage of every pair, [layer][pair]."""
    return [[layer.params * w for w, _ in pairs_of(bits)] for layer in layers]


def size_constraint(layers, bits, fixed_params, ratio):
    """sum n[i]*j*x + 8*n_fixed <= 32 * (all n) / ratio, the ratio a Fraction > 0."""
    full = FULL_PRECISION_BITS * (sum(layer.params for layer in layers) + fixed_params)
    limit = size_budget(layers, bits, fixed_params, full / ratio / BITS_PER_MB)
    return replace(limit, name="size", key="cr", whole=full)


def bitops_constraint(layers, bits, weight_bits, act_bits):
    """sum macs[i]*j*k*x <= sum macs[i]*wb*ab over the searched layers, wb and ab Fractions > 0."""
    macs = sum(layer.macs for layer in layers)
    limit = bitops_budget(layers, bits, 0, macs * weight_bits * act_bits / BITOPS_PER_G)
    return replace(limit, name="BitOPs", key="bops", whole=macs)


def size_budget(layers, bits, fixed_params, megabytes):
    """Weight storage of the whole network, fixed layers included, in MB of 2^20 bytes."""
    fixed = FIXED_BITS * fixed_params
    return Constraint("size budget", size_use(layers, bits), math.floor(megabytes * BITS_PER_MB) - fixed, "MB",
                      BITS_PER_MB, fixed, key="size_budget")


def bitops_budget(layers, bits, fixed_macs, giga):
    """BitOPs of the whole network, the fixed layers at 8 x 8 bits included, in G."""
    fixed = FIXED_BITS**2 * fixed_macs
    return Constraint("BitOPs budget", bitops_use(layers, bits), math.floor(giga * BITOPS_PER_G) - fixed, "G",
                      BITOPS_PER_G, fixed, key="bops_budget")


def mean_bits_budget(layers, bits, kind, mean):
    """Mean bits over the searched layers, of the weights (kind "weight") or the activations ("act")."""
    name, key = {"weight": ("mean weight bits", "avg_wb"), "act": ("mean activation bits", "avg_ab")}[kind]
    use = [pair[kind == "act"] for pair in pairs_of(bits)]
    return Constraint(name, [use] * len(layers), math.floor(mean * len(layers)), "bits", len(layers), key=key)


def memory_budget(elements, fixed_elements, bits, kind, megabytes):
    """Memory of the layers' inputs at their activation bits: of the largest one, or of all together ("summed").

    Args:
        elements, fixed_elements: of one image, a number for each searched and each fixed layer; fixed ones take 8 bits.
    """
    use = [[count * a for _, a in pairs_of(bits)] for count in elements]
    fixed = [FIXED_BITS * count for count in fixed_elements]
    largest = kind == "largest"
    offset = max(fixed, default=0) if largest else sum(fixed)
    bound = math.floor(megabytes * BITS_PER_MB) - (0 if largest else offset)
    return Constraint(f"{kind} activation memory", use, bound, "MB", BITS_PER_MB, offset, largest, "act_mem")


def latency_budget(times, fixed_time, milliseconds):
    """Sum of the times of all layers, in ms, all Fractions.

    Args:
        times: [layer][pair]; a pair that may not be taken has 0. fixed_time: of the fixed layers.
    """
    unit = math.lcm(Fraction(fixed_time).denominator, *(Fraction(value).denominator for row in times for value in row))
    fixed = int(fixed_time * unit)
    return Constraint("latency", [[int(value * unit) for value in row] for row in times],
                      math.floor(milliseconds * unit) - fixed, "ms", unit, fixed, key="latency_budget")


def fitting(options, fits):
    """Those of Problem.choices() that fit, by fits(layer, pair), every layer; NoPolicy where a group has none."""
    kept = [(group, [pair for pair in pairs if all(fits(layer, pair) for layer in group)]) for group, pairs in options]
    if not all(pairs for _, pairs in kept):
        raise NoPolicy
    return kept


def within_largest(options, constraints):
    """The options that keep those of the constraints that are on a largest use."""
    for limit in constraints:
        if limit.largest:
            if limit.offset > limit.bound:
                raise NoPolicy
            options = fitting(options, lambda layer, pair, limit=limit: limit.use[layer][pair] <= limit.bound)
    return options


def pairs_taken(options, chosen):
    """The index of each layer's pair, for the option that each group takes."""
    taken = {layer: pairs[option] for (group, pairs), option in zip(options, chosen, strict=True) for layer in group}
    return [taken[layer] for layer in sorted(taken)]


def _summed(options, rows):
    """[group][option], summed over the layers of each group."""
    return [[sum(rows[layer][pair] for layer in group) for pair in pairs] for group, pairs in options]


def _budgets(options, constraints):
    return [Budget(_summed(options, limit.use), limit.bound) for limit in constraints if not limit.largest]


def solve(problem, solver=None, time_limit=None):
    """The policy of least penalty, then least objective, then first in the order of ties.

    Args:
        solver: as for minimise. time_limit: seconds after which the best policy known is returned, with the gap left.

    Raises:
        Infeasible: when the constraints cannot be kept together.
        SolverError: when the solver is missing or fails, or no policy was found in time.
    """
    deadline = math.inf if time_limit is None else time.monotonic() + time_limit
    try:
        options = within_largest(problem.choices(), problem.constraints)
        with contextlib.suppress(NoPolicy):  # no penalty is the least there can be, so then erased ones are not looked at
            unerased = fitting(options, lambda layer, pair: problem.penalties[layer][pair] == 0)
            return _minimised(problem, unerased, [], solver, deadline)
        return _solve_with_least_penalty(problem, options, solver, deadline)
    except NoPolicy:
        raise Infeasible(*_conflict(problem, solver)) from None


def _solve_with_least_penalty(problem, options, solver, deadline):
    """First the least penalty in all, then the least cost among the policies that pay no more."""
    penalties = _summed(options, over_common_denominator(problem.penalties))
    if not any(map(any, penalties)):
        raise NoPolicy
    least, result = least_total(penalties, _budgets(options, problem.constraints), solver, deadline)
    return _minimised(problem, options, [Budget(penalties, least)], solver, deadline, result)


def _minimised(problem, options, more, solver, deadline, before=None):
    """The policy of least objective. more: further budgets; before: the Result that they come from."""
    result = minimise(_summed(options, problem.costs), _budgets(options, problem.constraints) + more,
                      [_summed(options, table) for table in problem.ties], solver, deadline)
    return solution_of(problem, pairs_taken(options, result.chosen), result.proven and (before is None or before.proven),
                       result.solver_status, result.gap, 0.0 if before is None else before.gap)


def solution_of(problem, chosen, proven, solver_status, gap, penalty_gap, seed=None):
    """The Solution in which layers take these pairs; cost and constraints are worked out anew, in exact arithmetic."""
    for constraint in problem.constraints:
        assert constraint.amount(chosen) <= constraint.bound, f"the policy breaks the {constraint.name} constraint"
    pairs, penalties, costs = ([row[pair] for row, pair in zip(table, chosen, strict=True)]
                               for table in (problem.pairs, problem.penalties, problem.costs))
    return Solution(chosen, [w for w, _ in pairs], [a for _, a in pairs], Fraction(sum(penalties)), Fraction(sum(costs)),
                    proven, solver_status, gap, penalty_gap, seed)


def _conflict(problem, solver):
    """(conflict, together) of Infeasible, for the fewest constraints that cannot hold together."""
    constraints = problem.constraints
    for count in range(1, len(constraints) + 1):
        conflict = []
        for group in itertools.combinations(constraints, count):
            least = [(constraint, _least_amount(problem, constraint, group, solver)) for constraint in group]
            if count == len(constraints) or any(amount is not None and amount > constraint.bound
                                                for constraint, amount in least):
                conflict += least
                if count > 1:  # one pair at a time: what each could take holds beside the other one only
                    break
        if conflict:
            return conflict, count > 1
    raise AssertionError("there are no constraints to break")


def _least_amount(problem, constraint, group, solver):
    """The least of `constraint` while the others of the group hold, or None where that was not found in time."""
    others = [other for other in group if other is not constraint]
    deadline = time.monotonic() + CONFLICT_SECONDS
    try:
        if constraint.largest:
            return _least_largest(problem, constraint, others, solver, deadline)
        options = within_largest(problem.choices(), others)
        least, result = least_total(_summed(options, constraint.use), _budgets(options, others), solver, deadline)
        return least if result.proven else None
    except SolverError:
        return None


def _least_largest(problem, constraint, others, solver, deadline):
    """The smallest of its values at which the others can still be kept, by halving."""
    def can_hold(value):
        try:
            options = within_largest(problem.choices(), [*others, replace(constraint, bound=value)])
            budgets = _budgets(options, others)
            if budgets:
                least_total([[0] * len(pairs) for _, pairs in options], budgets, solver, deadline)
            return True
        except NoPolicy:
            return False

    values = sorted({max(value, constraint.offset) for row in constraint.use for value in row})
    return values[bisect.bisect_left(values[:-1], True, key=can_hold)]
