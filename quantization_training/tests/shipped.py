"""What lets a shipped configuration run without its data and its weights: a few small images, and overrides."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

SMALL = ["training_device=cpu", "output_dir=out", "pre_trained=false", "resume.path=auto", "dataloader.dataset=folder",
         "dataloader.path=images", "dataloader.num_classes=", "dataloader.input_size=32", "dataloader.batch_size=2",
         "dataloader.workers=0", "dataloader.val_split=0", "dataloader.data_fraction=1"]


def images_in_folders(classes=2, images=4):
    """train/ and val/ below images/, as ImageNet has them."""
    draws = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(classes):
            folder = Path(f"images/{split}/{label}")
            folder.mkdir(parents=True)
            for image in range(images):
                Image.fromarray(draws.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(folder / f"{image}.png")


def without_timm(path):
    """The override that the comment of a configuration names for those who have not installed timm."""
    return ["arch=vit_tiny_patch16_224"] if "arch: timm:" in path.read_text() and not find_spec("timm") else []
