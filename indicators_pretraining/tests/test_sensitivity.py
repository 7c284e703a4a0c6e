"""Indicators without training: errors that no other step size makes smaller, in a file that the search reads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bad_input import complaint
from test_signs import BOTTLENECK
from torch import nn

import importance_extractor
import main
import sensitivity
from engine.checkpoint import save_checkpoint
from network import build_dense
from quan.quantizer import integer_range, lsq
from quantization_error import least_errors
from schema import IndicatorsConfig
from util.config import load_config
from util.exchange import read_indicators

pytestmark = pytest.mark.usefixtures("shallow")
CONFIG = """
arch: resnet20
pre_trained: dense
target_bits: [6, 2, 4]
dataloader: {dataset: digits, input_size: 8, batch_size: 32, data_fraction: 0.2}
wandb: {mode: disabled}
"""
IMAGES = 60


def brute_force(values, bit, signed, symmetric):
    """The least error over a fine grid of step sizes, by the quantizer of the networks."""
    qn, qp = integer_range(bit, signed, symmetric)
    steps = values.abs().max() * torch.logspace(-4, 0, 3000, dtype=values.dtype)
    return min((values - lsq(values, step, qn, qp)).square().mean().item() for step in steps)


SHAPES = {"normal": torch.randn, "uniform": torch.rand, "heavy": lambda *a, **b: torch.randn(*a, **b) ** 3,
          "sparse": lambda *a, **b: torch.randn(*a, **b) * (torch.rand(*a, **b) < 0.2),
          "outlier": lambda *a, **b: torch.randn(*a, **b).index_fill(0, torch.tensor([0]), 50.0)}


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from(sorted(SHAPES)), st.integers(3, 400), st.sampled_from([2, 3, 4, 6, 8]),
       st.booleans(), st.booleans(), st.sampled_from([1e-6, 1.0, 1e4]))
def test_no_step_size_of_a_fine_grid_has_less_error(seed, shape, count, bit, signed, symmetric, scale):
    generator = torch.Generator().manual_seed(seed)
    values = SHAPES[shape](count, generator=generator, dtype=torch.float64) * scale
    found, wanted = least_errors(values, [bit], signed, symmetric)[bit], brute_force(values, bit, signed, symmetric)
    assert 0 <= found <= wanted * 1.001


@settings(max_examples=50)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=30), st.booleans(), st.booleans())
def test_errors_fall_as_bits_grow_and_stay_below_that_of_zeros(values, signed, symmetric):
    values, bits = torch.tensor(values), [2, 3, 8, 5]
    errors = least_errors(values, bits, signed, symmetric)
    assert list(errors) == bits
    row = [values.double().square().mean().item(), *(errors[bit] for bit in sorted(bits))]
    assert all(0 <= narrower <= wider * (1 + 1e-12) for wider, narrower in zip(row, row[1:], strict=False))


def test_what_integers_hold_has_no_error_and_what_they_cannot_is_clipped():
    assert least_errors(0.25 * torch.arange(-8, 8), [4], signed=True)[4] < 1e-30
    assert least_errors(0.25 * torch.arange(16), [4], signed=False)[4] < 1e-30
    assert least_errors(0.25 * torch.arange(-8, 8), [4], signed=True, symmetric=True)[4] > 1e-4
    assert least_errors(torch.tensor([-3.0, 0.0, -1.0]), [8], signed=False)[8] == pytest.approx(10 / 3)
    assert least_errors(torch.zeros(5), [8, 2], signed=True) == {8: 0, 2: 0}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A configuration, and the weights that it names: of a network whose BatchNorms have statistics other than those they
    begin with."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)
    torch.manual_seed(3)
    model = build_dense(IndicatorsConfig(arch="resnet20"), 10, 8, None, torch.device("cpu")).model.train()
    with torch.no_grad():
        model(torch.randn(64, 3, 8, 8))
    save_checkpoint("dense", {"state_dict": model.state_dict(), "arch": "resnet20"})
    return tmp_path


def measured(*words):
    sensitivity.main(["config.yaml", *words, "--images", str(IMAGES), "--output", "i.pkl"])
    return read_indicators("i.pkl")


def inputs_of(model, name, images):
    """What enters a layer."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model.eval()(images)
    hook.remove()
    return seen[0]


def test_the_file_holds_the_errors_of_weights_and_inputs_of_the_trained_network(folder, capsys):
    content = measured()
    assert f"inputs of layers from {IMAGES} training images" in capsys.readouterr().out
    config = load_config(IndicatorsConfig, ["config.yaml"])
    model = build_dense(config, 10, 8, None, torch.device("cpu")).model
    loader = sensitivity.create_loaders(config.dataloader, config.seed, 0, 1, torch.device("cpu")).calibration(IMAGES)
    images = torch.cat([images for images, _ in loader])
    for name in ("layer1.0.conv1", "layer2.0.conv2", "layer3.0.conv2"):
        weight, entering = model.get_submodule(name).weight.detach(), inputs_of(model, name, images)
        assert content["weight"][name] == pytest.approx(least_errors(weight, [6, 4, 2], True), rel=1e-9)
        assert content["act"][name] == pytest.approx(least_errors(entering, [6, 4, 2], False), rel=1e-4)
    assert measured() == content
    assert measured("seed=1")["act"] != content["act"] and measured("seed=1")["weight"] == content["weight"]


