"""What a search prints: warnings about the indicators, the answer with its costs, and why there is none."""

import math
from dataclasses import dataclass

from ilp import BITOPS_PER_G, BITS_PER_MB, FIXED_BITS, FULL_PRECISION_BITS, erased
from network import Network


@dataclass(frozen=True)
class Costs:
    """Size and BitOPs of a whole network under a policy, the fixed layers at 8 x 8 bits included, in exact integers."""

    network: Network
    solution: object

    def assigned(self):
        """(row, weight bits, activation bits) of every layer."""
        yield from zip(self.network.rows.values(), self.solution.weight_bits, self.solution.act_bits, strict=True)
        yield from ((row, FIXED_BITS, FIXED_BITS) for row in self.network.fixed.values())

    def size(self):
        """Weight storage in bits."""
        return sum(row.params * weight_bits for row, weight_bits, _ in self.assigned())

    def full_size(self):
        return sum(row.params * FULL_PRECISION_BITS for row, _, _ in self.assigned())

    def bitops(self, count):
        """BitOPs per image; count is 'published' or 'exact'."""
        return sum(getattr(row, f"macs_{count}") * weight_bits * act_bits
                   for row, weight_bits, act_bits in self.assigned())

    def full_bitops(self, count):
        return sum(getattr(row, f"macs_{count}") * FULL_PRECISION_BITS**2 for row, _, _ in self.assigned())

    def mean_bits(self):
        """Mean weight bits and mean activation bits over the searched layers."""
        layers = len(self.network.rows)
        return sum(self.solution.weight_bits) / layers, sum(self.solution.act_bits) / layers

    def as_plain(self):
        weight_bits, act_bits = self.mean_bits()
        return {"size_mb": self.size() / BITS_PER_MB, "compression_ratio": self.full_size() / self.size(),
                "bitops_published": self.bitops("published"), "bitops_exact": self.bitops("exact"),
                "mean_weight_bits": weight_bits, "mean_act_bits": act_bits}


def print_indicators(layers, bits):
    """Say which indicators look wrong: not positive, or smaller than that of the next larger candidate."""
    for kind in ("weight", "act"):
        rows = {layer.name: getattr(layer, kind) for layer in layers}
        total = len(rows) * len(bits)
        low = {name: [bit for bit in bits if row[bit] <= 0] for name, row in rows.items()}
        falling = {name: erased(row, bits) for name, row in rows.items()}
        _print_suspects(f"of {total} {kind} indicators are not positive", low)
        _print_suspects(f"of {total} {kind} indicators are smaller than with more bits, "
                        "and are taken only where nothing else fits", falling)


def _print_suspects(what, found):
    count = sum(map(len, found.values()))
    if count:
        print(f"warning: {count} {what}: {', '.join(name for name, bits in found.items() if bits)}")


def print_solution(problem, solution, costs, solver=None):
    print(describe_proof(solution, solver))
    print(f"objective {float(solution.objective):.9f}, penalty {float(solution.penalty):g}")
    print(f"size {costs.size() / BITS_PER_MB:.3f} MB, {costs.full_size() / costs.size():.3f} times smaller than "
          f"{costs.full_size() / BITS_PER_MB:.3f} MB at 32 bits")
    for count in ("published", "exact"):
        print(f"BitOPs {costs.bitops(count) / BITOPS_PER_G:.3f} G ({count} MACs), fixed layers included; "
              f"{costs.full_bitops(count) / BITOPS_PER_G:.3f} G at 32x32 bits")
    print("mean bits over the searched layers: weights {:.3f}, activations {:.3f}".format(*costs.mean_bits()))
    for constraint in problem.constraints:
        amount = constraint.amount(solution.chosen)
        spare = (constraint.bound - amount) / constraint.per_unit
        print(f"{constraint.name} constraint: {constraint.shown(amount):.6f} of "
              f"{constraint.shown(constraint.bound):.6f} {constraint.unit}, {spare:.6f} {constraint.unit} left")
    print_layers(costs)


def describe_proof(solution, solver=None):
    """How well the answer is known to be the best, in one line."""
    said = f"; {solver or 'HiGHS'} says {solution.solver_status}" if solution.solver_status else ""
    if solution.proven:
        return f"optimal, gap 0: every policy that could be better or tie was compared exactly{said}"
    gap = "of unknown size" if solution.gap is None else f"{solution.gap:.3g}"
    if solution.optimal:
        return f"optimal within the solver's tolerances, ties not compared{said}, gap {gap}"
    return f"not proven to be optimal{said}, gap {gap}"


def print_layers(costs):
    """One line per layer: bits, MACs by the published count, and its shares of size and BitOPs."""
    names = [*costs.network.rows, *costs.network.fixed]
    width = max(map(len, [*names, "layer"]))
    print(f"{'layer':{width}}   w   a        MACs    size  BitOPs")
    size, bitops = costs.size(), costs.bitops("published")
    for name, (row, weight_bits, act_bits) in zip(names, costs.assigned(), strict=True):
        print(f"{name:{width}} {weight_bits:3d} {act_bits:3d} {row.macs_published:11d} "
              f"{row.params * weight_bits / size:7.2%} {row.macs_published * weight_bits * act_bits / bitops:7.2%}"
              + ("  fixed" if name in costs.network.fixed else ""))


def describe_conflict(conflict):
    """For each constraint that cannot be kept: what was asked and the smallest value it could take."""
    alone = len(conflict) == 1
    return "; ".join(
        f"{constraint.name} takes at least {_rounded_up(constraint.shown(least))} {constraint.unit}"
        f"{'' if alone else ' beside the others'}, asked is at most {constraint.shown(constraint.bound):.6g} "
        f"{constraint.unit}" for constraint, least in conflict)


def _rounded_up(value):
    """Six significant digits, never less than the value, so that what is printed can be asked for."""
    if value == 0:
        return "0"
    step = 10.0 ** (math.floor(math.log10(abs(value))) - 5)
    return f"{math.ceil(value / step) * step:.6g}"
