"""Swaps of bit-widths inside the budgets of a policy, in the order of what they cost by the indicators. No files, no network.

A choice is {(kind, layer): bit}, with kind "weight" or "act". All amounts are integers or fractions.
"""

from dataclasses import dataclass
from fractions import Fraction

from quan.cost import FIXED_BIT, FLOAT_BIT, MB
from quan.func import KINDS
from util.errors import UserError
from util.exchange import stands_for

MOST_MOVES = 4  # of the other direction, to make up for one
NUMBERS = ("wb", "ab", "cr", "bops_budget", "size_budget", "avg_wb", "avg_ab", "act_mem")
NOT_KEPT = ("latency_budget", "sparse_size", "sparse_bops", "same_bits")


@dataclass(frozen=True)
class Budget:
    """sum of use(row of the layer, weight bits, activation bits) over the searched layers <= bound."""

    use: object
    bound: Fraction

    def amount(self, layers, choice):
        return sum(self.use(row, choice["weight", name], choice["act", name]) for name, row in layers.items())


def budgets_of(policy, layers, fixed, choice, path):
    """The budgets that a policy was searched under, or, where it does not say any, its own BitOPs and size.

    Args:
        policy: as read_policy gives it.
        layers, fixed: {layer: row of the layer table}, searched and not.
        choice: what the policy chooses; a budget that it exceeds already is as large as it is.
        path: for messages.

    Raises:
        UserError: for a budget that only the search can keep.
    """
    asked = policy.get("constraints") or {}
    for key in NOT_KEPT:
        if asked.get(key):
            raise UserError(f"{path}: was searched with {key}, which swaps cannot keep; refine a policy of other budgets")
    macs, params = f"macs_{asked.get('macs', 'published')}", sum(row["params"] for row in fixed.values())
    size, bitops = (lambda row, w, a: row["params"] * w), (lambda row, w, a: row[macs] * w * a)
    elements = lambda row, w, a: row["act_elements"] * a  # noqa: E731 (as the two above)
    number = {key: _exactly(asked[key]) for key in NUMBERS if asked.get(key) is not None}
    budgets = []
    if asked.get("bops"):
        budgets.append(Budget(bitops, sum(row[macs] for row in layers.values()) * number["wb"] * number["ab"]))
    if "bops_budget" in number:
        budgets.append(Budget(bitops, number["bops_budget"] * 10**9 - FIXED_BIT**2 * sum(row[macs] for row in fixed.values())))
    if number.get("cr"):
        full = FLOAT_BIT * (sum(row["params"] for row in layers.values()) + params)
        budgets.append(Budget(size, full / number["cr"] - FIXED_BIT * params))
    if "size_budget" in number:
        budgets.append(Budget(size, number["size_budget"] * MB - FIXED_BIT * params))
    for key, use in (("avg_wb", lambda row, w, a: w), ("avg_ab", lambda row, w, a: a)):
        if key in number:
            budgets.append(Budget(use, number[key] * len(layers)))
    if "act_mem" in number:
        if asked.get("act_mem_kind") == "summed":
            rest = FIXED_BIT * sum(row["act_elements"] for row in fixed.values())
            budgets.append(Budget(elements, number["act_mem"] * MB - rest))
        else:
            largest = number["act_mem"] * MB
            budgets.append(Budget(lambda row, w, a: int(elements(row, w, a) > largest), 0))
    budgets = budgets or [Budget(bitops, 0), Budget(size, 0)]
    return [Budget(budget.use, max(budget.bound, budget.amount(layers, choice))) for budget in budgets]


def _exactly(value):
    if type(value) not in (int, float):
        raise TypeError(f"found {value!r}, expected a number")
    return Fraction(str(value))


def held(policy, layers):
    """The layers that pins and ties of a policy hold as they are."""
    asked = policy.get("constraints") or {}
    ties = asked.get("tie") or []
    if not all(isinstance(patterns, list) for patterns in ties):
        raise TypeError(f"tie: found {ties!r}, expected a list of lists")
    patterns = [*(asked.get("fix") or {}), *(pattern for patterns in ties for pattern in patterns)]
    return {name for pattern in patterns for name in _matching(pattern, layers)}


