"""Iterative magnitude pruning with rewinding, level by level (Frankle & Carbin, arXiv 1803.03635 and 1912.05671).

Level 0 trains the dense network and keeps its state after `rewind_epoch` epochs on disk. Each further level removes the
smallest of the weights that are left, loads that early state back, and trains what remains to the end.
"""

import os
import re

import torch.nn.functional as F

import pruning_report
from engine.checkpoint import load_checkpoint, masks_of, save_checkpoint
from engine.loop import Hooks, Training, training_step
from engine.metrics import Metrics, evaluate
from engine.resume import ResumeCheckpoint, check_arch, check_continues
from engine.run_folder import RunFolder
from engine.training_state import ResumeState, load_training_state, training_state
from model.weights import load_state
from util import distributed
from util.config import describe_idle, flatten
from util.errors import UserError

LEVEL_FILE = re.compile(r"level_(\d+)_checkpoint\.pth\.tar")
HARMLESS = ("quan.", "target_bits", "in_place_distillation", "random_pass", "weight_bits", "act_bits",
            "prune.levels", "prune.target_sparsity")  # what no level's training depends on
HARMLESS_WHILE_DENSE = ("prune.method", "prune.type", "prune.scope", "prune.amount", "prune.excepts")


class PruningFolder(RunFolder):
    """`<output_dir>/<name>_pruning/`: a checkpoint for each level, and the early state that all of them go back to."""

    def level(self, number):
        return os.path.join(self.path, f"level_{number}_checkpoint.pth.tar")

    @property
    def rewind(self):
        return os.path.join(self.path, "rewind_checkpoint.pth.tar")

    def newest_level(self):
        """The number of the newest level that left a checkpoint, or None."""
        names = os.listdir(self.path) if os.path.isdir(self.path) else []
        numbers = {int(match[1]) for name in names if (match := LEVEL_FILE.fullmatch(name))}
        for number in range(max(numbers, default=-1)):
            if number not in numbers:
                raise UserError(f"{self.level(number)}: is missing, but later levels are there; put it back, or remove the "
                                "folder to start anew")
        return max(numbers, default=None)

    def find(self, config):
        """The ResumeCheckpoint of the newest level, or None where the run starts afresh."""
        number = distributed.on_main(self.newest_level)
        return None if number is None else self.load(number, config)

    def load(self, number, config):
        """The ResumeCheckpoint of a level."""
        path = self.level(number)
        content = distributed.on_main(load_checkpoint, path)
        check_arch(content, config.arch, path)
        if content.get("level") != number:
            raise UserError(f"{path}: is not the checkpoint of level {number}")
        return ResumeCheckpoint(path, content, lean=False)


def harmless(found, config):
    """Which keys of the configuration may differ from those that the newest level was trained with."""
    level = level_of(found)
    if level == 0:
        return HARMLESS + HARMLESS_WHILE_DENSE
    if config.prune.method == "one_shot":  # all in one level: another target is another run
        return tuple(key for key in HARMLESS if not key.startswith("prune."))
    amounts = flatten(found.content.get("config", {})).get("prune.amount"), config.prune.amount
    trained, wanted = (amount[:level] if isinstance(amount, list) else [amount] * level for amount in amounts)
    return HARMLESS + (("prune.amount",) if trained == wanted else ())


def level_of(found):
    return found.content["level"] if found else 0


def epochs_before(level, config):
    """What is added to the epochs of a level to number those of the whole run: a level begins at rewind_epoch."""
    return level * (config.last_epoch - config.prune.rewind_epoch)


def is_finished(found, schedule, config, folder):
    """Whether the last level is trained and the results are written."""
    return (found is not None and found.content["epoch"] >= config.last_epoch
            and schedule.is_last(level_of(found), schedule.pruned.masks)
            and distributed.on_main(pruning_report.is_complete, folder.path, schedule.graph, level_of(found)))


def announce_finished(folder):
    distributed.on_main(print, f"{folder.path}: this run is finished; give more levels or a higher target_sparsity to go on, "
                               "or another name to start anew")


