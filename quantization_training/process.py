"""Fine-tuning at a policy's bits: training, BatchNorm calibration, validation, the final evaluation."""

import torch
import torch.nn.functional as F

from engine.loop import Hooks, Training, grouped, training_step
from engine.metrics import Metrics, calibrate_batchnorm, describe_accuracy, evaluate, evaluate_best, has_batchnorm
from engine.monitor import log_start
from engine.run_folder import describe_evaluated
from integer_network import computed
from util import distributed
from util.errors import UserError

ALWAYS_VALIDATED = 15  # the last epochs, each of which is validated


def create_criterion(config, teacher=None):
    """Loss of (logits, images, target): label-smoothed cross-entropy, mixed with distillation where there is a teacher.

    With weight w and temperature T: (1 - w) * CE + w * T^2 * KL(teacher / T, student / T) (arXiv 1503.02531).
    """
    weight, temperature = config.distillation.weight, config.distillation.temperature

    def criterion(logits, images, target):
        loss = F.cross_entropy(logits, target, label_smoothing=config.smoothing)
        if teacher is None:
            return loss
        with torch.no_grad():
            wanted = F.log_softmax(teacher(images) / temperature, dim=1)
        student = F.log_softmax(logits / temperature, dim=1)
        distance = F.kl_div(student, wanted, reduction="batchmean", log_target=True)
        return (1 - weight) * loss + weight * temperature**2 * distance

    return criterion


def calibration_loader(loaders, config, epoch):
    """The training images that the BatchNorm statistics are re-estimated on after an epoch (the first is 0)."""
    calibration = loaders.calibration(max(config.calibration_images, distributed.world_size()))
    calibration.set_epoch(epoch)
    return calibration


def check_accumulation(loaders, config):
    if not config.eval and len(loaders.train) < config.accumulation:
        raise UserError(f"accumulation: found {config.accumulation}, an epoch has {len(loaders.train)} batches only")


def is_validated(epoch, config):
    """Whether the epoch (the first is 0) ends with a validation."""
    return epoch == 0 or (epoch + 1) % config.val_cycle == 0 or epoch >= config.last_epoch - ALWAYS_VALIDATED


def finetune(network, loaders, criterion, optimizer, config, monitor, folder, start, pruning=None):
    """Train a PolicyNetwork to the last epoch, calibrating and validating where due; write a checkpoint after each epoch.

    Args:
        start: the ResumeState of this run.
        pruning: a GradualPruning, or None; no epoch is the best one before its target is reached.
    """
    model, steps = network.model, len(loaders.train) // config.accumulation
    log_start(monitor, start, network.remark)
    network.passes.log_to(monitor.log)

    def take_step(batches, epoch, step, metrics):
        training_step(model, batches, criterion, optimizer, metrics[None], network.passes)
        if pruning is not None:
            pruning.after_step(epoch, step, steps)

    def validate_where_due(epoch):
        scores = validate(model, loaders, config, epoch, monitor) if is_validated(epoch, config) else None
        return scores if pruning is None or epoch + 1 >= pruning.end else None

    def write(state, is_best):
        distributed.on_main(folder.save, {**state, **network.metadata, "masks": network.pruned.masks}, is_best,
                            config.log.keep_checkpoints)

    hooks = Hooks(take_step, validate_where_due, write, batches_per_step=config.accumulation)
    Training(model, optimizer, loaders.train, config, monitor, hooks).run(start, config.last_epoch)


def validate(model, loaders, config, epoch, monitor):
    """Calibrate a quantized network, validate it and log it; return top-1 and top-5."""
    if config.calibration_images and not config.fp_model:
        calibrate_batchnorm(model, calibration_loader(loaders, config, epoch))
    figures = evaluate(model, loaders.val)
    monitor.epoch(epoch + 1, "val", figures)
    monitor.scores(epoch + 1, figures["top1"], figures["top5"])
    return figures["top1"], figures["top5"]


