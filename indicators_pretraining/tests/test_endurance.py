"""A long run that is continued again and again takes no more memory and no more open files than a short one."""

import gc
import os
from pathlib import Path

import pytest

import main

pytestmark = pytest.mark.usefixtures("shallow")
EPOCHS = int(os.environ.get("LIMPQP_EPOCHS", "15"))
AT_ONCE = 3  # epochs before the run is ended and continued
GROWTH = 24 * 2**20  # bytes
CONFIG = """
arch: resnet20
target_bits: [4, 2]
dataloader: {dataset: digits, input_size: 8, batch_size: 32, data_fraction: 0.05, val_split: 0.05}
wandb: {mode: disabled}
log: {checkpoint_steps: 1, keep_checkpoints: 2}
quan: {act: {all_positive: true}, excepts: {conv1: , bn1: , fc: }}
sched: constant
val_cycle: 3
"""


def in_use():
    """(bytes of memory, open files) of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory and open files from /proc")
def test_memory_and_open_files_do_not_grow(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)
    measured = []
    for epochs in range(AT_ONCE, EPOCHS + 1, AT_ONCE):
        main.main(["config.yaml", "name=long", f"epochs={epochs}"])
        measured.append(in_use())
    settled = len(measured) // 2  # what is loaded once is loaded by then
    memory, files = zip(*measured, strict=True)
    with capfd.disabled():
        print(f"\n{EPOCHS} epochs, continued {len(measured) - 1} times: {memory[settled] / 2**20:.0f} MB and {files[settled]} "
              f"open files half-way, {memory[-1] / 2**20:.0f} MB and {files[-1]} at the end")
    assert files[-1] <= files[settled]
    assert memory[-1] - memory[settled] < GROWTH
    assert len(list((tmp_path / "results" / "long").glob("*.pth.tar"))) == 4
