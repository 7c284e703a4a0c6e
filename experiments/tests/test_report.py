"""Tables: means and deviations against numpy, pairs, totals; what is measured on files, against brute force."""

import csv
import pickle

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from measures import (
    agreement_of,
    jackknife,
    objective_of,
    order_of,
    rank_correlation,
    read_table,
    training_seconds,
    validation_of,
)
from plan import Value, read_experiment
from report import in_order, mean_and_deviation, paired_difference, pivot, summarise, totals, write_report
from util.exchange import write_policy

ROWS = [{"seed": str(seed), "budget": budget, "policy": policy, "top1": top1}
        for budget, policy, tops in (("a", "uniform", (80, 82, 84)), ("a", "searched", (81, 84, 84)),
                                     ("b", "searched", (70, 71, 75)))
        for seed, top1 in enumerate(tops)]


@given(st.lists(st.floats(0, 100), min_size=2, max_size=9))
@settings(deadline=None)
def test_mean_and_deviation_are_those_of_numpy(values):
    mean, deviation = mean_and_deviation(values)
    assert mean == pytest.approx(np.mean(values), abs=1e-4)
    assert deviation == pytest.approx(np.std(values, ddof=1), abs=1e-4)


def test_one_run_has_no_deviation():
    assert mean_and_deviation([3.0]) == (3.0, "")


def test_a_summary_names_mean_deviation_and_number_of_runs():
    table = summarise(ROWS, ["budget", "policy"], ["top1"])
    assert [(row["budget"], row["policy"], row["top1"], row["n"]) for row in table] == [
        ("a", "uniform", 82, 3), ("a", "searched", 83, 3), ("b", "searched", 72, 3)]
    assert table[0]["top1_sd"] == 2


def test_differences_are_taken_between_runs_of_one_seed():
    members = [row for row in ROWS if row["policy"] == "uniform"]
    assert paired_difference(members, ROWS, ["budget", "policy"], "top1", {"policy": "searched"}) == {
        "difference": -1, "difference_sd": 1, "pairs": 3}


def test_the_partner_of_a_run_has_the_same_budget():
    [*_, last] = summarise(ROWS, ["budget", "policy"], ["top1"], {"policy": "uniform"})
    assert last["budget"] == "b"
    assert last["pairs"] == 0 and last["difference"] == ""


def test_totals_add_up_what_has_the_same_seed():
    rows = [{"seed": "0", "kind": "alone", "s": 1, "command": "x"}, {"seed": "0", "kind": "alone", "s": 2, "command": "y"},
            {"seed": "1", "kind": "alone", "s": 4, "command": "z"}]
    assert [(row["seed"], row["s"], row["command"]) for row in totals(rows, ["kind", "seed"], ["s"])] == [
        ("0", 3, "x; y"), ("1", 4, "z")]


