"""Packed models: the same logits bit for bit, the size that was promised, and one line about a file that is none."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import deserialize
from safetensors.numpy import save
from test_finetuning import HEADS

import export
import folding
import main
import packed_file
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.schema import DataConfig
from folding import find_folds, fold_batchnorms
from fuzzing import PLAIN_JUNK, changed_bytes, changed_value, inputs, outcome
from model.model import create_traced
from network import build_network
from packed_file import KEY, NO_CHECKSUM, PackedLayer, read_packed, serialize
from packed_network import as_checkpoint, load_any, rebuild
from preprocessing import describe_preprocessing, read_image
from quan.config import ActQuantizerConfig, QuanConfig, QuantizerConfig
from quan.utils import name_exceptions, searchable_layers
from schema import FinetuneConfig
from util.config import to_plain
from util.datasets import read_digits
from util.errors import UserError, user_errors_on_one_line

JUNK = [value for value in PLAIN_JUNK if not (isinstance(value, list) and len(value) == 10)]  # but the one without an end
CPU, FILE, PACKED = torch.device("cpu"), "run.pth.tar", "model.safetensors"
SIGNED = QuanConfig(act=ActQuantizerConfig(all_positive=False))
PER_CHANNEL = QuanConfig(weight=QuantizerConfig(per_channel=True))
CONFIG = """
name: run
arch: resnet20
weight_bits: 3
act_bits: 4
dataloader: {dataset: digits, input_size: 16, batch_size: 64, data_fraction: 0.2}
wandb: {mode: disabled}
epochs: 2
lr: 0.05
"""
OWN = """
import pathlib
import re
from torch import nn

def tiny(num_classes):
    pathlib.Path("was_run").touch()
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(4, num_classes))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def images(size, count=4):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(7))


def write_checkpoint(arch, size, sparsity=None, path=FILE, bits=None, **changes):
    """A checkpoint of a network at mixed bits whose steps and statistics come from one batch; return its PolicyNetwork."""
    torch.manual_seed(0)
    config = FinetuneConfig(**{"arch": arch, "weight_bits": 4, "act_bits": 4, **changes})
    if bits is None:
        graph = create_traced(arch, 10, False, size)[1]
        count = len(searchable_layers(graph, name_exceptions(config, graph)[0].quan.excepts))
        mixed = [2 + index % 7 for index in range(count)]
        bits = {"weight_bits": mixed, "act_bits": mixed[::-1]}
    network = build_network(FinetuneConfig(**{**vars(config), **bits}), 10, size, None, CPU)
    network.model.train()(images(size, 8))
    if sparsity is not None:
        network.pruned.set({f"{name}.weight": torch.rand(call.shape) >= sparsity
                            for name, call in network.graph.layers.items() if name in network.metadata["weight_bits"]})
        network.pruned.apply()
    network.model.eval()
    save_checkpoint(path, {"arch": arch, "state_dict": network.model.state_dict(), "config": to_plain(network.config),
                           "masks": network.pruned.masks, **network.metadata})
    return network


@torch.no_grad()
def logits(model, size):
    return model.eval()(images(size))


def exported(*arguments):
    """The packed model that the command writes."""
    export.main([FILE, "--output", PACKED, *arguments])
    return read_packed(PACKED)


@pytest.mark.parametrize(("arch", "size", "sparsity", "changes"), [
    ("resnet20", 16, None, {"quan": PER_CHANNEL}), ("resnet20", 16, 0.8, {}), ("resnet20", 16, 0.5, {"quan": PER_CHANNEL}),
    ("mobilenet_v2", 32, None, {}), ("vit_tiny_patch4_32", 32, None, {"quan": SIGNED})])
def test_a_packed_model_gives_the_logits_of_its_checkpoint_bit_for_bit_at_the_size_that_was_promised(
        arch, size, sparsity, changes, capsys):
    network = write_checkpoint(arch, size, sparsity, **changes)
    expected = logits(network.model, size)
    packed = exported()
    assert expected.std() > 1e-3
    assert torch.equal(logits(rebuild(as_checkpoint(packed), PACKED).model, size), expected)
    assert "equal to the checkpoint's, bit for bit" in capsys.readouterr().out
    promised = network.cost["size_mb" if sparsity is None else "sparse_size_mb"] * 2**20
    sizes = export.itemise(packed)
    assert abs(sizes["packed weights"] / promised - 1) < 1e-3
    assert sum(sizes.values()) == os.path.getsize(PACKED) == packed.size
    assert any(layer.kept for layer in packed.layers.values()) == (sparsity is not None)
    for name, bit in network.metadata["weight_bits"].items():
        assert packed.layers[name].bits == bit and packed.layers[name].signed


