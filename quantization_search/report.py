"""What a search prints: warnings about the indicators, the policy with its costs, and why there is none."""

import itertools
import math
from fractions import Fraction

from baselines import LEAST_USE
from ilp import BITOPS_PER_G, BITS_PER_MB, erased
from util.config import describe
from util.exchange import STEPS

RULES = {"erase": "and are taken only where nothing else fits", "keep": "and are kept as they are",
         "isotonic": "and give way to the nearest sequence that never is"}

MOST_ENTRIES = 20  # of how the indicators were made, on one line


def describe_training(trained):
    """What an indicators file says of how it was made, in one line; '' where it says nothing."""
    if not isinstance(trained, dict):
        return ""
    said = [f"{key} {value if isinstance(value, str) and value.isidentifier() else describe(value)}"
            for key, value in itertools.islice(trained.items(), MOST_ENTRIES) if isinstance(key, str) and key.isidentifier()]
    return f"indicators made with {', '.join(said)}" if said else ""


def print_indicators(layers, bits, outliers="erase", kind_of_all=STEPS):
    """Say of what kind indicators are that are no step sizes, and which look wrong: step sizes that are not positive, others
    that are negative, and those that are smaller than that of the next larger candidate."""
    is_steps = kind_of_all == STEPS
    if not is_steps:
        print(f"indicators of the kind {describe(kind_of_all)}")
    for kind in ("weight", "act"):
        rows = {layer.name: getattr(layer, kind) for layer in layers}
        searched = [bit for bit in bits if all(bit in row for row in rows.values())]  # none of inputs that are left alone
        total = len(rows) * len(searched)
        wrong = "not positive" if is_steps else "negative"
        low = {name: [bit for bit in searched if row[bit] < 0 or (is_steps and not row[bit])] for name, row in rows.items()}
        falling = {name: erased(row, searched) for name, row in rows.items()}
        for what, found in ((wrong, low), (f"smaller than with more bits, {RULES[outliers]}", falling)):
            if any(found.values()):
                print(f"warning: {sum(map(len, found.values()))} of {total} {kind} indicators are {what}: "
                      f"{', '.join(name for name, bits in found.items() if bits)}")


def print_solution(problem, solution, costs, solver=None):
    print(describe_proof(solution, solver) if solution.seed is None else describe_draw(problem, solution))
    print(f"objective {float(solution.objective):.9f}, penalty {float(solution.penalty):g}")
    print(f"size {costs.size() / BITS_PER_MB:.3f} MB, {costs.full_size() / costs.size():.3f} times smaller than "
          f"{costs.full_size() / BITS_PER_MB:.3f} MB at 32 bits")
    if costs.network.sparse:
        zeros, params = costs.zeros()
        print(f"sparsity {zeros / params:.2%}, {zeros} of {params} weights are zero, fixed layers included")
        print(f"sparse size {costs.sparse_size() / BITS_PER_MB:.3f} MB, {costs.full_size() / costs.sparse_size():.3f} times "
              f"smaller than {costs.full_size() / BITS_PER_MB:.3f} MB at 32 bits")
    for count in ("published", "exact"):
        print(f"BitOPs {costs.bitops(count) / BITOPS_PER_G:.3f} G ({count} MACs), fixed layers included; "
              f"{costs.full_bitops(count) / BITOPS_PER_G:.3f} G at 32x32 bits")
        if costs.network.sparse:
            print(f"effective BitOPs {costs.effective_bitops(count) / BITOPS_PER_G:.3f} G ({count} MACs whose weight is not "
                  "zero), fixed layers included")
    if costs.network.non_layer_macs:
        print(f"non-layer MACs: {costs.network.non_layer_macs / BITOPS_PER_G:.3f} G in full precision, "
              "in no BitOPs")
    print("mean bits over the searched layers: weights {:.3f}, activations {:.3f}".format(*costs.mean_bits()))
    for constraint in problem.constraints:
        amount = constraint.amount(solution.chosen)
        spare = (constraint.bound - amount) / constraint.per_unit
        print(f"{constraint.name} constraint: {constraint.shown(amount):.6f} of "
              f"{constraint.shown(constraint.bound):.6f} {constraint.unit}, {spare:.6f} {constraint.unit} left")
    print_layers(costs)


