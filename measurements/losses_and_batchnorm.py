"""Which losses predict fine-tuning: those with the BatchNorm after a weight moved to the copy for its bits, held at the widest
copy, or held and re-estimated. From the folder indicators_pretraining: python ../measurements/losses_and_batchnorm.py FILE.csv

ResNet-20 on the digits at 8x8, trained jointly for 10 epochs. Then random policies of 2, 3 and 4 bits are fine-tuned for two
epochs. A row for each: in each way, the sum of the losses of its weights and inputs; its loss and top-1 on the test set.
"""

import copy
import csv
import sys

import numpy as np
import torch
from torch import nn

sys.path.insert(0, ".")
from engine.loop import training_step
from engine.metrics import Metrics, evaluate
from engine.schema import DataConfig
from network import build_network
from process import joint_step, random_policy
from quan.utils import BATCHNORM
from schema import IndicatorsConfig
from util.data_loader import create_loaders

BITS, CPU, POLICIES, EPOCHS, TUNED, LR = [6, 4, 3, 2], torch.device("cpu"), 20, 10, 2, 0.05
WAYS = ("moved", "held", "re-estimated")


def epochs_of(loader, optimizer, count, rate, step):
    """Call step(images, target, number) over some epochs with a cosine schedule."""
    for epoch in range(count):
        loader.set_epoch(epoch)
        for number, (images, target) in enumerate(loader):
            done = (epoch + number / len(loader)) / count
            optimizer.param_groups[0]["lr"] = rate * (1 + np.cos(np.pi * done)) / 2
            step(images, target, epoch * len(loader) + number)


def re_estimate(model, batches):
    for module in model.modules():
        if isinstance(module, BATCHNORM):
            module.reset_running_stats()
            module.momentum = None
            module.train()
    with torch.no_grad():
        for images, _ in batches:
            model(images)


def losses(model, switch, batches):
    """{way: {(kind, layer, bit): loss}}."""
    found, widest = {way: {} for way in WAYS}, max(BITS)
    for layer in switch.layers:
        for kind in ("weight", "act"):
            for bit in BITS[1:]:
                for way in WAYS:
                    changed = {**dict.fromkeys(switch.layers, widest), layer: bit}
                    switch.policy(changed) if way == "moved" and kind == "weight" else switch.uniform(widest)
                    switch.layers[layer].select(*((bit, widest) if kind == "weight" else (widest, bit)))
                    twin = copy.deepcopy(model).eval()
                    if way == "re-estimated":
                        re_estimate(twin, batches)
                    found[way][kind, layer, bit] = evaluate(twin, batches)["loss"]
    return found


def ranks_agree(one, other):
    """Spearman's rank correlation."""
    return float(np.corrcoef(*(np.argsort(np.argsort(values)) for values in (one, other)))[0, 1])


def main(path):
    torch.manual_seed(0)
    data = DataConfig("digits", 10, input_size=8, batch_size=64)
    config = IndicatorsConfig(arch="resnet20", target_bits=BITS, dataloader=data)
    network = build_network(config, 10, 8, None, CPU)
    loaders, model, switch = create_loaders(config.dataloader, 0, 0, 1, CPU), network.model.train(), network.switch
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
    epochs_of(loaders.train, optimizer, EPOCHS, LR, lambda images, target, step: joint_step(
        model, switch, images, target, nn.CrossEntropyLoss(), optimizer, random_policy(switch.layers, BITS, 0, 0, step),
        passes=network.passes))
    measured, rows = losses(model, switch, list(loaders.calibration(256))), []
    for number in range(POLICIES):
        weights, acts = (random_policy(switch.layers, BITS[1:], 1 + kind, 0, number) for kind in range(2))
        tuned = copy.deepcopy((model, switch))
        tuned[1].policy(weights, acts)
        optimizer = torch.optim.SGD(tuned[0].train().parameters(), LR / 5, momentum=0.9)
        epochs_of(loaders.train, optimizer, TUNED, LR / 5, lambda images, target, _, tuned=tuned, optimizer=optimizer:
                  training_step(tuned[0], [(images, target)], lambda logits, _, labels: nn.functional.cross_entropy(
                      logits, labels), optimizer, Metrics(CPU)))
        sums = [sum(measured[way][kind, layer, bit] for kind, bits in (("weight", weights), ("act", acts))
                    for layer, bit in bits.items()) for way in WAYS]
        reached = evaluate(tuned[0], loaders.test)
        rows.append([number, *sums, reached["loss"], reached["top1"]])
        print(*rows[-1], flush=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["policy", *WAYS, "loss", "top1"], *rows])
    columns = list(zip(*rows, strict=True))
    for way, sums in zip(WAYS, columns[1:4], strict=True):
        print(f"{way}: rank correlation with the fine-tuned loss {ranks_agree(sums, columns[4]):.2f}")


if __name__ == "__main__":
    main(sys.argv[1])
