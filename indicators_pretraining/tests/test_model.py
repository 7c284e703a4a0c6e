"""Networks by name, and full-precision weights that are loaded into them."""

import re

import pytest
import torch
from torchvision import models

from model import create_model, list_architectures, load_weights
from model.layer_table import trace
from util.errors import UserError


def test_create_model_stands_where_the_method_s_readme_says():
    assert create_model.__module__ == "model.model"


def test_names_of_torchvision_and_our_own_are_known():
    names = list_architectures()
    assert {"resnet18", "resnet50", "mobilenet_v2", "vit_b_16", "swin_t", "resnet20", "mobilenetv1"} <= set(names)
    assert not any("fasterrcnn" in name or "deeplab" in name for name in names)


@pytest.mark.parametrize(("arch", "layers", "size"), [
    ("resnet20", 20, 32), ("mobilenetv1", 28, 64), ("resnet18", 21, 64), ("squeezenet1_0", 26, 64), ("googlenet", 58, 64)])
def test_the_head_follows_the_number_of_classes(arch, layers, size):
    model = create_model(arch, 7).eval()
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 7)
    assert len(trace(model, size).layers) == layers


def test_mobilenetv1_halves_the_image_five_times():
    sizes = []
    model = create_model("mobilenetv1", 10).eval()
    for unit in (model.stem, *model.features):
        unit.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[-1]))
    model(torch.zeros(1, 3, 64, 64))
    assert sizes == [32, 32, 16, 16, 8, 8, 4, 4, 4, 4, 4, 4, 2, 2]


@pytest.fixture
def published(monkeypatch):
    """Stands in for the download of torchvision's ResNet-18 weights."""
    state = models.resnet18().state_dict()

    def get_state_dict(self, *args, **kwargs):
        assert self is models.ResNet18_Weights.IMAGENET1K_V1
        return state

    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", get_state_dict)
    return state


@pytest.mark.parametrize("classes", [1000, 10])
def test_pre_trained_weights_are_taken_and_a_head_of_another_size_is_new(published, classes):
    state = create_model("resnet18", classes, pre_trained=True).state_dict()
    differing = {name for name in state if state[name].shape != published[name].shape
                 or not torch.equal(state[name], published[name])}
    assert differing == (set() if classes == 1000 else {"fc.weight", "fc.bias"})


def test_a_failed_download_says_what_to_put_where(monkeypatch):
    def unreachable(self, *args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", unreachable)
    with pytest.raises(UserError, match=r"cannot download https://\S+resnet18\S+ \(no route to host\); put the file into"):
        create_model("resnet18", 10, pre_trained=True)


def test_published_names_of_densenets_are_todays(monkeypatch):
    state = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", name): tensor
             for name, tensor in models.densenet121().state_dict().items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in state
    monkeypatch.setattr(models.DenseNet121_Weights, "get_state_dict", lambda *args, **kwargs: state)
    model = create_model("densenet121", 1000, pre_trained=True)
    assert torch.equal(model.features.denseblock1.denselayer1.norm1.weight,
                       state["features.denseblock1.denselayer1.norm.1.weight"])


@pytest.mark.parametrize("arch", ["mnasnet0_5", "googlenet"])
def test_weights_of_modules_with_a_version_come_back(arch):
    model, other = create_model(arch, 10), create_model(arch, 10)
    assert load_weights(other, {name: tensor.clone() for name, tensor in model.state_dict().items()}, "file")
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("change", "message"), [
    (lambda state: state.pop("layer1.0.conv1.weight"), "layer1.0.conv1.weight of this network is missing"),
    (lambda state: state.update({"layer9.weight": torch.ones(1)}), "layer9.weight is not part of this network"),
    (lambda state: state.update({"conv1.weight": torch.ones(1)}), r"conv1.weight has shape \[1\]"),
    (lambda state: state.update({"layer1.0.conv1.quan_w_fn.s": torch.ones(1)}), "it is a quantized checkpoint")])
def test_weights_that_do_not_fit_are_refused_by_name(change, message):
    model = create_model("resnet20", 10)
    state = dict(model.state_dict())
    change(state)
    with pytest.raises(UserError, match=message):
        load_weights(model, state, "file")
