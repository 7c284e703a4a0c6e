"""A run that is killed again and again, at any moment, ends with the same bytes as one that is not."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from PIL import Image

from comparing import assert_equal_folders
from small_networks import SMALL

ROOT = Path(__file__).resolve().parents[1]
PRETRAINING, TRAINING = ROOT / "indicators_pretraining", ROOT / "quantization_training"
KILLS = int(os.environ.get("LIMPQP_KILLS", "20"))  # over the three commands
EPOCHS = max(4, KILLS // 4)
NETWORK = SMALL + """

import time


class Wait(nn.Module):
    def forward(self, x):
        time.sleep(0.03)
        return x


def slow(num_classes):  # leaves time for a signal inside an epoch, on any machine
    return make(num_classes).append(Wait())
"""
COMMON = f"""
dataloader: {{dataset: digits, input_size: 8, batch_size: 32, data_fraction: 0.25, val_split: 0.1}}
wandb: {{mode: disabled}}
log: {{checkpoint_steps: 1}}
quan: {{act: {{all_positive: true}}, excepts: {{'0': , '1': , '10': }}}}
epochs: {EPOCHS}
lr: 0.05
"""
COMMANDS = {
    "joint training": (PRETRAINING, "main", "target_bits: [4, 2]\n", "", 7),
    "pruning": (PRETRAINING, "pruning", "prune: {amount: [0.5, 0.6], rewind_epoch: 1}\n", "_pruning", 6),
    "fine-tuning": (TRAINING, "main", "weight_bits: 3\nact_bits: 4\nopt: adamw\nprune: {target_sparsity: 0.7, frequency: 2}\n",
                    "", 7),
}


def write_configuration(folder, factory, more):
    """The path of a configuration file, for a network of four layers."""
    (folder / "network.py").write_text(NETWORK)
    (folder / "config.yaml").write_text(f"arch: {folder}/network.py:{factory}\n{COMMON}{more}")
    return folder / "config.yaml"


def kill(stage, script, folder, kills, seed, *words):
    done = forked.run(stage, ROOT / "tests" / "killer.py", stage, script, kills, seed, folder, *words,
                      limit=60 + 20 * EPOCHS + 60 * kills)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["status"] == 0, done.stderr[-3000:]
    return result


@pytest.mark.parametrize("title", COMMANDS)
def test_a_run_that_is_killed_again_and_again_equals_an_undisturbed_one(title, tmp_path):
    stage, script, more, suffix, share = COMMANDS[title]
    config = write_configuration(tmp_path, "make", more)
    folders = {name: tmp_path / f"{name}{suffix}" for name in ("undisturbed", "killed")}
    words = [str(config), f"output_dir={tmp_path}"]
    kill(stage, script, folders["undisturbed"], 0, 0, *words, "name=undisturbed")
    kills = share * KILLS // 20
    result = kill(stage, script, folders["killed"], kills, 1, *words, "name=killed")
    print(f"{title}: {result}")
    assert result["killed"] >= kills // 2 and result["writing"] >= result["killed"] // 3 >= 1
    assert_equal_folders(folders["undisturbed"], folders["killed"])


# ---------------------------------------------------------------------------------------------------------------------
# Two processes under torchrun.


def torchrun(stage, *words):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                             f"--master_port={forked.free_port()}", *words], cwd=stage, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def children_of(process, script=""):
    """Process numbers of the children of a process, those that run a script where one is named."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children if script in Path(f"/proc/{child}/cmdline").read_text()]


def finish(process, status=0):
    """Wait until a process has ended as expected; return what it said."""
    said = process.communicate(timeout=300)[0]
    assert process.returncode == status, said[-3000:]
    return said


def wait_for_step(checkpoint, launcher, seconds=120):
    """Wait until a checkpoint appears that was not there before."""
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
    limit = time.time() + seconds
    while time.time() < limit and launcher.poll() is None:
        if checkpoint.exists() and checkpoint.stat().st_mtime_ns != before:
            return
        time.sleep(0.01)
    launcher.kill()
    raise AssertionError(launcher.communicate()[0][-3000:])


needs_proc = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds processes in /proc")


