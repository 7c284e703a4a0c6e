"""Facts of the data: which images make up which batch on which rank, and what is done to each of them."""

import contextlib
import gzip
import itertools
import math
import multiprocessing
import os
import pickle
import signal
import struct
import subprocess
import time
import zlib
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor

from engine.schema import DataConfig
from util import datasets
from util.data_loader import (
    FileBatches,
    SideStream,
    create_loaders,
    crop_and_flip,
    draw_crops,
    leave_signals_to_main,
    one_ahead,
)
from util.datasets import FASHION_FILES, describe_data, find_idx_file
from util.errors import UserError, user_errors_on_one_line
from util.sampling import OrderedSampler, ShuffledSampler, Stream, calibration_sampler, generator, stratified_split

CPU = torch.device("cpu")
DIGITS = DataConfig(dataset="digits", batch_size=32, input_size=16)


def loaders(config=DIGITS, seed=0, rank=0, world_size=1, **options):
    return create_loaders(config, seed, rank, world_size, CPU, **options)


def read(loader, epoch=0, start_step=0):
    loader.set_epoch(epoch, start_step)
    return list(loader)


def joined(batches):
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(one, two) for pair in zip(first, second, strict=True) for one, two in zip(*pair, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Splits.

labels_lists = st.lists(st.integers(0, 5), max_size=120)
fractions = st.sampled_from([0, 0.01, 0.1, 0.25, 0.29, 1 / 3, 0.5, 0.9, Fraction(1, 7)])


@given(labels_lists, fractions, st.integers(0, 5))
def test_a_split_is_complete_disjoint_and_class_balanced(labels, fraction, seed):
    labels = np.array(labels, dtype=np.int64)
    taken, rest = stratified_split(labels, fraction, seed)
    assert sorted([*taken, *rest]) == list(range(len(labels)))
    assert list(taken) == sorted(taken) and list(rest) == sorted(rest)
    for label in set(labels.tolist()):
        members, count = np.sum(labels == label), np.sum(labels[taken] == label)
        assert (count == 0) == (fraction == 0 or members == 1)
        assert count < members
        if 1 < count < members - 1:  # not at a bound
            assert abs(count - Fraction(str(fraction)) * int(members)) <= Fraction(1, 2)


def test_a_split_depends_on_the_seed_and_rounds_the_decimal_that_was_written():
    labels = np.zeros(50, dtype=np.int64)
    assert not np.array_equal(stratified_split(labels, 0.5, 0)[0], stratified_split(labels, 0.5, 1)[0])
    assert len(stratified_split(labels, 0.29, 0)[0]) == 15  # 14.5, although 0.29 * 50 < 14.5 in binary


def test_the_validation_split_is_the_same_on_every_rank_and_for_any_workers():
    config = replace(DIGITS, val_split=0.1)
    whole = joined(read(loaders(config).val))
    assert len(whole[1]) == loaders(config).val.images == 145
    for rank in range(3):
        images, labels = joined(read(loaders(replace(config, workers=3), rank=rank, world_size=3).val, epoch=7))
        assert torch.equal(images, whole[0][rank::3]) and torch.equal(labels, whole[1][rank::3])
    counts = torch.bincount(whole[1])
    assert counts.min() >= 14 and counts.max() <= 15
    assert not torch.equal(joined(read(loaders(config, seed=1).val))[0], whole[0])


def test_training_and_validation_images_are_disjoint_parts_of_the_training_set():
    split = loaders(replace(DIGITS, val_split=0.2, batch_size=1))
    train, val = set(split.train.sampler.indices), set(split.val.sampler.mine)
    assert not train & val and len(train | val) == 1438 == loaders(replace(DIGITS, batch_size=1)).train.images
    assert split.val is not split.test
    whole = loaders()
    assert whole.val is whole.test


def test_data_fraction_keeps_a_balanced_part_of_what_the_split_left():
    split = loaders(replace(DIGITS, val_split=0.1, data_fraction=0.5, batch_size=1))
    whole = loaders(replace(DIGITS, val_split=0.1, batch_size=1))
    kept, all_of_it = set(split.train.sampler.indices), set(whole.train.sampler.indices)
    assert kept < all_of_it and np.array_equal(split.val.sampler.mine, whole.val.sampler.mine)
    count = [torch.bincount(joined(read(part.train))[1]) for part in (split, whole)]
    assert (2 * count[0] - count[1]).abs().max() <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Batches.


def plans(count, batch_size, world_size, seed=3):
    steps = count // (batch_size * world_size)
    return [ShuffledSampler(np.arange(count), Stream.SHUFFLE, seed, batch_size, steps, rank, world_size)
            for rank in range(world_size)]


@given(st.integers(1, 200), st.integers(1, 8), st.integers(1, 5), st.integers(0, 3))
def test_the_slices_of_n_ranks_make_the_batch_of_one(count, batch_size, world_size, epoch):
    ranks, (single,) = plans(count, batch_size, world_size), plans(count, batch_size * world_size, 1)
    for plan in (*ranks, single):
        plan.set_epoch(epoch)
    assert len(single) == len(ranks[0]) == count // (batch_size * world_size)
    seen = []
    for slices, (_, whole) in zip(zip(*ranks, strict=True), single, strict=True):
        assert np.array_equal(np.concatenate([indices for _, indices in slices]), whole)
        assert all(len(indices) == batch_size for _, indices in slices)
        seen.extend(whole)
    assert len(set(seen)) == len(seen) == single.images == ranks[0].images


def test_ranks_get_the_very_pixels_of_one_process():
    single = read(loaders().train, epoch=2)
    ranks = [read(loaders(replace(DIGITS, batch_size=8), rank=rank, world_size=4).train, epoch=2) for rank in range(4)]
    assert same([joined(slices) for slices in zip(*ranks, strict=True)], single)


def test_the_order_differs_between_epochs_and_seeds_and_repeats_between_runs():
    first = loaders()
    assert same(read(first.train, epoch=1), read(loaders().train, epoch=1))
    orders = {tuple(joined(read(first.train, epoch))[1].tolist()) for epoch in range(3)}
    orders.add(tuple(joined(read(loaders(seed=1).train))[1].tolist()))
    assert len(orders) == 4
    torch.manual_seed(5)
    state = torch.get_rng_state()
    read(first.train)
    assert torch.equal(torch.get_rng_state(), state)


@given(st.integers(0, 60), st.integers(1, 7), st.integers(1, 6))
def test_evaluation_covers_each_image_once_for_any_number_of_ranks(count, batch_size, world_size):
    ranks = [OrderedSampler(np.arange(count), batch_size, rank, world_size) for rank in range(world_size)]
    seen = [index for plan in ranks for _, indices in plan for index in indices]
    assert sorted(seen) == list(range(count)) and all(plan.images == count for plan in ranks)
    for plan in ranks:
        batches = list(plan)
        assert len(batches) == len(plan) and all(0 < len(indices) <= batch_size for _, indices in batches)


def test_start_step_continues_the_stream():
    both = loaders(replace(DIGITS, val_split=0.3))
    for loader in (both.train, both.val):
        whole = read(loader, epoch=1)
        assert len(whole) == len(loader) > 5
        assert same(read(loader, epoch=1, start_step=5), whole[5:])
        assert read(loader, epoch=1, start_step=len(whole)) == []
        assert same(read(loader, epoch=1), whole)


@given(st.integers(5, 300), st.integers(5, 400), st.integers(1, 64), st.integers(1, 5))
def test_calibration_uses_no_more_than_was_asked_and_batches_of_one_size(count, samples, batch_size, world_size):
    ranks = [calibration_sampler(np.arange(count), samples, 0, batch_size, rank, world_size) for rank in range(world_size)]
    batches = [[indices for _, indices in plan] for plan in ranks]
    seen = [index for rank in batches for indices in rank for index in indices]
    assert len(seen) == len(set(seen)) == ranks[0].images
    wanted = min(samples, count)
    assert wanted - world_size * (len(ranks[0]) + 1) < len(seen) <= wanted
    assert len({len(indices) for rank in batches for indices in rank}) == 1 and len(batches[0][0]) <= batch_size
    assert len({len(rank) for rank in batches}) == 1


def test_calibration_reads_training_images_without_augmentation_and_draws_anew_each_epoch():
    data = loaders(replace(DIGITS, val_split=0.5))
    calibration = data.calibration(100)
    assert calibration.images == 100 and [len(labels) for _, labels in calibration] == [25] * 4
    plain = data.train.batches.images
    allowed = {plain[index].numpy().tobytes() for index in data.train.sampler.indices}
    draws = [joined(read(calibration, epoch))[0] for epoch in (0, 1, 0)]
    assert torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])
    mean, std = data.mean[0], data.std[0]
    for image in draws[1][:, :1]:
        assert ((image * std + mean) * 255).round().to(torch.uint8).numpy().tobytes() in allowed
    everything = data.calibration(10 ** 6)
    assert len(everything) == math.ceil(len(allowed) / 32) and everything.images > len(allowed) - len(everything)


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation.


