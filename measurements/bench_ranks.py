"""What the exchange of gradients costs two processes: from the folder indicators_pretraining,

python ../measurements/bench_ranks.py

ResNet-50 over gloo, one thread per process: a backward pass (fine-tuning) and six (joint training, where each pass has its own
copy of the first BatchNorm, and the last one that of an earlier pass), with one flat reduction, as this project has it, or
with torch's DistributedDataParallel, without exchange (no_sync) in all passes but the last. Medians of rounds that take each
side in turn. Writes measurements/ranks.csv; a difference is that of gradients, over the largest one of the parameter.
"""

import contextlib
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, ".")  # the stage

import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from engine.passes import keep_freed_memory
from timing import show, timed
from util.distributed import average_gradients

WORK = {"fine-tuning": 1, "joint training": 6}  # passes
NONE, FLAT, DDP = "no exchange", "one flat reduction", "DistributedDataParallel"
BATCH, SIZE, ROUNDS = 4, 96, 5
PORT = "29517"


class Copies(nn.ModuleList):
    """A BatchNorm with a copy for each bit-width."""

    chosen = 0

    def forward(self, x):
        return self[self.chosen](x)


def backward_passes(network, resnet, batches, is_exchanged):
    """Add up the gradients of all passes; the last one exchanges them, where a DistributedDataParallel does."""
    resnet.zero_grad()
    for number, images in enumerate(batches):
        is_last = number == len(batches) - 1
        resnet.bn1.chosen = 0 if is_last else number
        apart = isinstance(network, DistributedDataParallel) and not (is_last and is_exchanged)
        with network.no_sync() if apart else contextlib.nullcontext():
            network(images).square().mean().backward()


def step(side, networks, resnet, batches):
    backward_passes(networks[side == DDP], resnet, batches, side != NONE)
    if side == FLAT:
        average_gradients(resnet.parameters())


def difference(resnet, wanted):
    gradients = [parameter.grad for parameter in resnet.parameters()]
    return max(((found - right).abs().max() / right.abs().max()).item()
               for found, right in zip(gradients, wanted, strict=True) if right is not None)


def measure(work, passes, rank):
    """One row for each side."""
    torch.manual_seed(0)
    resnet = torchvision.models.resnet50()
    resnet.bn1 = Copies(nn.BatchNorm2d(64) for _ in range(max(1, passes - 1)))
    ddp = DistributedDataParallel(resnet, broadcast_buffers=False, find_unused_parameters=passes > 1)
    torch.manual_seed(1 + rank)
    batches = torch.randn(passes, BATCH, 3, SIZE, SIZE)
    seconds, differences, wanted = {side: [] for side in (NONE, FLAT, DDP)}, {}, None
    for _ in range(1 + ROUNDS):
        for side, found in seconds.items():
            dist.barrier()
            found.append(timed(lambda side=side: step(side, (resnet, ddp), resnet, batches) or dist.barrier())[0])
            if side == FLAT:
                wanted = [parameter.grad.clone() for parameter in resnet.parameters()]
        differences[DDP] = difference(resnet, wanted)
    return [{"work": work, "side": side, "seconds": statistics.median(found[1:]),
             "over_flat": statistics.median(own / flat for own, flat in list(zip(found, seconds[FLAT], strict=True))[1:]),
             "largest_difference": differences.get(side, "")} for side, found in seconds.items()]


def rank_of_two(rank):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=PORT)
    torch.set_num_threads(1)
    keep_freed_memory()  # as in training
    dist.init_process_group("gloo", rank=rank, world_size=2)
    rows = [row for work, passes in WORK.items() for row in measure(work, passes, rank)]
    if rank == 0:
        show(Path(__file__).with_name("ranks.csv"), list(rows[0]), rows, 4)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(rank_of_two, nprocs=2)
