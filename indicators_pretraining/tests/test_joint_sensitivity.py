"""Indicators measured on the trained network with one weight or input at fewer bits, against copies that are quantized so."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bad_input import complaint
from torch import nn

import importance_extractor
import joint_sensitivity
import main
import sensitivity
from engine.checkpoint import load_checkpoint
from model.layer_table import trace
from model.weights import load_state
from network import build_network
from quan.bit_switch import BitSwitch
from quan.config import ExceptionConfig, QuanConfig, QuantizerConfig
from quan.utils import joint_modules, replace_module_by_names
from schema import IndicatorsConfig
from small_networks import make_shallow
from util.config import load_config
from util.data_loader import create_loaders
from util.exchange import read_indicators

CONFIG = """
arch: resnet20
name: run
epochs: 1
lr: 0.05
target_bits: [6, 2, 4]
dataloader: {dataset: digits, input_size: 8, batch_size: 32, data_fraction: 0.2}
wandb: {mode: disabled}
"""
IMAGES = 60
CPU = torch.device("cpu")
TRAINED = "results/run/run_checkpoint.pth.tar"
pytestmark = [pytest.mark.usefixtures("shallow"), pytest.mark.xdist_group("losses")]  # one process makes what all read


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a configuration and the jointly trained network of its run."""
    path = tmp_path_factory.mktemp("losses")
    with pytest.MonkeyPatch.context() as patch:
        make_shallow(patch)
        patch.chdir(path)
        (path / "config.yaml").write_text(CONFIG)
        main.main(["config.yaml"])
    return path


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def measured(*words, of="loss"):
    sensitivity.main(["config.yaml", *words, "--of", of, "--images", str(IMAGES), "--output", "i.pkl"])
    return read_indicators("i.pkl")


def trained_network():
    """The network of the run at its highest bits, and the images and targets that are measured on."""
    config = load_config(IndicatorsConfig, ["config.yaml"])
    network = build_network(config, 10, 8, None, CPU)
    load_state(network.model, load_checkpoint(TRAINED)["state_dict"], TRAINED)
    network.model.eval()
    network.switch.uniform(6)
    batches = list(create_loaders(config.dataloader, config.seed, 0, 1, CPU).calibration(IMAGES))
    return network, *(torch.cat(parts) for parts in zip(*batches, strict=True))


@torch.no_grad()
def logits_of(network, layer, quantizer, bit, images, of="loss"):
    """The logits of a copy with one weight, or input, at fewer bits; all else, BatchNorms too, is at the highest. For "kl" the
    BatchNorms take their statistics from the images."""
    twin = copy.deepcopy(network.model)
    for module in twin.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.training = of == "kl"
    getattr(twin.get_submodule(layer), quantizer).index = [6, 2, 4].index(bit)
    return twin(images)


def divergence(best, logits):
    return F.kl_div(logits.log_softmax(1), best.log_softmax(1), reduction="batchmean", log_target=True).item()


@pytest.mark.parametrize("of", ["loss", "kl"])
def test_the_file_holds_what_one_quantizer_at_fewer_bits_does(capsys, of):
    content = measured(of=of)
    assert f"{TRAINED.replace('checkpoint', 'best')}: {of} over {IMAGES} training images" in capsys.readouterr().out
    network, images, target = trained_network()
    best = logits_of(network, "layer1.0.conv1", "quan_w_fn", 6, images, of)
    for layer in ("layer1.0.conv1", "layer2.0.conv2", "layer3.0.conv2"):
        for bit in (6, 4, 2):
            for kind, quantizer in (("weight", "quan_w_fn"), ("act", "quan_a_fn")):
                logits = logits_of(network, layer, quantizer, bit, images, of)
                wanted = F.cross_entropy(logits, target).item() if of == "loss" else divergence(best, logits)
                assert content[kind][layer][bit] == pytest.approx(wanted, rel=1e-4, abs=1e-7), (layer, bit, kind)
    found = {value for kind in ("weight", "act") for row in content[kind].values() for value in row.values()}
    assert len(found) == 2 * 2 * len(content["layer_name"]) + 1  # the highest candidate is one network for all
    assert measured(of=of) == content


