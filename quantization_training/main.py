"""Fine-tune a network at a policy's bits, train it in full precision (fp_model: true), or evaluate it (eval: true).

python main.py CONFIG.yaml [MORE.yaml ...] [dotted.key=value ...]
python -m torch.distributed.launch --nproc_per_node=N main.py CONFIG.yaml
"""

from util.errors import user_errors_on_one_line  # first, for Ctrl-C

# isort: split

from dataclasses import replace

import process
from engine.interruption import signals_noted
from engine.monitor import open_monitor
from engine.optim import create_optimizer
from engine.passes import prepare
from engine.resume import find_run, recorded_threads, restore
from engine.run_folder import RunFolder, announce_finished, is_finished
from engine.run_lock import alone_in
from gradual import create_pruning
from network import build_network, create_teacher
from packed_network import fit_packed, load_finetuned
from schema import FinetuneConfig
from util import distributed
from util.command import read_training_command
from util.data_loader import create_loaders, describe_data
from util.errors import is_first_process


def main(arguments=None):
    config, is_dry_run = read_training_command(__doc__, FinetuneConfig, arguments)
    with (distributed.process_group(config.training_device) as device,
          alone_in(RunFolder.of(config).path, reads_only=is_dry_run or config.eval)):
        distributed.set_seed(config.seed, config.dataloader.deterministic)
        run(config, device, is_dry_run)


def run(config, device, is_dry_run):
    folder = RunFolder.of(config)
    found = find_run(config, folder, load_finetuned)
    prepare(config, recorded_threads(found), device)
    num_classes, input_size = describe_data(config.dataloader)
    network = build_network(config, num_classes, input_size, found and found.content, device)
    config = network.config
    fit_packed(network.model, found.content if found else {})
    criterion = process.create_criterion(config, create_teacher(config, num_classes, device, input_size))
    optimizer = create_optimizer(network.model, config)
    start = restore(found, network.model, optimizer, config)
    network.pruned.hold(optimizer)
    pruning = create_pruning(network, config, found)
    if pruning is not None:
        network = replace(network, remark="\n".join(filter(None, [network.remark, pruning.remark])))
    loaders = create_loaders(config.dataloader, config.seed, distributed.rank(), distributed.world_size(), device,
                             distributed.barrier, is_first_process(), evaluation_only=config.eval)
    process.check_accumulation(loaders, config)
    if is_dry_run:
        process.dry_run(network, loaders, criterion, optimizer, config)
    elif config.eval:
        process.evaluate_only(network, loaders, config, found)
    elif is_finished(start.epoch, config, folder):
        announce_finished(folder, config)
    else:
        with signals_noted(), open_monitor(folder, config, start, device) as monitor:
            process.finetune(network, loaders, criterion, optimizer, config, monitor, folder, start, pruning)
            process.final_evaluation(network, loaders, config, monitor, folder)


if __name__ == "__main__":
    with user_errors_on_one_line():
        main()
