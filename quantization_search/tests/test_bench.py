"""The benchmark measures what it says: the same model, solved twice, judged exactly."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "measurements"))
import bench_search as bench
import ilp


def test_a_line_of_the_table():
    row = bench.measure("small", lambda: bench.made_up(4, 3), 3)
    assert row["layers"] == 4 and row["ours"] == "proven" and set(row) <= set(bench.COLUMNS)
    assert row["cbc_over_ours"] == row["plain_cbc_s"] / row["solving_s"]


def test_the_policy_of_the_reference_is_judged_exactly():
    problem = bench.made_up(4, 3)
    best = ilp.solve(problem)
    assert bench.judge(problem, best, best.chosen) == "the same objective"
    assert bench.judge(problem, best, [0] * 4) == "breaks a budget"
    assert bench.judge(problem, best, [len(problem.pairs[0]) - 1] * 4).startswith("worse by")