SUBCLASSES = """
import torch.nn.functional as F
from torch import nn

class Own(nn.Conv2d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = 2.0

class Deeper(Own):
    pass

class OwnLinear(nn.Linear):
    pass

class Cosine(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x), F.normalize(self.weight)) * 9

class Net(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.stem, self.norm = Own(3, 4, 3), nn.BatchNorm2d(4)
        self.body, self.norm2 = Deeper(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.hidden, self.head = OwnLinear(6, 8), head

    def forward(self, x):
        x = self.norm2(self.body(self.norm(self.stem(x)).relu() * self.body.gain)).relu()
        return self.head(self.hidden(x.mean((2, 3))).relu())

def net(num_classes):
    return Net(OwnLinear(8, num_classes))

def cosine(num_classes):
    return Net(Cosine(8, num_classes))
"""


@pytest.mark.parametrize("factory", ["net", "cosine"])
def test_subclasses_of_layers_are_packed_and_a_classifier_of_an_own_kind_stays_as_it_is(factory, capsys):
    pathlib.Path("net.py").write_text(SUBCLASSES)
    network = write_checkpoint(f"net.py:{factory}", 12)
    assert list(network.metadata["weight_bits"]) == ["body", "hidden"]
    assert list(network.config.quan.excepts) == ["stem", "norm", *(["head"] if factory == "net" else [])]
    assert ("head: its class Cosine has a forward of its own" in network.remark) == (factory == "cosine")
    for flags in ((), ("--fold-bn",)):
        packed = exported("--arch", f"net.py:{factory}", *flags)
        assert list(packed.layers) == ["stem", "body", "hidden", *(["head"] if factory == "net" else [])]
        found = logits(rebuild(as_checkpoint(packed), PACKED, f"net.py:{factory}").model, 12)
        torch.testing.assert_close(found, logits(network.model, 12), rtol=0, atol=1e-4 if flags else 0)
    assert "2 BatchNorms folded" in capsys.readouterr().out


def test_a_packed_model_scales_the_classifiers_that_were_scaled_in_training():
    pathlib.Path("net.py").write_text(HEADS)
    network = write_checkpoint("net.py:constant", 8)
    header = exported("--arch", "net.py:constant").header
    assert network.config.sat and network.metadata["scaled"] == header["scaled"] == ["heads.1"]
    model = rebuild(load_any(PACKED), PACKED, "net.py:constant").model
    assert not model.heads[0].sat and torch.equal(logits(model, 8), logits(network.model, 8))


def test_what_a_mask_removed_is_removed_in_the_packed_model_too():
    network = write_checkpoint("resnet20", 16, 0.8)
    exported()
    again = load_any(PACKED)
    for name, mask in again["masks"].items():
        assert torch.equal(mask, network.pruned.masks[name])
    assert len(again["masks"]) > 10


def test_a_module_under_two_names_is_packed_once():
    pathlib.Path("net.py").write_text(OWN.replace("return nn.Sequential(", "block = nn.Conv2d(4, 4, 1)\n    "
                                                  "return nn.Sequential(").replace("nn.ReLU(), ", "block, nn.ReLU(), block, "))
    network = write_checkpoint("net.py:tiny", 16)
    packed = exported("--arch", "net.py:tiny")
    assert packed.header["shared"] and "3.weight" not in packed.tensors
    model = rebuild(as_checkpoint(packed), PACKED, "net.py:tiny").model
    assert torch.equal(logits(model, 16), logits(network.model, 16)) and model[1] is model[3]


def trained(*overrides):
    """A small run on digits; the path of its checkpoint."""
    pathlib.Path("config.yaml").write_text(CONFIG)
    main.main(["config.yaml", *overrides])
    return "results/run/run_checkpoint.pth.tar"


@pytest.mark.usefixtures("shallow")
def test_a_trained_network_is_evaluated_shown_and_classifies_from_its_packed_file(capsys):
    path = trained()
    export.main([path, "--output", PACKED, "--report", "report.html"])
    capsys.readouterr()
    check_report(pathlib.Path("report.html").read_text())
    said = {}
    for file in (path, PACKED):
        main.main(["config.yaml", "eval=true", f"resume.path={file}", "arithmetic=float"])
        said[file] = capsys.readouterr().out.splitlines()[-1].replace(file, "")
    assert said[path] == said[PACKED] and "top-1" in said[PACKED]
    check_inspection()
    check_predictions(path, capsys)


def check_report(page):
    """A page that needs nothing else, with every layer, accuracy, both sizes, two plots and the configuration."""
    packed, summary = read_packed(PACKED), yaml.safe_load(pathlib.Path("results/run/summary.yaml").read_text())
    words = re.sub(r"base64,[^\"']*", "", page)  # plots may hold any letters
    assert "http" not in words and "<script" not in words
    assert page.count('src="data:image/png;base64,') == page.count("src=") == 2
    promised, ratio = packed.header["cost"]["size_mb"] * 2**20, packed.header["cost"]["ratio"]
    for words in (*packed.layers, f"{summary['top1']:.2f} %", f"{export.itemise(packed)['packed weights']:,} ",
                  f"promised by the search: {promised:,.0f} ", f"{packed.header['cost']['gbitops']:.3f} G",
                  f"weights alone are {ratio:.2f}x smaller", f"{packed.size:,} ", "batch_size: 64",
                  "python export.py results/run"):
        assert words in page, words


