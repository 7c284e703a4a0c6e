"""Losses for indicators: those of the trained network with one quantizer at fewer bits, in a file that the search reads."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_bad_input import complaint

import importance_extractor
import loss_sensitivity
import main
import sensitivity
from engine.checkpoint import load_checkpoint
from model.weights import load_state
from network import build_network
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


def measured(*words):
    sensitivity.main(["config.yaml", *words, "--of", "loss", "--images", str(IMAGES), "--output", "i.pkl"])
    return read_indicators("i.pkl")


@torch.no_grad()
def loss_of(network, layer, quantizer, bit, images, target):
    """The loss of a copy with one weight, or input, at fewer bits; all else, BatchNorms too, is at the widest."""
    twin = copy.deepcopy(network.model).eval()
    for module in twin.modules():
        if hasattr(module, "index"):
            module.index = 0
    getattr(twin.get_submodule(layer), quantizer).index = [6, 2, 4].index(bit)
    return F.cross_entropy(twin(images), target).item()


def test_the_file_holds_the_losses_with_one_quantizer_at_fewer_bits(capsys):
    content = measured()
    assert f"{TRAINED.replace('checkpoint', 'best')}: losses over {IMAGES} training images" in capsys.readouterr().out
    config = load_config(IndicatorsConfig, ["config.yaml"])
    network = build_network(config, 10, 8, None, CPU)
    load_state(network.model, load_checkpoint(TRAINED)["state_dict"], TRAINED)
    batches = list(create_loaders(config.dataloader, config.seed, 0, 1, CPU).calibration(IMAGES))
    images, target = (torch.cat(parts) for parts in zip(*batches, strict=True))
    for layer in ("layer1.0.conv1", "layer2.0.conv2", "layer3.0.conv2"):
        for bit in (6, 4, 2):
            for kind, quantizer in (("weight", "quan_w_fn"), ("act", "quan_a_fn")):
                wanted = loss_of(network, layer, quantizer, bit, images, target)
                assert content[kind][layer][bit] == pytest.approx(wanted, rel=1e-5), (layer, bit, kind)
    found = {value for kind in ("weight", "act") for row in content[kind].values() for value in row.values()}
    assert len(found) == 2 * 2 * len(content["layer_name"]) + 1  # the widest candidate is one network for all
    assert measured() == content


def test_the_file_is_as_the_extractor_writes_it():
    content = measured()
    importance_extractor.main([TRAINED, "--output", "trained.pkl"])
    trained = read_indicators("trained.pkl")
    assert content.keys() == trained.keys() and content["trained"]["epochs"] == 1
    for key in content.keys() - {"weight", "act"}:
        assert content[key] == trained[key], key
    for kind in ("weight", "act"):
        assert {name: list(row) for name, row in content[kind].items()} == {name: list(row)
                                                                            for name, row in trained[kind].items()}


def test_the_checkpoint_may_be_named_and_is_needed(capsys):
    assert measured(f"resume.path={TRAINED}") == measured()
    for words, message in [
            (["--output", "i.pkl", "name=other"], "resume.path"),
            (["--output", TRAINED, f"resume.path={TRAINED}"], f"--output: {TRAINED} is the checkpoint itself"),
            (["--output", "i.pkl", f"resume.path={TRAINED}", "arch=resnet18"], "holds resnet20, but arch is resnet18"),
            (["--output", "i.pkl", f"resume.path={TRAINED}", "target_bits=[6,4]"], "was trained at [6, 2, 4]"),
            (["--output", "i.pkl", f"resume.path={TRAINED}", "target_bits=[6,4,2]"], "was trained at [6, 2, 4]"),
            (["--output", "i.pkl", "--of", "los"], "--of")]:
        assert message in complaint(capsys, sensitivity.main, "config.yaml", "--of", "loss", *words), words


def test_a_loss_that_is_no_positive_number_is_named(monkeypatch):
    config = load_config(IndicatorsConfig, ["config.yaml"])
    network = build_network(config, 10, 8, None, CPU)
    monkeypatch.setattr(loss_sensitivity, "evaluate", lambda *words: {"loss": float("nan")})
    with pytest.raises(loss_sensitivity.UserError, match="layer1.0.conv1: the loss with its weight at 2 bits is nan"):
        loss_sensitivity.losses(network.model, network.switch, [])
