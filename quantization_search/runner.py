"""What search.py and main.py do with a configuration: one search or a sweep, to what is printed and written."""

import os
from dataclasses import replace
from fractions import Fraction

import report
from cost import Costs
from ilp import erased
from study import Study, make_policy, solve
from util.config import describe_idle
from util.errors import UserError, nearest
from util.exchange import write_policy

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
        others = list(problem.constraints)
        others[index] = constraint.relaxed(Fraction(MORE))
        yield constraint, solve(replace(problem, constraints=others), config)


def draw(config, study, costs):
    """The plot of the policy and its indicators."""
    from plots import save_policy_plot

    layers, bits = {layer.name: layer for layer in study.layers}, study.bits
    fixed = list(study.network.fixed)
    names = [*fixed[:1], *layers, *fixed[1:]] if len(fixed) > 1 else [*layers, *fixed]
    shares = costs.shares()
    indicators = {kind: {name: {bit: getattr(layer, kind)[bit] for bit in bits if bit in getattr(layer, kind)}
                         for name, layer in layers.items()} for kind in ("weight", "act")}
    save_policy_plot(
        config.plot, study.network.arch, names, {name: shares[name].weight_bits for name in names},
        {name: shares[name].act_bits for name in names}, bits, {name: shares[name].size for name in names},
        {name: shares[name].bitops for name in names}, indicators,
        {kind: {name: erased(row, list(row)) for name, row in table.items()} for kind, table in indicators.items()},
        report.headline(study.network, costs), fixed=set(fixed))


# ---------------------------------------------------------------------------------------------------------------------
# Checks before the work starts.


def check_outputs(config):
    """Refuse what cannot be written, and what would overwrite a file that is read or written elsewhere."""
    taken = {os.path.realpath(path): name for path, name in
             ((config.indicators, "the indicators file"), (config.latency, "the latency table")) if path}
    for key in ("output", "plot", "sweep_output", "sweep_policies"):
        path = getattr(config, key)
        if path:
            _check_writable(key, path, is_folder=key == "sweep_policies")
            where = os.path.realpath(path)
            if where in taken:
                raise UserError(f"{key}: {path} is {taken[where]} itself")
            taken[where] = f"the file of {key}"


def _check_writable(key, path, is_folder):
    folder = os.path.abspath(path) if is_folder else os.path.dirname(os.path.abspath(path))
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if (not is_folder and os.path.isdir(path)) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"{key}: {path} cannot be written; expected a "
                        f"{'folder' if is_folder else 'file in a folder'} that is writable")


def check_solver(name):
    if name is None:
        return
    import pulp

    available = pulp.listSolvers(onlyAvailable=True)
    if name not in available:
        raise UserError(f"solver: {name!r} is not available; PuLP finds {', '.join(available)}"
                        + nearest(name, available))
