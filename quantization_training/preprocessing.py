"""What happens to an image before a network sees it: as a packed model says it, and done to image files."""

from pathlib import Path

import numpy as np
import torch
import torchvision
from torchvision import transforms

from util.data_loader import RESIZE_RATIO, normalise
from util.datasets import DATASETS, FASHION_PADDING, grey_mean_and_std, read_digits, read_rgb

GREY = ("digits", "fashion_mnist")
CLASS_NAMES = {
    "cifar10": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    "digits": [str(digit) for digit in range(10)], "fashion_mnist": list(torchvision.datasets.FashionMNIST.classes)}


def describe_preprocessing(config, input_size):
    """What evaluation does to the images of a dataset, a DataConfig's; input_size is the height and width that result.

    {mean, std: of pixels from 0 to 1, per channel; resize: 'crop' (the shorter side, then the middle) or 'square' (the whole
    image); padding: black pixels on each side; grey: whether colours are taken away}.
    """
    dataset = DATASETS[config.dataset]
    mean, std = (dataset.mean, dataset.std) if dataset.mean else grey_mean_and_std(read_digits(input_size)[0].images)
    return {"mean": list(config.mean or mean), "std": list(config.std or std),
            "resize": "crop" if config.dataset in ("imagenet", "folder") else "square",
            "padding": FASHION_PADDING if config.dataset == "fashion_mnist" else 0, "grey": config.dataset in GREY}


def find_class_names(config, num_classes):
    """The names of a dataset's classes in the order of the outputs; None where they are not known, or of another number."""
    names = CLASS_NAMES.get(config.dataset)
    if config.dataset in ("imagenet", "folder") and config.path:
        folder = Path(config.path).expanduser() / "train"
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else None
    return names if names is not None and len(names) == num_classes else None


def read_image(path, preprocessing, size):
    """An image file as a network gets it: float32 [3, size, size], normalised.

    An image that has the size already, with or without its padding, is not resized.
    """
    image = read_rgb(path)
    if preprocessing["grey"]:
        image = image.convert("L")
    padding = preprocessing["padding"]
    inside = size - 2 * padding
    if preprocessing["resize"] == "crop":
        steps = [transforms.Resize(int(size * RESIZE_RATIO)), transforms.CenterCrop(size)]
    elif image.size in ((size, size), (inside, inside)):
        steps = []
    else:
        steps = [transforms.Resize((inside, inside))]
    if padding and image.size != (size, size):
        steps.append(transforms.Pad(padding))
    pixels = transforms.Compose([*steps, transforms.PILToTensor()])(image)
    mean, std = (torch.tensor(np.array(preprocessing[key], np.float32)).view(1, 3, 1, 1) for key in ("mean", "std"))
    return normalise(pixels[None], 1 / (255 * std), -mean / std)[0]
