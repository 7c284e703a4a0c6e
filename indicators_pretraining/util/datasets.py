"""Reading image sets: what each dataset is, and its images, in memory or as a list of files.

What is wrong with the files is a UserError that says what to put where.
"""

import contextlib
import gzip
import http.client
import os
import socket
import struct
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import ExifTags, Image
from torchvision.transforms.functional import pil_to_tensor

from util.errors import UserError, naming, reason
from util.exchange import no_empty_folders
from util.sampling import Stream, stratified_split

DIGITS_FILE = Path(__file__).parent / "data" / "digits.npz"
DIGITS_LEVELS = 16
DIGITS_TEST_FRACTION = 0.2
FASHION_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
TORCHVISION_FOLDER = "FashionMNIST/raw"
FASHION_PADDING = 2  # 28 x 28 to 32 x 32
IDX_UNSIGNED_BYTES = 8
DOWNLOAD_TIMEOUT = 30  # seconds without an answer
BACKGROUND = "white"  # what shows through where an image is transparent
# By the value of EXIF's tag Orientation.
TRANSPOSED = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
              5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
              8: Image.Transpose.ROTATE_90}
TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_MIN_IS_WHITE = 258, 262, 0
DEEP_FORMATS = ("PNG", "PPM")  # whose deep grey pixels Pillow may give as whole numbers of 32 bits, from 0 to 65535


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a dataset before it is read. num_classes, mean and std are None where the files say it."""

    title: str
    num_classes: int | None
    input_size: int
    resizable: bool
    flip: bool
    mean: tuple | None
    std: tuple | None


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Mean and std of CIFAR are those commonly published; of Fashion-MNIST, measured over the 60,000 padded training images.
DATASETS = {
    "imagenet": DatasetInfo("ImageNet", 1000, 224, True, True, IMAGENET_MEAN, IMAGENET_STD),
    "folder": DatasetInfo("folder", None, 224, True, True, IMAGENET_MEAN, IMAGENET_STD),
    "cifar10": DatasetInfo("CIFAR-10", 10, 32, False, True, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": DatasetInfo("CIFAR-100", 100, 32, False, True, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "fashion_mnist": DatasetInfo("Fashion-MNIST", 10, 32, False, True, (0.2190,) * 3, (0.3318,) * 3),
    "digits": DatasetInfo("digits", 10, 32, True, False, None, None),
}


@dataclass(frozen=True)
class ImageSet:
    """Images with their classes."""

    images: torch.Tensor | np.ndarray  # uint8 [N, C, S, S] with C = 1 (grey) or 3, or N encoded file names
    labels: np.ndarray  # int64 [N]

    def to(self, device):
        """The same set with its images, where they are in memory, on `device`."""
        return self if isinstance(self.images, np.ndarray) else ImageSet(self.images.to(device), self.labels)


@dataclass(frozen=True)
class Dataset:
    """A dataset as read."""

    train: ImageSet
    test: ImageSet
    class_names: tuple
    mean: tuple  # per colour channel, of pixels from 0 to 1
    std: tuple


def describe_data(config):
    """(num_classes, input_size) that a model for the data of a DataConfig needs. For `folder` without num_classes, the folders
    under train/ are counted."""
    info = DATASETS[config.dataset]
    if info.num_classes and config.num_classes not in (None, info.num_classes):
        raise UserError(f"dataloader.num_classes: found {config.num_classes}, {info.title} has {info.num_classes} classes; "
                        "leave it blank")
    if not info.resizable and config.input_size not in (None, info.input_size):
        raise UserError(f"dataloader.input_size: found {config.input_size}, {info.title} is used at {info.input_size} x "
                        f"{info.input_size} pixels only; leave it blank")
    num_classes = config.num_classes or info.num_classes or len(find_classes(data_path(config) / "train", "training"))
    return num_classes, config.input_size or info.input_size


def read_dataset(config, downloads, barrier):
    """The Dataset that a DataConfig names.

    Args:
        downloads: whether this process is the one on its machine that downloads missing files.
        barrier: called once where files may be downloaded; returns when all processes have called it.
    """
    info = DATASETS[config.dataset]
    if config.dataset in ("imagenet", "folder"):
        train, test, class_names = read_folders(data_path(config), config.dataset, config.num_classes)
    elif config.dataset == "digits":
        train, test, class_names = read_digits(config.input_size or info.input_size)
    else:
        read = read_fashion_mnist if config.dataset == "fashion_mnist" else read_cifar
        if not downloads:
            barrier()
        try:
            train, test, class_names = read(data_path(config), config.dataset, downloads)
        finally:
            if downloads:  # where it failed, the other processes report the missing files themselves
                barrier()
    mean, std = (info.mean, info.std) if info.mean else grey_mean_and_std(train.images)
    return Dataset(train, test, class_names, tuple(config.mean or mean), tuple(config.std or std))


def data_path(config):
    """dataloader.path as a Path, or a UserError where the dataset needs one and none is given."""
    if not config.path:
        raise UserError(f"dataloader.path: dataset {config.dataset} needs the folder that holds its files")
    return Path(config.path).expanduser()


def grey_mean_and_std(images):
    """Mean and standard deviation over all pixels (0 to 1) of grey uint8 images, each given for three channels."""
    values = torch.arange(256, dtype=torch.float64) / 255
    share = torch.bincount(images.flatten().long(), minlength=256).double() / images.numel()
    mean = float(share @ values)
    return (mean,) * 3, (float(share @ (values - mean).square()) ** 0.5,) * 3


def read_folders(path, dataset, num_classes):
    """List path/train and path/val, which hold one folder of images per class, the same classes in both."""
    train, classes = list_images(path / "train", "training", dataset)
    test, test_classes = list_images(path / "val", "validation", dataset)
    odd = sorted(set(classes) ^ set(test_classes))
    if odd:
        present, absent = ("train", "val") if odd[0] in classes else ("val", "train")
        raise UserError(f"dataloader.path: class {odd[0]} is in {path / present} but not in {path / absent} "
                        f"({len(odd)} class{'es differ' if odd[1:] else ' differs'}); both need the same class folders")
    if dataset == "imagenet" and len(classes) != DATASETS["imagenet"].num_classes:
        raise UserError(f"dataloader.path: {path / 'train'} holds {len(classes)} class folders, ImageNet has 1000; "
                        "for images of your own write 'dataset: folder'")
    if num_classes not in (None, len(classes)):
        raise UserError(f"dataloader.num_classes: found {num_classes}, but {path / 'train'} holds {len(classes)} class "
                        "folders; leave it blank")
    return train, test, tuple(classes)


def list_images(folder, part, dataset="folder"):
    """(ImageSet of file names, class names) of a folder of class folders, each with at least one image."""
    classes = find_classes(folder, part, dataset)
    samples = torchvision.datasets.ImageFolder(folder, allow_empty=True).samples
    labels = np.array([label for _, label in samples], dtype=np.int64)
    empty = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
    if len(empty):
        raise UserError(f"dataloader.path: {folder / classes[empty[0]]} holds no images; put that class's {part} "
                        "images there, or remove the folder")
    # One array of bytes instead of a list of strings: worker processes then share its memory instead of copying it.
    return ImageSet(np.array([os.fsencode(file) for file, _ in samples]), labels), classes


def find_classes(folder, part, dataset="folder"):
    """The names of the class folders in `folder`, sorted."""
    whose = "ImageNet's" if dataset == "imagenet" else "the"
    wanted = f"put {whose} {part} images there, one folder per class"
    if not folder.is_dir():
        raise UserError(f"dataloader.path: {folder} is missing; {wanted}")
    try:
        classes = torchvision.datasets.folder.find_classes(folder)[0]
    except FileNotFoundError:
        raise UserError(f"dataloader.path: {folder} holds no class folders; {wanted}") from None
    except OSError as error:
        raise UserError(f"dataloader.path: cannot list {folder} ({reason(error)})") from None
    if part == "training" and len(classes) == 1:
        inside = any(entry.is_dir() for entry in os.scandir(folder / classes[0]))
        raise UserError(f"dataloader.path: {folder} holds one class folder, {classes[0]}, allowed are at least 2"
                        + ("; its own folders look like classes, so put them in its place" if inside else ""))
    return classes


def read_rgb(path):
    """An image file as an upright RGB image of Pillow with 8 bits per channel, over white; of several frames, the first.
    Pixels without a defined range (32-bit whole numbers, floats) are refused."""
    try:
        with naming(path), open(path, "rb") as file:
            image = Image.open(file)
            image.load()
            return _upright(_as_rgb(image), image)
    except UserError:
        raise
    except Exception as error:  # Pillow raises many types on damaged files
        raise UserError(f"{path}: cannot read the image ({reason(error)}); replace or remove the file") from None


def read_pixels(path):
    """The pixels that read_rgb gives, uint8 [3, H, W]. Of a JPEG file torchvision decodes them, to the same values, in two
    thirds of the time; where it cannot, read_rgb does, or says why it cannot either."""
    with contextlib.suppress(Exception), open(path, "rb") as file:
        image = Image.open(file)
        if image.format == "JPEG" and image.mode in ("RGB", "L"):
            file.seek(0)
            content = torch.from_numpy(np.fromfile(file, np.uint8))
            pixels = torchvision.io.decode_jpeg(content, torchvision.io.ImageReadMode.RGB)
            if _turning(image) is None:
                return pixels
            return pil_to_tensor(_upright(Image.fromarray(pixels.permute(1, 2, 0).numpy()), image))
    return pil_to_tensor(read_rgb(path))


def _as_rgb(image):
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in DEEP_FORMATS):
        image = _in_8_bits(image)
    if image.mode in ("I", "F"):
        kind = "whole numbers of 32 bits" if image.mode == "I" else "floats"
        raise UserError(f"its pixels are {kind}, which have no defined range; save the image with 8 or 16 bits per channel")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image).convert("RGB")
    if image.mode == "LAB":
        from PIL import ImageCms  # not in every build of Pillow

        lab, rgb = (ImageCms.createProfile(space) for space in ("LAB", "sRGB"))
        return ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
    return image.convert("RGB")


def _in_8_bits(image):
    """A grey image of up to 16 bits scaled to 8, rounded to the nearest."""
    values = np.asarray(image).astype(np.uint32)
    tags = getattr(image, "tag_v2", {})
    largest = 2 ** int(tags.get(TIFF_BITS, (16,))[0]) - 1
    grey = np.minimum((values * 255 + largest // 2) // largest, 255).astype(np.uint8)
    if tags.get(TIFF_PHOTOMETRIC) == TIFF_MIN_IS_WHITE:
        grey = 255 - grey
    if "transparency" not in image.info:
        return Image.fromarray(grey)
    opaque = (values != image.info["transparency"]).astype(np.uint8) * 255
    return Image.fromarray(np.stack([grey, opaque], 2))


def _upright(rgb, image):
    """An image turned as the EXIF data of its file say."""
    turning = _turning(image)
    return rgb if turning is None else rgb.transpose(turning)


def _turning(image):
    """Pillow's name of what turns an image upright, None where it stands so, or where its EXIF data cannot be read."""
    with contextlib.suppress(Exception):  # of damaged EXIF data, which are no reason to do without the image
        return TRANSPOSED.get(image.getexif().get(ExifTags.Base.Orientation))