def test_outputs_recorded_in_small_pieces_give_the_same(monkeypatch):
    content = measured()
    monkeypatch.setattr(joint_sensitivity, "MEMORY", 1)
    found = measured()
    for kind in ("weight", "act"):
        for name, row in found[kind].items():
            assert row == pytest.approx(content[kind][name], rel=1e-4, abs=1e-8), name


def test_statistics_of_images_leave_no_trace_in_the_batchnorms_and_need_two_images(capsys):
    network, images, target = trained_network()
    before = {name: tensor.clone() for name, tensor in network.model.state_dict().items() if "num_batches" not in name}
    modes = [(module.training, getattr(module, "momentum", None)) for module in network.model.modules()]
    joint_sensitivity.MEASURES["kl"](network.model, network.switch, [(images[:5], target[:5]), (images[5:7], target[5:7])])
    assert all(torch.equal(tensor, network.model.state_dict()[name]) for name, tensor in before.items())
    assert modes == [(module.training, getattr(module, "momentum", None)) for module in network.model.modules()]
    words = ["config.yaml", "--of", "kl", "--output", "one.pkl", "--images", "1"]
    assert "--images: found 1 image" in complaint(capsys, sensitivity.main, *words)


@given(st.integers(1, 40), st.integers(1, 40))
@settings(deadline=None)
def test_pieces_have_two_images_or_more_and_at_most_what_fits(count, fits):
    images = torch.arange(float(count))[:, None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint_sensitivity, "Replay", lambda model, images: SimpleNamespace(bytes_per_image=1))
        patch.setattr(joint_sensitivity, "MEMORY", fits)
        pieces = [len(piece) for piece, _ in joint_sensitivity.split(None, [(images, images)])]
    assert sum(pieces) == count and min(pieces) >= min(count, 2) and max(pieces) <= max(fits, 3)
    assert max(pieces) - min(pieces) <= 1


def test_noise_is_the_squared_error_over_the_squared_values():
    content = measured(of="noise")
    network, images, _ = trained_network()
    for name, layer in network.switch.layers.items():
        inputs = []
        handle = layer.register_forward_pre_hook(lambda _, given, inputs=inputs: inputs.append(given[0]))
        with torch.no_grad():
            network.model(images)
        handle.remove()
        for kind, v, quantizer in (("weight", layer.weight, layer.quan_w_fn), ("act", inputs[0], layer.quan_a_fn)):
            for index, bit in enumerate([6, 2, 4]):
                qn, qp = (2 ** (bit - 1), 2 ** (bit - 1) - 1) if kind == "weight" else (0, 2**bit - 1)
                step = quantizer.s[index].detach().double()
                error = (v.double() / step).clamp(-qn, qp).round() * step - v.double()
                wanted = (error.square().sum() / v.double().square().sum()).item()
                assert content[kind][name][bit] == pytest.approx(wanted, rel=1e-3), (name, kind, bit)


def test_fisher_is_half_the_mean_square_of_gradient_times_error():
    """Against gradients of one image at a time; weights, whose gradients of eight images are squared together, apart."""
    torch.manual_seed(0)
    network, images, _ = trained_network()
    model, switch, images = network.model, network.switch, images[:16]
    labels = torch.multinomial(model(images[:8]).softmax(1), 1, generator=torch.Generator().manual_seed(3))[:, 0]
    tables = joint_sensitivity.fisher(model, switch, [(images[:8], labels)], seed=3)
    name, found = "layer2.0.conv2", {"weight": [], "act": []}
    layer = switch.layers[name]
    for image, label in zip(images[:8], labels, strict=True):
        taken = {}
        layer.is_fused = False
        handles = [getattr(layer, quantizer).register_forward_hook(
            lambda _, given, out, kind=kind, taken=taken: (out.retain_grad(), taken.update({kind: (given[0], out)}))[-1])
            for kind, quantizer in joint_sensitivity.KINDS.items()]
        F.cross_entropy(model(image[None]), label[None]).backward()
        for handle in handles:
            handle.remove()
        del layer.is_fused
        for kind, (v, out) in taken.items():
            quantizer = getattr(layer, joint_sensitivity.KINDS[kind])
            step, (qn, qp) = quantizer.s[1].detach(), ((2, 1) if kind == "weight" else (0, 3))
            found[kind].append((out.grad * ((v / step).clamp(-qn, qp).round() * step - v)).sum().item())
    acts, weights = (torch.tensor(found[kind], dtype=torch.float64) for kind in ("act", "weight"))
    assert tables["act"][name][2] == pytest.approx(acts.square().mean().item() / 2, rel=1e-3)
    assert tables["weight"][name][2] == pytest.approx(weights.sum().item() ** 2 / 8 / 2, rel=1e-3)
    assert all(quantizer.quan_w_fn.index == 0 and quantizer.is_fused for quantizer in switch.layers.values())


