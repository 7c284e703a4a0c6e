"""make check-gpu, as far as a machine without a GPU goes: checks are run, named and counted, and none ends the others."""

import pickle
from pathlib import Path

import check_gpu
import forked
import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]


def test_checks_run_on_the_cpu_and_what_needs_a_gpu_is_called_not_run():
    done = forked.run(ROOT, "tests/check_gpu.py", "--device", "cpu", "--only", "kernels", "side_stream", "evaluation")
    rows = [line.split()[:2] for line in done.stdout.splitlines()[:-1]]
    assert rows == [["kernels", "passed"], ["side_stream", "not"], ["evaluation", "failed"]], done.stdout + done.stderr
    assert done.returncode == 1 and done.stdout.endswith(": 1 passed, 1 failed, 1 not run\n")
    assert "the checkpoint" in done.stdout or "resume.path" in done.stdout  # there is none yet to evaluate


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so():
    done = forked.run(ROOT, "tests/check_gpu.py")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no GPU" in done.stderr


def test_no_check_begins_when_the_time_is_over():
    assert check_gpu.outcome(lambda: 1 / 0, 0) == ("not run", "the 240 seconds are over")
    assert check_gpu.outcome(lambda: 1 / 0, 1) == ("failed", "ZeroDivisionError: division by zero")


def test_without_pulp_the_policy_is_uniform(tmp_path, monkeypatch):
    monkeypatch.setattr(check_gpu.importlib.util, "find_spec", lambda name: None)
    checks = check_gpu.Checks("cpu", tmp_path)
    (tmp_path / check_gpu.PRETRAINING / "results").mkdir()
    (tmp_path / check_gpu.PRETRAINING / check_gpu.INDICATORS).write_bytes(pickle.dumps({"layer_name": ["a", "b"]}))
    checks.policy()
    written = yaml.safe_load((tmp_path / check_gpu.SEARCH / check_gpu.POLICY).read_text())
    assert written == {"arch": "resnet20", "layer_name": ["a", "b"], "weight_bits": [3, 3], "act_bits": [3, 3]}
