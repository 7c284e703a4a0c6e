"""What search.py and main.py do with a configuration: one search or a sweep, to what is printed and written."""

import os
from dataclasses import replace
from fractions import Fraction

import pulp

import report
from cost import Costs
from ilp import erased
from study import Study, make_policy, solve
from util.config import describe_idle
from util.errors import UserError, nearest
from util.exchange import write_policy
from util.figures import save_figure

MORE = "1.01"  # of a budget, for its shadow price


def run(config):
    """Search, print the report and, where asked, write the policy file and the plot; or all of it for a sweep."""
    check_outputs(config)
    check_solver(config.solver)
    study = Study.read(config)
    if config.baseline == "reversed":
        print("baseline: each layer has the indicators of its mirror rank, and the objective counts these")
    for line in filter(None, [report.describe_training(study.trained), describe_idle(config)]):
        print(line)
    report.print_indicators(study.layers, study.bits, config.outliers)
    if config.sweep:
        from frontier import run_sweep

        run_sweep(config, study)
    else:
        search(config, study)


def search(config, study):
    problem = study.problem(config)
    solution = solve(problem, config)
    costs = Costs(study.network, solution)
    report.print_solution(problem, solution, costs, config.solver)
    if config.shadow:
        report.print_shadow_prices(solution, shadow_prices(problem, config))
    if config.output:
        write_policy(config.output, make_policy(config, study, problem, solution, costs))
        print(f"policy written to {config.output}")
    if config.plot:
        draw(config, study, costs)
        print(f"plot written to {config.plot}")
    print(f"searched weight bit-widths {solution.weight_bits}")
    print(f"searched act bit-widths {solution.act_bits}")


def shadow_prices(problem, config):
    """(constraint, solution with 1% more of it) for each constraint."""
    for index, constraint in enumerate(problem.constraints):
        constraints = [*problem.constraints[:index], constraint.relaxed(Fraction(MORE)), *problem.constraints[index + 1:]]
        yield constraint, solve(replace(problem, constraints=constraints), config)


def draw(config, study, costs):
    """Write the plot of the policy and its indicators."""
    from plots import policy_figure

    fixed, shares = list(study.network.fixed), costs.shares()
    ahead = fixed[:1] if len(fixed) > 1 else []  # the first layer; what is fixed alone is the last one
    in_order = {name: shares[name] for name in dict.fromkeys([*ahead, *shares])}
    indicators = {kind: {layer.name: {bit: getattr(layer, kind)[bit] for bit in study.bits if bit in getattr(layer, kind)}
                         for layer in study.layers} for kind in ("weight", "act")}
    suspects = {kind: {name: erased(row, list(row)) for name, row in table.items()} for kind, table in indicators.items()}
    save_figure(policy_figure(study.network.arch, in_order, study.bits, indicators, suspects,
                              report.headline(study.network, costs), set(fixed)), config.plot)


# ---------------------------------------------------------------------------------------------------------------------
# Checks before the work starts.


def check_outputs(config):
    """Refuse what cannot be written, and what would overwrite a file that is read or written elsewhere."""
    taken = {os.path.realpath(path): name for path, name in
             ((config.indicators, "the indicators file"), (config.latency, "the latency table")) if path}
    for key in ("output", "plot", "sweep_output", "sweep_policies"):
        path = getattr(config, key)
        if not path:
            continue
        is_folder = key == "sweep_policies"
        folder = os.path.abspath(path) if is_folder else os.path.dirname(os.path.abspath(path))
        while not os.path.exists(folder):
            folder = os.path.dirname(folder)
        if (not is_folder and os.path.isdir(path)) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
            raise UserError(f"{key}: {path} cannot be written; expected a "
                            f"{'folder' if is_folder else 'file in a folder'} that is writable")
        where = os.path.realpath(path)
        if where in taken:
            raise UserError(f"{key}: {path} is {taken[where]} itself")
        taken[where] = f"the file of {key}"


def check_solver(name):
    if name is None:
        return
    available = pulp.listSolvers(onlyAvailable=True)
    if name not in available:
        raise UserError(f"solver: {name!r} is not available; PuLP finds {', '.join(available)}"
                        + nearest(name, available))
