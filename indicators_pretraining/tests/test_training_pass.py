"""Networks that do otherwise in training than in evaluation, or once their layers are quantized."""

import copy
import random
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from test_bad_input import CONFIG
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import main
import pruning
from model.layer_table import trace
from model.model import first_tensor
from model.training_pass import check_training
from quan.func import SwitchableBatchNorm
from quan.unchanged import check_unchanged
from quan.utils import joint_modules, name_exceptions, replace_module_by_names
from schema import IndicatorsConfig
from util.errors import UserError

SIZE, CLASSES = 8, 4


@dataclass
class Outputs:
    logits: torch.Tensor
    features: torch.Tensor


class Net(nn.Module):
    """A convolution with its BatchNorm, another one, a classifier; subclasses say what happens in between and at the end."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.conv, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.other = nn.Conv2d(6, 6, 1)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x):
        x = self.between(self.bn(self.stem(x)).relu())
        return self.output(x.mean((2, 3)))

    def between(self, x):
        return self.bn2(self.conv(x)).relu()

    def output(self, x):
        return self.fc(x)


def checked(model):
    model.register_forward_hook(first_tensor)
    return check_training(model, trace(model, SIZE, CLASSES), SIZE, CLASSES)


@pytest.mark.parametrize(("wrap", "kind"), [
    (lambda logits, x: (logits, x), "tuple"), (lambda logits, x: [logits, [x]], "list"),
    (lambda logits, x: {"out": logits, "aux": x}, "dict"), (lambda logits, x: Outputs(logits, x), "Outputs")])
@pytest.mark.parametrize("always", [False, True])
def test_of_several_outputs_the_first_tensor_is_trained_on(wrap, kind, always):
    class Several(Net):
        def output(self, x):
            return wrap(self.fc(x), x) if self.training or always else self.fc(x)

    model, images = Several(), torch.randn(2, 3, SIZE, SIZE)
    assert checked(model) == f"in training the network gives a {kind}; it is trained on the first tensor in it"
    alone = Net()
    alone.load_state_dict(model.state_dict())
    assert torch.equal(model(images), alone(images))


@pytest.mark.parametrize(("output", "message"), [
    (lambda net, x: (x, net.fc(x)), r"gives a tuple with a first tensor of shape \[2, 6\] for two images, expected logits"),
    (lambda net, x: {"loss": 1.0}, "gives a dict without a tensor for two images, expected logits of shape"),
    (lambda net, x: None, "gives a NoneType without a tensor"),
    (lambda net, x: net.fc(x)[:1], r"first tensor of shape \[1, 4\]"),
    (lambda net, x: net.missing(x), r"the network fails in training, on two images of 8x8 \(AttributeError: ")])
def test_a_network_without_logits_in_training_is_refused(output, message):
    class Odd(Net):
        def output(self, x):
            return output(self, x) if self.training else self.fc(x)

    with pytest.raises(UserError, match=message):
        checked(Odd())


@pytest.mark.parametrize("wrap", [lambda logits, aux: (aux, logits), lambda logits, aux: aux,
                                  lambda logits, aux: {"aux": aux, "logits": logits}])
def test_an_auxiliary_head_is_not_trained_in_place_of_the_one_that_is_evaluated(wrap):
    class Helper(Net):
        def __init__(self):
            super().__init__()
            self.helper = nn.Linear(self.fc.in_features, CLASSES)

        def output(self, x):
            logits = self.fc(x)
            return wrap(logits, self.helper(x)) if self.training else logits

    with pytest.raises(UserError, match="in training the logits come from helper, in evaluation from fc; give the same"):
        checked(Helper())


def test_layers_that_only_one_of_training_and_evaluation_reaches():
    class Elsewhere(Net):
        def between(self, x):
            return self.conv(x) if self.training else self.other(self.bn2(x))

    with pytest.raises(UserError, match="evaluation reaches other, bn2, which training does not"):
        checked(Elsewhere())

    class Helped(Net):
        def output(self, x):
            return self.fc(x) + (self.other(x[:, :, None, None]).mean() if self.training else 0)

    assert checked(Helped()) == "reached in training only, and left in full precision: other"

    class Normed(Helped):  # its layer is reached in both, and cannot be quantized
        def __init__(self):
            super().__init__()
            self.conv = weight_norm(self.conv)

    assert checked(Normed()) == "reached in training only, and left in full precision: other"


def test_layers_that_training_skips_at_random_are_reached_by_it_and_no_generator_notices():
    class Skipping(Net):
        def between(self, x):
            if self.training and random.random() < 0.5 and np.random.rand() < 0.9 and torch.rand(()) < 0.9:
                return x
            return self.bn2(self.conv(x)).relu()

    def drawn():
        return random.random(), np.random.rand(), torch.rand(()).item()

    def seed():
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    model = Skipping()
    seed()
    expected = drawn()
    seed()
    assert checked(model) == ""
    assert drawn() == expected


def test_one_value_per_channel_on_two_images_is_left_to_the_batch_that_is_trained_on():
    class Single(Net):
        def output(self, x):
            return self.fc(self.bn2(x[:1, :, None, None])[:, :, 0, 0]).expand(len(x), -1)

    assert checked(Single()) == ""


def joined(model, bits=(4, 2)):
    """The network, quantized for joint training, after it was compared with what it was."""
    graph = trace(model, SIZE, CLASSES)
    config, _ = name_exceptions(IndicatorsConfig(), graph)
    plain = copy.deepcopy(model)
    replace_module_by_names(model, joint_modules(model, graph, config.quan, bits))
    check_unchanged(plain, model, graph, SIZE)
    return model


class AsksForType(Net):
    def between(self, x):
        return self.bn2(self.conv(x)) if type(self.bn2) is nn.BatchNorm2d else self.bn2(self.conv(x)).relu()


class AsksForTypeInTraining(Net):
    def between(self, x):
        x = self.bn2(self.conv(x)).relu()
        return x * (2 if self.training and isinstance(self.bn2, nn.BatchNorm2d) else 1)


class AsksForAnotherNumber(Net):
    def between(self, x):
        return self.bn2(self.conv(x)) * (3 if type(self.conv) is nn.Conv2d else 2)


class LooksAtValues(Net):
    def between(self, x):
        x = self.bn2(self.conv(x)) if float(x.sum()) > -1e9 else x
        return x.relu() if type(self.bn2) is nn.BatchNorm2d else x


@pytest.mark.parametrize(("kind", "mode"), [(AsksForType, "evaluation"), (AsksForTypeInTraining, "training"),
                                            (AsksForAnotherNumber, "evaluation"), (LooksAtValues, "evaluation")])
def test_a_forward_pass_that_asks_for_types_of_layers_is_refused(kind, mode):
    with pytest.raises(UserError, match=f"computes something else in {mode}, beginning in its own forward pass"):
        joined(kind())


def test_what_quantized_layers_lack_is_named():
    class Asks(Net):
        def between(self, x):
            return self.bn2(self.conv(x)) * type(self.bn2).strength

    class Strong(nn.BatchNorm2d):
        strength = 2.0

    model = Asks()
    model.bn2 = Strong(6)
    with pytest.raises(UserError, match=r"fails once its layers are quantized \(AttributeError: .*strength"):
        joined(model)


def test_attributes_of_a_switched_batchnorm_are_those_of_the_selected_copy():
    class Asks(Net):
        def between(self, x):
            x = self.bn2(self.conv(x))
            size = self.bn2.weight.abs().mean() + self.bn2.running_var.sum() * self.bn2.eps + self.bn2.num_features
            return (x * size).relu()

    model = joined(Asks())
    switched = model.bn2
    assert isinstance(switched, SwitchableBatchNorm) and set(switched.state_dict()) == {
        f"bns.{index}.{name}" for index in range(2) for name in nn.BatchNorm2d(1).state_dict()}
    for bit, copied in zip((4, 2), switched.bns, strict=True):
        switched.select(bit)
        assert switched.weight is copied.weight and switched.running_mean is copied.running_mean
        assert switched.eps == copied.eps and switched.affine and switched.momentum == copied.momentum
    assert model.bn.weight is model.bn.bn.weight  # the excepted one
    for module in (switched, model.bn):
        with pytest.raises(AttributeError, match="missing"):
            _ = module.missing


SOURCE = """
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem, self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, num_classes)
        self.aux = nn.Linear(4, num_classes)

    def forward(self, x):
        x = self.conv(self.stem(x).relu()).relu().mean((2, 3))
        return {"out": self.fc(x), "aux": self.aux(x)} if self.training else self.fc(x)