class SharedLayer(nn.Module):
    """A layer that is called twice, one or both times without an axis of images; and one whose output is ignored."""

    def __init__(self, is_first_flat):
        super().__init__()
        self.is_first_flat = is_first_flat
        for name in ("stem", "shared", "aside", "fc"):
            setattr(self, name, nn.Linear(6, 6))

    def forward(self, x):
        x = self.stem(x.flatten(1, 2))
        first = self.shared(x.flatten(0, 1)).view_as(x) if self.is_first_flat else self.shared(x)
        x = self.shared(first.tanh().flatten(0, 1)).view_as(x).mean(1)
        self.aside(x)
        return self.fc(x)


def test_fisher_takes_a_batch_together_where_a_call_does_not_tell_images_apart_and_what_is_ignored_for_nothing():
    excepts, found = {name: ExceptionConfig() for name in ("stem", "fc")}, []
    for is_first_flat in (False, True):
        torch.manual_seed(0)
        model, bits = SharedLayer(is_first_flat), [6, 2]
        graph, config = trace(model, 6), QuanConfig(act=QuantizerConfig(all_positive=False), excepts=excepts)
        replace_module_by_names(model, joint_modules(model, graph, config, bits))
        for layer in (model.shared, model.aside):
            layer.quan_a_fn.s.data.fill_(0.3)
        switch = BitSwitch(model.eval(), graph, excepts, bits)
        found.append(joint_sensitivity.fisher(model, switch, [(torch.randn(11, 3, 6, 6), torch.zeros(11))]))
        assert {value for table in found[-1].values() for value in table["aside"].values()} == {0}
    for kind in ("weight", "act"):
        mixed, flat = (tables[kind]["shared"] for tables in found)
        assert mixed == pytest.approx(flat, rel=1e-4) and mixed[2] > 0


@pytest.mark.parametrize("of", ["loss", "kl", "noise", "fisher"])
def test_the_file_is_as_the_extractor_writes_it(of):
    content = measured(of=of)
    importance_extractor.main([TRAINED, "--output", "trained.pkl"])
    trained = read_indicators("trained.pkl")
    assert content.keys() == trained.keys() and content["trained"].pop("images") == IMAGES
    assert (content["kind"], trained["kind"]) == (of, "steps")
    for key in content.keys() - {"weight", "act", "kind"}:
        assert content[key] == trained[key], key
    for kind in ("weight", "act"):
        assert {name: list(row) for name, row in content[kind].items()} == {name: list(row)
                                                                            for name, row in trained[kind].items()}


def test_the_checkpoint_may_be_named_and_is_needed(capsys):
    assert measured(f"resume.path={TRAINED}") == measured()
    for words, message in [
            (["--output", "i.pkl", "target_bits=[4]"], "loss compares bit-widths with the highest, but target_bits is [4]"),
            (["--output", "i.pkl", "name=other"], "resume.path"),
            (["--output", TRAINED, f"resume.path={TRAINED}"], f"--output: {TRAINED} is also read"),
            (["--output", "i.pkl", f"resume.path={TRAINED}", "arch=resnet18"], "holds resnet20, but arch is resnet18"),
            (["--output", "i.pkl", f"resume.path={TRAINED}", "target_bits=[6,4]"], "was trained at [6, 2, 4]"),
            (["--output", "i.pkl", f"resume.path={TRAINED}", "target_bits=[6,4,2]"], "was trained at [6, 2, 4]"),
            (["--output", "i.pkl", "--of", "los"], "--of")]:
        assert message in complaint(capsys, sensitivity.main, "config.yaml", "--of", "loss", *words), words


