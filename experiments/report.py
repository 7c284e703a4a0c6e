"""Tables and plots of an experiment, from the files that its commands left. Each entry of `report` makes one:

  accuracy      top-1 and cost of runs of quantization_training
  validation    top-1 on the validation split of runs of either stage, by which hyper-parameters are chosen
  order         how many indicators are out of order, or not positive
  agreement     indicators and policies against those of a reference: rank correlation, equal choices, regret
  prediction    how the sums of indicators of fine-tuned policies rank these: rank correlation with accuracy and loss, a row
                per indicators file of the steps `indicators`; the deviation is the standard error

Every entry takes `runs`, {step: {axis: value where the step has no such axis}}, and `group`, the axes whose values have a
row each in the summary; the runs of a row differ in the axis `seed` (`total: true` adds up those that do not). It writes
EXPERIMENT[_ENTRY]_runs.csv, a row per run with the command that made it, and EXPERIMENT[_ENTRY].csv with mean, standard
deviation and number of runs; EXPERIMENT.md holds the same tables for people.
"""

import csv
import statistics
from pathlib import Path

import yaml

from measures import agreement_of, jackknife, objective_of, order_of, rank_correlation, training_seconds, validation_of
from plots import save_plot, save_scatter
from util.exchange import STEPS, read_indicators, read_policy, usual_alpha

DENSE_COSTS = ("size_mb", "ratio", "gbitops")
COSTS = (*DENSE_COSTS, "sparsity", "sparse_size_mb", "sparse_ratio", "gbitops_effective")
DIGITS = {"regret": ".3f", "loss": ".4f"}
SUM = "sum_"
COUNTS = ("out_of_order", "not_positive", "indicators")


def write_report(experiment, folder):
    """Write what `report` asks for into `folder`, of what is there by now."""
    page = [f"# {experiment.title}", experiment.question]
    for name, entry in experiment.report.items():
        rows = in_order([row for row in find_rows(experiment, entry) if row], entry["group"], experiment.values)
        stem = folder / (experiment.name if name == "main" else f"{experiment.name}_{name}")
        if not rows:
            print(f"{stem.name}: nothing to report yet")
            continue
        folder.mkdir(parents=True, exist_ok=True)
        group, measured = entry["group"], entry.get("measures", ["top1"])
        if entry.get("total"):
            rows = totals(rows, [*group, "seed"], measured)
        if entry["kind"] == "prediction":
            entry = {**entry, "group": ["indicators"], "measures": ["top1_rank", "loss_rank"]}
            summary = predictions(rows)
        else:
            summary = summarise(rows, group, measured, entry.get("paired"))
        write_csv(f"{stem}_runs.csv", rows)
        write_csv(f"{stem}.csv", summary)
        print(f"\n{experiment.title}{'' if name == 'main' else f': {name}'}\n{as_text(summary)}")
        page += [f"## {entry.get('title', name)}", *tables(summary, entry),
                 f"[Rows]({stem.name}.csv), [runs]({stem.name}_runs.csv)"]
        if "plot" in entry and entry["kind"] == "prediction":
            save_scatter(f"{stem}.png", experiment.title, rows, summary)
            page.append(f"![{entry['title']}]({stem.name}.png)")
        elif "plot" in entry:
            save_plot(f"{stem}.png", experiment.title, rows, summary, entry["plot"], measured[0])
            page.append(f"![{experiment.title}]({stem.name}.png)")
    if len(page) > 2:
        command = f"python run.py {experiment.name}.yaml"
        page.append(f"Made by `{command}`. Mean ± standard deviation over runs that differ in their seed; n: number of runs.")
        (folder / f"{experiment.name}.md").write_text("\n\n".join(page) + "\n")


