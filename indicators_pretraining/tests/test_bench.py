"""The benchmark measures what it says: the same step, with ratios to the right side, and the memory that tensors take."""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "measurements"))
import pytest
import torch

import bench_training as bench
from quan.quantizer import lsq
from util.errors import UserError

CPU = torch.device("cpu")


def test_ratios_are_against_full_precision_and_reference(monkeypatch):
    clock = bench.Clock(CPU, 1)
    monkeypatch.setattr(clock, "in_turn", lambda sides, before: dict(zip(sides, (10.0, 30.0, 15.0), strict=True)))
    monkeypatch.setattr(clock, "peak", lambda work: work() * bench.MB)
    rows = bench.table(clock, "case", "what", {bench.FULL_PRECISION: lambda: 4, bench.REFERENCE: lambda: 8, "ours": lambda: 6},
                       kept=4 * bench.MB, notes={"ours": "a note"})
    ours = rows[-1]
    assert (ours["time_over_floor"], ours["time_over_chain"]) == (1.5, 0.5)
    assert (ours["memory_over_floor"], ours["memory_over_chain"]) == (10 / 8, 10 / 12)
    assert ours["note"] == "a note" and set(ours) <= set(bench.COLUMNS)


def test_the_peak_counts_what_lies_in_memory_at_a_time():
    def work():
        first = torch.empty(2**20, dtype=torch.uint8)
        del first
        second, third = torch.empty(2**20, dtype=torch.uint8), torch.empty(2**21, dtype=torch.uint8)
        return second, third

    assert 3 * 2**20 <= bench.Clock(CPU, 1).peak(work) < 3.1 * 2**20


def test_the_reference_keeps_three_times_its_input_and_the_quantizer_once():
    x = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    size = x.numel() * x.element_size()
    assert round(bench.kept_bytes(bench.reference_lsq, x, 15, 0.1) / size, 1) == 3.0
    assert bench.kept_bytes(lsq, x, 15, 0.1) <= size + 64


@pytest.mark.parametrize("chain", [False, True])
def test_a_workload_takes_the_steps_of_training(chain):
    work = bench.Workload(CPU, "resnet20", 2, 16)
    for make in (lambda: work.joint((3, 2), chain=chain), lambda: work.tuned(chain=chain), lambda: work.full_precision(2)):
        step = make()
        step()
        step()
    assert work.kept() == 8 * sum(parameter.numel() for parameter in work.model().parameters())


def test_a_table_and_a_plot_are_written(tmp_path, monkeypatch, capsys):
    rows = [{"case": "joint step", "what": "x", "side": side, "ms": 1.0, "peak_mb": 1.0, "time_over_floor": ratio,
             "memory_over_floor": ratio} for side, ratio in ((bench.FULL_PRECISION, 1.0), ("ours", 1.1))]
    monkeypatch.setattr(bench, "CASES", {"joint": lambda clock: rows})
    bench.main(["--output", str(tmp_path / "bench.csv")])
    with open(tmp_path / "bench.csv", newline="") as file:
        assert [row["side"] for row in csv.DictReader(file)] == [bench.FULL_PRECISION, "ours"]
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="--only: found joints, .*; did you mean 'joint'"):
        bench.main(["--only", "joints"])


def test_the_cases_of_a_gpu_run_on_tiny_networks_and_one_that_fails_is_named(tmp_path, monkeypatch):
    full_precision = bench.Workload.full_precision

    def fails_once(work, passes, precision, channels_last):
        if passes == 1 and precision == "bf16":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return full_precision(work, passes, precision, channels_last)

    monkeypatch.setattr(bench.Workload, "full_precision", fails_once)
    monkeypatch.setattr(bench.Clock, "peak", lambda clock, work: work() or bench.MB)
    monkeypatch.setattr(bench.Workload.joint, "__defaults__", ((3, 2), *bench.Workload.joint.__defaults__[1:]))
    monkeypatch.setattr(bench, "draw", lambda path, rows: None)
    monkeypatch.setattr(bench, "TINY_CASES", {"broken": lambda clock: [][0], **bench.TINY_CASES})
    bench.main(["--tiny", "--rounds", "1", "--output", str(tmp_path / "bench.csv")])
    with open(tmp_path / "bench.csv", newline="") as file:
        broken, *rows = csv.DictReader(file)
    assert broken["case"] == "broken" and broken["note"].startswith("IndexError: ")
    rates = [row["side"] for row in rows if "GB/s" in row["note"]]
    assert rates == 2 * ["copy", "forward", "backward"]
    kernels = [row for row in rows if row["case"].startswith("kernels of a joint step")]
    assert kernels[0]["what"] == "all" and len(kernels) == 11 and all("launches" in row["note"] for row in kernels)
    steps = {(row["case"][5:10], row["what"][-4:], row["side"]): row for row in rows if row["case"].startswith("GPU, ")}
    assert len(steps) == 2 * 2 * 4
    for (kind, precision, side), row in steps.items():
        is_over = (kind, precision) != ("fine-", "bf16")
        assert bool(row["time_over_floor"]) == is_over and bool(row["ms"]) == (is_over or side != bench.FULL_PRECISION)
    assert steps["fine-", "bf16", "floor"]["note"] == "OutOfMemoryError: CUDA out of memory"
    monkeypatch.setattr(bench, "GPU_SECONDS", -1)
    assert {row["note"] for row in bench.TINY_CASES["gpu"](bench.Clock(CPU, 1))} == {"not measured: the -1 seconds are over"}
