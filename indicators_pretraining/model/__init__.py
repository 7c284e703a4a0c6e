"""Networks by name: torchvision's classification models and the architectures that torchvision lacks."""

import re
import warnings

from util.errors import UserError, nearest, reason

from .mobilenetv1 import mobilenetv1
from .resnet_cifar import resnet20
from .weights import load_weights

OWN_MODELS = {"mobilenetv1": mobilenetv1, "resnet20": resnet20}
AUXILIARY_HEADS = ("googlenet", "inception_v3")
OLD_DENSENET_NAME = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(\d)")  # norm.1 in the published files is norm1 today


def list_architectures():
    """Every name that `arch:` accepts."""
    from torchvision import models

    return sorted({*OWN_MODELS, *models.list_models(module=models)})


def create_model(arch, num_classes, pre_trained=False):
    """Build a network for images of shape [batch, 3, height, width].

    Args:
        arch: a name from list_architectures().
        num_classes: number of outputs.
        pre_trained: take torchvision's ImageNet weights; the classifier is kept where it has num_classes outputs.

    Returns:
        the network, with freshly initialised parameters wherever no pre-trained ones were taken.

    Raises:
        UserError: on an unknown name, weights that do not exist or cannot be downloaded.
    """
    if arch not in list_architectures():
        raise UserError(f"arch: {arch!r} is not a known network{nearest(arch, list_architectures())}")
    if arch in OWN_MODELS:
        if pre_trained:
            raise UserError(f"pre_trained: torchvision has no weights of {arch}; give a path to a checkpoint, or false")
        return OWN_MODELS[arch](num_classes)
    model = _torchvision_model(arch, num_classes)
    if pre_trained:
        load_weights(model, _torchvision_weights(arch), f"torchvision's {arch}")
    return model


def _torchvision_model(arch, num_classes):
    from torchvision import models

    options = {"num_classes": num_classes}
    if arch in AUXILIARY_HEADS:
        # Their second classifiers serve full-precision training only; the published weights expect inputs transformed.
        options.update(aux_logits=False, init_weights=True, transform_input=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return models.get_model(arch, weights=None, **options)


def _torchvision_weights(arch):
    """The weights that torchvision's `pretrained=True` stood for, IMAGENET1K_V1 where there are several."""
    from torchvision import models

    choices = models.get_model_weights(arch)
    weights = getattr(choices, "IMAGENET1K_V1", getattr(choices, "DEFAULT", None))
    if weights is None:
        raise UserError(f"pre_trained: torchvision has no weights of {arch}; give a path to a checkpoint, or false")
    try:
        state = weights.get_state_dict(progress=False, check_hash=True)
    except Exception as error:  # URL, proxy, disk and hash errors come as many types
        raise UserError(f"pre_trained: cannot download {weights.url} ({reason(error)}); put the file into "
                        "$TORCH_HOME/hub/checkpoints (~/.cache/torch/hub/checkpoints), or give its path") from None
    return {OLD_DENSENET_NAME.sub(r"\1\2", name): tensor for name, tensor in state.items()}