def find_rows(experiment, entry):
    """A row per finished run: its values, what was measured, its command."""
    measure = {"accuracy": accuracy_row, "validation": validation_row, "order": order_row,
               "agreement": agreement_row, "prediction": prediction_row}[entry["kind"]]
    for name, given in entry["runs"].items():
        for step in experiment.named(name):
            if step.is_done:
                row = measure(step, experiment, entry)
                yield row and {**step.values, **(given or {}), **row, "command": f"cd {step.folder} && python "
                               + " ".join(step.command)}


def in_order(rows, group, values):
    """The rows in the order of the axes' values; what is none of them, such as a value that a step was given, comes first."""
    def places(row):
        names = [[value.name for value in values.get(axis, [])] for axis in group]
        return [own.index(row[axis]) if row.get(axis) in own else -1 for axis, own in zip(group, names, strict=True)]
    return sorted(rows, key=places)


def accuracy_row(step, experiment, entry):
    facts = yaml.safe_load(step.made.read_text())
    dense = {"sparsity": 0.0, "sparse_ratio": facts["ratio"]} if "sparsity" in entry.get("measures", []) else {}
    return {"top1": facts["top1"], "top5": facts["top5"], "loss": facts["loss"],
            **dense, **{key: facts[key] for key in COSTS if key in facts},
            "train_seconds": training_seconds(step.made.parent / "metrics.csv")}


def validation_row(step, experiment, entry):
    return {**validation_of(step.made.parent / "metrics.csv"),
            "train_seconds": training_seconds(step.made.parent / "metrics.csv")}


def order_row(step, experiment, entry):
    return order_of(step.made)


def agreement_row(step, experiment, entry):
    """The policy that a search made, and the indicators that it read, against those of the step `of` with the values of
    `reference`; None where that is not there."""
    wanted = step.values | {axis: str(value) for axis, value in entry["reference"].items()}
    for reference in experiment.named(entry["of"]):
        if reference.values == wanted and reference.is_done:
            return agreement_of(step.made, step.read("--i"), reference.made, reference.read("--i"))
    return None


def prediction_row(step, experiment, entry):
    """An accuracy row, and what each kind of indicators adds up to for the policy, with the search's alpha for that kind."""
    [word] = [word for word in step.command if word.startswith("policy=")]
    policy, sums = read_policy(step.made.parent.parent / Path(word).name), {}
    for source in (source for name in entry["indicators"] for source in experiment.named(name) if source.is_done):
        content = read_indicators(source.made)
        kind = content.get("kind", STEPS)
        sums[f"{SUM}{kind}"] = objective_of(policy, content, usual_alpha(kind))
    return {**accuracy_row(step, experiment, entry), **sums}


# ---------------------------------------------------------------------------------------------------------------------
# Tables.


def predictions(rows):
    """A row per kind of indicators: rank correlation of its sums with accuracy and with loss, and standard errors. Good ones
    have a correlation near -1 with accuracy, and near 1 with loss."""
    summary = []
    for column in (column for column in rows[0] if column.startswith(SUM)):
        line = {"indicators": column.removeprefix(SUM), "n": len(rows)}
        for measure in ("top1", "loss"):
            found = jackknife(rank_correlation, [row[column] for row in rows], [row[measure] for row in rows])
            line[f"{measure}_rank"], line[f"{measure}_rank_sd"] = (round(value, 4) for value in found)
        summary.append(line)
    return sorted(summary, key=lambda line: -line["loss_rank"])


def totals(rows, axes, measures):
    """One row for all that agree in `axes`: the sums of the measures, and all commands."""
    added = {}
    for row in rows:
        key = tuple(row.get(axis, "") for axis in axes)
        total = added.setdefault(key, {**dict(zip(axes, key, strict=True)), **dict.fromkeys(measures, 0), "command": ""})
        for measure in measures:
            total[measure] = round(total[measure] + row[measure], 4)
        total["command"] += ("; " if total["command"] else "") + row["command"]
    return list(added.values())


