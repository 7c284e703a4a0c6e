"""Names that a network may have, and that wrappers put before them: every file finds its way through."""

import pytest
import torch
from torch import nn

from engine.checkpoint import load_checkpoint, save_checkpoint
from indicators import extract
from model import create_model
from model.names import unwrap
from model.weights import load_weights
from network import build_network
from quan.config import ExceptionConfig, QuanConfig
from schema import IndicatorsConfig
from util.errors import UserError
from util.exchange import fit_names, read_indicators, write_indicators

NASTY = ("module", "aux", "aux_head", "bns", "bn", "quan_w_fn", "quan_a_fn", "s", "init_state", "_orig_mod", "weight_",
         "first_conv")
SOURCE = """
from torch import nn

class Block(nn.Module):
    def __init__(self, names):
        super().__init__()
        self.order = names
        for name in names:
            self.add_module(name, nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))

    def forward(self, x):
        for name in self.order:
            x = getattr(self, name)(x)
        return x

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        for name in NAMES:
            self.add_module(name, Block(INNER))
        self.stem, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x):
        x = self.bn(self.stem(x))
        for name in NAMES:
            x = getattr(self, name)(x)
        return self.fc(x.mean((2, 3)))

class Module(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.module = Net(num_classes)

    def forward(self, x):
        return self.module(x)

def plain(num_classes):
    return Net(num_classes)

def inside(num_classes):
    return Module(num_classes)

def wrapped(num_classes):
    return nn.DataParallel(Net(num_classes))
"""
FACTORIES = ("plain", "inside", "wrapped")


@pytest.fixture
def nets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["module", "aux", "bns"]
    (tmp_path / "net.py").write_text(f"NAMES = {names}\nINNER = {list(NASTY)}\n{SOURCE}")


def joint(arch, **changes):
    torch.manual_seed(0)
    network = build_network(IndicatorsConfig(arch=arch, target_bits=[4, 2], **changes), 3, 8, None, torch.device("cpu"))
    network.model(torch.randn(2, 3, 8, 8))
    return network


@pytest.mark.parametrize("factory", FACTORIES)
def test_weights_find_their_way_under_every_name_and_wrapper(nets, factory):
    model, other = (create_model(f"net.py:{factory}", 3) for _ in range(2))
    for prefix in ("", "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.module."):
        for tensor in other.state_dict().values():
            tensor.fill_(7)
        torch.save({"net": {prefix + name: tensor for name, tensor in model.state_dict().items()}}, "weights")
        assert load_weights(other, load_checkpoint("weights")["state_dict"], "weights")
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in other.state_dict().items()), prefix


def test_weights_of_a_network_fit_one_that_holds_it_as_its_module(nets):
    bare, inside = create_model("net.py:plain", 3), create_model("net.py:inside", 3)
    assert load_weights(inside, bare.state_dict(), "weights")
    assert all(torch.equal(tensor, bare.state_dict()[name.removeprefix("module.")])
               for name, tensor in inside.state_dict().items())
    assert load_weights(bare, inside.state_dict(), "weights")


@pytest.mark.parametrize("factory", FACTORIES)
def test_indicators_name_the_layers_as_the_network_does(nets, factory):
    network = joint(f"net.py:{factory}")
    state = network.model.state_dict()
    for name, tensor in state.items():
        if name.endswith("fn.init_state"):
            tensor.fill_(1)
    save_checkpoint("c", {"arch": f"net.py:{factory}", "state_dict": state, **network.metadata})
    write_indicators("i.pkl", extract(load_checkpoint("c"), "c"))
    content = read_indicators("i.pkl")
    assert content["layer_name"] == list(content["layers"]) == list(network.switch.layers) and len(content["layers"]) == 36
    for name in content["layer_name"]:
        assert content["weight"][name] == {bit: state[f"{name}.quan_w_fn.s"][index].item() for index, bit in enumerate([4, 2])}


def test_a_file_that_only_in_part_has_a_wrapper_is_refused():
    model = create_model("resnet20", 10)
    state = {f"module.{name}" if name.startswith("layer1") else name: tensor for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match="file: the tensor module.layer1.0.conv1.weight is not part of this network"):
        load_weights(model, state, "file")


