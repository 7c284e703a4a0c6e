"""A run that is killed again and again, at any moment, ends with the same bytes as one that is not."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from comparing import assert_equal_folders

ROOT = Path(__file__).resolve().parents[1]
PRETRAINING, TRAINING = ROOT / "indicators_pretraining", ROOT / "quantization_training"
KILLS = int(os.environ.get("LIMPQP_KILLS", "20"))  # over the three commands
EPOCHS = max(4, KILLS // 4)
COMMON = f"""
arch: resnet20
dataloader: {{dataset: digits, input_size: 8, batch_size: 32, data_fraction: 0.15, val_split: 0.1}}
wandb: {{mode: disabled}}
log: {{checkpoint_steps: 1}}
quan: {{act: {{all_positive: true}}, excepts: {{conv1: , bn1: , fc: }}}}
epochs: {EPOCHS}
lr: 0.05
"""
COMMANDS = {
    "joint training": (PRETRAINING, "main", "target_bits: [4, 2]\n", "", 7),
    "pruning": (PRETRAINING, "pruning", "prune: {amount: [0.5, 0.6], rewind_epoch: 1}\n", "_pruning", 6),
    "fine-tuning": (TRAINING, "main", "weight_bits: 3\nact_bits: 4\nopt: adamw\nprune: {target_sparsity: 0.7, frequency: 2}\n",
                    "", 7),
}


def kill(stage, script, folder, kills, seed, *words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "killer.py"), str(stage), script, str(kills), str(seed),
                           str(folder), *words], capture_output=True, text=True,
                          timeout=60 + 20 * EPOCHS + 60 * kills, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["status"] == 0, done.stderr[-3000:]
    return result


@pytest.mark.parametrize("title", COMMANDS)
def test_a_run_that_is_killed_again_and_again_equals_an_undisturbed_one(title, tmp_path):
    stage, script, more, suffix, share = COMMANDS[title]
    config = tmp_path / "config.yaml"
    config.write_text(COMMON + more)
    folders = {name: tmp_path / f"{name}{suffix}" for name in ("undisturbed", "killed")}
    words = [str(config), f"output_dir={tmp_path}"]
    kill(stage, script, folders["undisturbed"], 0, 0, *words, "name=undisturbed")
    kills = share * KILLS // 20
    result = kill(stage, script, folders["killed"], kills, 1, *words, "name=killed")
    print(f"{title}: {result}")
    assert result["killed"] == kills and result["writing"] >= 1
    assert_equal_folders(folders["undisturbed"], folders["killed"])


# ---------------------------------------------------------------------------------------------------------------------
# Two processes under torchrun.


def torchrun(stage, script, *words):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=3",
                             f"--master_port={port}", f"{script}.py", *words], cwd=stage, text=True,
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
    config = tmp_path / "config.yaml"
    config.write_text(COMMON + more)
    words = [str(config), f"output_dir={tmp_path}", "epochs=2", "dataloader.data_fraction=0.4"]
    folders = [tmp_path / f"{name}{suffix}" for name in ("undisturbed", "killed")]
    undisturbed = torchrun(stage, script, *words, "name=undisturbed")

    files = ["level_0", "level_1"] if title == "pruning" else ["killed", "killed"]
    first, second = (folders[1] / f"{name}_checkpoint.pth.tar" for name in files)
    for _ in range(5):  # until it comes inside an epoch, where BatchNorm statistics differ between the two
        stopped = torchrun(stage, script, *words, "name=killed")
        wait_for_step(first, stopped)
        stopped.send_signal(signal.SIGTERM)
        said = stopped.communicate(timeout=60)[0]
        assert re.search(r"stopped by SIGTERM.*; the same command goes on from there", said), said[-3000:]
        inside = torch.load(first, weights_only=True).get("inside", {"batchnorms": []})
        if inside["batchnorms"]:
            break
    one, other = inside["batchnorms"]
    assert any(not torch.equal(one[name], other[name]) for name in one)

    restarted = torchrun(stage, script, *words, "name=killed")
    wait_for_step(second, restarted)
    os.kill(children_of(restarted, script)[1], signal.SIGKILL)
    said = finish(restarted)
    assert said.count("continuing after epoch") >= 2, said[-3000:]
    finish(undisturbed)
    assert_equal_folders(*folders)


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


def start(config, *words):
    """Start fine-tuning as the leader of a process group of its own, as a shell or a batch system does."""
    return subprocess.Popen([sys.executable, "main.py", str(config), *words], cwd=TRAINING, text=True, start_new_session=True,
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
    config = tmp_path / "config.yaml"
    config.write_text(COMMON + COMMANDS["fine-tuning"][2])
    words = [f"output_dir={tmp_path}", "epochs=4", "dataloader.dataset=folder", f"dataloader.path={tmp_path / 'images'}",
             "dataloader.input_size=16", "dataloader.batch_size=8", "dataloader.val_split=0", "dataloader.data_fraction=1",
             "dataloader.workers=2", "calibration_images=16"]
    undisturbed = start(config, *words, "name=undisturbed")
    checkpoint = tmp_path / "killed" / "killed_checkpoint.pth.tar"
    for send, number in ((to_group, signal.SIGTERM), (to_group, signal.SIGINT), (to_each, signal.SIGTERM)):
        stopped = start(config, *words, "name=killed")
        wait_for_step(checkpoint, stopped)
        workers = children_of(stopped)
        send(stopped, number)
        said = finish(stopped, 128 + number)
        assert said.splitlines()[-1].startswith(f"stopped by {signal.Signals(number).name}"), said[-3000:]
        assert said.endswith("the same command goes on from there\n") and "Traceback" not in said
        assert len(workers) >= 2 and not any(map(is_there, workers))
    finish(start(config, *words, "name=killed"))
    finish(undisturbed)
    assert_equal_folders(tmp_path / "undisturbed", tmp_path / "killed")
