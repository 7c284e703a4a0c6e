"""What a jointly trained network shows when a single weight or input has fewer bits, measured on training images.

"loss" and "kl" quantize one weight, or one input, at a time to b bits, everything else staying at the highest bit-width.
"noise" and "fisher" need no such passes; everything is at the highest bit-width. With v a weight or an input and
D = Q_b(v) - v, at the learned step size,

    loss    mean cross-entropy, with the BatchNorms at the highest bit-width
    kl      mean KL divergence of the outputs from those with everything at the highest bit-width, in nats, with the statistics
            of the images for those of the BatchNorms, which fine-tuning would adapt, too
    noise   |D|^2 / |v|^2
    fisher  mean over images of (h . D)^2 / 2, h the gradient of one image's cross-entropy for a label drawn from the network's
            own output: the second-order change of the KL divergence, with the Fisher information for the Hessian. Gradients
            with drawn labels have mean zero, so for weights the square of the sum over a batch stands for the sum of squares.
"""

import contextlib
import functools
import sys

import torch
import torch.nn.functional as F
from tqdm import tqdm

from engine.metrics import batchnorms_in_training, evaluation_mode
from engine.resume import find_run, restore
from engine.run_folder import RunFolder
from indicators import CARRIED, trained
from network import build_network, load_joint
from quan.func import KINDS
from quan.quantizer.lsq import quantized
from quan.utils import weights_quantized_once
from replay import MEMORY, Replay
from util.data_loader import create_loaders, describe_data
from util.errors import UserError

TINY = torch.finfo(torch.float64).tiny
ONE_IMAGE = "--images: found 1 image; kl takes the statistics of BatchNorms from the images, so give more"
COMPARING = ("kl", "loss")
FISHER_BATCH = 8  # images whose gradients for a weight are squared together


def measure(config, of, images, device):
    """The content of an indicators file.

    Args:
        config: the IndicatorsConfig of the joint training, for evaluation.
        of: "loss", "kl", "noise" or "fisher".
        images: how many training images are looked at, without augmentation; all, where there are fewer.
        device: where the network computes.
    """
    if of in COMPARING and len(config.target_bits) == 1:
        raise UserError(f"--of: {of} compares bit-widths with the highest, but target_bits is {config.target_bits}; take "
                        "fisher or noise")
    found, network, batches, images = load_trained(config, of, images, device)
    model, switch = network.model, network.switch
    with evaluation_mode(model):
        tables = MEASURES[of](model, switch, batches, **({"seed": config.seed} if of == "fisher" else {}))
    metadata = {**network.metadata, "arch": config.arch}
    made = trained(found.content["config"]) if found.content.get("config") else {}
    return {**tables, "layer_name": list(switch.layers), **{key: metadata[key] for key in CARRIED},
            "trained": {**made, "images": images}, "kind": of}


def load_trained(config, what, images, device):
    """(ResumeCheckpoint, JointNetwork, batches, number of images) of a joint training, for evaluation on training images; what
    is measured is printed."""
    found = find_run(config, RunFolder.of(config), load_joint)
    num_classes, input_size = describe_data(config.dataloader)
    network = build_network(config, num_classes, input_size, found, device)
    restore(found, network.model, None, network.config)
    loader = create_loaders(config.dataloader, config.seed, 0, 1, device, evaluation_only=True).calibration(images)
    print("\n".join(filter(None, [network.remark, f"{found.path}: {what} over {loader.images} training images"])))
    return found, network, list(loader), loader.images


def cross_entropy(logits, best, target):
    """Sum over images of the loss."""
    return F.cross_entropy(logits, target, reduction="sum").double()


def kl_divergences(logits, best):
    """KL(softmax(best) || softmax(logits)) of each image, float64 [batch], at least 0."""
    wanted, found = (F.log_softmax(each.double(), 1) for each in (best, logits))
    return (wanted.exp() * (wanted - found)).sum(1).clamp(min=0)


def kl_divergence(logits, best, target):
    """Their sum."""
    return kl_divergences(logits, best).sum()


def divergence_one_at_a_time(model, switch, batches):
    """KL divergences with BatchNorms that normalize with the statistics of as many images as fit; as one_at_a_time."""
    images, target = (torch.cat(parts) for parts in zip(*batches, strict=True))
    if len(images) == 1:
        raise UserError(ONE_IMAGE)
    with batchnorms_in_training(model, momentum=0.0):  # their own statistics stay
        return one_at_a_time(model, switch, [(images, target)], kl_divergence)


@torch.no_grad()
def one_at_a_time(model, switch, batches, score):
    """What one layer at fewer bits does to the output.

    Args:
        model: the jointly trained network, in evaluation mode.
        switch: its BitSwitch.
        batches: [(images [batch, 3, height, width], target [batch])].
        score: of (logits, logits with everything at the highest bit-width, target), summed over images.

    Returns:
        {"weight": {layer: {bit: mean score}}, "act": the same}.

    Raises:
        UserError: naming the layer, where a score is not finite.
    """
    highest = max(switch.bits)
    switch.uniform(highest)
    changes = [(kind, name, bit) for name in switch.layers for kind in KINDS for bit in switch.bits if bit != highest]
    totals, best, count = dict.fromkeys(changes, 0), 0, sum(len(target) for _, target in batches)
    with weights_quantized_once(model), progress(len(changes) * count) as bar:
        for images, target in split(model, batches):
            replay = Replay(model, images)
            if not replay.output.isfinite().all():
                raise UserError("the outputs at the highest bit-width are not finite")
            best += score(replay.output, replay.output, target)
            for kind, name, bit in changes:
                switch.layers[name].select(*((bit, highest) if kind == "weight" else (highest, bit)))
                totals[kind, name, bit] += score(replay.output_after_change(name), replay.output, target)
                switch.layers[name].select(highest)
                bar.update(len(target))
    for (kind, name, bit), total in totals.items():
        if not torch.isfinite(total):
            raise UserError(f"{name}: with its {kind} at {bit} bits the outputs are not finite")
    means = {change: float(total) / count for change, total in totals.items()}
    return {kind: {name: {bit: means.get((kind, name, bit), float(best) / count) for bit in switch.bits}
                   for name in switch.layers} for kind in KINDS}