def crop_literally(image, top, left, flipped, padding):
    """One image [C, S, S], with plain slicing."""
    channels, size, _ = image.shape
    padded = torch.zeros(channels, size + 2 * padding, size + 2 * padding, dtype=image.dtype)
    padded[:, padding:padding + size, padding:padding + size] = image
    crop = padded[:, top:top + size, left:left + size]
    return torch.flip(crop, [2]) if flipped else crop


@settings(max_examples=30)
@given(st.integers(1, 6), st.sampled_from([1, 3]), st.integers(2, 9), st.integers(0, 3), st.integers(0, 99))
def test_batched_augmentation_equals_plain_slicing(batch, channels, size, padding, seed):
    images = torch.randint(0, 256, (batch, channels, size, size), dtype=torch.uint8)
    draws = torch.from_numpy(draw_crops(seed, 0, batch, padding, flip=True))
    expected = [crop_literally(image, *draw.tolist(), padding) for image, draw in zip(images, draws.T, strict=True)]
    assert torch.equal(crop_and_flip(images, *draws, padding), torch.stack(expected))


def test_draws_cover_every_offset_and_flip_and_digits_never_flip():
    top, left, flipped = draw_crops(0, 0, 4000, 4, flip=True)
    assert set(top) == set(left) == set(range(9)) and 0.45 < flipped.mean() < 0.55
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.1
    assert not loaders().train.batches.augment.flip and not draw_crops(0, 0, 50, 4, flip=False)[2].any()
    assert loaders().train.batches.augment.padding == 2
    assert loaders(replace(DIGITS, input_size=None)).train.batches.images.shape[-1] == 32


def samples_of(data, epoch):
    """{image index: augmented pixels} of an epoch."""
    data.train.set_epoch(epoch)
    images, _ = joined(list(data.train))
    order = np.concatenate([indices for _, indices in data.train.sampler])
    return dict(zip(order.tolist(), images, strict=True))