def test_the_file_is_as_the_extractor_writes_it(folder):
    content = measured()
    main.main(["config.yaml", "name=run", "epochs=1"])
    importance_extractor.main(["results/run/run_checkpoint.pth.tar", "--output", "trained.pkl"])
    trained = read_indicators("trained.pkl")
    assert content.keys() == trained.keys()
    assert content["trained"]["dataset"] == trained["trained"]["dataset"] == "digits"
    assert (content["kind"], trained["kind"]) == ("error", "steps")
    for key in content.keys() - {"weight", "act", "trained", "kind"}:
        assert content[key] == trained[key], key
    for kind in ("weight", "act"):
        assert content[kind].keys() == trained[kind].keys()
        for name, row in content[kind].items():
            assert list(row) == list(trained[kind][name]) == [6, 2, 4] and 0 < row[6] < row[4] < row[2], name


def test_signs_are_found_in_the_inputs_or_as_the_configuration_says(folder):
    (folder / "net.py").write_text(BOTTLENECK)
    layers = measured("arch=net.py:make", "pre_trained=false")["layers"]
    assert {name: row["signed"]["act"] for name, row in layers.items()} == {"2": True, "4": False}
    found = measured()
    for positive in (True, False):
        content = measured(f"quan.act.all_positive={str(positive).lower()}")
        assert {row["signed"]["act"] for row in content["layers"].values()} == {not positive}
        assert (content["act"] == found["act"]) == positive  # all inputs of a ResNet come from a ReLU


def test_of_many_values_a_bounded_number_is_drawn(folder, monkeypatch):
    everything = measured()
    monkeypatch.setattr(sensitivity, "MOST_VALUES", 20_000)
    inputs, watch = [], sensitivity.watch_inputs
    monkeypatch.setattr(sensitivity, "watch_inputs", lambda *words: inputs.append(watch(*words)) or inputs[0])
    content = measured()
    counts = {name: len(found.values) for name, found in inputs[0].items()}
    assert max(counts.values()) <= 20_000 and counts["layer1.0.conv1"] > 19_900
    assert counts["layer3.0.conv2"] == 64 * 2 * 2 * IMAGES  # few enough to be taken as they are
    assert content["act"]["layer3.0.conv2"] == everything["act"]["layer3.0.conv2"]
    for bit, error in everything["act"]["layer1.0.conv1"].items():
        drawn = content["act"]["layer1.0.conv1"][bit]
        assert drawn != error and drawn == pytest.approx(error, rel=0.1)


def test_pruned_weights_are_zero(folder):
    state = torch.load("dense", weights_only=True)["state_dict"]
    mask = torch.ones_like(state["layer1.0.conv1.weight"], dtype=torch.bool)
    mask[:, :8] = False
    save_checkpoint("pruned", {"state_dict": state, "arch": "resnet20", "masks": {"layer1.0.conv1.weight": mask}})
    content = measured("pre_trained=false", "init_from=pruned")
    assert content["layers"]["layer1.0.conv1"]["sparsity"] == 0.5
    wanted = least_errors(state["layer1.0.conv1.weight"] * mask, [6, 4, 2], True)
    assert content["weight"]["layer1.0.conv1"] == pytest.approx(wanted, rel=1e-9)


def test_misuse_is_one_line_and_writes_nothing(folder, capsys):
    save_checkpoint("broken", {"state_dict": {**torch.load("dense", weights_only=True)["state_dict"],
                                              "layer1.0.conv1.weight": torch.full((16, 16, 3, 3), float("nan"))}})
    for words, message in [
            (["--output", "i.pkl", "--images", "0"], "--images: found 0, allowed is at least 1"),
            (["--of", "kl", "--output", "i.pkl", "--images", "1", "dataloader.path=none"], "--images: found 1 image; kl"),
            (["--output", "config.yaml"], "--output: config.yaml is also read by this command"),
            (["--output", "dense"], "--output: dense is also read by this command"),
            (["--output", "net.py", "arch=net.py:make"], "--output: net.py ends in .py"),
            (["--of", "fisher", "--output", "out/run/run_best.pth.tar"], "run_best.pth.tar ends in .pth.tar"),
            (["--output", "i.pkl", "pre_trained=missing"], "missing: cannot read the checkpoint"),
            (["--output", "i.pkl", "pre_trained=broken"], "is not finite; give another checkpoint"),
            (["--output", "i.pkl", "quan.excepts.con1.weight.bit="], "no such layer; did you mean 'conv1'"),
            (["--output", "i.pkl", "epochz=1"], "epochz: unknown key"), ([], "--output")]:
        assert message in complaint(capsys, sensitivity.main, "config.yaml", *words), words


def test_an_untrained_network_is_said_to_be_one(folder, capsys):
    measured()
    assert "untrained" not in capsys.readouterr().out
    measured("pre_trained=false")
    assert "warning: the network is untrained" in capsys.readouterr().out


class Repeated(nn.Module):
    """A layer that is called twice, the second time with negative values."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3, bias=False)

    def forward(self, x):
        return self.layer(self.layer(x))


def test_a_layer_that_is_called_twice_has_the_inputs_of_both_calls():
    model = Repeated()
    nn.init.constant_(model.layer.weight, -1.0)

    class Loader(list):
        images = 2

    loader = Loader([(torch.ones(1, 3), None), (torch.full((1, 3), 2.0), None)])
    inputs = sensitivity.watch_inputs(model, {"layer": {"act_elements": 6}}, loader, 0)["layer"]
    assert inputs.values.tolist() == [1, 1, 1, -3, -3, -3, 2, 2, 2, -6, -6, -6] and inputs.is_negative
