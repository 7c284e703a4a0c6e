"""The search as an integer program: one pair (weight bits, activation bits) per layer, least cost, under constraints.

minimize sum (act[i][k] + alpha * weight[i][j]) x[i,j,k] (LIMPQ, arXiv 2203.08368), after the least penalty for erased
indicators. Ties go to lower BitOPs, then to lower size, then to larger bits in network order: layer by layer, weights
before activations. Everything that is added up here is an integer or a fraction, so that nothing is lost to rounding.
No files, no printing.
"""

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction

from solver import Budget, NoPolicy, least_total, minimise

BITS_PER_MB = 8 * 2**20
BITOPS_PER_G = 10**9
FULL_PRECISION_BITS = 32
FIXED_BITS = 8
SOLVED = "Optimal", "Optimal Solution Found"
ZERO_GAP = 1e-12


@dataclass(frozen=True)
class Layer:
    """A layer to be searched.

    weight, act: {bit: indicator}, the learned step sizes. macs: per image. params: number of weights.
    """

    name: str
    weight: dict
    act: dict
    macs: int
    params: int


@dataclass(frozen=True)
class Constraint:
    """sum of use[layer][pair chosen] <= bound.

    use and bound are integers in the smallest unit, such as bits. For people, (amount + offset) / per_unit is printed,
    in `unit`; the offset is what the fixed layers add.
    """

    name: str
    use: list
    bound: int
    unit: str
    per_unit: int
    offset: int = 0

    def shown(self, amount):
        return (amount + self.offset) / self.per_unit

    def amount(self, chosen):
        return sum(row[pair] for row, pair in zip(self.use, chosen, strict=True))


@dataclass(frozen=True)
class Problem:
    """Layers, the pairs each may take, what each pair costs, and the constraints on all of them together.

    pairs, costs, penalties and the tables in ties and constraints are all indexed [layer][pair]; pairs stand in
    descending order. costs and penalties are Fractions.
    """

    names: list
    pairs: list
    costs: list
    penalties: list
    ties: list
    constraints: list


@dataclass(frozen=True)
class Solution:
    """A policy, what it costs exactly, and how well it is known to be the best.

    proven: no policy is better, and none ties and comes first; every one that could was compared exactly.
    gap: relative gap left, 0.0 where proven; None where the solver reports none.
    """

    chosen: list
    weight_bits: list
    act_bits: list
    penalty: Fraction
    objective: Fraction
    proven: bool
    solver_status: str | None
    gap: float | None

    @property
    def optimal(self):
        """Proven, or solved without a gap by a solver that says so itself."""
        return self.proven or (self.solver_status in SOLVED and self.gap is not None and self.gap <= ZERO_GAP)


class Infeasible(Exception):
    """No policy keeps the constraints.

    conflict: list of (constraint, smallest amount it could take while the others named here hold).
    """

    def __init__(self, conflict):
        super().__init__("no policy keeps " + " and ".join(constraint.name for constraint, _ in conflict))
        self.conflict = conflict


# ---------------------------------------------------------------------------------------------------------------------
# Making the problem.


def erased(indicators, bits):
    """The candidates whose indicator is smaller than that of the next larger candidate, original values compared.

    Args:
        indicators: {bit: value}; a sane one grows as bits shrink.
        bits: the candidates in use, descending.
    """
    return [bit for larger, bit in itertools.pairwise(bits) if indicators[bit] < indicators[larger]]


def make_problem(layers, bits, alpha, constraints):
    """The problem for candidates `bits`, descending, with alpha (a Fraction >= 0) as the weight of the weights.

    An erased candidate adds its penalty (alpha for a weight indicator, 1 for an activation indicator) and nothing else.
    """
    pairs = list(itertools.product(bits, bits))
    costs, penalties = [], []
    for layer in layers:
        weight_erased, act_erased = erased(layer.weight, bits), erased(layer.act, bits)
        weight = {bit: 0 if bit in weight_erased else alpha * Fraction(layer.weight[bit]) for bit in bits}
        act = {bit: 0 if bit in act_erased else Fraction(layer.act[bit]) for bit in bits}
        costs.append([act[a] + weight[w] for w, a in pairs])
        penalties.append([(a in act_erased) + alpha * (w in weight_erased) for w, a in pairs])
    return Problem([layer.name for layer in layers], [pairs] * len(layers), costs, penalties,
                   [bitops_use(layers, bits), size_use(layers, bits)], constraints)


def bitops_use(layers, bits):
    """BitOPs of every pair, [layer][pair]: MACs times weight bits times activation bits."""
    return [[layer.macs * w * a for w, a in itertools.product(bits, bits)] for layer in layers]