def final_evaluation(network, loaders, config, monitor, folder):
    """Evaluate the last epoch's network and the best checkpoint's on the test set, unless final_test is off; log them with
    what the network costs; write summary.yaml."""
    figures, best, which = {}, {}, "final model"
    if config.final_test:
        figures = evaluate(network.model, loaders.test)
        monitor.epoch(config.last_epoch, "test", figures)
        found = evaluate_best(network.model, folder, config.last_epoch, lambda: evaluate(network.model, loaders.test), figures,
                              monitor)
        which += f" (epoch {config.last_epoch}{', the best on validation' if found and found[0] == config.last_epoch else ''})"
        if found:
            best = {"best": {"epoch": found[0], **found[1]}}
            if found[0] != config.last_epoch:
                monitor.log(f"best on validation (epoch {found[0]}) on the test set: {describe_accuracy(found[1])}")
    monitor.log(f"{which}{' on the test set' if figures else ''}: {report(figures, network.cost)}")
    if distributed.is_main():
        folder.summarise({"name": config.name, "arch": config.arch, "epochs": config.last_epoch, **figures, **network.cost,
                          **best})


def report(figures, cost):
    """Accuracy, where there are figures of it, size and BitOPs on one line."""
    return "  ".join(([describe_accuracy(figures)] if figures else []) + [describe_cost(cost, "  ")])


def describe_cost(cost, separator):
    """Size and BitOPs; of a pruned network its sparsity, sparse size and effective BitOPs too."""
    parts = [f"size {cost['size_mb']:.4f} MB ({cost['ratio']:.2f}x smaller than 32 bits)",
             f"BitOPs {cost['gbitops']:.3f} G ({cost['gbitops_exact']:.3f} G by exact output sizes)"]
    if "sparsity" in cost:
        parts += [f"{100 * cost['sparsity']:.2f} % sparse",
                  f"sparse size {cost['sparse_size_mb']:.4f} MB ({cost['sparse_ratio']:.2f}x total compression)",
                  f"effective BitOPs {cost['gbitops_effective']:.3f} G ({cost['gbitops_effective_exact']:.3f} G by exact "
                  "output sizes)"]
    return separator.join(parts)


def evaluate_only(network, loaders, config, found):
    """Print what a checkpoint reaches on the test set, with BatchNorm as it was saved or, with eval_calibration, as LIMPQ
    evaluates: re-estimated on training images before. The images are those of the validation of that epoch, so that this
    changes nothing of a network that was validated with as many. A packed file is computed as config.arithmetic says."""
    if config.arithmetic == "integer" and "packed" not in found.content:
        raise UserError(f"arithmetic: found integer, which takes a packed file; {found.path} is none, export.py writes one")
    model, batchnorm = network.model, "BatchNorm as saved" if has_batchnorm(network.model) else "no BatchNorm"
    if config.eval_calibration:
        if "packed" in found.content and found.content["packed"].header["folded"]:
            raise UserError(f"eval_calibration: the BatchNorms of {found.path} are folded into its weights; leave it false, "
                            "or name the checkpoint, or a file that was packed without --fold-bn")
        calibration = calibration_loader(loaders, config, max(found.content.get("epoch", 0) - 1, 0))
        calibrate_batchnorm(model, calibration)
        if has_batchnorm(model):
            batchnorm = f"BatchNorm re-estimated on {calibration.images:,} training images"
    which = describe_evaluated(found.path, found.content)
    if "packed" in found.content:
        model, how = computed(network, config.arithmetic, found.path)
        which += f", {how}"
    figures = evaluate(model, loaders.test)
    if distributed.is_main():
        print(f"{which}\n{found.path} ({batchnorm}): {report(figures, network.cost)}")


def dry_run(network, loaders, criterion, optimizer, config):
    """Compute one step and report sizes; nothing is written."""
    network.model.train()
    metrics = Metrics(next(network.model.parameters()).device)
    batches = next(grouped(loaders.train, config.accumulation))
    training_step(network.model, batches, criterion, optimizer, metrics, network.passes)
    cost, parameters = network.cost, sum(p.numel() for p in network.model.parameters())
    if distributed.is_main():
        print(f"{config.arch}: {len(network.metadata.get('weight_bits', {}))} searched layers, {parameters / 1e6:.3f} M "
              f"parameters; {describe_cost(cost, ', ')}\n"
              f"{loaders.train.images} training images in {len(loaders.train)} batches of {list(batches[0][0].shape)}, "
              f"{loaders.val.images} validation and {loaders.test.images} test images\n"
              f"loss of the first step: {metrics.result()['loss']:.4f}\n"
              f"{network.remark + chr(10) if network.remark else ''}dry run: nothing was written")