def read_digits(size):
    """The optical digits that lie next to this file, resized to size x size; the same fifth is always the test set."""
    try:
        with np.load(DIGITS_FILE, allow_pickle=False) as file:
            pixels, labels = file["images"], file["labels"].astype(np.int64)
    except (OSError, ValueError, KeyError, zlib.error, EOFError) as error:
        raise UserError(f"{DIGITS_FILE}: missing or damaged ({reason(error)}); take it from the repository") from None
    images = torch.from_numpy(pixels).float().unsqueeze(1) * (255 / DIGITS_LEVELS)
    images = torch.nn.functional.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    images = images.round().to(torch.uint8)
    test, train = stratified_split(labels, DIGITS_TEST_FRACTION, [Stream.DIGITS_TEST])
    return (ImageSet(images[train], labels[train]), ImageSet(images[test], labels[test]),
            tuple(str(digit) for digit in range(10)))


def read_cifar(path, dataset, download):
    """CIFAR-10 or CIFAR-100 in torchvision's layout under `path`; torchvision checks every file's MD5 sum."""
    kind = torchvision.datasets.CIFAR10 if dataset == "cifar10" else torchvision.datasets.CIFAR100
    wanted = f"put the folder {kind.base_folder} there"
    with dataset_errors(DATASETS[dataset].title, path, path / kind.base_folder, wanted, download):
        parts = [kind(path, train=train, download=download and train) for train in (True, False)]
    train, test = (ImageSet(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(),
                            np.array(part.targets, dtype=np.int64)) for part in parts)
    return train, test, tuple(parts[0].classes)


