"""How long a search takes, next to a reference implementation of the same model, and how that grows with the work.

In quantization_search: python ../measurements/bench_search.py [INDICATORS.pkl ...] [--output results/bench.csv]

The reference implementation has every pair (w, a) as a variable and 1e8 for each erased indicator, and goes through PuLP to
a solver as it comes: HiGHS and CBC. Medians of five runs; where the first takes more than a second, of that one. All in one
run on one machine, so that their ratios mean something.
"""

import glob
import random
import statistics
import subprocess
import sys
from fractions import Fraction

sys.path.insert(0, ".")  # the search

import pulp

import ilp
from options import SearchConfig
from study import Study
from timing import show, timed
from util.command import Parser
from util.errors import user_errors_on_one_line

COLUMNS = ("case", "layers", "candidates", "whole_command_s", "solving_s", "plain_highs_s", "plain_cbc_s", "highs_over_ours",
           "cbc_over_ours", "ours", "plain_highs", "plain_cbc")
BUDGETS = {18: ("3", "3", "10.59")}  # by layers: ResNet-20; the others take LIMPQ's
LIMPQ = ("3", "4", "12.2")
RUNS, SLOW = 5, 1.0
LIMIT = 15  # seconds for one solution
PENALTY = 1e8
GROWTH = [(layers, candidates) for candidates in (5, 8) for layers in (10, 50, 200, 1000)]
MOST_LAYERS_CBC = 200  # beyond, its runs do not end in time


def median_time(work):
    """(median seconds, what the last run gave)."""
    times = []
    while not times or (len(times) < RUNS and max(times) < SLOW):
        seconds, result = timed(work)
        times.append(seconds)
    return statistics.median(times), result


def reference(problem, solver):
    """The policy, as indices of pairs, of the model as it is written down in the paper."""
    model = pulp.LpProblem("plain", pulp.LpMinimize)
    rows = [[pulp.LpVariable(f"x_{i}_{p}", cat="Binary") for p in range(len(pairs))]
            for i, pairs in enumerate(problem.pairs)]
    cells = [(i, p, variable) for i, row in enumerate(rows) for p, variable in enumerate(row)]
    model += pulp.lpSum(float(problem.costs[i][p] + PENALTY * problem.penalties[i][p]) * v for i, p, v in cells)
    for row in rows:
        model += pulp.lpSum(row) == 1
    for constraint in problem.constraints:
        model += pulp.lpSum(constraint.use[i][p] * v for i, p, v in cells) <= constraint.bound
    model.solve(solver)
    return [max(range(len(row)), key=lambda p: row[p].varValue or 0) for row in rows]


def judge(problem, best, chosen):
    """What the reference's policy is worth, exactly: whether it keeps the budgets and how far it is from ours."""
    if any(constraint.amount(chosen) > constraint.bound for constraint in problem.constraints):
        return "breaks a budget"
    penalty = sum(row[pair] for row, pair in zip(problem.penalties, chosen, strict=True))
    objective = sum(row[pair] for row, pair in zip(problem.costs, chosen, strict=True))
    if penalty != best.penalty:
        return f"penalty {float(penalty):g} instead of {float(best.penalty):g}"
    above = float((objective - best.objective) / abs(best.objective))
    return "the same objective" if above == 0 else f"{'worse' if above > 0 else 'better'} by {abs(above):.1e}"


def measure(case, make_problem, candidates, command=None):
    """One line of the table."""
    print(f"{case} ...", file=sys.stderr, flush=True)
    problem = make_problem()
    ours, solution = median_time(lambda: ilp.solve(problem, time_limit=LIMIT))
    row = {"case": case, "layers": len(problem.names), "candidates": candidates, "solving_s": ours,
           "ours": "proven" if solution.proven else "HiGHS's word" if solution.optimal else f"gap {solution.gap:.1e}"}
    if command:
        row["whole_command_s"], _ = median_time(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
    solvers = {"highs": pulp.HiGHS(msg=False, timeLimit=LIMIT)}
    if len(problem.names) <= MOST_LAYERS_CBC:
        solvers["cbc"] = pulp.PULP_CBC_CMD(msg=False, timeLimit=LIMIT)
    for name, solver in solvers.items():
        seconds, chosen = median_time(lambda solver=solver: reference(problem, solver))
        row |= {f"plain_{name}_s": seconds, f"{name}_over_ours": seconds / ours,
                f"plain_{name}": judge(problem, solution, chosen) + (" (out of time)" if seconds > LIMIT else "")}
    return row


def file_cases(paths):
    for path in paths:
        study = Study.read(SearchConfig(path))
        wb, ab, ratio = BUDGETS.get(len(study.layers), LIMPQ)
        config = SearchConfig(path, wb=wb, ab=ab, cr=ratio, bops=True)
        command = [sys.executable, "search.py", "--i", path, "--wb", wb, "--ab", ab, "--cr", ratio, "--bops", "True"]
        yield (path.rpartition("/")[2], lambda study=study, config=config: study.problem(config), len(study.bits),
               command)


def made_up(count, candidates):
    """Layers of the sizes that convolutions have, with indicators that grow as bits shrink; the same ones every time."""
    draw = random.Random(0)
    bits = list(range(candidates + 1, 1, -1))
    layers = []
    for i in range(count):
        weight, act = ({bit: scale * 2**(-slope * bit) * draw.uniform(0.9, 1.1) for bit in bits}
                       for scale, slope in ((draw.uniform(0.1, 2), 0.7), (draw.uniform(0.2, 6), 0.6)))
        params = 4**draw.randint(4, 9) * draw.choice((1, 9))
        layers.append(ilp.Layer(f"layer{i}", weight, act, params * 4**draw.randint(2, 6), params))
    return ilp.make_problem(layers, bits, Fraction(2), [ilp.size_constraint(layers, bits, 1000, Fraction("9.8")),
                                                        ilp.bitops_constraint(layers, bits, Fraction(3), Fraction(4))])


def growth_cases():
    for count, candidates in GROWTH:
        yield "made up", lambda count=count, candidates=candidates: made_up(count, candidates), candidates


def main(arguments=None):
    parser = Parser(description=__doc__)
    parser.add_argument("indicators", nargs="*", help="by default those in indicators/")
    parser.add_argument("--output", default="results/bench.csv")
    options = parser.parse_args(arguments)
    paths = options.indicators or sorted(glob.glob("indicators/*.pkl"))
    rows = [measure(*case) for cases in (file_cases(paths), growth_cases()) for case in cases]
    show(options.output, COLUMNS, rows, digits=3)


if __name__ == "__main__":
    with user_errors_on_one_line():
        main()
