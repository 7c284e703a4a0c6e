"""Which bits each layer gets: from a policy file by name, from pasted lists by order, or the same everywhere."""

from dataclasses import dataclass

from util.errors import UserError, nearest
from util.exchange import fit_names, same_arch


@dataclass(frozen=True)
class Policy:
    """Bits of every searchable layer, {layer: bit}, and of some whether their activations are signed, {layer: bool}."""

    weight_bits: dict
    act_bits: dict
    signed: dict


def resolve_policy(config, names, policy_file=None, checkpoint=None):
    """The policy that a configuration asks for; a UserError where it is one of another network.

    Args:
        names: the searchable layers, in network order. policy_file: the content of config.policy, as read_policy gives it.
        checkpoint: for evaluation without a policy in the configuration, the checkpoint that carries one.
    """
    if policy_file is not None:
        return _from_file(config, names, policy_file)
    if config.weight_bits is None and config.act_bits is None and checkpoint and "weight_bits" in checkpoint:
        if set(names) != checkpoint["weight_bits"].keys() or set(names) != checkpoint["act_bits"].keys():
            raise UserError("quan.excepts: the checkpoint was trained with other exceptions; its searched layers are "
                            f"{', '.join(list(checkpoint['weight_bits'])[:3])}, ...")
        return Policy(checkpoint["weight_bits"], checkpoint["act_bits"], {})
    return Policy(_spread("weight_bits", config.weight_bits, names), _spread("act_bits", config.act_bits, names), {})


def _from_file(config, names, content):
    path = config.policy
    if not same_arch(content.get("arch", config.arch), config.arch):
        raise UserError(f"{path}: the policy is for {content['arch']}, but arch is {config.arch}")
    fitted = fit_names(names, content["layer_name"])
    layers = [fitted[name] for name in content["layer_name"]]
    strangers = [name for name in layers if name not in names]
    if strangers:
        hint = nearest(strangers[0], names)
        if not hint and 2 * len(strangers) > len(layers):
            hint = f"; nor are {len(strangers)} of the policy's {len(layers)} layers in all: it is another network's"
        raise UserError(f"{path}: {strangers[0]} is no searchable layer of {config.arch}{hint}")
    for name in names:
        if name not in layers:
            raise UserError(f"{path}: the policy says nothing of the layer {name} of {config.arch}, nor does "
                            f"quan.excepts ({', '.join(config.quan.excepts) or 'none'})")
    return Policy(*(dict(zip(layers, content[key], strict=True)) for key in ("weight_bits", "act_bits")),
                  dict(zip(layers, content.get("act_signed") or [], strict=False)))


def _spread(key, bits, names):
    """{layer: bit} of one number for all layers, or of a list in network order."""
    if bits is None:
        raise UserError(f"{key}: missing; give a policy file, or both weight_bits and act_bits")
    if isinstance(bits, int):
        return dict.fromkeys(names, bits)
    if len(bits) != len(names):
        raise UserError(f"{key}: found {len(bits)} values, this network has {len(names)} searchable layers "
                        f"({names[0]} to {names[-1]})")
    return dict(zip(names, bits, strict=True))