def read_fashion_mnist(path, dataset, download):
    """Fashion-MNIST from its four idx files, in `path` itself or where torchvision puts them, padded to 32 x 32."""
    if download and not all(find_idx_file(path, name) for name in FASHION_FILES):
        wanted = f"put {', '.join(name + '.gz' for name in FASHION_FILES)} there"
        with dataset_errors(DATASETS[dataset].title, path, path / TORCHVISION_FOLDER, wanted, download):
            torchvision.datasets.FashionMNIST(path, download=True)
    train, test = (read_idx_pair(path, *names) for names in (FASHION_FILES[:2], FASHION_FILES[2:]))
    return train, test, tuple(torchvision.datasets.FashionMNIST.classes)


def read_idx_pair(path, images_name, labels_name):
    """One part of Fashion-MNIST: grey images of 28 x 28 pixels and as many labels from 0 to 9."""
    images, labels = read_idx(path, images_name, 3), read_idx(path, labels_name, 1)
    if images.shape[1:] != (28, 28) or len(images) != len(labels) or not len(labels) or labels.max() > 9:
        raise UserError(f"dataloader.path: {images_name} {list(images.shape)} and {labels_name} {list(labels.shape)} "
                        f"in {path} do not belong to Fashion-MNIST; put the published files there")
    padding = ((0, 0), (FASHION_PADDING,) * 2, (FASHION_PADDING,) * 2)
    return ImageSet(torch.from_numpy(np.pad(images, padding)).unsqueeze(1), labels.astype(np.int64))