def test_the_augmentation_of_a_sample_depends_on_seed_epoch_and_index_only():
    data = loaders()
    reference, next_epoch = samples_of(data, 1), samples_of(data, 2)
    others = [samples_of(data, 1),
              samples_of(loaders(replace(DIGITS, batch_size=7)), 1),
              samples_of(loaders(replace(DIGITS, val_split=0.2, data_fraction=0.7)), 1),
              samples_of(loaders(replace(DIGITS, batch_size=5), rank=1, world_size=3), 1)]
    for other in others:
        common = reference.keys() & other.keys()
        assert len(common) > 400 and all(torch.equal(reference[index], other[index]) for index in common)
    for changed in (next_epoch, samples_of(loaders(seed=1), 1)):
        common = reference.keys() & changed.keys()
        assert sum(torch.equal(reference[index], changed[index]) for index in common) < len(common) / 4


# ---------------------------------------------------------------------------------------------------------------------
# Sets held in memory.


def test_digits_have_a_fixed_balanced_test_set_and_their_own_statistics():
    data = loaders(replace(DIGITS, batch_size=1))
    images, labels = joined(read(data.test))
    assert images.shape == (359, 3, 16, 16) and images.dtype == torch.float32 and labels.dtype == torch.int64
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])
    assert torch.bincount(labels).tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]
    assert torch.equal(joined(read(loaders(seed=4).test))[0], images)
    training, _ = joined(read(data.calibration(10 ** 6)))
    assert data.train.images == len(training) == 1438 and data.class_names == tuple("0123456789")
    assert abs(training.mean()) < 1e-4 and abs(training.std() - 1) < 1e-3


def test_digits_at_their_own_size_are_the_stored_values():
    data = loaders(replace(DIGITS, input_size=8, mean=[0.0] * 3, std=[1.0] * 3))
    with np.load(datasets.DIGITS_FILE) as file:
        stored = file["images"]
    assert stored.shape == (1797, 8, 8) and stored.max() == 16
    _, train = stratified_split(np.load(datasets.DIGITS_FILE)["labels"], 0.2, [Stream.DIGITS_TEST])
    images = data.train.batches.images[:, 0].numpy()
    assert np.array_equal(np.round(images / 255 * 16).astype(np.uint8), stored[train])
    assert images.max() == 255


def test_mean_and_std_can_be_given():
    plain, given_ones = loaders(), loaders(replace(DIGITS, mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 4.0]))
    assert given_ones.mean == (0.1, 0.2, 0.3) and given_ones.std == (1.0, 2.0, 4.0)
    pixels = joined(read(plain.test))[0][:, 0] * plain.std[0] + plain.mean[0]
    images = joined(read(given_ones.test))[0]
    for channel, (mean, std) in enumerate(zip(given_ones.mean, given_ones.std, strict=True)):
        assert torch.allclose(images[:, channel], (pixels - mean) / std, atol=1e-5)


def write_cifar(root, monkeypatch, dataset):
    """A few images in CIFAR's own format; the MD5 sums that torchvision checks become those of these files."""
    kind = torchvision.datasets.CIFAR10 if dataset == "cifar10" else torchvision.datasets.CIFAR100
    folder = root / kind.base_folder
    folder.mkdir()
    rng, classes = np.random.default_rng(0), 10 if dataset == "cifar10" else 100
    key = "labels" if dataset == "cifar10" else "fine_labels"
    md5 = torchvision.datasets.utils.calculate_md5
    contents = {}
    for listing in ("train_list", "test_list"):
        for name, _ in getattr(kind, listing):
            contents[name] = rng.integers(0, 256, (classes, 3072), dtype=np.uint8), rng.permutation(classes).tolist()
            (folder / name).write_bytes(pickle.dumps({"data": contents[name][0], key: contents[name][1]}))
        monkeypatch.setattr(kind, listing, [[name, md5(folder / name)] for name, _ in getattr(kind, listing)])
    meta = folder / kind.meta["filename"]
    meta.write_bytes(pickle.dumps({kind.meta["key"]: [f"class {number}" for number in range(classes)]}))
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(meta)})
    return contents


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_cifar_is_read_from_its_files(tmp_path, monkeypatch, dataset):
    contents = write_cifar(tmp_path, monkeypatch, dataset)
    data = loaders(DataConfig(dataset=dataset, path=str(tmp_path), batch_size=8))
    pixels, labels = contents["test_batch" if dataset == "cifar10" else "test"]
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (data.mean, data.std))
    images, found = joined(read(data.test))
    assert found.tolist() == labels and data.num_classes == len(labels) == len(data.class_names)
    assert np.allclose(images, (pixels.reshape(-1, 3, 32, 32) / 255 - mean) / std, atol=1e-5)
    assert len(data.train.batches.images) == {"cifar10": 50, "cifar100": 100}[dataset]
    assert data.train.batches.augment.padding == 4 and data.train.batches.augment.flip
    assert data.mean != datasets.IMAGENET_MEAN


def test_a_damaged_cifar_file_is_refused(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch, "cifar10")
    with open(tmp_path / "cifar-10-batches-py" / "test_batch", "ab") as file:
        file.write(b"x")
    config = DataConfig(dataset="cifar10", path=str(tmp_path), batch_size=8)
    with pytest.raises(UserError, match="CIFAR-10 is missing or damaged.*put the folder cifar-10-batches-py there"):
        loaders(config, downloads=False)


