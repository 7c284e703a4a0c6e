"""The runner, on commands of a moment: order, parallel jobs, failures, continuing."""

import os
import subprocess
import sys
import time

import pytest
import yaml

from plan import read_experiment
from run import HERE, left_over
from steps import Runner

STAGE = '''
import pathlib, sys, time
name, needs, fails = (sys.argv[1:] + ["", ""])[:3]
if needs and not pathlib.Path(needs).exists():
    sys.exit(f"{needs} is not there yet")
if fails == "fails":
    sys.exit(3)
with open("order.txt", "a") as file:
    file.write(name + "\\n")
pathlib.Path(f"../results/{name}.yaml").write_text("x: 1")
'''


@pytest.fixture
def root(tmp_path):
    (tmp_path / "stage").mkdir()
    (tmp_path / "results").mkdir()
    (tmp_path / "stage" / "make.py").write_text(STAGE)
    return tmp_path


def experiment(root, fails=""):
    plan = {"values": {"seed": [0, 1, 2]}, "steps": {
        "late": {"over": ["seed"], "folder": "stage", "command": "make.py late{seed} {results}/early{seed}.yaml",
                 "makes": "{results}/late{seed}.yaml"},
        "early": {"over": ["seed"], "folder": "stage", "command": f"make.py early{{seed}} '' {fails}",
                  "makes": "{results}/early{seed}.yaml"}}}
    (root / "plan.yaml").write_text(yaml.safe_dump(plan))
    return read_experiment(root / "plan.yaml", root, "../results", "", "")


@pytest.fixture
def run(root):
    """Runs what is left of experiments, two commands at a time."""
    return lambda *experiments: Runner(2, root, root / "results" / "logs").run(left_over(experiments))


def test_every_step_runs_once_after_what_it_waits_for(root, run):
    assert run(experiment(root), experiment(root)) == []
    order = (root / "stage" / "order.txt").read_text().split()
    assert sorted(order) == sorted([*(f"early{seed}" for seed in range(3)), *(f"late{seed}" for seed in range(3))])
    assert all(order.index(f"early{seed}") < order.index(f"late{seed}") for seed in range(3))


def test_what_is_there_is_not_made_again(root, run):
    run(experiment(root))
    (root / "results" / "late1.yaml").unlink()
    (root / "stage" / "order.txt").unlink()
    assert [step.key for step in left_over([experiment(root)])] == ["late 1"]
    assert run(experiment(root)) == []
    assert (root / "stage" / "order.txt").read_text().split() == ["late1"]


def test_a_step_of_several_experiments_has_its_place_in_the_first(root):
    plan = {"values": {"seed": [0]}, "steps": {"own": {"folder": "stage", "command": "own.py", "makes": "{results}/own.yaml"}}}
    (root / "first.yaml").write_text(yaml.safe_dump(plan))
    first, both = read_experiment(root / "first.yaml", root, "../results", "", ""), experiment(root)
    assert [step.key for step in left_over([both, first, both])] == [step.key for step in left_over([both])] + ["own"]


def test_a_failure_is_reported_with_what_waits_for_it_and_the_rest_is_done(root, run):
    failing = experiment(root, fails="fails")
    (root / "results" / "early1.yaml").write_text("x: 1")
    failed = run(failing)
    assert sorted(failed) == ["early 0", "early 2", "late 0", "late 2"]
    assert (root / "results" / "late1.yaml").exists()
    assert "early2" in (root / "results" / "logs" / "early_2.log").read_text()


def test_a_command_that_makes_nothing_has_failed(root, run):
    plan = experiment(root)
    (root / "stage" / "make.py").write_text("")
    assert len(run(plan)) == 6


def test_a_stopped_runner_stops_its_commands_and_says_how_to_go_on(root):
    experiment(root)
    (root / "stage" / "make.py").write_text("import os, pathlib, time; "
                                            "pathlib.Path(f'{os.getpid()}.pid').touch(); time.sleep(600)")
    code = (f"import run, pathlib, plan; root = pathlib.Path({str(root)!r}); run.ROOT = run.HERE = root; "
            "run.read_experiment = lambda path, *rest: plan.read_experiment(path, root, '../results', '', ''); "
            "run.main([str(root / 'plan.yaml'), '--jobs', '2'])")
    with subprocess.Popen([sys.executable, "-c", code], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as runner:
        while len(pids := list((root / "stage").glob("*.pid"))) < 2:
            assert runner.poll() is None
            time.sleep(0.05)
        runner.terminate()
        said = runner.communicate(timeout=60)[1]
    assert runner.returncode and "the same command goes on" in said and "Traceback" not in said
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.stem), 0)


@pytest.mark.parametrize(("words", "said"), [
    (["missing.yaml"], "missing.yaml"), (["policies.yaml", "--jobs", "0"], "--jobs"), (["policies.yaml", "--rep"], "--rep"),
    (["policies.yaml", "--dry-run", "--data", "/nothere"], "--data: /nothere is no folder")])
def test_misuse_ends_in_one_line(words, said):
    done = subprocess.run([sys.executable, "run.py", *words], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1


def test_output_that_nobody_reads_ends_quietly():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "run.py", "policies.yaml", "--quick", "--dry-run"], stdout=write,
                          stderr=subprocess.PIPE, cwd=HERE)
    os.close(write)
    assert not done.stderr