def test_auxiliary_classifiers_are_passed_over_only_where_the_network_has_none(nets):
    model = create_model("net.py:plain", 3)
    with pytest.raises(UserError, match="the tensor aux.bn.0.weight of this network is missing"):
        load_weights(model, {name: tensor for name, tensor in model.state_dict().items() if name != "aux.bn.0.weight"}, "file")
    assert load_weights(model, {**model.state_dict(), "AuxLogits.fc.weight": torch.ones(3)}, "file")


def test_wrappers_inside_a_network_are_no_part_of_its_names():
    parts = nn.Sequential(nn.DataParallel(nn.Sequential(nn.DataParallel(nn.Conv2d(1, 1, 1)))), nn.Linear(1, 1))
    plain = unwrap(nn.DataParallel(nn.DataParallel(parts)))
    assert list(plain.state_dict()) == ["0.0.weight", "0.0.bias", "1.weight", "1.bias"]
    assert fit_names(plain.state_dict(), ["module.0.module.0.weight", "module.1.weight"]) == {
        "module.0.module.0.weight": "0.0.weight", "module.1.weight": "1.weight"}
    compiled = torch.compile(nn.Linear(1, 1))
    assert list(unwrap(nn.Sequential(compiled)).state_dict()) == ["0.weight", "0.bias"]


PUBLISHED = {"first_conv.0": "stem.0", "first_conv.1": "stem.1", "features.stage1.unit1.dw_conv.conv": "features.0.0",
             "features.stage1.unit1.pw_conv.bn": "features.0.4", "features.stage4.unit6.dw_conv.bn": "features.10.1",
             "features.stage5.unit2.pw_conv.conv": "features.12.3", "fc": "fc"}


def limpq_mobilenet():
    """The names that LIMPQ's MobileNetV1 has, in its order, with the shapes of their tensors."""
    names = ["first_conv.0", "first_conv.1"]
    for stage, depth in enumerate([1, 2, 2, 6, 2], 1):
        for unit in range(1, depth + 1):
            names += [f"features.stage{stage}.unit{unit}.{part}" for part in
                      ("dw_conv.conv", "dw_conv.bn", "pw_conv.conv", "pw_conv.bn")]
    return [*names, "fc"]


@pytest.mark.parametrize("arch", ["mobilenetv1", "mobilenetv1_limpq"])
def test_limpqs_names_of_mobilenetv1_are_read(tmp_path, arch):
    model, other = create_model(arch, 1000), create_model(arch, 1000)
    modules = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))]
    published = dict(zip(modules, limpq_mobilenet(), strict=True))
    assert {new: old for old, new in published.items() if new in PUBLISHED} == PUBLISHED
    state = {f"module.{published[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": tensor
             for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 3, "arch": "mobilenetv1", "state_dict": state}, tmp_path / "c")
    assert load_weights(other, load_checkpoint(str(tmp_path / "c"))["state_dict"], "c")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in other.state_dict().items())


def test_mobilenetv1_of_limpq_halves_the_image_in_every_unit_of_a_stage():
    def sides(arch):
        model, seen = create_model(arch, 10).eval(), []
        for unit in model.features:
            unit.register_forward_hook(lambda module, entering, out: seen.append(out.shape[-1]))
        with torch.no_grad():
            assert model(torch.randn(1, 3, 224, 224)).shape == (1, 10)
        return seen

    assert sides("mobilenetv1") == [112, 56, 56, 28, 28, *[14] * 6, 7, 7]
    assert sides("mobilenetv1_limpq") == [112, 56, 28, 14, 7, 4, 2, 1, 1, 1, 1, 1, 1]


def test_pasted_exceptions_and_indicators_may_have_limpqs_names():
    excepts = {name: ExceptionConfig() for name in ("first_conv.0", "first_conv.1", "fc")}
    network = joint("mobilenetv1", quan=QuanConfig(excepts=excepts))
    assert list(network.config.quan.excepts) == ["stem.0", "stem.1", "fc"] and "stem.0" not in network.switch.layers
    layers = [name for name in limpq_mobilenet()[:-1] if name.endswith("conv")]
    state = {f"module.{name}.{kind}.{entry}": torch.ones(2) for name in layers for kind in ("quan_w_fn", "quan_a_fn")
             for entry in ("s", "init_state")}
    content = extract({"arch": "mobilenetv1", "state_dict": {name.removeprefix("module."): tensor
                                                             for name, tensor in state.items()}}, "c", [4, 2])
    assert content["layer_name"] == list(network.switch.layers) == list(content["weight"])
