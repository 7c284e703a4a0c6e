"""What a search is compared with: a policy drawn at random under the same budgets, and indicators in reversed order.

No files, no printing.
"""

import random
from dataclasses import replace
from fractions import Fraction

from ilp import Infeasible, pairs_taken, solution_of, within_largest

LEAST_USE = 99  # percent of each budget
WALKS = 40
PROPOSALS, PROPOSALS_PER_GROUP = 1000, 100  # of one walk


class NoneDrawn(Exception):
    """No policy that uses enough of the budgets was found; the message says of which."""


def mirrored(layers, bits):
    """The layers, each with the indicators of its mirror rank: the layer of the smallest mean has those of the largest.

    Weights and activations are ranked apart, by the mean over the candidates in use; equal means rank in network order. The
    layer at rank r has the whole row of the one at rank L - 1 - r, L the number of layers.
    """
    def mirror(ranked):
        return [other for _, other in sorted(zip(ranked, reversed(ranked), strict=True))]

    return _exchanged(layers, bits, mirror)


def by_depth(layers, bits):
    """The layers, each with such indicators that their means, ranked as above, fall from the first layer to the last."""
    return _exchanged(layers, bits, lambda ranked: ranked[::-1])


def _exchanged(layers, bits, order):
    """The layers with each other's indicators; order: from indices, the least mean first, to what each layer takes."""
    rows = {kind: [getattr(layer, kind) for layer in layers] for kind in ("weight", "act")}
    means = {kind: [sum(Fraction(row.get(bit, 0)) for bit in bits) for row in table] for kind, table in rows.items()}
    taken = {kind: order(sorted(range(len(layers)), key=totals.__getitem__)) for kind, totals in means.items()}
    return [replace(layer, **{kind: rows[kind][taken[kind][index]] for kind in rows}) for index, layer in enumerate(layers)]


def draw(problem, seed):
    """A policy drawn at random that keeps every constraint and uses at least 99% of each that is a sum, fixed layers included.

    A walk starts at uniform choices and proposes uniform choices for one or two groups at a time, taken where the budgets are
    missed by no more than before, until none is; it is begun anew where it does not end. So not every policy is equally
    likely, and where very few are inside, none may be found.

    Args:
        problem: ilp.Problem. seed: a whole number >= 0; the same one gives the same policy, a Solution that is not proven.

    Raises:
        ilp.Infeasible: when a constraint cannot be kept even alone.
        NoneDrawn: when a budget cannot be used to 99%, or no walk ended with every budget kept and in use.
    """
    options = problem.choices()
    least = [(constraint, _extreme(constraint, options, min)) for constraint in problem.constraints]
    broken = [(constraint, amount) for constraint, amount in least if amount > constraint.bound]
    if broken:
        raise Infeasible(broken)
    options = within_largest(options, problem.constraints)
    budgets = [constraint for constraint in problem.constraints if not constraint.largest]
    _check_reach(budgets, options)
    uses = [[tuple(_group_use(budget, group, pair) for budget in budgets) for pair in pairs] for group, pairs in options]
    fixed, limits = [budget.offset for budget in budgets], [budget.bound + budget.offset for budget in budgets]
    rng = random.Random(seed)
    for _ in range(WALKS):
        found = _walk(rng, uses, fixed, limits)
        if found is not None:
            return solution_of(problem, pairs_taken(options, found), proven=False, solver_status=None, gap=None,
                               penalty_gap=None, seed=seed)
    raise NoneDrawn(f"no policy that keeps {' and '.join(budget.name for budget in budgets)} and uses at least {LEAST_USE}% "
                    f"of each was found in {WALKS} random walks")


def _check_reach(budgets, options):
    for budget in budgets:
        most = _extreme(budget, options, max)
        if LEAST_USE * (budget.bound + budget.offset) > 100 * (most + budget.offset):
            raise NoneDrawn(f"even the largest bits use only {budget.shown(most):.6g} {budget.unit} of the "
                            f"{budget.shown(budget.bound):.6g} {budget.unit} of {budget.name}, less than {LEAST_USE}%")


def _group_use(constraint, group, pair):
    """What a group takes of a constraint when its layers have this pair."""
    used = [constraint.use[layer][pair] for layer in group]
    return max(used) if constraint.largest else sum(used)


def _extreme(constraint, options, extreme):
    """The amount when every group takes its least (min) or its most (max)."""
    used = [extreme(_group_use(constraint, group, pair) for pair in pairs) for group, pairs in options]
    return max(constraint.offset, *used) if constraint.largest else sum(used)


def _walk(rng, uses, fixed, limits):
    """The option of each group at the end of a walk that misses no budget, or None.

    Args:
        uses: [group][option], tuples with an amount for each budget. fixed, limits: one number for each budget.
    """
    chosen = [rng.randrange(len(rows)) for rows in uses]
    picked = [rows[option] for rows, option in zip(uses, chosen, strict=True)]
    used = [sum(amounts) for amounts in zip(fixed, *picked, strict=True)]
    missed = _missed(used, limits)
    for _ in range(PROPOSALS + PROPOSALS_PER_GROUP * len(uses)):
        if not missed:
            return chosen
        changed = {rng.randrange(len(uses)) for _ in range(rng.randint(1, 2))}
        moves = {group: rng.randrange(len(uses[group])) for group in changed}
        proposed = used
        for group, option in moves.items():
            rows = uses[group]
            proposed = [amount - before + after
                        for amount, before, after in zip(proposed, rows[chosen[group]], rows[option], strict=True)]
        remains = _missed(proposed, limits)
        if remains <= missed:
            used, missed = proposed, remains
            for group, option in moves.items():
                chosen[group] = option
    return None if missed else chosen


def _missed(used, limits):
    """By how much amounts are above their limits, or below 99% of them, relative to these; the sum of all."""
    return sum(max(0, 100 * (amount - limit), LEAST_USE * limit - 100 * amount) / (100 * max(limit, 1))
               for amount, limit in zip(used, limits, strict=True))
