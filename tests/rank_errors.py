"""One process of a run that meets an error: python rank_errors.py KIND, started by a launcher.

KIND: alone (rank 1 meets it), alike (every rank meets the same one), loss (rank 1's loss is not finite), restart (rank 1 is
lost at the first start), machines (the same, and rank 0 does not notice).
"""

import os
import sys
import time
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "indicators_pretraining"))

import torch

from engine.loop import Training
from engine.metrics import Metrics
from util import distributed
from util.errors import UserError, user_errors_on_one_line


def fail(kind):
    rank = distributed.rank()
    if kind == "alike":
        raise UserError("file.yaml: all meet this")
    if kind == "alone" and rank == 1:
        raise UserError("image.png: only rank 1 meets this")
    if kind == "loss":
        metrics, training = Metrics(torch.device("cpu")), object.__new__(Training)
        training.model, training.steps, training.has_checkpoint = torch.nn.Linear(2, 2), 10, False
        training.device = torch.device("cpu")
        training.hooks = types.SimpleNamespace(epochs_before=0)
        training.config = types.SimpleNamespace(log=types.SimpleNamespace(print_freq=5))
        metrics.sums[0] = float("nan") if rank == 1 else 1.0
        training.check_finite(2, 4, {None: metrics})  # for which ranks do not wait for each other
        training.check_finite(2, 5, {None: metrics})
    if kind == "restart":
        starts = torch.distributed.distributed_c10d._get_default_store().add("starts", 1)
        distributed.barrier()
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os._exit(1)
        os.write(1, f"entry {starts} of this start\n".encode())  # in one piece: print writes the end of the line apart
    if kind == "machines":
        counted = distributed.gather_objects(int(os.environ["TORCHELASTIC_RESTART_COUNT"]))
        if counted == [0, 0]:
            if distributed.rank() == 1:
                os._exit(1)
            time.sleep(60)  # until its agent, which finds the other one waiting, ends it, and does not count that
        os.write(1, f"restarts {sorted(counted)}\n".encode())
    distributed.barrier()


with user_errors_on_one_line(), distributed.process_group("cpu"):
    fail(sys.argv[1])
