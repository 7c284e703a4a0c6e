"""How many training images a core reads from JPEG files: from the folder indicators_pretraining,

python ../measurements/bench_loader.py

beside torchvision's reference loader, on made-up photographs. Medians of rounds in which each side reads all images. Writes
measurements/loader.csv; a difference is that of pixels from whole decoding and Pillow's resizing, in grey levels of 255.
"""

import itertools
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, ".")  # the stage

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision import transforms

from engine.passes import keep_freed_memory
from engine.schema import DataConfig
from timing import show, timed
from util.data_loader import create_loaders
from util.datasets import IMAGENET_MEAN, IMAGENET_STD, read_rgb

SIZES = {(500, 375): 96, (2000, 1500): 12}  # how many images of each
QUALITY, BATCH, ROUNDS = 90, 12, 15
CROP = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]


def photograph(rng, width, height):
    """An image with a photograph's spectrum (amplitude 1/f), hard edges, and the noise of a camera."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    frequency[0, 0] = 1 / width
    noise = np.fft.ifft2(np.exp(2j * np.pi * rng.random((4, height, width))) / frequency**1.2).real
    noise /= noise.std((1, 2), keepdims=True)
    pixels = 120 + 50 * noise[3] + 15 * noise[:3]
    rows, columns = np.mgrid[:height, :width] / height
    for row, column, radius in rng.random((12, 3)) * (1, 1.3, 0.25):
        pixels[:, (rows - row)**2 + (columns - column)**2 < radius**2] += rng.normal(0, 40, (3, 1))
    pixels += rng.normal(0, 4, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def write_photographs(folder, size, count):
    rng = np.random.default_rng(0)
    for part, number in itertools.product(("train", "val"), range(count)):
        path = Path(folder) / part / str(number % 2)
        path.mkdir(parents=True, exist_ok=True)
        photograph(rng, *size).save(path / f"{number}.jpg", quality=QUALITY)


def at_half_size(path):
    """A training image of a file that libjpeg decodes at half its size, for what that would gain."""
    with Image.open(path) as image:
        width, height = image.size
        image.draft("RGB", (width // 2, height // 2))
        image.load()
    top, left, rows, columns = CROP[0].get_params(torch.empty(1, height, width), CROP[0].scale, CROP[0].ratio)
    box = (left / 2, top / 2, (left + columns) / 2, (top + rows) / 2)
    return transforms.PILToTensor()(CROP[1](image.resize((224, 224), Image.Resampling.BILINEAR, box=box)))


def measure(size, count):
    """One row for each side."""
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(folder, size, count)
        config = DataConfig(dataset="folder", path=folder, batch_size=BATCH, workers=0)
        ours, half, plain = (create_loaders(config, 0, 0, 1, torch.device("cpu")).train.batches for _ in range(3))
        half.dataset.transform = at_half_size
        plain.dataset.transform = transforms.Compose([read_rgb, *CROP, transforms.PILToTensor()])
        images = torchvision.datasets.ImageFolder(f"{folder}/train", transforms.Compose(
            [*CROP, transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]))
        sides = {"reference": torch.utils.data.DataLoader(images, BATCH, shuffle=True), "ours": ours,
                 **({"decoded at half the size": half} if min(size) > 1000 else {})}
        rounds = [{side: count / timed(partial(list, batches))[0] for side, batches in sides.items()} for _ in range(ROUNDS)]
        wanted = torch.cat([batch for batch, _ in plain]).int()
        return [{"image": "x".join(map(str, size)), "side": side,
                 "images_per_s": statistics.median(rates[side] for rates in rounds),
                 "over_reference": statistics.median(rates[side] / rates["reference"] for rates in rounds),
                 **({} if side == "reference" else differences(wanted, batches))} for side, batches in sides.items()]


def differences(wanted, batches):
    away = (torch.cat([batch for batch, _ in batches]).int() - wanted).abs()
    return {"mean_difference": away.double().mean().item(), "largest_difference": away.max().item()}


def main():
    torch.set_num_threads(1)  # as in a worker
    keep_freed_memory()
    rows = [row for size, count in SIZES.items() for row in measure(size, count)]
    columns = ["image", "side", "images_per_s", "over_reference", "mean_difference", "largest_difference"]
    show(Path(__file__).with_name("loader.csv"), columns, rows, 4)


if __name__ == "__main__":
    main()
