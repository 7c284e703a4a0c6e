"""Modules under their names, of which one module may have several."""


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