class Pruning:
    """A run of all levels, of a DenseNetwork with its LevelSchedule in a PruningFolder; config is made for levels."""

    def __init__(self, network, schedule, loaders, optimizer, config, monitor, folder):
        self.model, self.graph, self.pruned = network.model, network.graph, network.pruned
        self.schedule, self.loaders, self.optimizer, self.config = schedule, loaders, optimizer, config
        self.monitor, self.folder, self.passes = monitor, folder, network.passes
        self.rows = []
        network.passes.log_to(monitor.log)

    def run(self, found, start):
        """Train every level that is not finished, from the newest ResumeCheckpoint (or None), which is loaded already."""
        level = level_of(found)
        self.find_rows(found)
        if self.graph.contiguous:
            self.monitor.log(self.graph.describe_layout())
        while True:
            self.train(level, start)
            self.report(level)
            if self.schedule.is_last(level, self.pruned.masks):
                break
            level += 1
            start = self.begin(level, distributed.on_main(self.schedule.masks_for, level, self.pruned.masks))
        distributed.on_main(pruning_report.summarise, self.folder, self.config, self.rows)

    def begin(self, level, masks):
        """Load the early state back, unless the method goes on without, and apply the new masks; return the ResumeState."""
        if self.config.prune.method != "iterative":
            self.rewind()
        self.pruned.set(masks)
        self.pruned.apply()
        self.monitor.log(f"level {level}: {self.schedule.describe(masks)}")
        empty = [name for name in self.schedule.layers if not masks[f"{name}.weight"].any()]
        if empty:
            self.monitor.log(f"no weight is left in {', '.join(empty)}")
        return ResumeState(self.config.prune.rewind_epoch)

    def rewind(self):
        """Load weights, BatchNorm, optimizer and random states as they were after rewind_epoch epochs."""
        path, epoch = self.folder.rewind, self.config.prune.rewind_epoch
        content = distributed.on_main(load_checkpoint, path)
        if content.get("epoch") != epoch:
            raise UserError(f"{path}: holds the state after epoch {content.get('epoch')}, not {epoch}")
        check_arch(content, self.config.arch, path)
        check_continues(content, self.config, path, HARMLESS + HARMLESS_WHILE_DENSE)
        load_training_state(content, self.model, self.optimizer, path)

    def train(self, level, start):
        """Train a level to its last epoch, with a checkpoint after each; a finished one is left as it is."""
        rewind_epoch, criterion = self.config.prune.rewind_epoch, full_precision_criterion(self.config)

        def take_step(batches, epoch, step, metrics):
            training_step(self.model, batches, criterion, self.optimizer, metrics[None], self.passes)

        def write(state, is_best):
            if level == 0 and state["epoch"] == rewind_epoch and "inside" not in state:
                self.write(self.folder.rewind, state, level)
            self.write(self.folder.level(level), state, level)

        if level == start.epoch == rewind_epoch == 0 and start.inside is None:
            initial = training_state(self.model, self.optimizer, 0, start.best, self.config, self.monitor)
            self.write(self.folder.rewind, initial, level)
        hooks = Hooks(take_step, lambda epoch: self.validate(level, epoch), write,
                      epochs_before=epochs_before(level, self.config))
        training = Training(self.model, self.optimizer, self.loaders.train, self.config, self.monitor, hooks)
        training.run(start, self.config.last_epoch)

    def validate(self, level, epoch):
        """Validate where it is due and log it; return top-1 and top-5, or None."""
        if (epoch + 1) % self.config.val_cycle and epoch + 1 < self.config.last_epoch:
            return None
        figures, number = evaluate(self.model, self.loaders.val), epochs_before(level, self.config) + epoch + 1
        self.monitor.epoch(number, "val", figures)
        self.monitor.scores(number, figures["top1"], figures["top5"])
        return figures["top1"], figures["top5"]

    def write(self, path, state, level):
        distributed.on_main(save_checkpoint, path, {**state, "level": level, "masks": self.pruned.masks})

    def report(self, level):
        """Evaluate a finished level on the test set and write it into the report, unless it stands there."""
        if any(row["level"] == level for row in self.rows):
            return
        figures = evaluate(self.model, self.loaders.test)
        number = epochs_before(level, self.config) + self.config.last_epoch
        self.monitor.epoch(number, "test", figures)
        masks = self.pruned.masks
        self.rows.append(pruning_report.make_row(level, figures, self.graph, masks, self.schedule.share_removed(masks)))
        self.monitor.send("pruning", self.rows[-1])
        distributed.on_main(pruning_report.write, self.folder.path, self.config.name, self.rows)

    def find_rows(self, found):
        """Read the report of the levels that are finished; one that is missing there is evaluated again."""
        newest = level_of(found)
        known = distributed.on_main(pruning_report.read, self.folder.path, self.graph)
        for level in range(newest):
            if level in known:
                self.rows.append(known[level])
                continue
            earlier = self.folder.load(level, self.config)
            load_state(self.model, earlier.content["state_dict"], earlier.path)
            self.pruned.set(masks_of(earlier.content, self.model, earlier.path))
            self.report(level)
        if not known.keys() >= set(range(newest)):  # put back what was loaded over
            load_training_state(found.content, self.model, self.optimizer, found.path)
            self.pruned.set(masks_of(found.content, self.model, found.path))
        if newest in known and found and found.content["epoch"] >= self.config.last_epoch:
            self.rows.append(known[newest])


def full_precision_criterion(config):
    """Label-smoothed cross-entropy of (logits, images, target)."""
    return lambda logits, images, target: F.cross_entropy(logits, target, label_smoothing=config.smoothing)


def dry_run(network, schedule, loaders, optimizer, config, level):
    """Compute one step and report sizes and the levels after `level`; nothing is written."""
    network.model.train()
    metrics, batches = Metrics(next(network.model.parameters()).device), [next(iter(loaders.train))]
    training_step(network.model, batches, full_precision_criterion(config), optimizer, metrics, network.passes)
    loss, (total, left) = metrics.result()["loss"], schedule.count(network.pruned.masks)
    epochs, ahead = config.last_epoch, schedule.forecast(level, network.pruned.masks)
    report = [f"{config.arch}: {left:,} of {total:,} {schedule.unit} left to prune in {len(schedule.layers)} of "
              f"{len(network.graph.layers)} layers; {epochs} epochs per level, {epochs - config.prune.rewind_epoch} of them "
              "after rewinding",
              *(f"level {number}: {removed:,} removed ({100 * removed / total:.2f} %)" for number, removed in ahead),
              f"{loaders.train.images} training images in {len(loaders.train)} batches of {list(batches[0][0].shape)}, "
              f"{loaders.val.images} validation images", f"loss of the first step: {loss:.4f}",
              *filter(None, [schedule.remark])]
    distributed.on_main(print, "\n".join([*report, *filter(None, [describe_idle(config)]), "dry run: nothing was written"]))