"""


def test_a_network_with_an_auxiliary_head_goes_through_joint_training_and_pruning(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(SOURCE)
    (tmp_path / "config.yaml").write_text(CONFIG.replace(", excepts: {conv1: , bn1: , fc: }", ""))
    words = ["config.yaml", "arch=net.py:Net", "epochs=1", "name=aux"]
    main.main(words)
    assert "in training the network gives a dict; it is trained on the first tensor in it" in \
        next((tmp_path / "out" / "aux").glob("*.log")).read_text()
    pruning.main([*words, "prune.levels=1"])


SOME = """
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.stem, self.conv, self.rare = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x):
        rare = x.abs().max() == 0 or x.min() < -2  # as the images of the dry passes are, and those of the data are not
        x = self.conv(self.stem(x).relu()).relu()
        return self.fc((self.rare(x) if rare or THIS_TOO else x).mean((2, 3)))
"""


def test_a_layer_that_no_image_reaches_ends_the_run_after_its_first_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG.replace(", excepts: {conv1: , bn1: , fc: }", ""))
    words = ["config.yaml", "arch=net.py:Net", "epochs=3"]
    (tmp_path / "net.py").write_text(SOME.replace("THIS_TOO", "True"))
    main.main([*words, "name=all", "epochs=1"])
    (tmp_path / "net.py").write_text(SOME.replace("THIS_TOO", "False"))
    with pytest.raises(UserError, match="no image of the first epoch reached rare; name what only some images reach"):
        main.main(words)
    assert not (tmp_path / "out" / "run" / "run_checkpoint.pth.tar").exists()
