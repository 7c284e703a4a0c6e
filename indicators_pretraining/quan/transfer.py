"""From a jointly trained network to one at a policy's bits: which tensors of its checkpoint stay."""

from model.names import is_below
from model.weights import is_step
from util.errors import UserError
from util.exchange import FLOAT_BIT

from .quantizer.lsq import SMALLEST_STEP


def choose_candidates(checkpoint, weight_bits, act_bits, source, second_names=frozenset()):
    """The state_dict {name: tensor} of a network at a policy's bits, from a jointly trained one.

    A layer keeps its step sizes at its own bits; a BatchNorm keeps the copy for the weight bits of the layer before it,
    or for the highest bit-width where there is no such layer.

    Args:
        checkpoint: a stage-1 checkpoint, with bits, batchnorms and state_dict.
        weight_bits, act_bits: {layer: bit}.
        source: the path of the checkpoint, for messages.
        second_names: second_names() of the network; their tensors are left out.

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
        layer, _, kind = module.rpartition(".")
        batchnorm, _, copy = module.rpartition(".bns.")
        if kind in ("quan_w_fn", "quan_a_fn") and entry in ("s", "init_state") and layer in weight_bits:
            wanted = (weight_bits if kind == "quan_w_fn" else act_bits)[layer]
            if wanted == FLOAT_BIT:  # an input that is not quantized
                continue
            index = _index(bits, wanted, layer, source)
            if tensor.dim() == 0 or len(tensor) != len(bits):
                raise UserError(f"{source}: {name}: found {tensor.numel()} values, expected one per candidate {list(bits)}")
            chosen[name] = tensor[index:index + 1].clone()
        elif batchnorm in before and copy.isdecimal():
            wanted = weight_bits.get(before[batchnorm], max(bits))
            if copy == str(_index(bits, wanted, batchnorm, source)):
                chosen[f"{batchnorm}.{entry}"] = tensor
        else:  # of an excepted layer or BatchNorm, or of what has no bits
            chosen[f"{layer}.{entry}" if kind == "bn" and layer in before else name] = tensor
    return chosen


def names_in_joint_training(own, batchnorms, bits):
    """The names that tensors called `own`, in full precision or at a policy's bits, may have in joint training at `bits`."""
    copies, names = ["bn", *(f"bns.{index}" for index in range(len(bits)))], []
    for name in own:
        module, _, entry = name.rpartition(".")
        names += [f"{module}.{copy}.{entry}" for copy in copies] if module in batchnorms else [name]
    return names


def clamp_as_limpq(state_dict):
    """A state_dict of LIMPQ's joint training with its step sizes clamped to [1e-5, 1], and a line about those, or ''.

    LIMPQ's forward pass clamps them; the parameters themselves leave that range, and stay where they get no gradient.
    """
    clamped = {name: tensor.clamp(SMALLEST_STEP, 1.0) for name, tensor in state_dict.items() if is_step(name)}
    outside = {name: int((state_dict[name] != tensor).sum()) for name, tensor in clamped.items()}
    names = [name for name, count in outside.items() if count]
    if not names:
        return state_dict, ""
    line = f"{sum(outside.values())} step sizes are taken at the nearer end of [1e-5, 1], as LIMPQ does: those of "
    return state_dict | clamped, line + ", ".join(names)


def normalised_weights(state_dict):
    """A state_dict of LIMPQ's fine-tuning with the weights that were quantized, and whether these were normalised.

    LIMPQ's first code quantized (w - mean)/std of each convolution's weight and left an unused parameter act_rescale_p in its
    checkpoints; the later one does neither.
    """
    marks = [name for name in state_dict if name.endswith(".act_rescale_p")]
    weights = {f"{name.removesuffix('.act_rescale_p')}.weight" for name in marks}
    return {name: (tensor - tensor.mean()) / tensor.std() if name in weights else tensor
            for name, tensor in state_dict.items() if name not in marks}, bool(marks)


def _index(bits, wanted, name, source):
    if wanted not in bits:
        raise UserError(f"{source}: {name}: the policy chose {wanted} bits, the checkpoint was trained at {list(bits)}")
    return list(bits).index(wanted)
