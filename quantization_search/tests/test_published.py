"""The published indicators under other budgets, against a solver that has no part in the search."""

from fractions import Fraction

import pulp
import pytest

import ilp
from options import SearchConfig
from study import Study

BITS = [6, 5, 4, 3, 2]
BUDGETS = {
    "10 times smaller": {"cr": 10},
    "46 G in all and 3.4 mean weight bits": {"bops_budget": 46, "avg_wb": "3.4"},
    "8 MB, 3.5 mean activation bits and 0.45 MB at once": {"size_budget": 8, "avg_ab": "3.5", "act_mem": "0.45"},
}


def by_cbc(problem, sums, limit, kept):
    """The least of the table `sums` under the problem's constraints and an upper limit on a second table."""
    model = pulp.LpProblem("plain", pulp.LpMinimize)
    layers = range(len(problem.names))
    variables = [[pulp.LpVariable(f"x_{layer}_{pair}", cat="Binary") for pair in problem.allowed[layer]] for layer in layers]
    model.setObjective(pulp.lpSum(float(sums[i][p]) * v for i in layers for p, v in enumerate(variables[i])))
    for layer in layers:
        model.addConstraint(pulp.lpSum(variables[layer]) == 1)
    for constraint in problem.constraints:
        for layer in layers:
            for pair, variable in enumerate(variables[layer]):
                if constraint.largest and constraint.use[layer][pair] > constraint.bound:
                    model.addConstraint(variable == 0)
        if not constraint.largest:
            model.addConstraint(pulp.lpSum(constraint.use[i][p] / constraint.bound * v
                                           for i in layers for p, v in enumerate(variables[i])) <= 1)
    if kept is not None:
        model.addConstraint(pulp.lpSum(float(kept[i][p]) * v for i in layers for p, v in enumerate(variables[i])) <= limit)
    model.solve(pulp.PULP_CBC_CMD(msg=False, gapRel=0, timeLimit=60))
    assert model.sol_status == pulp.LpSolutionOptimal
    return pulp.value(model.objective)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", ["limpq", "limpqp"])
def test_other_budgets_against_an_independent_solver(reference, name, budget):
    config = SearchConfig(str(reference / f"importance_indicators_resnet50_{name}.pkl"), "resnet50", BITS, **BUDGETS[budget])
    problem = Study.read(config).problem(config)
    solution = ilp.solve(problem)
    assert solution.proven
    least = by_cbc(problem, problem.penalties, None, None)
    assert round(least) == solution.penalty
    objective = by_cbc(problem, problem.costs, float(solution.penalty) + 1e-6, problem.penalties)
    assert float(solution.objective) == pytest.approx(objective, rel=2e-5)
    assert solution.objective <= Fraction(objective) * (1 + Fraction(1, 10**5))