def describe_proof(solution, solver=None):
    """How well the policy is known to be the best, in one line."""
    said = f"; {solver or 'HiGHS'} says {solution.solver_status}" if solution.solver_status else ""
    if solution.proven:
        return f"optimal, gap 0: every policy that could be better or tie was compared exactly{said}"
    if solution.optimal:
        return f"optimal within the solver's tolerances, ties not compared{said}, gap 0"
    gap, penalty_gap = ("of unknown size" if gap is None else f"{gap:.3g}" for gap in (solution.gap, solution.penalty_gap))
    at_penalty = "" if solution.penalty_gap == 0 else f" at this penalty, whose own gap is {penalty_gap}"
    return f"not proven to be optimal{said}, gap {gap}{at_penalty}"


def describe_draw(problem, solution):
    """Where a policy comes from that no search has found, in one line."""
    largest = [constraint.name for constraint in problem.constraints if constraint.largest]
    sums = len(problem.constraints) - len(largest)
    used = f", at least {LEAST_USE}% of each {'other ' if largest else ''}budget in use" if sums else ""
    return f"drawn at random with seed {solution.seed}{used}" + "".join(f", {name} kept" for name in largest)


def print_layers(costs):
    """One line per layer: bits, MACs by the published count, its shares of dense size and BitOPs, and sparsity, if any."""
    shares = costs.shares()
    width = max(map(len, [*shares, "layer"]))
    sparse = costs.network.sparse
    print(f"{'layer':{width}}   w   a        MACs    size  BitOPs" + "  sparsity" * sparse)
    for name, share in shares.items():
        print(f"{name:{width}} {share.weight_bits:3d} {share.act_bits:3d} {share.macs:11d} "
              f"{share.size:7.2%} {share.bitops:7.2%}" + f" {share.sparsity:9.2%}" * sparse
              + ("  fixed" if name in costs.network.fixed else ""))


def print_shadow_prices(solution, prices):
    """What 1% more of each constraint would gain: penalty first, as the search weighs it."""
    for constraint, relaxed in prices:
        fall = float(solution.objective - relaxed.objective)
        penalty = solution.penalty - relaxed.penalty
        print(f"1% more {constraint.name}: the objective {'falls' if fall >= 0 else 'rises'} by {abs(fall):.9f}"
              + (f", the penalty falls by {float(penalty):g}" if penalty else "")
              + ("" if solution.optimal and relaxed.optimal else ", not proven"))


def headline(network, costs):
    return (f"{network.arch}: {costs.size() / BITS_PER_MB:.3f} MB, {costs.full_size() / costs.size():.2f} times smaller, "
            f"{costs.bitops('published') / BITOPS_PER_G:.3f} G BitOPs")


def describe_conflict(conflict, together):
    """For each constraint that cannot be kept: what was asked and the smallest value it could take."""
    parts = []
    for constraint, least in conflict:
        bound = f"asked is at most {constraint.shown(constraint.bound):.6g} {constraint.unit}"
        if least is None:
            parts.append(f"the least that {constraint.name} takes beside the others was not found in time, {bound}")
        else:
            parts.append(f"{constraint.name} takes at least {rounded(constraint.exactly(least))} {constraint.unit}"
                         f"{_as_asked(constraint, least)}{' beside the others' if together else ''}, {bound}")
    return "; ".join(parts)


def _as_asked(constraint, least):
    """The same in the number of the option, where that is another one."""
    if constraint.key == "cr" and least + constraint.offset > 0:
        return f" (cr at most {rounded(Fraction(constraint.whole, least + constraint.offset), up=False)})"
    if constraint.key == "bops":
        return f" (wb times ab at least {rounded(Fraction(least, constraint.whole))})"
    return ""


def rounded(value, up=True):
    """Six significant digits of a Fraction, never less than the value (or never more), so that it can be asked for."""
    if value == 0:
        return "0"
    step = Fraction(10) ** (math.floor(math.log10(abs(value))) - 5)
    whole = math.ceil(value / step) if up else math.floor(value / step)
    return f"{float(whole * step):.6g}"
