"""Modules under their names, of which one module may have several."""

from torch import nn


def put_modules(model, replacements):
    """Put modules into a network, in place.

    Args:
        replacements: {name of the module that goes: module that comes}; it comes under every name of the one that goes.
    """
    coming = {model.get_submodule(name): module for name, module in replacements.items()}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in coming:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, coming[module])


def second_names(model):
    """Names of modules that a network has under another name before; a state_dict holds their tensors once more."""
    first = dict(model.named_modules())
    return {name for name, _ in model.named_modules(remove_duplicate=False) if name not in first}


def is_below(name, modules):
    """Whether the name of a tensor or module lies in one of the modules of these names."""
    parts = name.split(".")
    return any(".".join(parts[:length]) in modules for length in range(1, len(parts) + 1))


def unwrap(model):
    """A network without the wrappers around it and around its parts (nn.DataParallel, torch.compile), whose names would
    stand in every name below them."""
    while _inside(model) is not None:
        model = _inside(model)
    inside = {name: _inside(module) for name, module in model.named_modules()}
    for name in reversed(inside):  # the inner ones first
        if inside[name] is not None:
            put_modules(model, {name: inside[name]})
    return model


def _inside(module):
    """What a wrapper holds; None of a module that is none."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return module.module
    kind = type(module)  # of torch.compile's wrapper, which takes a second to import
    is_compiled = kind.__name__ == "OptimizedModule" and kind.__module__.startswith("torch._dynamo")
    return module._orig_mod if is_compiled else None