def floors_of(policy, layers):
    """{(kind, layer): least bit-width} that a policy was searched with; layers without are left out."""
    floors = {}
    for pattern, pair in ((policy.get("constraints") or {}).get("at_least") or {}).items():
        for name in _matching(pattern, layers):
            floors |= {(kind, name): max(bit, floors.get((kind, name), 0)) for kind, bit in zip(KINDS, pair, strict=True)}
    return floors


def _matching(pattern, layers):
    """The layers that a pattern of the search stands for."""
    found = [name for name, row in layers.items() if stands_for(pattern, name, row.get("shape"), row.get("groups", 1))]
    if not found:
        raise ValueError(f"{pattern} matches no layer")
    return found


class Swaps:
    """Finds swaps.

    Args:
        layers: {layer: row of the layer table}.
        costs: {(kind, layer): {bit: cost}}, by which swaps are ordered.
        budgets: list of Budget.
        held: layers that do not take part.
        floors: {(kind, layer): least bit-width}.
    """

    def __init__(self, layers, costs, budgets, held=(), floors=None):
        self.layers, self.costs, self.budgets = layers, costs, budgets
        self.keys = [key for key in costs if key[1] not in held]
        self.bits = {key: sorted(row) for key, row in costs.items()}
        self.floors = floors or {}

    def find(self, choice):
        """[(cost by the indicators, {key: new bit})] of the swaps from a choice, the least cost first."""
        spare = [budget.bound - budget.amount(self.layers, choice) for budget in self.budgets]
        found = {}
        for key in self.keys:
            for direction in (1, -1):
                changes = self._completed(choice, spare, key, direction)
                if changes:
                    cost = sum(self.costs[each][bit] - self.costs[each][choice[each]] for each, bit in changes.items())
                    found.setdefault(tuple(sorted(changes.items())), cost)
        return sorted(((cost, dict(changes)) for changes, cost in found.items()), key=lambda swap: swap[0])

    def _completed(self, choice, spare, key, direction):
        """A move of one key, with moves of others that make room for it (up), or use the room that it makes (down)."""
        bit = self._next(choice, key, direction)
        if bit is None:
            return None
        changed, left, moved = {**choice, key: bit}, self._left(choice, spare, key, bit), [key]
        while len(moved) <= MOST_MOVES and (direction == -1 or min(left) < 0):
            best = self._best_move(changed, moved, left, -direction)
            if best is None:
                break
            bit = self._next(changed, best, -direction)
            changed, left, moved = {**changed, best: bit}, self._left(changed, left, best, bit), [*moved, best]
        is_swap = min(left) >= 0 and (direction == 1 or len(moved) > 1)
        return {each: changed[each] for each in moved} if is_swap else None

    def _next(self, choice, key, direction):
        bits, place = self.bits[key], self.bits[key].index(choice[key]) + direction
        return bits[place] if 0 <= place < len(bits) and bits[place] >= self.floors.get(key, 0) else None

    def _left(self, choice, left, key, bit):
        """What is left of each budget after one more move."""
        rows, changed = {key[1]: self.layers[key[1]]}, {**choice, key: bit}
        return [room + budget.amount(rows, choice) - budget.amount(rows, changed)
                for room, budget in zip(left, self.budgets, strict=True)]

    def _best_move(self, choice, moved, left, direction):
        """The key whose move costs least for what it frees (down), or gains most and fits (up); None where there is none."""
        values = {}
        for key in self.keys:
            bit = None if key in moved else self._next(choice, key, direction)
            if bit is None:
                continue
            after, cost = self._left(choice, left, key, bit), self.costs[key][bit] - self.costs[key][choice[key]]
            if direction == 1 and min(after) >= 0 and cost < 0:
                values[key] = cost
            elif direction == -1:
                freed = sum(min(new, 0) - old for new, old in zip(after, left, strict=True) if old < 0)
                if freed > 0:
                    values[key] = max(cost, 0) / freed
        return min(values, key=values.get, default=None)