@needs_proc
@pytest.mark.parametrize("title", COMMANDS if KILLS > 20 else list(COMMANDS)[:2])  # fine-tuning in make soak alone
def test_a_launched_run_goes_on_after_sigterm_and_after_the_loss_of_a_worker(title, tmp_path):
    stage, script, more, suffix, _ = COMMANDS[title]
    config = write_configuration(tmp_path, "slow", more)
    words = ["--max-restarts=3", f"{script}.py", str(config), f"output_dir={tmp_path}", "epochs=2",
             "dataloader.data_fraction=0.4"]
    folders = [tmp_path / f"{name}{suffix}" for name in ("undisturbed", "killed")]
    undisturbed = forked.torchrun(stage, *words, "name=undisturbed", is_merged=True)
    start = torchrun if title == "joint training" else partial(forked.torchrun, is_merged=True)
    restart = start if KILLS > 20 else partial(forked.torchrun, is_merged=True)

    files = ["level_0", "level_1"] if title == "pruning" else ["killed", "killed"]
    first, second = (folders[1] / f"{name}_checkpoint.pth.tar" for name in files)
    for _ in range(5):  # until it comes inside an epoch, where BatchNorm statistics differ between the two
        stopped = start(stage, *words, "name=killed")
        wait_for_step(first, stopped)
        stopped.send_signal(signal.SIGTERM)
        said = stopped.communicate(timeout=60)[0]
        assert re.search(r"stopped by SIGTERM.*; the same command goes on from there", said), said[-3000:]
        inside = torch.load(first, weights_only=True).get("inside", {"batchnorms": []})
        if inside["batchnorms"]:
            break
        start = restart
    one, other = inside["batchnorms"]
    assert any(not torch.equal(one[name], other[name]) for name in one)

    restarted = restart(stage, *words, "name=killed")
    wait_for_step(second, restarted)
    os.kill(children_of(restarted, script if restart is torchrun else "")[1], signal.SIGKILL)
    said = finish(restarted)
    assert said.count("continuing after epoch") >= 2, said[-3000:]
    finish(undisturbed)
    assert_equal_folders(*folders)


@needs_proc
@pytest.mark.skipif(KILLS <= 20, reason="in make soak alone: torchrun waits a quarter of a minute for a machine that is lost")
def test_a_run_on_two_machines_equals_one_on_one_also_after_the_loss_of_a_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    config = write_configuration(tmp_path, "slow", COMMANDS["joint training"][2])
    words = ["--max-restarts=3", "main.py", str(config), f"output_dir={tmp_path}", "epochs=2", "dataloader.data_fraction=0.4",
             "threads=1"]
    finish(forked.torchrun(PRETRAINING, *words, "name=one", is_merged=True))
    *agents, _ = forked.two_agents(PRETRAINING, *words, "name=two", is_merged=True)
    for agent in agents:
        finish(agent)
    assert_equal_folders(tmp_path / "one", tmp_path / "two")

    first, second, start_again = forked.two_agents(PRETRAINING, *words, "name=killed", is_merged=True)
    for _ in range(3):
        wait_for_step(tmp_path / "killed" / "killed_checkpoint.pth.tar", first)
    for number in [second.pid, *children_of(second)]:
        os.kill(number, signal.SIGKILL)
    finish(start_again())
    assert "continuing after epoch" in finish(first)
    assert_equal_folders(tmp_path / "one", tmp_path / "killed")


# ---------------------------------------------------------------------------------------------------------------------
# Loader workers.


def write_images(folder):
    """A small image folder: two classes, train/ and val/."""
    draws = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 4)):
        for label in ("one", "two"):
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = draws.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{number}.png")


def python(folder, *words):
    """Start a command as a shell or a batch system does, as the leader of a process group of its own."""
    return subprocess.Popen([sys.executable, *words], cwd=folder, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def to_group(process, number):
    os.killpg(process.pid, number)


def to_each(process, number):
    """To every process, workers first, as a batch system does that knows no groups."""
    for child in [*children_of(process), process.pid]:
        os.kill(child, number)
        time.sleep(0.02)


def is_there(number):
    """Whether a process is there, zombies left aside."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@needs_proc
def test_a_signal_that_reaches_loader_workers_too_ends_in_a_checkpoint_and_leaves_none_behind(tmp_path):
    write_images(tmp_path / "images")
    config = write_configuration(tmp_path, "slow", COMMANDS["fine-tuning"][2])
    fork = partial(forked.Fork, is_leader=True, is_merged=True)
    words = ["main.py", str(config), f"output_dir={tmp_path}", "epochs=4", "dataloader.dataset=folder",
             f"dataloader.path={tmp_path / 'images'}", "dataloader.input_size=16", "dataloader.batch_size=8",
             "dataloader.val_split=0", "dataloader.data_fraction=1", "dataloader.workers=2", "calibration_images=16"]
    undisturbed = fork(TRAINING, *words, "name=undisturbed")
    checkpoint = tmp_path / "killed" / "killed_checkpoint.pth.tar"
    for start, send, number in ((fork, to_group, signal.SIGTERM), (python, to_group, signal.SIGINT),
                                (fork, to_each, signal.SIGTERM)):
        stopped = start(TRAINING, *words, "name=killed")
        wait_for_step(checkpoint, stopped)
        workers = children_of(stopped)
        send(stopped, number)
        said = finish(stopped, 128 + number)
        assert said.splitlines()[-1].startswith(f"stopped by {signal.Signals(number).name}"), said[-3000:]
        assert said.endswith("the same command goes on from there\n") and "Traceback" not in said
        assert len(workers) >= 2 and not any(map(is_there, workers))
    finish(fork(TRAINING, *words, "name=killed"))
    finish(undisturbed)
    assert_equal_folders(tmp_path / "undisturbed", tmp_path / "killed")