def test_a_policy_is_compared_with_the_reference_of_its_seed_where_that_is_there(tmp_path):
    plan = {"title": "x", "values": {"seed": [0, 1], "amount": ["little", "much"]},
            "steps": {"search": {"over": ["seed", "amount"], "folder": "stage", "makes": "{results}/{amount}_{seed}.yaml",
                                 "command": "search.py --i {results}/{amount}_{seed}.pkl"}},
            "report": {"main": {"kind": "agreement", "runs": {"search": None}, "of": "search", "group": ["amount"],
                                "reference": {"amount": "much"}, "measures": ["regret"]}}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    (tmp_path / "out").mkdir()
    for name, table, bits in (("little_0", ONE, [2, 2, 2]), ("much_0", TWO, [4, 4, 4]), ("little_1", ONE, [4, 4, 4])):
        indicators(tmp_path / "out" / f"{name}.pkl", table, table)
        policy(tmp_path / "out" / f"{name}.yaml", bits, bits)
    write_report(read_experiment(tmp_path / "plan.yaml", tmp_path, "../out", "", ""), tmp_path)
    found = [(row["seed"], row["amount"], float(row["regret"])) for row in read_table(tmp_path / "plan_runs.csv")]
    assert found == [("0", "little", pytest.approx(12 / 6 - 1)), ("0", "much", 0)]


def test_rows_stand_in_the_order_of_the_values_whatever_ran_first():
    values = {"budget": [Value("small", {}), Value("large", {})], "policy": [Value("searched", {})]}
    rows = [{"budget": budget, "policy": policy} for budget in ("large", "small") for policy in ("searched", "uniform")]
    assert [(row["budget"], row["policy"]) for row in in_order(rows, ["budget", "policy"], values)] == [
        ("small", "uniform"), ("small", "searched"), ("large", "uniform"), ("large", "searched")]


@given(st.permutations(range(7)), st.permutations(range(7)))
@settings(deadline=None)
def test_rank_correlation_is_spearmans_formula(one, other):
    squares = sum((a - b) ** 2 for a, b in zip(one, other, strict=True))
    assert rank_correlation([2.0**x for x in one], other) == pytest.approx(1 - 6 * squares / (7 * (49 - 1)))


def test_equal_values_share_their_mean_rank():
    """Ranks 1.5, 1.5, 3, 4 against 2, 1, 3.5, 3.5."""
    ranks = np.corrcoef([1.5, 1.5, 3, 4], [2, 1, 3.5, 3.5])[0, 1]
    assert rank_correlation([5, 5, 6, 9], [20, 10, 30, 30]) == pytest.approx(ranks)


@given(st.lists(st.floats(-100, 100), min_size=3, max_size=9))
@settings(deadline=None)
def test_the_jackknife_of_a_mean_is_its_standard_error(values):
    mean, error = jackknife(np.mean, values)
    assert mean == pytest.approx(np.mean(values))
    assert error == pytest.approx(np.std(values, ddof=1) / len(values) ** 0.5, abs=1e-9)


def test_indicators_are_ranked_by_how_well_their_sums_predict(tmp_path):
    plan = {"title": "x", "values": {"draw": [0, 1, 2, 3], "kind": ["good", "steps"]},
            "steps": {"extract": {"over": ["kind"], "folder": "stage", "command": "x", "makes": "../out/{kind}.pkl"},
                      "tune": {"over": ["draw"], "folder": "stage", "command": "main.py policy=../out/p{draw}.yaml",
                               "makes": "../out/run{draw}"}},
            "report": {"main": {"title": "y", "kind": "prediction", "runs": {"tune": None}, "indicators": ["extract"],
                                "group": ["draw"], "plot": "scatter"}}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    (tmp_path / "out").mkdir()
    for kind, act in (("good", {"4": 0.1, "2": 1.0}), ("steps", {"4": 1.0, "2": 0.1})):
        table = dict.fromkeys("abc", act)
        content = {"weight": dict.fromkeys("abc", {"4": 0.5, "2": 0.5}), "act": table, "layer_name": list("abc"), "kind": kind}
        (tmp_path / "out" / f"{kind}.pkl").write_bytes(pickle.dumps(content))
    for draw, (bits, top1) in enumerate((([4, 4, 4], 90), ([4, 4, 2], 80), ([4, 2, 2], 70), ([2, 2, 2], 75))):
        policy(tmp_path / "out" / f"p{draw}.yaml", [4, 4, 4], bits)
        (tmp_path / "out" / f"run{draw}").mkdir()
        metrics(tmp_path / "out" / f"run{draw}" / "metrics.csv", [])
        (tmp_path / "out" / f"run{draw}" / "summary.yaml").write_text(
            yaml.safe_dump({"top1": top1, "top5": 100, "loss": (100 - top1) / 50, "size_mb": 1, "ratio": 1, "gbitops": 1}))
    write_report(read_experiment(tmp_path / "plan.yaml", tmp_path, "out", "", ""), tmp_path)
    rows = read_table(tmp_path / "plan.csv")
    assert [(row["indicators"], float(row["top1_rank"]), float(row["loss_rank"])) for row in rows] == [
        ("good", pytest.approx(-0.8), pytest.approx(0.8)), ("steps", pytest.approx(0.8), pytest.approx(-0.8))]
    sums = [(float(row["sum_good"]), float(row["sum_steps"])) for row in read_table(tmp_path / "plan_runs.csv")]
    assert sums[0] == pytest.approx((0.3 + 1.5, 3 + 2 * 1.5)) and sums[3] == pytest.approx((3 + 1.5, 0.3 + 2 * 1.5))
    assert (tmp_path / "plan.png").exists() and "| good | -0.80 ± " in (tmp_path / "plan.md").read_text()


def metrics(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", "split", "bits", "loss", "top1", "top5", "lr", "seconds"])
        writer.writeheader()
        writer.writerows(rows)


def test_seconds_and_validation_of_a_joint_training(tmp_path):
    metrics(tmp_path / "metrics.csv", [
        {"epoch": epoch, "split": split, "bits": bits, "top1": top1, "seconds": 10 * epoch if split == "train" else ""}
        for epoch in (1, 2) for split, top1 in (("train", 1), ("val", 10 * epoch), ("test", 99)) for bits in (4, 3)])
    assert training_seconds(tmp_path / "metrics.csv") == 30
    assert validation_of(tmp_path / "metrics.csv") == {"top1": 20}


def indicators(path, weight, act):
    table = {"weight": weight, "act": act, "layer_name": list(weight)}
    path.write_bytes(pickle.dumps(table))
    return path


ONE = {"a": {"4": 1.0, "2": 2.0}, "b": {"4": 3.0, "2": 2.5}, "c": {"4": -1.0, "2": 0.5}}
TWO = {"a": {"4": 1.0, "2": 3.0}, "b": {"4": 2.0, "2": 4.0}, "c": {"4": 3.0, "2": 5.0}}


def policy(path, weight_bits, act_bits, alpha=2):
    write_policy(path, {"arch": "resnet20", "layer_name": ["a", "b", "c"], "weight_bits": weight_bits, "act_bits": act_bits,
                        "alpha": alpha})
    return path


def test_indicators_out_of_order_and_not_positive_are_counted(tmp_path):
    assert order_of(indicators(tmp_path / "i.pkl", ONE, TWO)) == {"indicators": 12, "out_of_order": 1, "not_positive": 1}


def test_agreement_with_a_reference(tmp_path):
    own, best = indicators(tmp_path / "own.pkl", ONE, TWO), indicators(tmp_path / "best.pkl", TWO, TWO)
    found = agreement_of(policy(tmp_path / "own.yaml", [4, 4, 2], [4, 4, 4], alpha=7), own,
                         policy(tmp_path / "best.yaml", [4, 4, 4], [4, 4, 2]), best)
    assert found["same_weight_bits"] == pytest.approx(2 / 3) and found["same_act_bits"] == pytest.approx(2 / 3)
    assert found["act_rank"] == pytest.approx(1)
    # ranks at 4 bits 1 2 0 and at 2 bits 1 2 0 against 0 1 2: 1 - 6 * 6 / (3 * 8)
    assert found["weight_rank"] == pytest.approx(-0.5)
    # (1 + 2 + 3) + 2 * (1 + 2 + 5) against (1 + 2 + 5) + 2 * (1 + 2 + 3)
    assert found["regret"] == pytest.approx(22 / 20 - 1)


def test_candidates_at_which_no_layer_differs_have_no_ranks(tmp_path):
    level = {name: {"4": 0.5, "2": row["2"]} for name, row in TWO.items()}
    own, best = indicators(tmp_path / "own.pkl", level, ONE), indicators(tmp_path / "best.pkl", TWO, level)
    flat = indicators(tmp_path / "flat.pkl", {name: {"4": 0.5, "2": 0.5} for name in TWO}, ONE)
    chosen = policy(tmp_path / "policy.yaml", [4, 4, 2], [4, 4, 4])
    assert agreement_of(chosen, own, chosen, best)["weight_rank"] == pytest.approx(1)  # that of 2 bits
    assert agreement_of(chosen, flat, chosen, best)["weight_rank"] is None


def test_the_objective_is_that_of_the_search(tmp_path):
    content = {"weight": TWO, "act": ONE}
    chosen = {"layer_name": ["a", "b", "c"], "weight_bits": ["4", "2", "2"], "act_bits": ["2", "4", "4"], "alpha": 3}
    assert objective_of(chosen, content, 0.5) == 2.0 + 3.0 - 1.0 + 0.5 * (1.0 + 4.0 + 5.0)


PLAN = {
    "title": "Policies", "values": {"seed": [0, 1], "policy": ["searched"]},
    "steps": {"tune": {"over": ["policy", "seed"], "folder": "stage", "command": "main.py {policy} {seed}",
                       "makes": "{results}/{policy}_{seed}"}},
    "report": {"main": {"kind": "accuracy", "runs": {"tune": {"size": "small"}}, "group": ["size", "policy"],
                        "plot": {"x": "policy"}}},
}


def test_a_report_has_a_row_for_each_finished_run_with_its_command(tmp_path, capsys):
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(PLAN))
    experiment = read_experiment(tmp_path / "plan.yaml", tmp_path, "../out", "", "")
    write_report(experiment, tmp_path / "tables")
    assert "nothing to report yet" in capsys.readouterr().out
    folder = tmp_path / "out" / "searched_1"
    folder.mkdir(parents=True)
    (folder / "summary.yaml").write_text(yaml.safe_dump({"top1": 91.5, "top5": 99.0, "loss": 0.3, "size_mb": 0.1, "ratio": 8.0,
                                                         "gbitops": 1.5}))
    metrics(folder / "metrics.csv", [{"epoch": 1, "split": "train", "top1": 50, "seconds": 12.5}])
    write_report(experiment, tmp_path / "tables")
    [row] = read_table(tmp_path / "tables" / "plan_runs.csv")
    assert row["command"] == "cd stage && python main.py searched 1"
    found = [row[key] for key in ("seed", "policy", "size", "top1", "train_seconds")]
    assert found == ["1", "searched", "small", "91.5", "12.5"]
    [row] = read_table(tmp_path / "tables" / "plan.csv")
    assert (row["policy"], row["top1"], row["top1_sd"], row["n"]) == ("searched", "91.5", "", "1")
    assert (tmp_path / "tables" / "plan.png").stat().st_size > 1000
    assert "| small | searched | 91.50 | 1 | 0.1000 |" in (tmp_path / "tables" / "plan.md").read_text()


def test_a_table_of_two_axes_has_mean_and_deviation_in_each_cell():
    table = pivot(summarise(ROWS, ["budget", "policy"], ["top1"]), "policy", "budget", "top1")
    assert table.splitlines() == ["| policy | a | b |", "| --- | --- | --- |", "| uniform | 82.00 ± 2.00 |  |",
                                  "| searched | 83.00 ± 1.73 | 72.00 ± 2.65 |"]