def split(model, batches):
    """The batches in nearly equal pieces, so small that the outputs of all layers fit into MEMORY, but of two images at
    least."""
    images, _ = batches[0]
    most = max(2, int(MEMORY / Replay(model, images[:2]).bytes_per_image))
    for images, target in batches:
        pieces = min(-(-len(images) // most), max(len(images) // 2, 1))
        yield from zip(images.tensor_split(pieces), target.tensor_split(pieces), strict=True)


def progress(total):
    """A progress bar over images on stderr, where that is a terminal."""
    return tqdm(total=total, unit=" images", unit_scale=True, leave=False, file=sys.stderr, disable=not sys.stderr.isatty())


@torch.no_grad()
def noise(model, switch, batches):
    """Noise-to-signal ratio of every weight and input; arguments and result as of one_at_a_time."""
    squares, signals = {}, {}

    def add(kind, name, v, out):
        signals[kind, name] = signals.get((kind, name), 0) + v.double().square().sum()
        for bit, error in quantization_errors(switch.layers[name], kind, v, switch.bits):
            squares[kind, name, bit] = squares.get((kind, name, bit), 0) + error.double().square().sum()

    switch.uniform(max(switch.bits))
    with quantizers_watched(switch, add), progress(sum(len(target) for _, target in batches)) as bar:
        for images, _ in batches:
            model(images)
            bar.update(len(images))
    return {kind: {name: {bit: float(squares[kind, name, bit] / signals[kind, name].clamp(min=TINY)) for bit in switch.bits}
                   for name in switch.layers} for kind in KINDS}


def fisher(model, switch, batches, seed=0):
    """Second-order change of the KL divergence, for every weight and input; arguments and result as of one_at_a_time.

    Args:
        seed: of the labels that are drawn.
    """
    draws, totals, found = torch.Generator().manual_seed(seed), {}, {}

    def watch(kind, name, v, out):
        out.register_hook(functools.partial(add, kind, name, v.detach()))

    def add(kind, name, v, grad):
        for bit, error in quantization_errors(switch.layers[name], kind, v, switch.bits):
            products = (error * grad).double()
            per_image = kind == "act" and v.dim() > 1 and len(v) == len(images)
            found.setdefault((kind, name, bit), []).append(products.flatten(1).sum(1) if per_image else products.sum()[None])

    switch.uniform(max(switch.bits))
    with quantizers_watched(switch, watch), progress(sum(len(target) for _, target in batches)) as bar:
        for images in torch.cat([images for images, _ in batches]).split(FISHER_BATCH):
            with torch.enable_grad():
                logits = model(images)
            if not logits.isfinite().all():
                raise UserError("the outputs at the highest bit-width are not finite")
            labels = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=draws)[:, 0].to(logits.device)
            F.cross_entropy(logits, labels, reduction="sum").backward()
            model.zero_grad(set_to_none=True)
            for key, calls in found.items():  # of a layer; by image only where each call of it has them apart
                per_image = all(len(values) == len(images) for values in calls)
                total = sum(calls) if per_image else sum(values.sum() for values in calls)
                totals[key] = totals.get(key, 0) + total.square().sum()
            found.clear()
            bar.update(len(images))
    count = sum(len(target) for _, target in batches)
    # No gradient reaches what feeds only outputs that are ignored, such as those of a second head.
    return {kind: {name: {bit: float(totals.get((kind, name, bit), 0)) / (2 * count) for bit in switch.bits}
                   for name in switch.layers} for kind in KINDS}


def quantization_errors(layer, kind, v, bits):
    """(bit, Q(v) - v) of each bit-width; the one that was selected is selected afterwards."""
    quantizer = getattr(layer, KINDS[kind])
    selected = quantizer.bits[quantizer.index]
    with torch.no_grad():
        for bit in bits:
            quantizer.select(bit)
            yield bit, quantized(v, *quantizer.quantization_parameters(v)[:3]) - v
    quantizer.select(selected)


@contextlib.contextmanager
def quantizers_watched(switch, see):
    """Within, see(kind, layer, what is quantized, the result) is called for each weight and input."""
    handles = []
    try:
        for name, layer in switch.layers.items():
            layer.is_fused = False
            for kind, quantizer in KINDS.items():
                handles.append(getattr(layer, quantizer).register_forward_hook(
                    lambda _, inputs, out, kind=kind, name=name: see(kind, name, inputs[0], out)))
        yield
    finally:
        for layer in switch.layers.values():
            del layer.is_fused
        for handle in handles:
            handle.remove()


MEASURES = {"noise": noise, "fisher": fisher, "kl": divergence_one_at_a_time,
            "loss": functools.partial(one_at_a_time, score=cross_entropy)}
