"""Exact minimisation of a sum over layers, one option per layer, under integer budgets. No files, no printing.

Floating-point solvers stop within a tolerance, so what one finds proves nothing about small gains and ties. Three steps:

1. The linear relaxation, solved by HiGHS, gives a Lagrangian multiplier m >= 0 for each budget. Whatever the multipliers,
   every policy inside the budgets fulfils sum(cost) = bound + sum(reduced cost) + sum(m * unused), where the reduced cost of
   an option is cost + m * use above its least value in the layer. A beam search finds a first policy; options whose reduced
   cost alone exceeds what that policy has above the bound are in no better one and are left out.
2. Dynamic programming over the layers visits every policy that is not worse than the best one known, merging those that use
   the same amounts. It compares whole numbers of any length, so gains below any tolerance and ties are decided exactly. Where
   it ends, the result is proven, whatever a solver says. Its work is bounded.
3. Where that would be long, or a solver is asked for by name, what remains is handed to a mixed-integer solver first, whose
   status and gap are kept. Where its result cannot be proven by dynamic programming, the gap to the better of the solver's
   bound and that of the relaxation goes with it.
"""

import contextlib
import heapq
import math
import operator
import time
from dataclasses import dataclass

FEW_STEPS = 1_500_000  # of dynamic programming, after which a solver is asked first
MOST_STEPS = 4_000_000  # after which the solver's word is all there is
FIRST_PART = 0.3  # of the allowance, divided by the layers, is tried first, and then widened
GROWTH, SLOW_GROWTH, LEAST_GROWTH = 1.6, 1.15, 1.03
LARGEST_SHARE = 0.4  # of all steps, for one allowance
CHEAP_STEPS = 100  # while an allowance takes so few, it grows fast
BEAM_WIDTH = 24
BEAM_OPTIONS = 5
LARGEST_ROW = 10**9  # beyond this, HiGHS's absolute tolerance of 1e-9 is finer than a double can hold
ROUNDING = 1e-13  # bound on the relative rounding error of a sum of doubles over all layers, with a wide margin
CLEAR_GAIN = 1e-5  # of the largest cost in the program
OBJECTIVE_SCALE = 1e6  # HiGHS passes over gains below about 1e-6
SHORTEST_RUN = 0.01  # seconds; a limit of 0 means none to some solvers
OPTIMAL = ("Optimal", "Optimal Solution Found")
INFEASIBLE = "Infeasible"
STRICT = {"gapRel": 0.0, "gapAbs": 0.0, "threads": 1, "mip_feasibility_tolerance": 1e-9}


class SolverError(RuntimeError):
    """The solver is missing, or found nothing that can be used."""


class NoPolicy(Exception):
    """No choice of options keeps every budget."""


class _TooLong(Exception):
    """Dynamic programming took more steps than it was given."""


@dataclass(frozen=True)
class Budget:
    """sum of use[layer][option chosen] <= bound, all integers, use never negative."""

    use: list
    bound: int


@dataclass(frozen=True)
class Result:
    """The options chosen, one index per layer; proven: whether every policy that could be better, or tied, was compared.

    solver_status: what the solver said of its own run; None where it was not needed.
    gap: relative distance to the best bound known, 0.0 where there is none left; None where that is not known.
    """

    chosen: list
    proven: bool
    solver_status: str | None
    gap: float | None


def minimise(costs, budgets, ties=(), solver=None, deadline=math.inf):
    """Choose one option per layer so that the total cost is least and every budget is kept.

    Args:
        costs: exact cost (int or Fraction) of every option, [layer][option]. budgets: list of Budget.
        ties: integer tables [layer][option]; between equal costs the least total of the first table wins, then of the
            second, and so on; at last the lower option index in the first layer that differs.
        solver: the name in PuLP of a solver that has to be asked; None asks HiGHS, and only where that is needed.
        deadline: the moment, by time.monotonic(), after which the best policy known is returned unproven.

    Raises:
        NoPolicy: when the budgets cannot be kept together.
        SolverError: when the solver is missing, fails, or finds no policy in time.
    """
    return _settle(_Program(costs, budgets, ties), solver, 0.0, deadline)


def least_total(costs, budgets, solver=None, deadline=math.inf):
    """(the least total cost inside the budgets, a Result that reaches it); arguments and errors are those of minimise."""
    program = _Program(costs, budgets, ())
    result = _settle(program, solver, program.smallest_gain, deadline)
    return _total(costs, result.chosen), result


