"""A rank that fails ends the whole run, with its own error shown once."""

from pathlib import Path

import forked
import pytest

SAID = {"alone": "error: image.png: only rank 1 meets this", "alike": "error: file.yaml: all meet this",
        "loss": "error: the loss is not finite in epoch 3, step 5 of 10: all weights and step sizes are finite"}
SCRIPT = Path(__file__).with_name("rank_errors.py")


@pytest.mark.parametrize("kind", SAID)
def test_a_rank_that_fails_ends_all_with_its_error_told_once(kind):
    launcher = forked.torchrun(SCRIPT.parent, SCRIPT, kind)
    stderr = launcher.communicate(timeout=120)[1]
    assert launcher.returncode == 1
    assert stderr.count(SAID[kind]) == 1, stderr[-3000:]
    ours = stderr.partition(SAID[kind])[0]
    assert "Traceback" not in ours


def test_ranks_that_start_again_find_nothing_of_those_that_are_gone():
    launcher = forked.torchrun(SCRIPT.parent, "--max-restarts=1", SCRIPT, "restart")
    stdout, stderr = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, stderr[-3000:]
    assert sorted(stdout.splitlines()) == ["entry 1 of this start", "entry 2 of this start"]
