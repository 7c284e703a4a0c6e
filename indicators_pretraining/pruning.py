"""Prune a network by magnitude, level by level, rewinding to an early state.

python pruning.py CONFIG.yaml [MORE.yaml ...] [dotted.key=value ...]
python -m torch.distributed.launch --nproc_per_node=N pruning.py CONFIG.yaml
"""

from util.errors import user_errors_on_one_line  # first, for Ctrl-C

# isort: split

from dataclasses import replace

import rewinding
from engine.interruption import signals_noted
from engine.monitor import log_start, open_monitor
from engine.optim import create_optimizer
from engine.passes import prepare
from engine.resume import recorded_threads, restore
from engine.run_lock import alone_in
from level_schedule import LevelSchedule
from model.training_pass import check_training
from network import build_dense
from rewinding import Pruning, PruningFolder
from schema import PruningConfig
from util import distributed
from util.command import read_training_command
from util.config import describe_idle
from util.data_loader import create_loaders, describe_data
from util.errors import is_first_process


def main(arguments=None):
    config, is_dry_run = read_training_command(__doc__, PruningConfig, arguments)
    config = config.for_levels()
    with (distributed.process_group(config.training_device) as device,
          alone_in(PruningFolder.of(config).path, reads_only=is_dry_run)):
        distributed.set_seed(config.seed, config.dataloader.deterministic)
        run(config, device, is_dry_run)


def run(config, device, is_dry_run):
    folder = PruningFolder.of(config)
    found = folder.find(config)
    prepare(config, recorded_threads(found), device)
    num_classes, input_size = describe_data(config.dataloader)
    network = build_dense(config, num_classes, input_size, found, device)
    remark = check_training(network.model, network.graph, input_size, num_classes)
    optimizer = create_optimizer(network.model, config)
    start = restore(found, network.model, optimizer, config, rewinding.harmless(found, config),
                    schedule_may_change=False)
    network.pruned.hold(optimizer)
    schedule = LevelSchedule(network, config.prune)
    schedule.check(rewinding.level_of(found), network.pruned.masks)
    loaders = create_loaders(config.dataloader, config.seed, distributed.rank(), distributed.world_size(), device,
                             distributed.barrier, is_first_process())
    if is_dry_run:
        rewinding.dry_run(network, schedule, loaders, optimizer, config, rewinding.level_of(found))
    elif rewinding.is_finished(found, schedule, config, folder):
        rewinding.announce_finished(folder)
    else:
        completed = rewinding.epochs_before(rewinding.level_of(found), config) + start.epoch
        numbered = replace(start, epoch=completed)
        with signals_noted(), open_monitor(folder, config, numbered, device) as monitor:
            log_start(monitor, numbered, "\n".join(filter(None, [describe_idle(config), schedule.remark, remark])))
            Pruning(network, schedule, loaders, optimizer, config, monitor, folder).run(found, start)


if __name__ == "__main__":
    with user_errors_on_one_line():
        main()