def check_inspection():
    """--inspect works where there is no torch at all."""
    code = f"import sys; sys.modules['torch'] = None; import export; export.main(['--inspect', {PACKED!r}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": str(pathlib.Path(export.__file__).parent)})
    lines = done.stdout.splitlines()
    assert next(line for line in lines if line.startswith("layer3.0.conv2")).split() == [
        "layer3.0.conv2", "conv", "64x64x3x3", "3", "s", "4", "u",
        f"{100 * read_packed(PACKED).layers['layer3.0.conv2'].zeros / 36864:.2f}", "13,824", "integer"]
    assert lines[2].endswith(" float: its input is not quantized") and lines[9].endswith(
        " float: 8 by 8 bits: two products may exceed 16 bits")
    assert f"in all {os.path.getsize(PACKED):,}" in done.stdout


@pytest.mark.parametrize(("dataset", "size"), [("digits", 8), ("fashion_mnist", 32), ("folder", 16)])
def test_an_image_is_predicted_from_the_same_pixels_whatever_its_depth(tmp_path, monkeypatch, dataset, size):
    monkeypatch.chdir(tmp_path)
    preprocessing = describe_preprocessing(DataConfig(dataset=dataset), size)
    grey = np.random.default_rng(0).integers(0, 256, (size, size + 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(grey).save("8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save("16.png")
    Image.fromarray(np.ascontiguousarray(grey[::-1, ::-1])).save("turned.png", exif=exif)
    Image.fromarray(np.dstack([grey, np.full_like(grey, 255)])).save("alpha.png")
    wanted = read_image("8.png", preprocessing, size)
    assert wanted.shape == (3, size, size)
    assert all(torch.equal(read_image(name, preprocessing, size), wanted) for name in ("16.png", "turned.png", "alpha.png"))
    Image.fromarray(grey.astype(np.float32)).save("float.tif")
    with pytest.raises(UserError, match="float.tif: its pixels are floats"):
        read_image("float.tif", preprocessing, size)


def check_predictions(path, capsys):
    """--predict names the classes that the checkpoint gives to the same pixels."""
    pixels = read_digits(16)[1].images[:5]
    names = [f"{index}.png" for index in range(5)]
    for name, image in zip(names, pixels, strict=True):
        Image.fromarray(image[0].numpy()).save(name)
    export.main(["--predict", PACKED, *names, "--arithmetic", "float"])
    said = capsys.readouterr().out.splitlines()
    facts = read_packed(PACKED).header["preprocessing"]
    batch = (pixels.float() / 255 - facts["mean"][0]) / facts["std"][0]
    with torch.no_grad():
        shares, classes = rebuild(load_checkpoint(path), path).model(batch.expand(-1, 3, -1, -1)).softmax(1).max(1)
    assert [line.split(",")[0] for line in said] == [f"{name}: {label} ({100 * share:.1f} %)" for name, label, share
                                                     in zip(names, classes.tolist(), shares.tolist(), strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Inputs that are left alone.


def test_inputs_at_32_bits_are_left_alone_from_training_to_the_packed_file(capsys):
    pathlib.Path("net.py").write_text(OWN)
    path = trained("arch=net.py:tiny", "act_bits=32", "weight_bits=[3]", "epochs=1")
    content = load_checkpoint(path)
    assert content["act_bits"] == {"2": 32} and content["weight_bits"] == {"2": 3} and content["signed"].keys() == {"6"}
    assert not [name for name in content["state_dict"] if name.startswith("2.quan_a_fn")]
    model = rebuild(content, path, "net.py:tiny").model
    entered = []
    model[2].register_forward_hook(lambda module, inputs, output: entered.append((inputs[0], output)))
    expected = logits(model, 16)
    weight = model[2].quan_w_fn(model[2].weight)
    assert torch.equal(torch.nn.functional.conv2d(entered[0][0], weight, model[2].bias), entered[0][1])
    export.main([path, "--output", PACKED, "--arch", "net.py:tiny"])
    packed = read_packed(PACKED)
    assert packed.layers["2"].act_bits is None and packed.layers["2"].searched
    assert torch.equal(logits(rebuild(as_checkpoint(packed), PACKED, "net.py:tiny").model, 16), expected)
    macs = 4 * 3 * 9 * 14**2 * 64 + 4 * 4 * 9 * 12**2 * 3 * 32 + 4 * 10 * 64
    assert abs(packed.header["cost"]["gbitops_exact"] * 1e9 - macs) < 1
    export.main(["--inspect", PACKED])
    assert capsys.readouterr().out.splitlines()[-4].split()[3:6] == ["3", "s", "-"]
    main.main(["config.yaml", "arch=net.py:tiny", "act_bits=32", "weight_bits=[3]", "eval=true", f"resume.path={PACKED}"])
    assert "top-1" in capsys.readouterr().out


def test_weights_cannot_be_left_alone(capsys):
    pathlib.Path("config.yaml").write_text(CONFIG)
    assert "weight_bits: found 32, expected a bit-width from 2 to 8" in complaint(
        capsys, main.main, "config.yaml", "weight_bits=32")
    assert "act_bits: found 16, expected a bit-width from 2 to 8, or 32 for an input that is left alone" in complaint(
        capsys, main.main, "config.yaml", "act_bits=16")


# ---------------------------------------------------------------------------------------------------------------------
# What stays in full precision.

LEFT_ALONE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.up, self.wide = nn.Conv2d(3, 4, 3, 2, 1), nn.ConvTranspose2d(4, 5, 2, 2), nn.Conv2d(5, 6, 3)
        self.init_state = nn.Parameter(torch.randn(1))
        self.block = nn.Module()
        self.block.init_state, self.block.num_batches_tracked = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))
        self.position = nn.Parameter(torch.randn(1, 6, 6, 6).contiguous(memory_format=torch.channels_last))
        self.turned = nn.Parameter(torch.randn(6, 7).T)
        self.tied = self.turned
        self.last = nn.Linear(7, num_classes)
        for name, tensor in {"scale": torch.tensor(1.5), "flip": torch.tensor([True, False] * 3),
                             "order": torch.tensor([5, 4, 3, 2, 1, 0], dtype=torch.int32), "nothing": torch.zeros(0, 3),
                             "part": torch.randn(6, 2)[:, 1], "coarse": torch.randn(6).bfloat16(),
                             "fine": torch.randn(6, dtype=torch.float64)}.items():
            self.register_buffer(name, tensor)

    def forward(self, x):
        x = self.wide(self.up(self.conv(x)).relu()) + self.position
        x = x.mean((2, 3))[:, self.order] * self.scale * self.init_state
        x = torch.where(self.flip, x, -x) + self.part + self.coarse + self.block.init_state
        x = x + self.fine.float() + self.nothing.sum()
        return self.last((x + self.block.num_batches_tracked) @ self.turned.T)
"""


def test_tensors_of_any_type_and_order_in_memory_are_stored_as_they_are():
    pathlib.Path("net.py").write_text(LEFT_ALONE)
    network = write_checkpoint("net.py:Net", 7)
    expected = logits(network.model, 7)
    packed = exported("--arch", "net.py:Net")
    model = rebuild(as_checkpoint(packed), PACKED, "net.py:Net").model
    assert torch.equal(logits(model, 7), expected) and expected.std() > 1e-3
    again = model.state_dict()
    for name, tensor in network.model.state_dict().items():
        if not name.endswith(("conv.weight", "wide.weight", "last.weight")) and "quan_" not in name:
            assert torch.equal(again[name], tensor) and again[name].dtype == tensor.dtype, name


def changed_network(change):
    own = OWN.replace("return ", "net = ").replace("import pathlib", "import pathlib\nimport torch")
    pathlib.Path("net.py").write_text(f"{own}    net.{change}\n    return net\n")


@pytest.mark.parametrize("change", ["bfloat16()", "double()", "half()", "requires_grad_()[2].double()"])
def test_parameters_of_another_type_are_trained_and_packed_in_float32(change, capsys):
    changed_network(change)
    network = write_checkpoint("net.py:tiny", 16)
    assert "converted to float32" in capsys.readouterr().err
    packed = exported("--arch", "net.py:tiny")
    assert torch.equal(logits(rebuild(as_checkpoint(packed), PACKED, "net.py:tiny").model, 16), logits(network.model, 16))
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in network.model.state_dict().values())


@pytest.mark.parametrize(("tensor", "found"), [
    ("torch.zeros(2, dtype=torch.cfloat)", "torch.complex64"), ("torch.zeros(1).expand(3)", "an expanded tensor"),
    ("torch.zeros(2).to(torch.float8_e4m3fn)", "torch.float8_e4m3fn"),
    ("torch.eye(2).to_sparse()", "torch.float32, torch.sparse_coo"),
    ("torch.nn.parameter.UninitializedBuffer()", "a UninitializedBuffer")])
def test_a_tensor_that_no_checkpoint_holds_is_refused_before_training(tensor, found, capsys):
    changed_network(f"register_buffer('extra', {tensor})")
    pathlib.Path("config.yaml").write_text(CONFIG)
    said = complaint(capsys, main.main, "config.yaml", "arch=net.py:tiny")
    assert f"arch: net.py:tiny: extra: a checkpoint cannot hold it ({found}" in said
    assert not os.path.exists("results")


@pytest.mark.parametrize("kind", [*packed_file.NUMPY_TYPES.values()])
def test_a_file_holds_the_values_of_arrays_whatever_their_strides(kind):
    rng = np.random.default_rng(3)
    header, layers, tensors = tiny()
    for index in range(40):
        shape = rng.integers(0, 4, rng.integers(0, 5))
        steps = tuple(np.s_[::int(step)] for step in rng.choice([2, -2], len(shape)))
        some = rng.integers(0, 2**15, (2 * shape).tolist()).astype(kind)[steps]
        tensors[f"other.{index}"] = some.transpose(rng.permutation(len(shape))) if index % 3 else np.asfortranarray(some)
    found = packed_file.parse_packed(serialize(header, layers, tensors), PACKED).tensors
    for name, tensor in tensors.items():
        assert found[name].shape == tensor.shape and np.array_equal(found[name], tensor), name


@pytest.mark.usefixtures("shallow")
def test_a_file_with_other_logits_is_not_left_behind_and_an_older_one_stays(capsys, monkeypatch):
    write_checkpoint("resnet20", 16)
    whole = export.serialize
    for before in (None, b"an older file"):
        if before:
            write(before)
        for flags in ([], ["--fold-bn"]):
            monkeypatch.setattr(export, "serialize", lambda header, layers, tensors: whole(header, layers, {
                **tensors, "layer2.0.conv1.weight": tensors["layer2.0.conv1.weight"][::-1].copy()}))
            assert "gives other outputs than" in complaint(capsys, export.main, FILE, "--output", PACKED, *flags)
            assert sorted(os.listdir()) == sorted([FILE] + [PACKED] * bool(before))
            assert not before or pathlib.Path(PACKED).read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# Folded BatchNorms.


@pytest.mark.usefixtures("shallow")
def test_folded_batchnorms_change_each_layer_by_rounding_only(capsys):
    network = write_checkpoint("resnet20", 16, 0.5)
    with torch.no_grad():
        for index, name in enumerate(network.graph.batchnorms):
            batchnorm = network.model.get_submodule(name)
            batchnorm.weight.normal_().mul_(torch.arange(len(batchnorm.weight)) != index)  # negative ones, and a zero
            batchnorm.bias.normal_()
            batchnorm.running_var.uniform_(0.5, 2)
    content = {**load_checkpoint(FILE), "state_dict": network.model.state_dict()}
    save_checkpoint(FILE, content)
    expected = outputs_of_batchnorms(network.model)
    folds = find_folds(network.model, images(16))
    assert folds.keys() == network.graph.batchnorms.keys()
    fold_batchnorms(network.model, folds)
    for name, convolution in folds.items():
        layer, (entering, leaving) = network.model.get_submodule(convolution), expected[name]
        assert torch.allclose(layer(entering), leaving, rtol=1e-5, atol=1e-5 * leaving.abs().max().item())
    before = [layer.zeros for layer in exported().layers.values()]
    folded = exported("--fold-bn")
    assert all(layer.zeros >= count for layer, count in zip(folded.layers.values(), before, strict=True))
    assert export.itemise(folded)["BatchNorm"] == 0 and "BatchNorms folded" in capsys.readouterr().out
    assert torch.equal(logits(rebuild(as_checkpoint(folded), PACKED).model, 16), logits(network.model, 16))


@torch.no_grad()
def outputs_of_batchnorms(model):
    """{BatchNorm: (input of the convolution before it, its output)}."""
    entered, found = {}, {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2].startswith("conv"):
            module.register_forward_pre_hook(
                lambda module, inputs, name=name: entered.__setitem__(name.replace("conv", "bn"), inputs[0]))
        elif name.rpartition(".")[2].startswith("bn"):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: found.__setitem__(name, (entered[name], output.clone())))
    logits(model, 16)
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return found


def test_a_batchnorm_whose_input_something_else_uses_is_left():
    pathlib.Path("net.py").write_text("""
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.relu, self.bn2 = nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)
        self.conv3, self.bn3, self.fc = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, num_classes)

    def forward(self, x):
        x = self.conv(x)
        x = self.bn2(self.relu(self.conv2(x + self.bn(x))))
        return self.fc(self.bn3(self.conv3(x)).mean((2, 3)))
""")
    assert find_folds(write_checkpoint("net.py:Net", 8).model, images(8)) == {"bn3": "conv3"}


FOLDED = """
import torch
from torch import nn

class Own(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()

class Same(nn.BatchNorm2d):
    pass

class Constant(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(True)

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.first, self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, num_classes)
        self.bn = nn.BatchNorm2d(4)
        {change}

    def body(self, x):
        {body}

    def forward(self, x):
        return self.fc(self.body(self.first(x)).mean((2, 3)))
"""
USUAL = "return self.bn(self.conv(x))"


@pytest.mark.parametrize(("change", "body", "folds"), [
    ("pass", USUAL, True), ("self.bn.momentum = None", USUAL, True), ("self.bn = nn.BatchNorm2d(4, eps=3.)", USUAL, True),
    ("self.bn = nn.BatchNorm2d(4, affine=False)", USUAL, True), ("self.bn.bias = None", USUAL, True),
    ("self.conv = nn.Conv2d(4, 4, 3, padding=1, padding_mode='reflect', groups=2)", USUAL, True),
    ("self.bn = nn.BatchNorm2d(4, track_running_stats=False)", USUAL, False),
    ("self.bn = Own(4)", USUAL, False), ("self.bn = Same(4)", USUAL, False), ("self.bn = Constant(4)", USUAL, False),
    ("self.bn = nn.SyncBatchNorm(4)", USUAL, False),
    ("self.bn.forward = lambda x: x.relu()", USUAL, False),
    ("self.bn.register_forward_hook(lambda module, inputs, output: output.relu())", USUAL, False),
    ("self.bn.register_forward_pre_hook(lambda module, inputs: inputs[0].relu())", USUAL, False),
    ("nn.utils.parametrizations.weight_norm(self.bn, dim=None)", USUAL, False),
    ("pass", "return self.bn(self.bn(self.conv(x)))", False), ("pass", "return self.bn(self.conv(self.conv(x)))", False),
    ("pass", "y = self.conv(x); return self.bn(y) + y", False), ("pass", "return self.bn(self.conv(x).relu_())", False),
    ("pass", "y = self.conv(x); y[:, 0] = 0; return self.bn(y)", False),
    ("pass", "y = self.conv(x); z = y[:, :1]; z.zero_(); return self.bn(y)", False),
    ("pass", "return self.bn(self.conv(x)) * self.bn.weight.sum()", False),
    ("pass", "return self.bn(self.conv(x)) + self.bn.forward(x)", False)])
def test_what_computes_something_else_is_not_folded(change, body, folds):
    torch.manual_seed(0)
    pathlib.Path("net.py").write_text(FOLDED.format(change=change, body=body))
    network = write_checkpoint("net.py:Net", 6)
    assert find_folds(network.model, images(6)) == ({"bn": "conv"} if folds else {})
    export.main([FILE, "--output", PACKED, "--arch", "net.py:Net", "--fold-bn"])
    found = logits(rebuild(load_any(PACKED), PACKED, "net.py:Net").model, 6)
    assert torch.allclose(found, logits(network.model, 6), rtol=1e-4, atol=1e-4)


def test_statistics_at_the_edge_are_folded_within_rounding():
    pathlib.Path("net.py").write_text(FOLDED.format(change="pass", body=USUAL))
    network = write_checkpoint("net.py:Net", 6)
    batchnorm = network.model.bn
    with torch.no_grad():
        batchnorm.running_var.copy_(torch.tensor([0, 1e-12, 1e6, 1]))
        batchnorm.weight.copy_(torch.tensor([1e3, -1, -1e-20, 0]))
        batchnorm.running_mean.copy_(torch.tensor([1e3, -1e3, 0, 1e4]))
    expected = logits(network.model, 6)
    save_checkpoint(FILE, {**load_checkpoint(FILE), "state_dict": network.model.state_dict()})
    export.main([FILE, "--output", PACKED, "--arch", "net.py:Net", "--fold-bn"])
    found = logits(rebuild(load_any(PACKED), PACKED, "net.py:Net").model, 6)
    assert load_any(PACKED)["packed"].header["folded"] == {"bn": "conv"}
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    batchnorm.eps = 0.0
    assert find_folds(network.model, images(6)) == {}  # one over a variance of zero


def test_a_fold_that_gives_other_values_is_refused_and_nothing_is_written(capsys, monkeypatch):
    fold = folding.fold_batchnorms

    def wrong(model, folds):
        fold(model, folds)
        with torch.no_grad():
            model.conv.bias[2] *= 1.01

    for body, change, message in (("return self.bn(self.conv(x)) / self.bn.num_features", fold, "does not compute without"),
                                  (USUAL, wrong, "bn cannot be folded into conv")):
        pathlib.Path("net.py").write_text(FOLDED.format(change="nn.init.ones_(self.bn.bias)", body=body))
        write_checkpoint("net.py:Net", 6)
        monkeypatch.setattr(folding, "fold_batchnorms", change)
        assert message in complaint(capsys, export.main, FILE, "--output", PACKED, "--arch", "net.py:Net", "--fold-bn")
        assert not os.path.exists(PACKED)


# ---------------------------------------------------------------------------------------------------------------------
# Files that are none.


def complaint(capsys, command, *arguments):
    """The one line that a command says when it refuses, with status 2."""
    with pytest.raises(SystemExit) as stop, user_errors_on_one_line():
        command([*arguments])
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
    return said.err


def tiny():
    """A packed model of few bytes, with every kind of entry."""
    layers = {"0": PackedLayer("conv", (4, 3, 1, 1), 3, True, None, None, False, 12),
              "1": PackedLayer("linear", (10, 4), 2, True, 4, False, True, 40, kept=8)}
    tensors = {"0.weight": np.zeros(5, np.uint8), "1.weight": np.zeros(2, np.uint8),
               "1.weight.map": np.array([255, 0, 0, 0, 0], np.uint8), "0.quan_w_fn.s": np.ones(1, np.float32),
               "1.quan_w_fn.s": np.ones((1, 10), np.float32), "1.quan_a_fn.s": np.ones(1, np.float32)}
    header = {"arch": "tiny", "num_classes": 10, "input_size": 8, "class_names": None, "config": {"sat": True}, "folded": {},
              "preprocessing": {"mean": [0.5] * 3, "std": [1] * 3, "resize": "crop", "padding": 0, "grey": False},
              "shared": {"2.quan_w_fn.s": "0.quan_w_fn.s"}, "cost": {"size_mb": 1}}
    return header, layers, tensors


def write(data, path=PACKED):
    pathlib.Path(path).write_bytes(data)


def with_header(data, change):
    """The bytes of a packed model with another header, and a checksum that fits."""
    length = int.from_bytes(data[:8], "little")
    header = change(json.loads(json.loads(data[8:8 + length])["__metadata__"][KEY]))
    if isinstance(header, dict):
        header = {"version": header.pop("version", None), "sha256": NO_CHECKSUM,
                  **{key: value for key, value in header.items() if key != "sha256"}}
    tensors = {name: np.frombuffer(entry["data"], packed_file.NUMPY_TYPES[entry["dtype"]]).reshape(entry["shape"])
               for name, entry in deserialize(data)}
    data = save(tensors, {KEY: json.dumps(header, separators=(",", ":"))})
    return packed_file._with_checksum(data, packed_file.hashlib.sha256(data).hexdigest()) or data


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda data: data[:-1], "damaged"), (lambda data: data[:300], "ends inside its header"),
    (lambda data: data[:5], "damaged"),
    (lambda data: b"", "damaged or not a packed model"), (lambda data: b"a: 1\n" * 99, "not a packed model"),
    (lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "its checksum does not fit"),
    (lambda data: save({"weight": np.zeros(3, np.float32)}), "not a packed model of this project"),
    (lambda data: with_header(data, lambda header: {**header, "version": 2}), "a newer version of this project (format 2)"),
    (lambda data: with_header(data, lambda header: {**header, "arch": 3}), "arch: found 3"),
    (lambda data: with_header(data, lambda header: {**header, "num_classes": 2**62}), "the file holds"),
    (lambda data: with_header(data, lambda header: {**header, "class_names": ["one", 2]}), "class_names: found"),
    (lambda data: with_header(data, change_layer("0", bits=2)), "header and tensors disagree (0: [4, 3, 1, 1] at 2 bits"),
    (lambda data: with_header(data, change_layer("1", kept=9)), "header and tensors disagree (1:"),
    (lambda data: with_header(data, change_layer("0", kept=9)), "header and tensors disagree (0: the packed weight or"),
    (lambda data: with_header(data, change_layer("0", shape=[3, 4, 1, 1], zeros=13)), "layers: found")])
def test_a_file_that_is_damaged_foreign_or_newer_is_refused_in_one_line(spoil, message, capsys):
    write(spoil(serialize(*tiny())))
    pathlib.Path("config.yaml").write_text(CONFIG)
    for command, *arguments in ((export.main, "--inspect", PACKED), (export.main, "--predict", PACKED, "a.png"),
                                (main.main, "config.yaml", "eval=true", f"resume.path={PACKED}")):
        said = complaint(capsys, command, *arguments)
        if command is main.main and "not a packed model of this project" in message:  # then it may be a plain state_dict
            assert "resume.path: the checkpoint is in full precision" in said
        else:
            assert message in said and PACKED in said


def test_a_network_whose_logits_no_packed_layer_gives_is_packed():
    """Logits of two heads, side by side, one of which is a matrix and no layer."""
    pathlib.Path("net.py").write_text("""
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head, self.prototypes = nn.Linear(4, 3), nn.Parameter(torch.randn(num_classes - 3, 4))

    def forward(self, x):
        x = self.body(x)
        return torch.cat([self.head(x), -torch.cdist(x, self.prototypes)], 1)
""")
    network = write_checkpoint("net.py:Net", 16)
    model = rebuild(as_checkpoint(exported("--arch", "net.py:Net")), PACKED, "net.py:Net").model
    assert torch.equal(logits(model, 16), logits(network.model, 16))


def change_layer(name, **changes):
    def change(header):
        return {**header, "layers": {**header["layers"], name: {**header["layers"][name], **changes}}}
    return change


@pytest.mark.usefixtures("shallow")
def test_a_header_that_fits_the_tensors_but_not_the_network_is_refused(capsys):
    write_checkpoint("resnet20", 16)
    exported()
    whole = pathlib.Path(PACKED).read_bytes()
    Image.new("L", (16, 16)).save("a.png")
    for change, message in ((lambda header: {**header, "arch": "resnet18"}, f"{PACKED}: quan.excepts"),
                            (change_layer("fc", act_bits=7), "header and network disagree on shape, bits or signs of fc"),
                            (change_layer("conv1", zeros=0), "header and tensors disagree (conv1: 0 zeros"),
                            (lambda header: {**header, "num_classes": 9}, "shape, bits or signs of fc"),
                            (lambda header: {**header, "folded": {"bn1": "fc"}}, "folded: the network has no BatchNorm"),
                            (lambda header: {**header, "config": {"quan": 3}}, "quan"),
                            (lambda header: {**header, "shared": {"a": "b"}}, "shared: there is no tensor b")):
        write(with_header(whole, change))
        assert message in complaint(capsys, export.main, "--predict", PACKED, "a.png")


def test_any_change_of_a_packed_model_is_refused():
    whole = serialize(*tiny())
    write(whole)
    assert not isinstance(outcome(lambda: as_checkpoint(read_packed(PACKED)), [PACKED], "whole"), UserError)
    for number, rng in inputs(60):
        write(changed_bytes(rng, whole))
        assert isinstance(outcome(lambda: as_checkpoint(read_packed(PACKED)), [PACKED], number), UserError), number


def test_a_packed_model_with_a_wrong_header_is_read_or_refused():
    whole = serialize(*tiny())
    for number, rng in inputs(60):
        try:
            write(with_header(whole, lambda header, rng=rng: changed_value(rng, header, JUNK)))
        except (RecursionError, ValueError, TypeError):
            continue
        result = outcome(lambda: as_checkpoint(read_packed(PACKED)), [PACKED], number)
        assert isinstance(result, (dict, UserError)), number


# ---------------------------------------------------------------------------------------------------------------------
# Commands that cannot be.


def test_a_network_of_a_file_is_not_run_unasked(capsys):
    pathlib.Path("net.py").write_text(OWN)
    write_checkpoint("net.py:tiny", 16)
    exported("--arch", "net.py:tiny")
    Image.new("RGB", (20, 30)).save("a.png")
    os.remove("was_run")
    for arguments in (["--predict", PACKED, "a.png"], [FILE, "--output", "other"]):
        assert "give --arch path/to/net.py:tiny" in complaint(capsys, export.main, *arguments)
    export.main(["--inspect", PACKED])
    assert not os.path.exists("was_run")
    assert "holds net.py:tiny, but arch is" in complaint(capsys, export.main, "--predict", PACKED, "a.png", "--arch", "b.py:c")
    export.main(["--predict", PACKED, "a.png", "--arch", "net.py:tiny"])
    assert os.path.exists("was_run") and "a.png: " in capsys.readouterr().out


@pytest.mark.usefixtures("shallow")
def test_what_cannot_be_packed_is_said_in_one_line(capsys):
    write_checkpoint("resnet20", 16)
    content = load_checkpoint(FILE)
    unsound = {**content["state_dict"], "layer1.0.conv1.quan_w_fn.s": torch.zeros(1)}
    cases = [({"state_dict": content["state_dict"]}, "does not say how it was trained"),
             ({key: content[key] for key in content if not key.endswith("_bits")}, "in full precision"),
             ({**content, "bits": [4, 2]}, "is a checkpoint of indicators_pretraining"),
             ({**content, "state_dict": unsound}, "layer1.0.conv1: a step size is zero")]
    for changed, message in cases:
        save_checkpoint("changed", changed)
        said = complaint(capsys, export.main, "changed", "--output", PACKED)
        assert message in said and said.startswith("error: changed")
    for arguments, message in (([], "give one checkpoint"), ([FILE], "--output, --onnx or --qonnx"),
                               (["--predict", PACKED], "name the images"),
                               (["--inspect", PACKED, "--output", "a"], "--inspect stands alone; leave out --output"),
                               (["--inspect", PACKED, "--arithmetic", "float"], "--arithmetic: belongs to --predict FILE"),
                               (["--predict", PACKED, "a.png", "--onnx", "a"], "--predict stands alone; leave out --onnx"),
                               ([FILE, "--output", PACKED, "--arithmetic", "integer"], "--arithmetic: belongs to --predict"),
                               ([FILE, "--output", "a", "--onnx", "./a"], "--onnx: ./a is also written by --output"),
                               ([FILE, "--onnx", FILE], f"--onnx: {FILE} is also read by this command"),
                               ([FILE, FILE, "--onnx", "a"], "give one checkpoint"),
                               ([FILE, "--arch", "net.py:make", "--output", "net.py"], "--output: net.py is also read"),
                               ([FILE, "--config", "c", "--output", "c"], "--output: c is also read"),
                               ([FILE, "--output", "a.onnx"], "a.onnx ends in .onnx, as ONNX models do; packed models end in"),
                               ([FILE, "--onnx", "a.safetensors"], "--onnx: a.safetensors ends in .safetensors"),
                               ([FILE, "--output", "a", "--report", "a_best.pth.tar"], "reports end in .html"),
                               (["--inspect", "nowhere"], "(No such file or directory); python export.py CHECKPOINT")):
        assert message in complaint(capsys, export.main, *arguments)
    assert not os.path.exists(PACKED)
