"""Two runs on one folder: the second one says so and ends, and leaves the first one's files alone."""

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

import main
import pruning
from engine import run_lock
from engine.run_lock import alone_in
from util import distributed
from util.errors import UserError, user_errors_on_one_line

pytestmark = [pytest.mark.usefixtures("shallow"),
              pytest.mark.skipif(run_lock.fcntl is None, reason="this platform has no such locks")]
CONFIG = """
arch: resnet20
target_bits: [4, 2]
dataloader: {dataset: digits, input_size: 8, batch_size: 16, data_fraction: 0.02, val_split: 0}
wandb: {mode: disabled}
prune: {amount: [0.5]}
epochs: 1
lr: 0.01
"""


@contextlib.contextmanager
def locked_by_another(folder, forks=False):
    """Within, another process is at work in a folder; gives its number. It may have a child of its own, which outlives it."""
    (told, tell), (alive, stay) = os.pipe(), os.pipe()
    process = os.fork()
    if not process:
        os.close(stay)
        with alone_in(folder):
            if forks and not os.fork():
                os.read(alive, 1)  # until the test is over
                os._exit(0)
            os.write(tell, b".")
            signal.pause()
    os.close(alive)
    os.read(told, 1)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        for descriptor in (told, tell, stay):
            os.close(descriptor)


def content(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE", 0.2)


def test_a_second_run_is_told_who_is_at_work(tmp_path, impatient):
    folder = str(tmp_path / "results" / "run")
    with locked_by_another(folder) as process:
        before = content(folder)
        with pytest.raises(UserError, match=rf"^{folder}: another run is at work in this folder \(process {process} on .+\); "
                                            "wait until it ends, stop it, or take another name$"), alone_in(folder):
            raise AssertionError
        with alone_in(folder, reads_only=True):
            assert content(folder) == before
        with alone_in(str(tmp_path / "results" / "another")):
            pass


def test_the_lock_goes_with_the_process_that_is_killed_whatever_its_children_do(tmp_path, monkeypatch):
    with locked_by_another(tmp_path / "run", forks=True) as process:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        monkeypatch.setattr(run_lock, "PATIENCE", 0)
        with alone_in(tmp_path / "run"):
            assert (tmp_path / "run" / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_run_that_is_about_to_end_is_waited_for(tmp_path):
    with locked_by_another(tmp_path) as process:
        if not os.fork():
            time.sleep(0.3)
            os.kill(process, signal.SIGKILL)
            os._exit(0)
        with alone_in(tmp_path):
            pass
        os.waitpid(process, 0)
        os.wait()


def test_nothing_is_left_behind_but_what_was_written(tmp_path):
    with pytest.raises(ZeroDivisionError), alone_in(tmp_path / "results" / "run"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with alone_in(tmp_path / "results" / "run"):
        (tmp_path / "results" / "run" / "args.yaml").write_text("name: run\n")
    assert content(tmp_path / "results" / "run") == {"args.yaml": b"name: run\n"}


def test_what_was_locked_by_one_that_is_gone_and_removed_is_locked_anew(tmp_path, monkeypatch):
    """The one before removes its file while this one has it open already."""
    lockf, path, opened = run_lock.fcntl.lockf, tmp_path / ".lock", []

    def lock_after_removal(descriptor, how):
        if not opened:
            path.unlink()
        opened.append(descriptor)
        return lockf(descriptor, how)

    monkeypatch.setattr(run_lock.fcntl, "lockf", lock_after_removal)
    with alone_in(tmp_path):
        assert len(opened) == 2 and path.exists()


@pytest.mark.parametrize("obstacle", ["no such locks here", "no locks on this disk", "not writable", "a link"])
def test_where_nothing_can_be_locked_a_run_does_without(tmp_path, monkeypatch, obstacle):
    folder = tmp_path / "run"
    if obstacle == "no such locks here":
        monkeypatch.setattr(run_lock, "fcntl", None)
    elif obstacle == "no locks on this disk":
        def fail(*_):
            raise OSError(37, "No locks available")
        monkeypatch.setattr(run_lock.fcntl, "lockf", fail)
    elif obstacle == "a link":
        folder.mkdir()
        (tmp_path / "precious").write_text("precious")
        (folder / ".lock").symlink_to(tmp_path / "precious")
    else:
        (tmp_path / "run").write_text("a file")
    entered = []
    with alone_in(folder):
        entered.append(1)
    assert entered
    if obstacle == "a link":
        assert (tmp_path / "precious").read_text() == "precious"


def test_rank_0_alone_holds_it_and_all_ranks_hear_of_it(tmp_path, monkeypatch, impatient):
    calls = []
    monkeypatch.setattr(distributed, "on_main", lambda function, *arguments: calls.append(function))
    with alone_in(tmp_path):
        assert len(calls) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("command, suffix", [(main, ""), (pruning, "_pruning")])
def test_commands_that_write_are_alone_in_their_folder_and_those_that_read_are_not(tmp_path, monkeypatch, capsys, impatient,
                                                                                  command, suffix):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)
    folder = Path("results") / f"run{suffix}"
    command.main(["config.yaml", "name=run"])
    assert not (folder / ".lock").exists()
    with locked_by_another(folder):
        before = content(folder)
        with pytest.raises(UserError, match=f"^{folder}: another run is at work"):
            command.main(["config.yaml", "name=run"])
        command.main(["config.yaml", "name=run", "--dry-run"])
        if command is main:
            command.main(["config.yaml", "name=run", "eval=true"])
        assert content(folder) == before


def test_the_second_start_is_one_line_and_exit_status_2(tmp_path, capsys, impatient):
    (tmp_path / "config.yaml").write_text(CONFIG)
    with locked_by_another(tmp_path / "out" / "run") as process, pytest.raises(SystemExit) as stop, user_errors_on_one_line():
        main.main([str(tmp_path / "config.yaml"), "name=run", f"output_dir={tmp_path / 'out'}"])
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'out' / 'run'}: another run is at work in this folder (process {process} on ")
