"""Loss, top-1 and top-5, summed where the data are and read once; and BatchNorm statistics for them."""

import contextlib
import os

import torch
import torch.nn.functional as F

from model.weights import load_state
from quan.utils import BATCHNORM, weights_quantized_once
from util import distributed
from util.errors import UserError

from .checkpoint import load_checkpoint
from .interruption import put_off, watched


class Metrics:
    """Sums of loss and of correct predictions over batches; nothing is read from the device before result()."""

    def __init__(self, device):
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, logits, target, mean_loss):
        """Add a batch: logits [batch, classes], target [batch], and the batch's mean loss."""
        # Filled on the device: a number that is copied there would wait for all that is computed before.
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == target[:, None]
        self.sums += torch.stack([mean_loss.double() * len(target), ranked[:, 0].sum(), ranked.sum(),
                                  torch.full((), len(target), device=logits.device)])

    def result(self):
        """Mean loss, top-1 and top-5 in percent over all ranks."""
        loss, top1, top5, images = distributed.sum_over_ranks(self.sums.clone()).tolist()
        return {"loss": loss / images, "top1": 100 * top1 / images, "top5": 100 * top5 / images}


def describe_accuracy(figures):
    return "loss {loss:.4f}  top-1 {top1:.3f}  top-5 {top5:.3f}".format(**figures)


@contextlib.contextmanager
def evaluation_mode(model):
    """Evaluation mode for every module; afterwards each is put back into the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def evaluate(model, loader):
    """Cross-entropy loss, top-1 and top-5 (percent) of a model over a loader and all ranks."""
    metrics = Metrics(next(model.parameters()).device)
    with evaluation_mode(model), weights_quantized_once(model):
        for images, target in watched(loader):
            logits = model(images)
            metrics.update(logits, target, F.cross_entropy(logits, target))
    return metrics.result()


def evaluate_best(model, folder, last_epoch, evaluate_model, figures, monitor):
    """(epoch, figures) of the best checkpoint; None where no epoch counted as the best, or it cannot be read, which is logged.

    evaluate_model gives the figures of the model as it is; `figures` are those of the last epoch, which are taken where it is
    the best one. The model is left as it was.
    """
    try:
        content = distributed.on_main(load_checkpoint, folder.best) if distributed.on_main(os.path.exists, folder.best) else {}
        if content.get("epoch", last_epoch) == last_epoch:
            return (last_epoch, figures) if content else None
        own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        load_state(model, content["state_dict"], folder.best)
    except UserError as error:  # no reason to lose the results of the last epoch
        monitor.log(f"the best checkpoint is not evaluated: {error}")
        return None
    try:
        with put_off():
            return content["epoch"], evaluate_model()
    finally:
        model.load_state_dict(own)


@contextlib.contextmanager
def batchnorms_in_training(model, momentum):
    """Evaluation mode, but for BatchNorms, which are yielded: they normalize with each batch's statistics, and take these into
    their own by this momentum. Modes and momenta are put back."""
    batchnorms = [module for module in model.modules() if isinstance(module, BATCHNORM) and module.track_running_stats]
    momenta = [module.momentum for module in batchnorms]
    with evaluation_mode(model):
        try:
            for module in batchnorms:
                module.train()
                module.momentum = momentum
            yield batchnorms
        finally:
            for module, before in zip(batchnorms, momenta, strict=True):
                module.momentum = before


@contextlib.contextmanager
def batchnorms_estimating_anew(model):
    """BatchNorms in training mode, averaging all batches with equal weight from zero; mode and momentum are put back, and
    after an error or a signal the statistics too."""
    with batchnorms_in_training(model, momentum=None) as batchnorms:
        before = [{name: buffer.clone() for name, buffer in module.named_buffers()} for module in batchnorms]
        try:
            for module in batchnorms:
                module.reset_running_stats()
            yield
        except BaseException:
            for module, buffers in zip(batchnorms, before, strict=True):
                module.load_state_dict(buffers, strict=False)
            raise


def has_batchnorm(model):
    return any(isinstance(module, BATCHNORM) for module in model.modules())


@torch.no_grad()
def calibrate_batchnorm(model, loader):
    """Re-estimate the BatchNorm statistics of a quantized network, where it has any, on a loader's images and over ranks."""
    if not has_batchnorm(model):
        return
    with batchnorms_estimating_anew(model), weights_quantized_once(model):
        for images, _ in watched(loader):
            model(images)
    distributed.average_batchnorm_statistics(model)
