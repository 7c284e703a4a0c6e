"""Networks by name: torchvision's classification models, those that torchvision lacks, timm's, and the user's own."""

import re
import warnings

import torch
from torchvision import models

from util.errors import UserError, nearest, reason
from util.exchange import split_arch

from .attention import decompose_attention
from .external import TIMM, create_from_file, create_from_timm
from .layer_table import tensors_in, trace
from .names import unwrap
from .own_models import OWN_MODELS, SIZED_MODELS
from .weights import load_weights, redraw_zero_classifiers

AUXILIARY_HEADS = ("googlenet", "inception_v3")
OLD_DENSENET_NAME = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(\d)")  # norm.1 in the published files is norm1 today


def list_architectures():
    """Every name that `arch:` accepts, besides timm:NAME and path/to/file.py:factory."""
    return sorted({*OWN_MODELS, *models.list_models(module=models)})


def create_model(arch, num_classes, pre_trained=False, input_size=None):
    """Build a network for images of shape [batch, 3, height, width], its attention decomposed into layers.

    Of several outputs of timm's networks or the user's own, in a tuple, a dict or the like, it gives the first tensor, which
    has to be the logits.

    Args:
        arch: a name from list_architectures(); timm:NAME; or path/to/file.py:factory, whose code is then run.
        num_classes: number of outputs.
        pre_trained: take torchvision's ImageNet weights, or timm's; the classifier is kept where it has num_classes outputs.
        input_size: height and width of the images; None for those that the network was made for.

    Raises:
        UserError: on an unknown name, a size or a file that does not fit, weights that do not exist or cannot be downloaded.
    """
    is_torchvision = not (split_arch(arch) or arch.startswith(TIMM) or arch in OWN_MODELS)
    if pre_trained and not (is_torchvision or arch.startswith(TIMM)):
        raise UserError(f"pre_trained: torchvision has no weights of {arch}; give a path to a checkpoint, or false")
    if split_arch(arch) or arch.startswith(TIMM):
        model = (unwrap(create_from_file(arch, num_classes)) if split_arch(arch) else
                 create_from_timm(arch, num_classes, pre_trained, input_size))
        model = decompose_attention(model)
        model.register_forward_hook(first_tensor)
        return model
    _check_name(arch)
    build = _torchvision_model if is_torchvision else _own_model
    try:
        model = decompose_attention(build(arch, num_classes, input_size))
    except (AssertionError, ValueError) as error:
        raise UserError(_why_not_built(build, arch, num_classes, input_size, error)) from None
    if pre_trained:
        load_weights(model, _torchvision_weights(arch), f"torchvision's {arch}")
    return model


def _why_not_built(build, arch, num_classes, input_size, error):
    """What to say of an error in building a network: the size is to blame only where it is built for its own one."""
    try:
        build(arch, num_classes, None)
    except Exception:
        return f"arch: {arch} cannot be built ({type(error).__name__}: {reason(error)})"
    return (f"the network does not take images of {input_size}x{input_size} ({reason(error)}); "
            "change arch or dataloader.input_size")


def create_traced(arch, num_classes, pre_trained, input_size):
    """The network that create_model builds, with weights in classifiers that would begin at zero, and its Graph."""
    model = create_model(arch, num_classes, pre_trained, input_size)
    graph = trace(model, input_size, num_classes)
    redraw_zero_classifiers(model, graph)
    return model, graph


def first_tensor(module, inputs, output):
    """A forward hook that gives the first tensor of several outputs."""
    return None if isinstance(output, torch.Tensor) else next(tensors_in(output), output)


def _check_name(arch):
    if arch in list_architectures():
        return
    if arch.endswith(".py"):
        raise UserError(f"arch: {arch!r} is a file; say what in it builds the network, {arch}:factory")
    close = nearest(arch, list_architectures())
    raise UserError(f"arch: {arch!r} is not a known network"
                    f"{close or '; expected a name such as resnet18, timm:NAME, or path/to/file.py:factory'}")


def _own_model(arch, num_classes, input_size):
    options = {"input_size": input_size} if input_size and arch in SIZED_MODELS else {}
    return OWN_MODELS[arch](num_classes, **options)


def _torchvision_model(arch, num_classes, input_size):
    options = {"num_classes": num_classes}
    if arch in AUXILIARY_HEADS:
        # Their second classifiers serve full-precision training only; the published weights expect inputs transformed.
        options.update(aux_logits=False, init_weights=True, transform_input=True)
    if input_size and arch.startswith("vit_"):
        options.update(image_size=input_size)
    if input_size and arch.startswith("maxvit"):
        options.update(input_size=(input_size, input_size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return models.get_model(arch, weights=None, **options)


def _torchvision_weights(arch):
    """The weights that torchvision's `pretrained=True` stood for, IMAGENET1K_V1 where there are several."""
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
