"""Loss, top-1 and top-5, summed where the data are and read once."""

import contextlib

import torch
import torch.nn.functional as F

from quan.utils import weights_quantized_once
from util.distributed import sum_over_ranks

from .interruption import watched


class Metrics:
    """Sums of loss and of correct predictions over batches; nothing is read from the device before result()."""

    def __init__(self, device):
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, logits, target, mean_loss):
        """Add a batch: logits [batch, classes], target [batch], and the batch's mean loss."""
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == target[:, None]
        self.sums += torch.stack([mean_loss.double() * len(target), ranked[:, 0].sum(), ranked.sum(),
                                  torch.tensor(len(target), device=logits.device)])

    def result(self):
        """Mean loss, top-1 and top-5 in percent over all ranks."""
        loss, top1, top5, images = sum_over_ranks(self.sums.clone()).tolist()
        return {"loss": loss / images, "top1": 100 * top1 / images, "top5": 100 * top5 / images}


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