def refuse_downloads(monkeypatch):
    def fail(*_, **__):
        raise torchvision.datasets.utils.urllib.error.URLError("no network")

    monkeypatch.setattr(torchvision.datasets.utils.urllib.request, "urlopen", fail)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "fashion_mnist"])
def test_a_failed_download_says_what_to_put_where_and_leaves_nothing(tmp_path, monkeypatch, dataset):
    refuse_downloads(monkeypatch)
    path, calls = tmp_path / "new" / "data", []
    config = DataConfig(dataset=dataset, path=str(path))
    with pytest.raises(UserError, match=r"dataloader\.path: .* could not be downloaded .*no network.*; put .* there"):
        loaders(config, barrier=lambda: calls.append("first"))
    with pytest.raises(UserError, match=r"dataloader\.path: .* missing.* there"):
        loaders(config, rank=1, world_size=2, barrier=lambda: calls.append("second"))
    assert calls == ["first", "second"] and not (tmp_path / "new").exists()


def test_other_ranks_wait_until_the_first_has_downloaded(tmp_path, monkeypatch):
    config = DataConfig(dataset="fashion_mnist", path=str(tmp_path), batch_size=4)
    data = loaders(config, rank=1, world_size=2, barrier=lambda: write_fashion(tmp_path))
    assert data.test.images == 10 and sum(len(labels) for _, labels in data.test) == 5
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "__init__", lambda *_, **__: pytest.fail("downloads again"))
    loaders(config)