def _settle(program, solver, gain, deadline):
    """The three steps. Policies that are better by less than `gain` are not looked for; with 0, all that tie are."""
    program.drop_impossible()
    program.drop_dominated()
    program.price(_multipliers(program))
    known = program.dynamic_program(math.inf, width=BEAM_WIDTH)
    if known is not None:
        program.drop_worse_than(known)
        if solver is None and (gain < CLEAR_GAIN or program.allowance(known, gain) < 0):
            with contextlib.suppress(_TooLong):
                return Result(program.best(known, gain, FEW_STEPS, deadline), True, None, 0.0)
    chosen, status, gap, bound = _solve_mixed_integer(program, solver or "HiGHS", deadline)
    if known is None and status == INFEASIBLE:
        raise NoPolicy
    if chosen is not None and (known is None or program.key(chosen) < program.key(known)):
        known = chosen
        program.drop_worse_than(known)
    if known is None:
        raise SolverError(f"{solver or 'HiGHS'} found nothing usable ({status})")
    if gain > CLEAR_GAIN and chosen is not None and status in OPTIMAL and not gap:
        return Result(known, True, status, 0.0)  # no gain so large can hide behind the solver's tolerances
    try:
        return Result(program.best(known, gain, MOST_STEPS, deadline), True, status, 0.0)
    except _TooLong:
        closed = status in OPTIMAL and gap == 0
        return Result(known, False, status, 0.0 if closed else program.gap(known, bound))


def _total(table, chosen):
    """The sum of table[layer][option] over the options chosen."""
    return sum(map(operator.getitem, table, chosen))


