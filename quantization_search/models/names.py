"""Modules under their names, of which one module may have several."""

from torch import nn


def put_modules(model, replacements):
    """Put modules into a network, in place.

    Args:
        replacements: {name of the module that goes: module that comes}; it comes under every name of the one that goes.
    """
    names = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    places = {name: names[id(model.get_submodule(name))] for name in replacements}
    for name, module in replacements.items():
        for place in places[name]:
            parent, _, child = place.rpartition(".")
            setattr(model.get_submodule(parent), child, module)


def second_names(model):
    """Names of modules that a network has under another name before; a state_dict holds their tensors once more."""
    seen, second = set(), set()
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in seen:
            second.add(name)
        seen.add(id(module))
    return second


def is_below(name, modules):
    """Whether the name of a tensor or module lies in one of the modules of these names."""
    parts = name.split(".")
    return any(".".join(parts[:length]) in modules for length in range(1, len(parts) + 1))


def unwrap(model):
    """A network without the wrappers around it and around its parts (nn.DataParallel, torch.compile), whose names would
    stand in every name below them."""
    while _is_wrapper(model):
        model = _inside(model)
    wrapped = {name: module for name, module in model.named_modules() if _is_wrapper(module)}
    for name in reversed(wrapped):  # the inner ones first
        put_modules(model, {name: _inside(wrapped[name])})
    return model


def _is_wrapper(module):
    return isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or _is_compiled(module)


def _is_compiled(module):
    kind = type(module)  # of a module that takes a second to import
    return kind.__name__ == "OptimizedModule" and kind.__module__.startswith("torch._dynamo")


def _inside(wrapper):
    return wrapper._orig_mod if _is_compiled(wrapper) else wrapper.module
