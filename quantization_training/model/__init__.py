"""Networks by name: torchvision's classification models and the architectures that torchvision lacks."""

import warnings

from torch import nn

from util.errors import UserError, nearest, reason

from .mobilenetv1 import mobilenetv1
from .resnet_cifar import resnet20

OWN_MODELS = {"mobilenetv1": mobilenetv1, "resnet20": resnet20}
AUXILIARY_HEADS = ("googlenet", "inception_v3")


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
    model = _torchvision_model(arch, num_classes, transform_input=pre_trained)
    if pre_trained:
        load_weights(model, _torchvision_weights(arch), f"torchvision's {arch}")
    return model


def _torchvision_model(arch, num_classes, transform_input):
    from torchvision import models

    options = {"num_classes": num_classes}
    if arch in AUXILIARY_HEADS:  # their second classifiers serve full-precision training only
        options.update(aux_logits=False, init_weights=True, transform_input=transform_input)
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
        return weights.get_state_dict(progress=False, check_hash=True)
    except Exception as error:  # URL, proxy, disk and hash errors come as many types
        raise UserError(f"pre_trained: cannot download {weights.url} ({reason(error)}); put the file into "
                        "$TORCH_HOME/hub/checkpoints (~/.cache/torch/hub/checkpoints), or give its path") from None


def classifier_name(model):
    """The name of the last convolution or linear layer, which gives the outputs."""
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))][-1]


def load_weights(model, state_dict, source):
    """Load full-precision weights into a full-precision model, by name.

    The classifier may have another number of outputs; it then keeps its fresh parameters. Auxiliary classifiers in
    the file are passed over. Everything else has to fit.

    Returns:
        the names of the parameters that were not taken from the file.

    Raises:
        UserError: naming the source and the first tensor that is missing, extra or of another shape.
    """
    own = model.state_dict()
    head = classifier_name(model)
    taken = {}
    for name, tensor in state_dict.items():
        if name.split(".")[0].lower().startswith("aux"):
            continue
        if name not in own:
            hint = "; it is a quantized checkpoint, which init_from takes" if "quan_w_fn" in name else nearest(name, own)
            raise UserError(f"{source}: the tensor {name} is not part of this network{hint}")
        if own[name].shape == tensor.shape:
            taken[name] = tensor
        elif name.rpartition(".")[0] != head:
            raise UserError(f"{source}: {name} has shape {list(tensor.shape)}, this network's is {list(own[name].shape)}")
    missing = [name for name in own if name not in taken]
    for name in missing:
        if name.rpartition(".")[0] != head and not name.endswith("num_batches_tracked"):
            raise UserError(f"{source}: the tensor {name} of this network is missing in the file")
    model.load_state_dict(taken, strict=False)
    return missing