def read_idx(path, name, dimensions):
    """Read a file of unsigned bytes in the idx format: two zeros, type, dimensions, each size (big-endian), data."""
    file = find_idx_file(path, name)
    if file is None:
        raise UserError(f"dataloader.path: {name} (or {name}.gz) is missing in {path}; put Fashion-MNIST's file there")
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as stream:
            content = stream.read()
        magic, *shape = struct.unpack_from(f">{1 + dimensions}I", content)
        data = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
        if magic != (IDX_UNSIGNED_BYTES << 8 | dimensions):
            raise ValueError("not an idx file of this kind")
        return data.reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise UserError(f"dataloader.path: {file} is damaged ({reason(error)}); put the published file there") from None


def find_idx_file(path, name):
    """The file `name`, plain or gzipped, in `path` or in torchvision's folder beneath it; None where there is none."""
    candidates = (folder / f"{name}{ending}" for folder in (path, path / TORCHVISION_FOLDER) for ending in ("", ".gz"))
    return next((file for file in candidates if file.is_file()), None)


@contextlib.contextmanager
def dataset_errors(title, path, folder, wanted, download):
    """Turn what torchvision raises while it reads or downloads `folder` into a UserError; leave no empty folders."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        with no_empty_folders(folder):
            yield
    except (OSError, RuntimeError, EOFError, ValueError, http.client.HTTPException, tarfile.TarError) as error:
        failed = f" and could not be downloaded ({' '.join(str(error).split())})" if download else ""
        raise UserError(f"dataloader.path: {title} is missing or damaged in {path}{failed}; {wanted}") from None
    finally:
        socket.setdefaulttimeout(timeout)
