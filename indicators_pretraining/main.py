"""Pre-train the importance indicators of a network.

python main.py CONFIG.yaml [MORE.yaml ...] [dotted.key=value ...]
python -m torch.distributed.launch --nproc_per_node=N main.py CONFIG.yaml
"""

from util.errors import user_errors_on_one_line  # first, for Ctrl-C

# isort: split

import process
from engine.interruption import signals_noted
from engine.monitor import open_monitor
from engine.optim import create_optimizer
from engine.passes import prepare
from engine.resume import find_run, recorded_threads, restore
from engine.run_folder import RunFolder, announce_finished, is_finished
from engine.run_lock import alone_in
from network import build_network, load_joint
from schema import IndicatorsConfig
from util import distributed
from util.command import read_training_command
from util.data_loader import create_loaders, describe_data
from util.errors import is_first_process


def main(arguments=None):
    config, is_dry_run = read_training_command(__doc__, IndicatorsConfig, arguments)
    with (distributed.process_group(config.training_device) as device,
          alone_in(RunFolder.of(config).path, reads_only=is_dry_run or config.eval)):
        distributed.set_seed(config.seed, config.dataloader.deterministic)
        run(config, device, is_dry_run)


def run(config, device, is_dry_run):
    folder = RunFolder.of(config)
    found = find_run(config, folder, load_joint)
    prepare(config, recorded_threads(found), device)
    num_classes, input_size = describe_data(config.dataloader)
    network = build_network(config, num_classes, input_size, found, device)
    config = network.config
    optimizer = create_optimizer(network.model, config)
    start = restore(found, network.model, optimizer, config, harmless=("prune.",))
    network.pruned.hold(optimizer)
    loaders = create_loaders(config.dataloader, config.seed, distributed.rank(), distributed.world_size(), device,
                             distributed.barrier, is_first_process(), evaluation_only=config.eval)
    if is_dry_run:
        process.dry_run(network, loaders, optimizer, config)
    elif config.eval:
        process.evaluate_only(network, loaders, found)
    elif is_finished(start.epoch, config, folder):
        announce_finished(folder, config)
    else:
        with signals_noted(), open_monitor(folder, config, start, device) as monitor:
            process.pretrain(network, loaders, optimizer, config, monitor, folder, start, found)
            process.final_evaluation(network, loaders, config, monitor, folder)


if __name__ == "__main__":
    with user_errors_on_one_line():
        main()