def size_use(layers, bits):
    """Bits of weight storage of every pair, [layer][pair]."""
    return [[layer.params * w for w, _ in itertools.product(bits, bits)] for layer in layers]


def size_constraint(layers, bits, fixed_params, ratio):
    """sum n[i]*j*x + 8*n_fixed <= 32 * (all n) / ratio, the ratio a Fraction > 0."""
    total = sum(layer.params for layer in layers) + fixed_params
    fixed = FIXED_BITS * fixed_params
    bound = math.floor(Fraction(FULL_PRECISION_BITS * total) / ratio) - fixed
    return Constraint("size", size_use(layers, bits), bound, "MB", BITS_PER_MB, fixed)


def bitops_constraint(layers, bits, weight_bits, act_bits):
    """sum macs[i]*j*k*x <= sum macs[i]*wb*ab over the searched layers, wb and ab Fractions > 0."""
    bound = math.floor(sum(layer.macs for layer in layers) * weight_bits * act_bits)
    return Constraint("BitOPs", bitops_use(layers, bits), bound, "G", BITOPS_PER_G)


# ---------------------------------------------------------------------------------------------------------------------
# Solving it.


def solve(problem, solver=None):
    """The policy of least penalty, then least objective, then first in the order of ties.

    Args:
        solver: the name in PuLP of a solver that has to be asked; by default HiGHS, where it is needed.

    Raises:
        Infeasible: when the constraints cannot be kept together.
        SolverError: when the solver is missing or fails.
    """
    budgets = [Budget(constraint.use, constraint.bound) for constraint in problem.constraints]
    try:
        answer, chosen = _solve_without_erased(problem, budgets, solver)
    except NoPolicy:
        answer, chosen = _solve_with_least_penalty(problem, budgets, solver)
    return _recosted(problem, answer, chosen)


def _solve_without_erased(problem, budgets, solver):
    """Penalty 0 is the least there can be, so where it is possible the erased candidates need not be looked at."""
    free = [[pair for pair, penalty in enumerate(row) if penalty == 0] for row in problem.penalties]
    if not all(free):
        raise NoPolicy

    def pick(table):
        return [[row[pair] for pair in kept] for row, kept in zip(table, free, strict=True)]

    answer = minimise(pick(problem.costs), [Budget(pick(budget.use), budget.bound) for budget in budgets],
                      [pick(table) for table in problem.ties], solver)
    return answer, [kept[option] for kept, option in zip(free, answer.chosen, strict=True)]


def _solve_with_least_penalty(problem, budgets, solver):
    """First the least penalty in all, then the least cost among the policies that pay no more."""
    unit = math.lcm(*(Fraction(value).denominator for row in problem.penalties for value in row))
    penalties = [[int(value * unit) for value in row] for row in problem.penalties]
    if not any(map(any, penalties)):
        raise Infeasible(_conflict(problem, solver))
    try:
        least = least_total(penalties, budgets, solver)
    except NoPolicy:
        raise Infeasible(_conflict(problem, solver)) from None
    answer = minimise(problem.costs, [*budgets, Budget(penalties, least)], problem.ties, solver)
    return answer, answer.chosen


def _recosted(problem, answer, chosen):
    """The solution with its cost and every constraint worked out anew from the problem, in exact arithmetic."""
    for constraint in problem.constraints:
        assert constraint.amount(chosen) <= constraint.bound, f"the policy breaks the {constraint.name} constraint"
    pairs = [row[pair] for row, pair in zip(problem.pairs, chosen, strict=True)]
    return Solution(
        chosen, [w for w, _ in pairs], [a for _, a in pairs],
        Fraction(sum(row[pair] for row, pair in zip(problem.penalties, chosen, strict=True))),
        Fraction(sum(row[pair] for row, pair in zip(problem.costs, chosen, strict=True))),
        answer.proven, answer.solver_status, 0.0 if answer.proven else answer.gap)


def _conflict(problem, solver):
    """The fewest constraints that cannot hold together, each with the least it could take beside the others named."""
    constraints = problem.constraints
    for count in range(1, len(constraints) + 1):
        conflict = []
        for group in itertools.combinations(constraints, count):
            least = [_least_amount(constraint, group, solver) for constraint in group]
            if any(amount > constraint.bound for amount, constraint in zip(least, group, strict=True)):
                named = {constraint.name for constraint, _ in conflict}
                conflict += [pair for pair in zip(group, least, strict=True) if pair[0].name not in named]
        if conflict:
            return conflict
    raise AssertionError("the constraints can be kept")


def _least_amount(constraint, group, solver):
    others = [Budget(other.use, other.bound) for other in group if other is not constraint]
    return least_total(constraint.use, others, solver)
