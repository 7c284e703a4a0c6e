"""The same search for a range of one budget, and the Pareto frontier: what each value costs and gains."""

import os

from cost import Costs
from ilp import BITOPS_PER_G
from study import Impossible, make_policy, solve
from util.exchange import write_atomically, write_policy
from util.figures import save_figure
from util.tables import csv_text

COLUMNS = ("status", "gap", "objective", "penalty", "size_mb", "compression_ratio", "bitops_published", "bitops_exact",
           "mean_weight_bits", "mean_act_bits", "policy")
SPARSE_COLUMNS = ("sparsity", "sparse_size_mb", "sparse_compression_ratio", "effective_bitops_published",
                  "effective_bitops_exact")  # of a pruned network


def run_sweep(config, study):
    """Solve every point, then write or print the table, and draw it where asked.

    Raises:
        Impossible: when not one of the points can be kept.
    """
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
    write_table(config, rows, [key, *COLUMNS, *(SPARSE_COLUMNS if study.network.sparse else ())])
    if config.plot:
        draw(config, study, key, found)
        print(f"plot written to {config.plot}")
    print(f"{len(found)} of {len(rows)} points " + (
        "have a policy drawn at random" if config.baseline == "random" else
        f"can be kept, {sum(row['status'] == 'optimal' for row in found)} of them proven to be optimal"))


def solve_point(config, study, key, text, point):
    """One row of the table; its policy file is written where that is asked."""
    problem = study.problem(point)
    solution = solve(problem, point)
    costs = Costs(study.network, solution)
    status = "random" if solution.seed is not None else "optimal" if solution.optimal else "not proven"
    row = {"status": status, "gap": solution.gap,
           "objective": float(solution.objective), "penalty": float(solution.penalty)} | costs.as_plain()
    if config.sweep_policies:
        row["policy"] = os.path.join(config.sweep_policies, f"policy_{key}{text}.yaml")
        write_policy(row["policy"], make_policy(point, study, problem, solution, costs))
    return row


def write_table(config, rows, columns):
    text = csv_text(columns, rows)
    path = config.sweep_output or (f"{os.path.splitext(config.output)[0]}_frontier.csv" if config.output else None)
    if path:
        write_atomically(path, text.encode())
        print(f"frontier written to {path}")
    else:
        print(text, end="")


def draw(config, study, key, rows):
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