def test_outputs_that_are_not_finite_are_named():
    network, images, target = trained_network()
    network.switch.layers["layer1.0.conv2"].quan_w_fn.s.data[1] = math.nan
    with pytest.raises(joint_sensitivity.UserError, match="layer1.0.conv2: with its weight at 2 bits the outputs are not"):
        joint_sensitivity.one_at_a_time(network.model, network.switch, [(images, target)], joint_sensitivity.cross_entropy)


# ---------------------------------------------------------------------------------------------------------------------
# What indicators have to know.


@pytest.mark.parametrize("of", ["kl", "noise", "fisher"])
def test_the_scale_of_a_weight_does_not_matter(of):
    """The same function with one convolution, its step sizes, and the statistics of its BatchNorm 16 times as large."""
    network, images, target = trained_network()
    model, switch = copy.deepcopy((network.model, network.switch))
    layer = model.layer2[0].conv1
    for values in (layer.weight, layer.quan_w_fn.s):
        values.data *= 16
    for bn in model.layer2[0].bn1.bns:
        bn.running_mean *= 16
        bn.running_var *= 16**2
        bn.eps *= 16**2
    torch.testing.assert_close(model(images), network.model(images), rtol=1e-4, atol=1e-4)
    before = joint_sensitivity.MEASURES[of](network.model, network.switch, [(images, target)])
    after = joint_sensitivity.MEASURES[of](model, switch, [(images, target)])
    for kind in ("weight", "act"):
        for name, row in before[kind].items():
            assert after[kind][name] == pytest.approx(row, rel=1e-2, abs=1e-9), (kind, name)


PLANTED = """
from torch import nn
import torch.nn.functional as F


class Planted(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.Linear(16, num_classes)
        sizes = {"first": (16, 16), "narrow": (16, 4), "wide": (4, 16), "branch": (16, 16), "last": (16, 16)}
        for name, (inputs, outputs) in sizes.items():
            setattr(self, name, nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
            setattr(self, f"{name}_bn", nn.BatchNorm2d(outputs))

    def forward(self, x):
        def of(name, x):
            return getattr(self, f"{name}_bn")(getattr(self, name)(x))
        x = F.relu(of("first", self.stem(x)))
        x = F.relu(of("narrow", x))
        x = F.relu(of("wide", x))
        x = F.relu(of("last", F.relu(x + of("branch", x))))
        return self.fc(x.mean((2, 3)))
"""


@pytest.fixture(scope="module")
def planted(folder):
    """A trained network with a bottleneck of 4 channels, and a branch that hardly adds anything; images, targets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "planted.py").write_text(PLANTED)
        words = ["arch=planted.py:Planted", "name=planted", "epochs=5", "dataloader.data_fraction=1",
                 "quan.excepts={stem: {}, first: {}, first_bn: {}, fc: {}}", "quan.act.all_positive=auto"]
        main.main(["config.yaml", *words])
        config = load_config(IndicatorsConfig, ["config.yaml"], words)
        path = "results/planted/planted_checkpoint.pth.tar"
        network = build_network(config, 10, 8, None, CPU)
        load_state(network.model, load_checkpoint(path)["state_dict"], path)
        for bn in network.model.eval().branch_bn.bns:
            bn.weight.data.fill_(0.01)
            bn.bias.data.zero_()
        batches = create_loaders(config.dataloader, config.seed, 0, 1, CPU).calibration(400)
    return network, list(batches)


@pytest.mark.parametrize("of", ["kl", "fisher"])
def test_a_bottleneck_matters_most_and_a_branch_that_adds_nothing_least(planted, of):
    network, batches = planted
    tables = joint_sensitivity.MEASURES[of](network.model, network.switch, batches)
    ranked = {kind: sorted(table, key=lambda name: table[name][2]) for kind, table in tables.items()}
    assert ranked["weight"][0] == "branch" and ranked["weight"][-1] == "wide", tables
    assert ranked["act"][0] == "branch" and ranked["act"][-1] in ("narrow", "wide"), tables
