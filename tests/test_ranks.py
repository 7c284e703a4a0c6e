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


def test_ranks_on_two_machines_start_again_though_one_agent_counts_no_restart(monkeypatch):
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    *launchers, _ = forked.two_agents(SCRIPT.parent, "--max-restarts=1", SCRIPT, "machines")
    try:
        said = [launcher.communicate(timeout=60) for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()  # a hanging one waits for half an hour
    assert [launcher.returncode for launcher in launchers] == [0, 0], said
    assert [stdout for stdout, _ in said] == ["restarts [0, 1]\n"] * 2


def test_restarts_on_two_machines_that_would_hang_are_refused_in_one_line(monkeypatch):
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1, "GROUP_WORLD_SIZE": 2,
                        "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_MAX_RESTARTS": 3}.items():
        monkeypatch.setenv(name, str(value))
    refused = forked.run(SCRIPT.parent, SCRIPT, "alike", limit=60)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 stands in its environment; set it on each machine" in refused.stderr