def write_fashion(folder, compress=True, count=20):
    """The four idx files with a few random images; returns what lies in them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, contents = np.random.default_rng(0), []
    for part, size in (("train", count), ("t10k", count // 2)):
        contents.append((rng.integers(0, 256, (size, 28, 28), dtype=np.uint8), np.arange(size, dtype=np.uint8) % 10))
        for name, array in zip(("images-idx3", "labels-idx1"), contents[-1], strict=True):
            header = struct.pack(f">{1 + array.ndim}I", 0x0800 | array.ndim, *array.shape)
            content = header + array.tobytes()
            file = folder / f"{part}-{name}-ubyte{'.gz' if compress else ''}"
            file.write_bytes(gzip.compress(content) if compress else content)
    return contents


@pytest.mark.parametrize(("below", "compress"), [("", True), ("", False), ("FashionMNIST/raw", False)])
def test_fashion_mnist_is_read_from_its_idx_files(tmp_path, below, compress):
    _, (pixels, labels) = write_fashion(tmp_path / below, compress)
    data = loaders(DataConfig(dataset="fashion_mnist", path=str(tmp_path), batch_size=4))
    images, found = joined(read(data.test))
    padded = np.pad(pixels, ((0, 0), (2, 2), (2, 2))) / 255
    assert found.tolist() == labels.tolist() and data.class_names[9] == "Ankle boot"
    for channel in range(3):
        assert np.allclose(images[:, channel], (padded - data.mean[0]) / data.std[0], atol=1e-5)


@pytest.mark.parametrize("damage", ["truncated", "zipped wrongly", "other kind", "short", "swapped", "gone"])
def test_a_damaged_fashion_mnist_file_is_named(tmp_path, damage):
    write_fashion(tmp_path)
    images, labels = (find_idx_file(tmp_path, name) for name in FASHION_FILES[:2])
    content = images.read_bytes()
    if damage == "truncated":
        images.write_bytes(content[:-30])
    elif damage == "zipped wrongly":
        images.write_bytes(b"no gzip")
    elif damage == "other kind":
        images.write_bytes(labels.read_bytes())
    elif damage == "short":
        images.write_bytes(gzip.compress(gzip.decompress(content)[:-1]))
    elif damage == "swapped":
        labels.write_bytes(find_idx_file(tmp_path, FASHION_FILES[3]).read_bytes())
    else:
        images.unlink()
    with pytest.raises(UserError, match=r"dataloader\.path: .*train-images-idx3-ubyte.*; put "):
        loaders(DataConfig(dataset="fashion_mnist", path=str(tmp_path), batch_size=4), downloads=False)


def test_a_damaged_digits_file_is_named(tmp_path, monkeypatch):
    for content in (None, b"", b"version https://git-lfs"):
        monkeypatch.setattr(datasets, "DIGITS_FILE", tmp_path / "digits.npz")
        if content is not None:
            (tmp_path / "digits.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"digits\.npz: missing or damaged"):
            loaders()


# ---------------------------------------------------------------------------------------------------------------------
# Image folders.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """train/ and val/ with three classes, images of differing sizes, kinds and colour modes."""
    root, rng = tmp_path_factory.mktemp("folder"), np.random.default_rng(0)
    for part, count in (("train", 7), ("val", 3)):
        for label, name in enumerate(("ant", "bee", "cat")):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (20 + number, 30 + label, 3), dtype=np.uint8)
                image = Image.fromarray(pixels)
                image = image.convert("L") if number == 0 else image
                image.save(root / part / name / (f"{number}.png" if number % 2 else f"{number}.JPEG"))
    return root


def folder_config(folder, **changes):
    return replace(DataConfig(dataset="folder", path=str(folder), batch_size=4, workers=0, input_size=24), **changes)


def test_the_number_of_workers_and_ranks_does_not_change_the_images(folder):
    alone = loaders(folder_config(folder))
    workers = loaders(folder_config(folder, workers=2))
    for epoch in (0, 1):  # the second time through the same worker processes
        expected = read(alone.train, epoch)
        assert same(read(workers.train, epoch), expected)
        ranks = [read(loaders(folder_config(folder, batch_size=2), rank=rank, world_size=2).train, epoch)
                 for rank in range(2)]
        assert same([joined(slices) for slices in zip(*ranks, strict=True)], expected)
    assert same(read(workers.train, 1, start_step=2), read(alone.train, 1)[2:])
    assert same(read(workers.test), read(alone.test)) and same(read(workers.test), read(alone.test))
    assert same(read(workers.calibration(9)), read(alone.calibration(9)))


def test_folder_samples_are_augmented_anew_each_epoch_and_leave_the_global_stream_alone(folder):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    data = loaders(folder_config(folder))
    samples = [samples_of(data, epoch) for epoch in (0, 1, 0)]
    common = samples[0].keys() & samples[1].keys()
    assert common and not any(torch.equal(samples[0][index], samples[1][index]) for index in common)
    assert all(torch.equal(samples[0][index], samples[2][index]) for index in samples[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_folder_evaluation_is_resize_and_centre_crop(folder):
    data = loaders(folder_config(folder))
    images, labels = joined(read(data.test))
    assert data.num_classes == 3 and data.class_names == ("ant", "bee", "cat")
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    with Image.open(folder / "val" / "ant" / "1.png") as file:
        width, height = file.size
        short = int(24 * 256 / 224)
        resized = file.resize((int(short * width / height), short), Image.Resampling.BILINEAR)
    left, top = round((resized.width - 24) / 2), round((resized.height - 24) / 2)
    pixels = np.array(resized)[top:top + 24, left:left + 24].transpose(2, 0, 1) / 255
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (datasets.IMAGENET_MEAN, datasets.IMAGENET_STD))
    assert np.allclose(images[1], (pixels - mean) / std, atol=1e-5)


def test_training_crops_are_those_of_torchvision_to_one_grey_level(folder):
    data = loaders(folder_config(folder))
    files, plain = data.train.sampler.indices, transforms.Compose(
        [transforms.RandomResizedCrop(24), transforms.RandomHorizontalFlip(), transforms.PILToTensor()])
    batches = data.train.batches.dataset
    for epoch, index in itertools.product((0, 7), files):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(generator(Stream.AUGMENTATION, 0, epoch, index).integers(2**63)))
            wanted = plain(datasets.read_rgb(os.fsdecode(batches.files[index]))).int()
        assert (batches.read(epoch, index).int() - wanted).abs().max() <= 1


def test_batches_lie_as_networks_want_them(folder):
    data = loaders(folder_config(folder))
    assert all(images.is_contiguous() for images, _ in [*read(data.train), *read(data.test)])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named_in_one_line(tmp_path, workers):
    for part in ("train", "val"):
        for name in ("ant", "bee"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (30, 30)).save(tmp_path / part / name / "good.png")
    (tmp_path / "train" / "bee" / "good.png").write_bytes(b"not an image")
    data = loaders(folder_config(tmp_path, batch_size=2, workers=workers))
    with pytest.raises(UserError) as error:
        read(data.train)
    assert str(tmp_path / "train" / "bee" / "good.png") in str(error.value) and "\n" not in str(error.value)


def stored(tmp_path, name, image, **options):
    """The pixels [height, width, 3] of an image that was saved and read."""
    image.save(tmp_path / name, **options)
    read = datasets.read_rgb(tmp_path / name)
    assert read.mode == "RGB" and torch.equal(datasets.read_pixels(tmp_path / name), pil_to_tensor(read))
    return np.asarray(read)


GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.pgm"])
def test_grey_values_of_16_bits_are_scaled_to_8(tmp_path, name):
    for values, wanted in ((GREY.astype(np.uint16) * 257, GREY),
                           (np.array([[0, 128, 129, 65407, 65406, 32896]], np.uint16), [[0, 0, 1, 255, 254, 128]])):
        assert (stored(tmp_path, name, Image.fromarray(values)) == np.asarray(wanted)[..., None]).all()


def test_other_depths_have_their_own_largest_value(tmp_path):
    (tmp_path / "12.pgm").write_bytes(b"P5 2 1 4095\n" + struct.pack(">2H", 4095, 2048))
    assert np.asarray(datasets.read_rgb(tmp_path / "12.pgm"))[..., 0].tolist() == [[255, 128]]
    for bits, photometric, data, wanted in ((12, 1, b"\xff\xf8\x00", [255, 128]), (16, 1, b"\xff\xff\x00\x80", [255, 128]),
                                            (16, 0, b"\xff\xff\x00\x80", [0, 127])):
        entries = [(256, 2), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 1),
                   (279, len(data))]
        tags = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in entries)
        start = 8 + len(data) + len(data) % 2
        (tmp_path / "x.tif").write_bytes(b"II*\0" + struct.pack("<I", start) + data.ljust(start - 8, b"\0")
                                         + struct.pack("<H", len(entries)) + tags + bytes(4))
        assert np.asarray(datasets.read_rgb(tmp_path / "x.tif"))[0, :, 0].tolist() == wanted


def test_colours_of_16_bits_are_those_of_8(tmp_path):
    height, width = COLOURS.shape[:2]
    rows = b"".join(b"\0" + (row.astype(">u2") * 257).astype(">u2").tobytes() for row in COLOURS)
    chunks = [(b"IHDR", struct.pack(">2I5B", width, height, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks))
    assert (np.asarray(datasets.read_rgb(tmp_path / "x.png")) == COLOURS).all()


def test_ordinary_images_are_what_torchvision_reads(tmp_path):
    image = Image.fromarray(COLOURS)
    for name, kind in (("x.jpg", image), ("x.png", image), ("x.webp", image), ("x.bmp", image), ("x.ppm", image),
                       ("l.jpg", image.convert("L")), ("1.png", image.convert("1")), ("p.png", image.quantize(16)),
                       ("c.jpg", image.convert("CMYK"))):
        pixels = stored(tmp_path, name, kind)
        assert (pixels == np.asarray(torchvision.datasets.folder.default_loader(tmp_path / name))).all(), name


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"quality": 30, "restart_marker_blocks": 1}])
def test_torchvision_decodes_the_same_pixels_of_jpeg_files(tmp_path, monkeypatch, mode, options):
    Image.fromarray(COLOURS.repeat(5, 0).repeat(3, 1)).convert(mode).save(tmp_path / "x.jpg", **options)
    wanted = pil_to_tensor(datasets.read_rgb(tmp_path / "x.jpg"))
    monkeypatch.delattr(datasets, "read_rgb")
    assert torch.equal(datasets.read_pixels(tmp_path / "x.jpg"), wanted)


def outcome(reader, path):
    try:
        return np.asarray(reader(path)).tolist()
    except UserError as error:
        return str(error)


def test_a_damaged_jpeg_file_is_refused_or_read_as_pillow_does(tmp_path):
    Image.fromarray(COLOURS.repeat(5, 0)).save(tmp_path / "x.jpg")
    whole, rng, refused = (tmp_path / "x.jpg").read_bytes(), np.random.default_rng(0), 0
    for number in range(120):
        damaged = bytearray(whole[:rng.integers(1, len(whole))] if number % 3 == 0 else whole)
        damaged[rng.integers(len(damaged))] = rng.integers(256)
        (tmp_path / "x.jpg").write_bytes(damaged)
        wanted = outcome(lambda path: pil_to_tensor(datasets.read_rgb(path)), tmp_path / "x.jpg")
        assert outcome(datasets.read_pixels, tmp_path / "x.jpg") == wanted
        refused += isinstance(wanted, str)
    assert 30 < refused < 110


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.webp", "x.jpg"])
@pytest.mark.parametrize("orientation", range(10))
def test_an_image_stands_upright_as_its_exif_says(tmp_path, name, orientation):
    blocks = COLOURS[:3, :4].repeat(16, 0).repeat(16, 1)
    # What has to be done to an upright image so that a viewer that follows the tag shows it upright.
    turned = {2: blocks[:, ::-1], 3: blocks[::-1, ::-1], 4: blocks[::-1], 5: blocks.swapaxes(0, 1), 6: np.rot90(blocks),
              7: np.rot90(blocks.swapaxes(0, 1), 2), 8: np.rot90(blocks, -1)}.get(orientation, blocks)
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if name == "x.webp" else {"quality": 100, "subsampling": 0} if name == "x.jpg" else {}
    pixels = stored(tmp_path, name, Image.fromarray(np.ascontiguousarray(turned)), exif=exif, **lossless)
    assert pixels.shape == blocks.shape and np.abs(pixels.astype(int) - blocks).max() <= (4 if name == "x.jpg" else 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_are_passed_over(tmp_path):
    pixels = stored(tmp_path, "x.jpg", Image.fromarray(COLOURS), exif=b"Exif\0\0II*\0\xff\xff\xff\0nonsense")
    assert pixels.shape == COLOURS.shape


def test_what_is_transparent_is_white(tmp_path):
    alpha = np.linspace(0, 255, COLOURS[..., 0].size).astype(np.uint8).reshape(COLOURS.shape[:2])
    over = COLOURS * (alpha / 255)[..., None] + 255 * (1 - alpha / 255)[..., None]
    rgba = Image.fromarray(np.dstack([COLOURS, alpha]))
    assert np.abs(stored(tmp_path, "x.png", rgba) - over).max() <= 1
    grey = Image.fromarray(np.dstack([COLOURS[..., 0], alpha]))
    assert np.abs(stored(tmp_path, "la.png", grey) - over[..., :1]).max() <= 1
    one = Image.fromarray(np.array([[[10, 20, 30], [40, 50, 60]]], np.uint8))
    for name, image, transparent, wanted in (
            ("rgb.png", one, (10, 20, 30), [[255, 255, 255], [40, 50, 60]]),
            ("l.png", Image.fromarray(np.array([[10, 40]], np.uint8)), 40, [[10] * 3, [255] * 3]),
            ("deep.png", Image.fromarray(np.array([[257, 514]], np.uint16)), 514, [[1] * 3, [255] * 3]),
            ("p.png", one.quantize(2), 0, None), ("p.gif", one.quantize(2), 0, None)):
        pixels = stored(tmp_path, name, image, transparency=transparent)
        white = (pixels == 255).all(2).tolist()
        assert (pixels == [wanted]).all() if wanted else white in ([[True, False]], [[False, True]]), name


def test_other_colour_spaces_and_the_first_of_several_frames(tmp_path):
    red = Image.new("RGB", (8, 8), (200, 30, 40))
    lab = Image.new("LAB", (8, 8), (round(43.3 * 2.55), 128 + 63, 128 + 41))
    assert np.abs(stored(tmp_path, "lab.tif", lab).astype(int) - [200, 30, 40]).max() <= 6
    assert np.abs(stored(tmp_path, "ycc.tif", red.convert("YCbCr")).astype(int) - [200, 30, 40]).max() <= 3
    blue = Image.new("RGB", (8, 8), (0, 0, 255))
    for name in ("x.tif", "x.gif", "x.png", "x.webp"):
        pixels = stored(tmp_path, name, red, save_all=True, append_images=[blue], lossless=True)
        assert np.abs(pixels.astype(int) - [200, 30, 40]).max() <= 1, name


@pytest.mark.parametrize(("name", "values"), [
    ("x.tif", np.array([[0, 2**31 - 1]], np.int32)), ("x.tif", np.array([[0.0, 0.5]], np.float32)),
    ("x.pfm", np.array([[0.0, 0.5]], np.float32))])
def test_pixels_without_a_defined_range_are_refused_by_name(tmp_path, name, values):
    Image.fromarray(values).save(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: its pixels are .*, which have no defined range"):
        datasets.read_rgb(tmp_path / name)


def test_deep_images_give_the_batches_of_their_8_bit_versions(tmp_path):
    rng = np.random.default_rng(0)
    for part, label, number in itertools.product(("train", "val"), range(2), range(4)):
        pixels = rng.integers(0, 128, (30, 34), dtype=np.uint8) + np.uint8(128 * label)
        for depth, values in ((8, pixels), (16, pixels.astype(np.uint16) * 257)):
            path = tmp_path / str(depth) / part / str(label)
            path.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(path / f"{number}.png")
    plain, deep = (loaders(folder_config(tmp_path / depth)) for depth in ("8", "16"))
    assert same(read(deep.train, 1), read(plain.train, 1)) and same(read(deep.test), read(plain.test))


class Ahead:
    """Moves batches as SideStream does, and notes what happens when."""

    def __init__(self):
        self.noted = []

    def begin(self, batch):
        self.noted.append(f"begin {len(self.noted)}")
        return batch, self.noted[-1]

    def finish(self, begun):
        self.noted.append(begun[1].replace("begin", "finish"))
        return begun[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_that_are_moved_one_ahead_are_the_same(folder, workers):
    plain, ahead = loaders(folder_config(folder)), loaders(folder_config(folder, workers=workers))
    ahead.train.transfer = ahead.test.transfer = Ahead()
    assert same(read(ahead.train, 1), read(plain.train, 1))
    assert same(read(ahead.train, 1, start_step=2), read(plain.train, 1)[2:])
    assert same(read(ahead.test), read(plain.test))
    for _ in ahead.train:  # a signal, or an error, stops in the middle
        break
    assert same(read(ahead.train, 2), read(plain.train, 2))


def test_a_batch_is_begun_before_the_one_before_it_is_given_out():
    noted = []
    for batch in one_ahead("abc", lambda batch: noted.append(f"begin {batch}") or batch, str.upper):
        noted.append(f"use {batch}")
    assert noted == ["begin a", "begin b", "use A", "begin c", "use B", "use C"]
    assert list(one_ahead("", str.lower, str.upper)) == [] and list(one_ahead("a", str.lower, str.upper)) == ["A"]


def test_an_error_in_place_of_a_batch_comes_after_the_batches_before_it():
    def batches():
        yield from "ab"
        raise UserError("cannot be read")

    given_out = []
    with pytest.raises(UserError, match="cannot be read"):
        for letter in one_ahead(batches(), str.lower, str.upper):
            given_out.append(letter)
    assert given_out == ["A", "B"]


def test_a_stream_of_its_own_is_waited_for_batch_by_batch(monkeypatch):
    noted = []

    class FakeStream:
        def __init__(self, name="side"):
            self.name = name

        def record_event(self):
            return f"event {len(noted)}"

        def wait_event(self, event):
            noted.append((self.name, "waits for", event))

    class Part:
        def to(self, device, non_blocking):
            noted.append((self, "to", device, non_blocking))
            return self

        def record_stream(self, stream):
            noted.append((self, "used on", stream.name))

    entered = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: entered.append(stream.name) or contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream("computing"))
    transfer, first, second = SideStream("cuda:0"), Part(), Part()
    begun = [transfer.begin([first]), transfer.begin([second])]
    assert transfer.finish(begun[0]) == [first] and entered == ["side", "side"]
    assert noted == [(first, "to", "cuda:0", True), (second, "to", "cuda:0", True), ("computing", "waits for", "event 1"),
                     (first, "used on", "computing")]


def test_workers_leave_interrupts_to_the_main_process(folder, monkeypatch):
    ignored = torch.full((3, 24, 24), 255, dtype=torch.uint8)

    def read_signal(*_):
        return ignored if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else ignored * 0

    monkeypatch.setattr(FileBatches, "read", read_signal)
    data = loaders(folder_config(folder, workers=1, mean=[0.0] * 3, std=[1.0] * 3))
    assert joined(read(data.train))[0].min() == 1


@pytest.mark.parametrize("problem", ["train", "val", "flat", "nested", "empty class", "classes differ", "num_classes"])
def test_a_wrong_folder_says_what_to_put_where(tmp_path, problem):
    for part in ("train", "val"):
        for name in ("ant", "bee"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / part / name / "0.png")
    config, expected = folder_config(tmp_path), None
    if problem in ("train", "val"):
        os.rename(tmp_path / problem, tmp_path / "elsewhere")
        part = "training" if problem == "train" else "validation"
        expected = f"{tmp_path / problem} is missing; put the {part} images there, one folder per class"
    elif problem == "flat":
        os.rename(tmp_path / "val" / "ant", tmp_path / "ant")
        os.rename(tmp_path / "val" / "bee", tmp_path / "bee")
        expected = f"{tmp_path / 'val'} holds no class folders; put"
    elif problem == "nested":
        os.rename(tmp_path / "train", tmp_path / "images")
        (tmp_path / "train").mkdir()
        os.rename(tmp_path / "images", tmp_path / "train" / "images")
        expected = "holds one class folder, images, allowed are at least 2; its own folders look like classes"
    elif problem == "empty class":
        (tmp_path / "train" / "bee" / "0.png").unlink()
        expected = f"{tmp_path / 'train' / 'bee'} holds no images"
    elif problem == "classes differ":
        os.rename(tmp_path / "val" / "bee", tmp_path / "val" / "wasp")
        expected = "class bee is in"
    else:
        config, expected = replace(config, num_classes=10), "found 10, but"
    with pytest.raises(UserError) as error:
        loaders(config)
    assert expected in str(error.value) and str(error.value).startswith("dataloader.")


def test_imagenet_needs_its_1000_classes(tmp_path):
    missing = DataConfig(path="/nowhere", num_classes=1000)
    assert describe_data(missing) == (1000, 224)
    with pytest.raises(UserError) as error:
        loaders(missing)
    assert str(error.value) == ("dataloader.path: /nowhere/train is missing; put ImageNet's training images there, one "
                                "folder per class")
    Image.new("RGB", (40, 30), (255, 0, 0)).save(tmp_path / "red.jpg")
    for part in ("train", "val"):
        for label in range(1000):
            (tmp_path / part / f"n{label:08}").mkdir(parents=True)
            os.link(tmp_path / "red.jpg", tmp_path / part / f"n{label:08}" / "0.JPEG")
    data = loaders(DataConfig(path=str(tmp_path), batch_size=2, workers=0))
    images, labels = next(iter(data.train))
    assert images.shape == (2, 3, 224, 224) and data.train.images == data.test.images == 1000
    assert len(set(labels.tolist())) == 2 and data.mean == datasets.IMAGENET_MEAN
    (tmp_path / "train" / "n00000007" / "0.JPEG").unlink()
    for part in ("train", "val"):
        os.rename(tmp_path / part / "n00000007", tmp_path / f"without {part}")
    with pytest.raises(UserError, match="holds 999 class folders, ImageNet has 1000"):
        loaders(DataConfig(path=str(tmp_path), batch_size=2, workers=0))


# ---------------------------------------------------------------------------------------------------------------------
# Configuration.


def test_describe_data_knows_classes_and_size_without_the_files():
    known = {"imagenet": (1000, 224), "cifar10": (10, 32), "cifar100": (100, 32), "fashion_mnist": (10, 32),
             "digits": (10, 32)}
    for dataset, expected in known.items():
        assert describe_data(DataConfig(dataset=dataset)) == expected
    assert describe_data(DataConfig(dataset="folder", num_classes=7, input_size=96)) == (7, 96)
    assert describe_data(DataConfig(dataset="digits", input_size=16)) == (10, 16)


def test_describe_data_counts_the_folders_of_an_own_set(folder):
    assert describe_data(DataConfig(dataset="folder", path=str(folder))) == (3, 224)


@pytest.mark.parametrize(("config", "expected"), [
    (DataConfig(dataset="cifar10", num_classes=1000), "dataloader.num_classes: found 1000, CIFAR-10 has 10 classes"),
    (DataConfig(dataset="cifar100", input_size=64), "dataloader.input_size: found 64, CIFAR-100 is used at 32 x 32"),
    (DataConfig(dataset="fashion_mnist", input_size=28), "dataloader.input_size: found 28"),
    (DataConfig(dataset="cifar10"), "dataloader.path: dataset cifar10 needs"),
    (DataConfig(dataset="folder"), "dataloader.path: dataset folder needs"),
    (replace(DIGITS, batch_size=1439), "dataloader.batch_size: found 1439, but only 1438 images are left for training"),
    (replace(DIGITS, batch_size=800, val_split=0.5), "but only 717 images are left for training; take at most 717"),
])
def test_a_contradiction_is_refused(config, expected):
    with pytest.raises(UserError) as error:
        loaders(config)
    assert expected in str(error.value)


def test_too_large_a_batch_over_all_ranks_is_refused():
    with pytest.raises(UserError, match="found 4 processes x 400, but only 1438 .* take at most 359"):
        loaders(replace(DIGITS, batch_size=400), rank=3, world_size=4)
    assert len(loaders(replace(DIGITS, batch_size=359), rank=3, world_size=4).train) == math.floor(1438 / 359 / 4)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the sender of a signal is not told")
def test_workers_obey_sigterm_of_the_main_process_and_of_nobody_else():
    ready, tell = multiprocessing.Pipe(duplex=False)
    worker = multiprocessing.get_context("fork").Process(target=wait_as_worker, args=(tell,))
    worker.start()
    assert ready.recv()
    subprocess.run(["sh", "-c", f"kill -TERM {worker.pid}"], check=True)
    worker.join(timeout=0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(timeout=10)
    assert worker.exitcode == 0


def wait_as_worker(tell):
    leave_signals_to_main(0)
    tell.send(True)
    time.sleep(60)


def test_a_worker_that_is_lost_is_told_in_one_line(folder, monkeypatch, capsys):
    monkeypatch.setattr(FileBatches, "read", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(SystemExit) as stop, user_errors_on_one_line():
        read(loaders(folder_config(folder, workers=1)).train)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert "error: a process that reads images was lost" in said and "lower dataloader.workers" in said
