"""From a jointly trained network to one at a policy's bits: which tensors of its checkpoint stay."""

from model.names import is_below
from util.errors import UserError


def choose_candidates(checkpoint, weight_bits, act_bits, source, second_names=frozenset()):
    """The state_dict of a jointly trained network, reduced to the bits that a policy chose.

    A layer keeps its step sizes at its own bits; a BatchNorm keeps the copy for the weight bits of the layer before it,
    or for the widest candidate where there is no such layer.

    Args:
        checkpoint: a stage-1 checkpoint, with bits, batchnorms and state_dict.
        weight_bits, act_bits: {layer: bit}.
        source: the path of the checkpoint, for messages.
        second_names: modules that the network has under another name before; what stands under these is left out.

    Returns:
        {name: tensor} with the names of a network quantized at the policy's bits.

    Raises:
        UserError: where the checkpoint was not trained at a chosen bit-width.
    """
    bits, before = checkpoint.get("bits"), checkpoint.get("batchnorms")
    if not bits or before is None:
        raise UserError(f"{source}: not a checkpoint of indicators_pretraining (it has no candidate bit-widths)")
    chosen = {}
    for name, tensor in checkpoint["state_dict"].items():
        if is_below(name, second_names):
            continue
        module, _, entry = name.rpartition(".")
        if module.endswith((".quan_w_fn", ".quan_a_fn")):
            layer, _, kind = module.rpartition(".")
            wanted = (weight_bits if kind == "quan_w_fn" else act_bits).get(layer)
            if wanted is None:  # an excepted layer at bits of its own
                chosen[name] = tensor
            else:
                index = _index(bits, wanted, layer, source)
                if tensor.dim() == 0 or len(tensor) != len(bits):
                    raise UserError(f"{source}: {name}: found {tensor.numel()} values, expected one per candidate "
                                    f"{list(bits)}")
                chosen[name] = tensor[index:index + 1].clone()
        elif ".bns." in name:
            batchnorm, _, copy = module.rpartition(".bns.")
            wanted = weight_bits.get(before.get(batchnorm), max(bits))
            if copy == str(_index(bits, wanted, batchnorm, source)):
                chosen[f"{batchnorm}.{entry}"] = tensor
        else:
            chosen[f"{module.removesuffix('.bn')}.{entry}" if module.removesuffix(".bn") in before else name] = tensor
    return chosen


def _index(bits, wanted, name, source):
    if wanted not in bits:
        raise UserError(f"{source}: {name}: the policy chose {wanted} bits, the checkpoint was trained at {list(bits)}")
    return list(bits).index(wanted)
