"""Networks that tests train often: the source of one of four layers, and ResNet-20 with fewer blocks."""

SMALL = """
from torch import nn


def make(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, bias=False),
                         nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                         nn.Linear(24, num_classes))
"""


def make_shallow(patch):
    """ResNet-20 with one block in each group instead of three: layers of the same names, in less than half the time."""
    from model.own_models import OWN_MODELS, CifarResNet

    patch.setitem(OWN_MODELS, "resnet20", lambda num_classes: CifarResNet(1, num_classes))