class _Program:
    """The working form: integer keys to compare by, doubles to bound by, and the options still in play.

    keys[layer][option] is one integer made of cost, ties and option index, most significant first: sums of keys compare as
    policies do, and the options can be read back from a sum.
    """

    def __init__(self, costs, budgets, ties):
        self.layers = range(len(costs))
        self.options = [list(range(len(row))) for row in costs]
        self.base = max(map(len, costs))
        whole = over_common_denominator(costs)
        self.keys = _ordered_keys(whole, ties, self.base)
        self.costs, self.smallest_gain, self.base_cost = _normalized(whole)
        self.rows, self.bounds = [], []
        for budget in budgets:
            divisor = math.gcd(*(value for row in budget.use for value in row)) or 1
            self.rows.append([[value // divisor for value in row] for row in budget.use])
            self.bounds.append(budget.bound // divisor)
        self._lay_out_fields()
        self.reduced = self.costs
        self.work = 0  # steps of the last dynamic_program

    def key(self, chosen):
        return _total(self.keys, chosen)

    def keeps_budgets(self, chosen):
        return all(_total(row, chosen) <= bound for row, bound in zip(self.rows, self.bounds, strict=True))

    def drop_impossible(self):
        """Leave out options that break a budget even beside the least use of all other layers, and idle budgets."""
        for row, bound in zip(self.rows, self.bounds, strict=True):
            least = [min(row[layer][option] for option in self.options[layer]) for layer in self.layers]
            spare = bound - sum(least)
            self.options = [[option for option in self.options[layer] if row[layer][option] - least[layer] <= spare]
                            for layer in self.layers]
            if not all(self.options):
                raise NoPolicy
        binding = [(row, bound) for row, bound in zip(self.rows, self.bounds, strict=True) if bound < sum(
            max(row[layer][option] for option in self.options[layer]) for layer in self.layers)]
        self.rows, self.bounds = [row for row, _ in binding], [bound for _, bound in binding]
        self._lay_out_fields()

    def _lay_out_fields(self):
        """(shift, mask) of each budget's field in a packed integer; the guard is the highest bit of every field."""
        self.multipliers, self.scales = [0.0] * len(self.rows), [abs(bound) or 1 for bound in self.bounds]
        self.fields, self.guard, shift = [], 0, 0
        for row, bound in zip(self.rows, self.bounds, strict=True):
            length = (max(bound, 0) + max(map(max, row))).bit_length()
            self.fields.append((shift, (1 << length) - 1))
            self.guard += 1 << (shift + length)
            shift += length + 1

    def drop_dominated(self):
        """Leave out an option where another of its layer comes first in the order and uses no more of any budget."""
        for layer in self.layers:
            kept, uses = [], []
            for option in sorted(self.options[layer], key=self.keys[layer].__getitem__):
                use = [row[layer][option] for row in self.rows]
                if not any(all(map(operator.le, other, use)) for other in uses):
                    kept.append(option)
                    uses.append(use)
            self.options[layer] = kept

    def price(self, multipliers):
        """Set the multipliers, and with them the reduced cost of every option and the lower bound on the total cost."""
        self.multipliers = multipliers
        priced = [list(costs) for costs in self.costs]
        for price, row in zip(multipliers, self.rows, strict=True):
            priced = [[value + price * use for value, use in zip(values, uses, strict=True)]
                      for values, uses in zip(priced, row, strict=True)]
        least = [min(priced[layer][option] for option in self.options[layer]) for layer in self.layers]
        spent = [price * bound for price, bound in zip(multipliers, self.bounds, strict=True)]
        self.reduced = [[value - low for value in values] for values, low in zip(priced, least, strict=True)]
        self.lower_bound = math.fsum(least) - math.fsum(spent)
        self.rounding = ROUNDING * (sum(max(map(abs, values)) for values in priced) + sum(map(abs, spent)) + 1)

    def allowance(self, known, gain=0.0):
        """How much reduced cost and unused, priced budget a policy may gather and still be better than `known` by `gain`."""
        return math.fsum(map(operator.getitem, self.costs, known)) - gain - self.lower_bound + self.rounding

    def drop_worse_than(self, known):
        allowance = self.allowance(known)
        self.options = [[option for option in self.options[layer] if self.reduced[layer][option] <= allowance]
                        for layer in self.layers]

    def best(self, known, gain, limit, deadline=math.inf):
        """The first policy in the order of keys, or `known` where none is better by `gain`.

        What is found within a smaller allowance is better than everything beyond it, so small ones are tried first, and
        smaller steps where one turns out too wide.
        """
        allowance = self.allowance(known, gain)
        if allowance < 0:
            return known
        tried, growth, left = min(1.0, FIRST_PART / len(self.costs)), GROWTH, limit
        while tried < 1:
            part = min(1.0, tried * growth)
            try:
                best = self.dynamic_program(part * allowance, min(left, limit * LARGEST_SHARE), deadline=deadline)
            except _TooLong:
                growth, left = math.sqrt(growth), left - self.work
                if left <= 0 or growth < LEAST_GROWTH or time.monotonic() > deadline:
                    raise
                continue
            if best is not None:
                return best
            tried, left = part, left - self.work
            growth = min(growth, GROWTH if self.work < CHEAP_STEPS else SLOW_GROWTH)
        return known

    def gap(self, known, bound):
        """How far `known` may be from the best, relative to its cost; None where that is 0. bound: one more lower bound."""
        cost = math.fsum(map(operator.getitem, self.costs, known))
        whole = abs(cost + self.base_cost)
        return max(0.0, cost - max(bound, self.lower_bound - self.rounding)) / whole if whole else None

    def dynamic_program(self, allowance, limit=math.inf, width=None, deadline=math.inf):
        """The first policy in the order of keys within the allowance, visiting all layer by layer; None where there is none.

        Two partial policies that have used the same amounts have the same futures, so only the better one is followed. A
        budget that can no longer run out counts as used up to where it could, and the difference, priced, as reduced cost.

        Args:
            limit: number of steps, one for each option of each partial policy; _TooLong when it, or the deadline, is reached.
            width: a beam search; so many partial policies of least reduced cost, and few options; this proves nothing.
        """
        steps, self.work = self._steps(width, allowance), 0
        states = {0: (0.0, 0)}
        for options, floors, ceiling in steps:
            if min(ceiling, default=0) < 0:
                return None
            if self.work + len(states) * len(options) > limit or time.monotonic() > deadline:
                raise _TooLong
            self.work += len(states) * len(options)
            states = self._extend(states, options, floors, ceiling, allowance)
            if width is not None and len(states) > width:
                states = dict(heapq.nsmallest(width, states.items(), key=self._promise))
        return next((self._chosen(key) for _, key in states.values()), None)

    def _extend(self, states, options, floors, ceiling, allowance):
        """The partial policies with one more layer. Amounts are packed; a field's guard bit says which of two is larger."""
        following, guard = {}, self.guard
        above, below = self._pack(ceiling) + guard, guard - self._pack(floors)
        for used, (reduced, key) in states.items():
            for extra, key_part, use in options:
                total = reduced + extra
                if total > allowance:
                    break  # options come in order of reduced cost
                after = used + use
                if (above - after) & guard != guard:
                    continue
                if (after + below) & guard != guard:
                    after, total = self._raised(after, total, floors)
                    if total > allowance:
                        continue
                best = following.get(after)
                if best is None or key + key_part < best[1]:
                    following[after] = (total, key + key_part)
        return following

    def _raised(self, packed, reduced, floors):
        """Amounts below their floors lifted onto them, and what was lifted, priced, added to the reduced cost."""
        amounts = self._unpack(packed)
        lifted = list(map(max, amounts, floors))
        for price, before, after in zip(self.multipliers, amounts, lifted, strict=True):
            reduced += price * (after - before)
        return self._pack(lifted), reduced

    def _pack(self, amounts):
        """One integer that holds an amount of each budget side by side, so that one addition adds them all."""
        return sum(amount << shift for amount, (shift, _) in zip(amounts, self.fields, strict=True))

    def _unpack(self, packed):
        return [packed >> shift & mask for shift, mask in self.fields]

    def _steps(self, width, allowance):
        """The layers in the order they are visited, most choices first, each with its options and the limits after it.

        Options beyond the allowance stay out, which also tightens the limits.
        """
        offered = [[option for option in self.options[layer] if self.reduced[layer][option] <= allowance]
                   for layer in self.layers]
        order = sorted(self.layers, key=lambda layer: self._range(layer, offered[layer]), reverse=True)
        least, most = [0] * len(self.rows), [0] * len(self.rows)
        steps = []
        for layer in reversed(order):
            uses = {option: [row[layer][option] for row in self.rows] for option in offered[layer]}
            ranks = {option: (self.reduced[layer][option], self._relative(use)) for option, use in uses.items()}
            options = sorted(uses, key=ranks.__getitem__)[:width and BEAM_OPTIONS]
            steps.append(([(self.reduced[layer][option], self.keys[layer][option], self._pack(uses[option]))
                           for option in options],
                          [max(0, bound - value) for bound, value in zip(self.bounds, most, strict=True)],
                          [bound - value for bound, value in zip(self.bounds, least, strict=True)]))
            for k, column in enumerate(zip(*(uses[option] for option in options), strict=True)):
                least[k] += min(column)
                most[k] += max(column)
        return steps[::-1]

    def _range(self, layer, options):
        """How much of the costliest budget hangs on the layer: large steps come first, fine ones to fill."""
        if not self.rows or not options:
            return 0
        _, row = max(zip((price * bound for price, bound in zip(self.multipliers, self.bounds, strict=True)), self.rows,
                         strict=True), key=lambda pair: pair[0])
        used = [row[layer][option] for option in options]
        return max(used) - min(used)

    def _promise(self, state):
        """Least reduced cost first; where these tie, as with multipliers of 0, least use of the budgets."""
        used, (reduced, _) = state
        return reduced, self._relative(self._unpack(used))

    def _relative(self, use):
        return sum(map(operator.truediv, use, self.scales))

    def _chosen(self, key):
        digits = []
        for _ in self.layers:
            key, digit = divmod(key, self.base)
            digits.append(digit)
        return digits[::-1]


def _ordered_keys(keys, ties, base):
    """One integer per option, made of its cost in `keys`, so that sums compare like (cost, ties..., option indices)."""
    for table in ties:
        radix = sum(map(max, table)) - sum(map(min, table)) + 1
        keys = [[key * radix + value - min(values) for key, value in zip(row, values, strict=True)]
                for row, values in zip(keys, table, strict=True)]
    place = base ** len(keys)
    return [[key * place + option * base ** (len(keys) - 1 - layer) for option, key in enumerate(row)]
            for layer, row in enumerate(keys)]


def _normalized(whole):
    """(integer costs as doubles, each layer's least 0 and the largest of all 1; the least by which two totals can differ;
    what the sum of the layers' least came to)."""
    above = [[value - min(row) for value in row] for row in whole]
    spread = max(map(max, above)) or 1
    step = math.gcd(*(value for row in above for value in row)) or 1
    return [[value / spread for value in row] for row in above], step / spread, sum(map(min, whole)) / spread


def over_common_denominator(costs):
    """The numerators of exact costs (int or Fraction) over their common denominator."""
    denominator = math.lcm(*(value.denominator for row in costs for value in row))
    return [[value.numerator * (denominator // value.denominator) for value in row] for row in costs]


def _multipliers(program):
    """The Lagrangian multiplier of each budget, its price per unit in the linear relaxation, never negative."""
    if not program.rows:
        return []
    import pulp

    problem, _, budgets = _model(program, 1.0)
    if not pulp.HiGHS().available():
        raise SolverError("HiGHS is missing; install it with: pip install 'pulp[highs]'")
    status = problem.solve(pulp.HiGHS(mip=False, msg=False, threads=1))
    if status == pulp.LpStatusInfeasible:
        raise NoPolicy
    if status != pulp.LpStatusOptimal:
        return [0.0] * len(program.rows)
    return [max(0.0, -(budget.pi or 0.0)) * _row_scale(program, k) for k, budget in enumerate(budgets)]


def _solve_mixed_integer(program, name, deadline=math.inf):
    """What the solver makes of the remaining options: (those chosen, status in words, gap or None, lower bound on the cost).

    Those chosen are None unless the solver's variables are integral and keep every budget in exact arithmetic.
    """
    import pulp

    problem, variables, _ = _model(program, OBJECTIVE_SCALE)
    left = deadline - time.monotonic()
    try:
        problem.solve(_solver(name, None if left == math.inf else max(left, SHORTEST_RUN)))
    except (pulp.PulpError, OSError) as error:
        raise SolverError(f"{name}: {error}") from None
    bound = -math.inf
    if name == "HiGHS":
        model = problem.solverModel
        information = model.getInfo()
        status, gap = model.modelStatusToString(model.getModelStatus()), information.mip_gap
        bound = max(bound, information.mip_dual_bound / OBJECTIVE_SCALE)  # which passes over NaN
    else:
        status, gap = pulp.LpSolution[problem.sol_status], None
    if problem.sol_status == pulp.LpSolutionInfeasible:
        return None, INFEASIBLE, None, bound
    return _integral(program, variables), status, gap, bound


def _integral(program, variables):
    """The option whose variable is 1 in each layer; None where one is neither 0 nor 1, or a budget is not kept."""
    values = [{option: variable.varValue or 0 for option, variable in row.items()} for row in variables]
    chosen = [max(row, key=row.get) for row in values]
    is_integral = all(abs(value - (option == choice)) < 1e-4
                      for row, choice in zip(values, chosen, strict=True) for option, value in row.items())
    return chosen if is_integral and program.keeps_budgets(chosen) else None


def _solver(name, seconds):
    import pulp

    if name == "HiGHS":
        return pulp.HiGHS(msg=False, timeLimit=seconds, **STRICT)
    try:
        return pulp.getSolver(name, msg=False, gapRel=0.0, timeLimit=seconds)
    except TypeError:  # a solver without these options
        return pulp.getSolver(name, msg=False)


def _row_scale(program, k):
    return min(1.0, LARGEST_ROW / max(1, abs(program.bounds[k])))


def _model(program, scale):
    """The remaining options as a PuLP problem, its variables as one {option: variable} per layer, and its budgets."""
    import pulp

    problem = pulp.LpProblem("search", pulp.LpMinimize)
    variables = [{option: pulp.LpVariable(f"x_{layer}_{option}", 0, 1, pulp.LpInteger)
                  for option in program.options[layer]} for layer in program.layers]
    problem.setObjective(pulp.LpAffineExpression(
        [(variable, scale * program.costs[layer][option])
         for layer, row in enumerate(variables) for option, variable in row.items()]))
    for layer, row in enumerate(variables):
        problem.addConstraint(pulp.LpAffineExpression([(v, 1) for v in row.values()]) == 1, f"layer_{layer}")
    budgets = []
    for k, (use, bound) in enumerate(zip(program.rows, program.bounds, strict=True)):
        factor = _row_scale(program, k)
        terms = [(variable, factor * use[layer][option])
                 for layer, row in enumerate(variables) for option, variable in row.items()]
        budgets.append(pulp.LpAffineExpression(terms) <= factor * (bound + 0.5))  # whole numbers: 0.5 admits no more
        problem.addConstraint(budgets[-1], f"budget_{k}")
    return problem, variables, budgets
