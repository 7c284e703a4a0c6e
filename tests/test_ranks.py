"""A rank that fails ends the whole run, with its own error shown once."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

SAID = {"alone": "error: image.png: only rank 1 meets this", "alike": "error: file.yaml: all meet this",
        "loss": "error: the loss is not finite in epoch 3, step 5 of 10: all weights and step sizes are finite"}


def launch(kind, *options):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", *options,
               str(Path(__file__).with_name("rank_errors.py")), kind]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("kind", SAID)
def test_a_rank_that_fails_ends_all_with_its_error_told_once(kind):
    done = launch(kind)
    assert done.returncode != 0
    assert done.stderr.count(SAID[kind]) == 1, done.stderr[-3000:]
    ours = done.stderr.partition(SAID[kind])[0]
    assert "Traceback" not in ours


def test_ranks_that_start_again_find_nothing_of_those_that_are_gone():
    done = launch("restart", "--max-restarts=1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(done.stdout.splitlines()) == ["entry 1 of this start", "entry 2 of this start"]
