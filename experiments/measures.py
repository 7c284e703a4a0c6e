"""What is measured on the files of a run. Their readers, and the rule for outliers, are those of the search."""

import csv
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent.parent / "quantization_search"))
from ilp import erased
from util.exchange import read_indicators, read_policy

KINDS = ("weight", "act")


def read_table(path):
    """The rows of a CSV file, {column: text}."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def validation_of(path):
    """{'top1': mean over the candidates (or the one network) of the last validation}, in percent."""
    rows = [row for row in read_table(path) if row["split"] == "val"]
    last = [float(row["top1"]) for row in rows if row["epoch"] == rows[-1]["epoch"]]
    return {"top1": sum(last) / len(last)}


def training_seconds(path):
    """Seconds in the training epochs of a run; the row of the random pass, or of any candidate, stands for all of an epoch."""
    epochs = {row["epoch"]: float(row["seconds"]) for row in read_table(path) if row["split"] == "train" and row["seconds"]}
    return round(sum(epochs.values()), 1)


def order_of(path):
    """Counts over the indicators of a file: all, smaller than with one bit more, not positive."""
    content = read_indicators(path)
    rows = [row for kind in KINDS for row in content[kind].values()]
    falling = sum(len(erased(row, sorted(row, reverse=True))) for row in rows)
    return {"indicators": sum(map(len, rows)), "out_of_order": falling,
            "not_positive": sum(value <= 0 for row in rows for value in row.values())}


def objective_of(policy, content, alpha):
    """sum over layers of act[bits] + alpha * weight[bits] (LIMPQ, arXiv 2203.08368), for any policy and any indicators."""
    return sum(content["act"][name][a] + alpha * content["weight"][name][w]
               for name, w, a in zip(policy["layer_name"], policy["weight_bits"], policy["act_bits"], strict=True))


def rank_correlation(one, other):
    """Spearman's: the correlation of ranks; values that are equal share their mean rank."""
    columns = [np.asarray(values, float)[:, None] for values in (one, other)]
    return float(np.corrcoef(*((column > column.T).sum(1) + (column == column.T).sum(1) / 2 for column in columns))[0, 1])


def jackknife(statistic, *columns):
    """(the statistic of the columns, its standard error by leaving out each entry once)."""
    columns = [np.asarray(column, float) for column in columns]
    count = len(columns[0])
    without = np.array([statistic(*(np.delete(column, place) for column in columns)) for place in range(count)])
    return statistic(*columns), float(np.sqrt((count - 1) * without.var()))


def agreement_of(policy_file, indicators_file, reference_policy_file, reference_indicators_file):
    """How near indicators and their policy come to a reference.

    Returns:
        weight_rank, act_rank: Spearman's rank correlation of the layers' indicators, mean over the candidates at which they
            differ at all (losses at the widest one are those of the same network); None where there is no such candidate.
        same_weight_bits, same_act_bits: share of the layers with the bits of the reference's policy.
        regret: by how much, relative to the reference's policy, the objective in the reference's indicators, with the alpha of
            its search, is larger.
    """
    policy, reference = read_policy(policy_file), read_policy(reference_policy_file)
    content, best = read_indicators(indicators_file), read_indicators(reference_indicators_file)
    measured = {}
    for kind in KINDS:
        names, bits = list(best[kind]), list(next(iter(best[kind].values())))
        columns = [[[table[kind][name][bit] for name in names] for table in (content, best)] for bit in bits]
        ranked = [rank_correlation(*pair) for pair in columns if all(len(set(column)) > 1 for column in pair)]
        measured[f"{kind}_rank"] = float(np.mean(ranked)) if ranked else None
        same = np.mean([own == other for own, other in zip(policy[f"{kind}_bits"], reference[f"{kind}_bits"], strict=True)])
        measured[f"same_{kind}_bits"] = float(same)
    alpha = float(reference["alpha"])
    measured["regret"] = objective_of(policy, best, alpha) / objective_of(reference, best, alpha) - 1
    return measured
