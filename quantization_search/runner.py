"""What search.py and main.py do with a configuration: one search or a sweep, to what is printed and written."""

import os
from dataclasses import replace
from fractions import Fraction

import report
from cost import Costs
from ilp import BITOPS_PER_G, erased
from study import Impossible, Study, make_policy, solve
from util.config import AUTO, describe_idle
from util.errors import UserError, nearest
from util.exchange import FOLDER, check_outputs, write_atomically, write_policy
from util.figures import save_figure
from util.tables import csv_text

BASELINES = {"reversed": "each layer has the indicators of its mirror rank",
             "depth": "the earlier a layer, the larger the indicators that it has"}
MORE = "1.01"  # of a budget, for its shadow price
COLUMNS = ("status", "gap", "objective", "penalty", "size_mb", "compression_ratio", "bitops_published", "bitops_exact",
           "mean_weight_bits", "mean_act_bits", "policy")
SPARSE_COLUMNS = ("sparsity", "sparse_size_mb", "sparse_compression_ratio", "effective_bitops_published",
                  "effective_bitops_exact")  # of a pruned network


def run(config, configs=()):
    """Search, print the report and, where asked, write the policy file and the plot; or all of it for a sweep; configs: the
    paths of YAML files that it was read from."""
    check_outputs([("output", config.output, "policies"), ("plot", config.plot, "plots"),
                   ("sweep_output", config.frontier, "tables"), ("sweep_policies", config.sweep_policies, FOLDER)],
                  [*configs, config.indicators, config.latency])
    check_solver(config.solver)
    study = Study.read(config)
    if config.baseline in BASELINES:
        print(f"baseline: {BASELINES[config.baseline]}, and the objective counts these")
    dense = [f"without effect here: {key} (nothing is pruned)" for key in ("sparse_size", "sparse_bops")
             if getattr(config, key) and not study.network.sparse]
    for line in filter(None, [report.describe_training(study.trained), describe_idle(config), *dense]):
        print(line)
    report.print_indicators(study.layers, study.bits, study.outliers(config), study.kind)
    if config.sweep:
        run_sweep(config, study)
    else:
        search(config, study)


def search(config, study):
    config, typed = study.settled(config), config.alpha
    problem = study.problem(config)
    solution = solve(problem, config)
    costs = Costs(study.network, solution)
    if typed == AUTO and config.baseline != "random" and not config.weights_only:
        weight_bits, act_bits = costs.mean_bits()
        print(f"alpha {config.alpha} brings the mean bits of weights and activations closest, of those tried: they differ by "
              f"{abs(weight_bits - act_bits):.3g}")
    report.print_solution(problem, solution, costs, config.solver)
    if config.shadow:
        report.print_shadow_prices(solution, shadow_prices(problem, config))
    if config.output:
        write_policy(config.output, make_policy(config, study, problem, solution, costs))
        print(f"policy written to {config.output}")
    if config.plot:
        draw_policy(config, study, costs)
        print(f"plot written to {config.plot}")
    print(f"searched weight bit-widths {solution.weight_bits}")
    print(f"searched act bit-widths {solution.act_bits}")


def shadow_prices(problem, config):
    """(constraint, solution with 1% more of it) for each constraint."""
    for index, constraint in enumerate(problem.constraints):
        constraints = [*problem.constraints[:index], constraint.relaxed(Fraction(MORE)), *problem.constraints[index + 1:]]
        yield constraint, solve(replace(problem, constraints=constraints), config)


def draw_policy(config, study, costs):
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


def run_sweep(config, study):
    """Solve every point, then write or print the table, and draw it where asked; Impossible where no point can be kept."""
    from tqdm import tqdm

    key, points = config.sweep.partition("=")[0], config.points()
    rows, first_refusal = [], None
    for text, point in tqdm(points, unit="point", disable=None):  # where a terminal shows it
        try:
            rows.append({key: text} | solve_point(config, study, key, text, point))
        except Impossible as error:
            first_refusal = first_refusal or error
            rows.append({key: text, "status": "none drawn" if config.baseline == "random" else "infeasible"})
    found = [row for row in rows if "objective" in row]
    if not found:
        raise first_refusal
    alpha = ("alpha",) if config.alpha == AUTO else ()  # objectives of different ones cannot be compared
    write_table(config, rows, [key, *COLUMNS, *alpha, *(SPARSE_COLUMNS if study.network.sparse else ())])
    if config.plot:
        draw_frontier(config, study, key, found)
        print(f"plot written to {config.plot}")
    print(f"{len(found)} of {len(rows)} points " + (
        "have a policy drawn at random" if config.baseline == "random" else
        f"can be kept, {sum(row['status'] == 'optimal' for row in found)} of them proven to be optimal"))


def solve_point(config, study, key, text, point):
    """One row of the table; its policy file is written where that is asked."""
    point = study.settled(point)
    problem = study.problem(point)
    solution = solve(problem, point)
    costs = Costs(study.network, solution)
    status = "random" if solution.seed is not None else "optimal" if solution.optimal else "not proven"
    row = {"status": status, "gap": solution.gap, **({"alpha": point.alpha} if config.alpha == AUTO else {}),
           "objective": float(solution.objective), "penalty": float(solution.penalty)} | costs.as_plain()
    if config.sweep_policies:
        row["policy"] = os.path.join(config.sweep_policies, f"policy_{key}{text}.yaml")
        write_policy(row["policy"], make_policy(point, study, problem, solution, costs))
    return row


def write_table(config, rows, columns):
    text = csv_text(columns, rows)
    if config.frontier:
        write_atomically(config.frontier, text.encode())
        print(f"frontier written to {config.frontier}")
    else:
        print(text, end="")


def draw_frontier(config, study, key, rows):
    """The Pareto frontier: what each policy achieved against its objective."""
    from plots import frontier_figure

    achieved, label = {"cr": ("compression_ratio", "compression ratio"),
                       "bops": (f"bitops_{config.macs}", f"BitOPs in G ({config.macs} MACs)")}[key]
    if study.network.sparse and {"cr": config.sparse_size, "bops": config.sparse_bops}[key]:
        before = {"cr": "sparse", "bops": "effective"}[key]
        achieved, label = f"{before}_{achieved}", f"{before} {label}"
    unit = BITOPS_PER_G if key == "bops" else 1
    points = [{"x": row[achieved] / unit, "y": row["objective"], "label": row[key]} for row in rows]
    title = f"{study.network.arch}: {len(points)} policies over {config.sweep}"
    save_figure(frontier_figure(points, label, "objective (importance cost)", title), config.plot)


def check_solver(name):
    if name is None:
        return
    import pulp

    available = pulp.listSolvers(onlyAvailable=True)
    if name not in available:
        raise UserError(f"solver: {name!r} is not available; PuLP finds {', '.join(available)}"
                        + nearest(name, available))