def summarise(rows, group, measures, paired=None):
    """A row per combination of the values of `group`: mean, standard deviation (n - 1) and number of runs of each measure.

    Args:
        paired: {axis: value}; with it, also the differences of the first measure to the runs that have this value instead,
            and the same values of all other axes, seed among them.
    """
    combinations = list(dict.fromkeys(tuple(row.get(axis, "") for axis in group) for row in rows))
    summary = []
    for combination in combinations:
        members = [row for row in rows if tuple(row.get(axis, "") for axis in group) == combination]
        line = dict(zip(group, combination, strict=True))
        for measure in measures:
            values = [float(row[measure]) for row in members if row.get(measure) is not None]
            line[measure], line[f"{measure}_sd"] = mean_and_deviation(values)
        line["n"] = len(members)
        for cost in DENSE_COSTS:
            if all(cost in row for row in members):
                line[cost] = round(statistics.fmean(row[cost] for row in members), 6)
        if paired:
            line |= paired_difference(members, rows, group, measures[0], paired)
        summary.append(line)
    return summary


def paired_difference(members, rows, group, measure, paired):
    """Mean, standard deviation and number of the differences of `members` to their partners."""
    axes = [*group, "seed"]
    by_values = {tuple(row.get(axis, "") for axis in axes): row for row in rows}
    differences = []
    for row in members:
        wanted = {axis: str(value) for axis, value in paired.items()}
        partner = by_values.get(tuple(wanted.get(axis, row.get(axis, "")) for axis in axes))
        if partner is not None and partner is not row:
            differences.append(float(row[measure]) - float(partner[measure]))
    mean, deviation = mean_and_deviation(differences)
    return {"difference": mean, "difference_sd": deviation, "pairs": len(differences)}


def mean_and_deviation(values):
    """Rounded to four digits; '' where there is no value, or for the deviation only one."""
    mean = round(statistics.fmean(values), 4) if values else ""
    return mean, round(statistics.stdev(values), 4) if len(values) > 1 else ""


def write_csv(path, rows):
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def as_text(rows):
    """A table in aligned columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([str(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


# ---------------------------------------------------------------------------------------------------------------------
# The same for people, in Markdown.


def tables(summary, entry):
    """What EXPERIMENT.md shows of a summary; with `table`, {rows, columns}, first the first measure against these two axes."""
    group, measures = entry["group"], entry.get("measures", ["top1"])
    if "table" in entry:
        yield pivot(summary, entry["table"]["rows"], entry["table"]["columns"], measures[0])
        if entry.get("paired"):
            pairs = ", ".join(f"{axis} {value}" for axis, value in entry["paired"].items() if value)
            yield f"Differences to {pairs}, of runs with the same seed:"
            yield pivot(summary, entry["table"]["rows"], entry["table"]["columns"], "difference", measures[0])
    columns = [*group, *measures, "n", *(cost for cost in DENSE_COSTS if cost in summary[0])]
    if entry.get("paired"):
        columns.append("difference")
    yield markdown(columns, [[shown(row, column, measures[0] if column == "difference" else column) for column in columns]
                             for row in summary])


def pivot(summary, rows, columns, measure, written_as=None):
    """Mean and deviation of a measure, one axis down and one across."""
    down, across = (list(dict.fromkeys(row[axis] for row in summary)) for axis in (rows, columns))
    cells = {(row[rows], row[columns]): shown(row, measure, written_as or measure) for row in summary}
    return markdown([rows, *across], [[name, *(cells.get((name, other), "") for other in across)] for name in down])


def shown(row, column, written_as):
    """A cell: mean and deviation where there is one, else what stands there; with the digits of the column `written_as`."""
    value, deviation = row.get(column, ""), row.get(f"{column}_sd", "")
    if isinstance(value, float):
        style = ".3g" if written_as in COUNTS else DIGITS.get(written_as, ".2f" if f"{column}_sd" in row else ".4f")
        return f"{value:{style}}" + (f" ± {deviation:{style}}" if deviation != "" else "")
    return str(value)


def markdown(header, lines):
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))
