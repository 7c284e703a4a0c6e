"""External networks: timm's, and those that a file of the user's own builds."""

import contextlib
import inspect
import os
import sys
import traceback
import types

import torch
from torch import nn

from util.errors import UserError, nearest, reason
from util.exchange import split_arch

TIMM = "timm:"
KEPT_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
              torch.uint8, torch.bool)  # that can be read from a checkpoint


def create_from_file(arch, num_classes):
    """The network that factory(num_classes=num_classes) in the user's own file gives, its parameters in float32.

    Raises:
        UserError: where the file or the factory is not there, takes other arguments, fails, or gives no nn.Module or one
            with tensors that no checkpoint holds.
    """
    path, name = split_arch(arch)
    module = _run_file(arch, os.path.expanduser(path))
    factory = getattr(module, name, None)
    if not callable(factory):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"arch: {path} has no {'' if factory is None else 'function '}{name!r}{nearest(name, known)}")
    _check_arguments(arch, factory)
    with _errors_of_the_user(arch, path):
        model = factory(num_classes=num_classes)
    if not isinstance(model, nn.Module):
        raise UserError(f"arch: {arch} gave a {type(model).__name__}, expected an nn.Module")
    _check_tensors(arch, model)
    other = {parameter.dtype for parameter in model.parameters()} - {torch.float32}
    if other:  # step sizes, optimizers and files are made for one type; precision: bf16 computes in bfloat16
        print(f"arch: {arch}: parameters in {', '.join(sorted(str(kind).removeprefix('torch.') for kind in other))} are "
              "converted to float32", file=sys.stderr)
    return model.float() if other else model


def _check_tensors(arch, model):
    """Refuse tensors that could be trained, but not be read again from a checkpoint."""
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, torch.Tensor) or isinstance(value, nn.parameter.UninitializedTensorMixin):
            found = f"a {type(value).__name__}"
        elif value.dtype not in KEPT_TYPES or value.layout != torch.strided:
            found = f"{value.dtype}, {value.layout}"
        elif value.numel() * value.element_size() > value.untyped_storage().nbytes():
            found = "an expanded tensor"
        else:
            continue
        raise UserError(f"arch: {arch}: {name}: a checkpoint cannot hold it ({found}); expected a plain tensor of real "
                        "numbers, or a buffer registered with persistent=False")


def _run_file(arch, path):
    """The module in a Python file. Its folder is searched for imports after everything else."""
    try:
        with open(path, "rb") as file:
            source = file.read()
    except OSError as error:
        raise UserError(f"arch: {path}: cannot read the file ({error.strerror}); paths are relative to "
                        f"{os.getcwd()}") from None
    module = types.ModuleType(f"arch_{os.path.basename(path).removesuffix('.py')}")
    module.__file__ = os.path.abspath(path)
    sys.modules[module.__name__] = module  # dataclasses look their own module up
    folder = os.path.dirname(module.__file__)
    if folder not in sys.path:
        sys.path.append(folder)
    with _errors_of_the_user(arch, path):
        exec(compile(source, module.__file__, "exec"), vars(module))
    return module


@contextlib.contextmanager
def _errors_of_the_user(arch, path):
    """Turns whatever the user's code raises into a UserError with the line of their file."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        own = os.path.abspath(os.path.expanduser(path))
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == own]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        raise UserError(f"arch: {arch} failed{f' in line {line}' if line else ''} "
                        f"({type(error).__name__}: {reason(error)})") from None


def _check_arguments(arch, factory):
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # not every callable has one
        return
    try:
        signature.bind(num_classes=0)
    except TypeError as error:
        raise UserError(f"arch: {arch} takes {signature}, but is called with num_classes=...; give it a parameter "
                        f"num_classes, and all others a default ({reason(error)})") from None


def create_from_timm(arch, num_classes, pre_trained, input_size):
    """A network of timm, by its name there after `timm:`; the arguments are those of create_model."""
    try:
        import timm
    except ImportError as error:
        raise UserError(f"arch: {arch!r} needs timm, which is not installed ({reason(error)}); pip install timm") from None
    name = arch.removeprefix(TIMM)
    if not timm.is_model(name):
        raise UserError(f"arch: {name!r} is not a network of timm {timm.__version__}{nearest(name, timm.list_models())}")
    published, options = timm.get_pretrained_cfg(name), {}
    if input_size and published is not None and published.fixed_input_size and input_size != published.input_size[-1]:
        options["img_size"] = input_size
    try:
        return timm.create_model(name, pretrained=pre_trained, num_classes=num_classes, **options)
    except Exception as error:  # of the network's own checks, of the download, of the hub: many types
        what = "pre_trained" if pre_trained else "arch"
        raise UserError(f"{what}: timm cannot build {name} ({reason(error)})") from None
