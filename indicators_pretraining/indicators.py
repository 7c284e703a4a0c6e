"""Indicators files: read from the step sizes of checkpoints, checked, and written."""

import math

from engine.checkpoint import is_foreign, load_checkpoint, signedness_of
from network import check_not_finetuned
from quan.func import KINDS
from quan.quantizer.lsq import SMALLEST_STEP
from sparsity.masks import is_mask
from taylor import describe_factors, joint_fisher, loss_shares
from util.config import check_bits, describe, differing_keys, flatten
from util.errors import UserError
from util.exchange import own_name, same_arch, write_indicators

CARRIED = ("arch", "input_size", "num_classes", "bits", "layers", "fixed", "products")
TRAINED = ("dataloader.dataset", "dataloader.data_fraction", "dataloader.val_split", "dataloader.batch_size", "epochs", "opt",
           "lr", "weight_decay", "precision", "seed")  # what a file says of how it was made
MOBILENETS = ("mobilenetv1", "mobilenetv1_limpq")
OF_THE_NETWORK = ("arch", "layer_name", "input_size", "num_classes", "layers", "fixed", "products", "signed")


def extract(checkpoint, source, bits=None, of="steps"):
    """Read the indicators of a jointly trained network.

    Args:
        checkpoint: as engine.checkpoint.load_checkpoint gives it.
        source: its path, for messages.
        bits: candidate bit-widths of a checkpoint that does not say them itself.
        of: "steps", the learned step sizes, or "loss_share" or "joint_fisher", as taylor.py has them.

    Returns:
        the content of an indicators file: 'weight' and 'act' are {layer: {bit: indicator}}, 'layer_name' the layers in
        network order. The indicator of a layer with one step size per channel is their mean, over the channels of which
        something remains.

    Raises:
        UserError: naming the layer whose step size is missing or not finite, or whose mask is none.
    """
    if bits and checkpoint.get("bits") and list(bits) != checkpoint["bits"]:
        raise UserError(f"--b: found {list(bits)}, but {source} was trained at {checkpoint['bits']}")
    check_not_finetuned(checkpoint, source)
    steps = checkpoint["state_dict"]
    names = list(checkpoint.get("layers") or [name.removesuffix(".quan_w_fn.s") for name in steps
                                              if name.endswith(".quan_w_fn.s")])
    if not names:
        raise UserError(f"{source}: holds no step sizes; is it a checkpoint of indicators_pretraining?")
    bits = checkpoint.get("bits") or bits
    if not bits:
        raise UserError(f"{source}: does not say its candidate bit-widths; give them by --b, in the order of training")
    check_bits("--b", bits)
    _warn_of_zeros(steps, names, source)
    masks = checkpoint.get("masks", {})
    is_published = is_foreign(checkpoint) and checkpoint.get("arch") in MOBILENETS
    own = {name: own_name(name) if is_published else name for name in names}
    content = {"weight": {own[name]: _indicators(steps, f"{name}.quan_w_fn", bits, source, masks.get(f"{name}.weight"))
                          for name in names},
               "act": {own[name]: _indicators(steps, f"{name}.quan_a_fn", bits, source) for name in names}}
    if of != "steps":
        content.update(EXTRACTED[of](checkpoint, source))
    content["layer_name"] = list(own.values())
    content["kind"] = of
    _warn_of_steps(checkpoint, names, source)
    content.update({key: checkpoint[key] for key in CARRIED if key in checkpoint})
    if checkpoint.get("config"):
        content["trained"] = trained(checkpoint["config"])
    return content


def _warn_of_zeros(steps, names, source):
    """Name the quantizers whose step sizes have no value, because all data were zero; refuse where that is all of them."""
    quantizers = [f"{name}.{kind}" for name in names for kind in KINDS.values()]
    waiting = [name for name in quantizers if f"{name}.init_state" in steps and not steps[f"{name}.init_state"].any()]
    if waiting == quantizers:
        raise UserError(f"{source}: {waiting[0]}: the step sizes were never trained, nor were any others")
    if waiting:
        print(f"warning: {source}: all that these quantizers met in training was zero, so any bit-width serves them: "
              f"{', '.join(waiting)}")


def _warn_of_steps(checkpoint, names, source):
    """Name the step sizes that no quantizer computes with as they are; as LIMPQ does, their values go into the file all the
    same. Its forward pass clamps them to [1e-5, 1]; here steps above 1 are usual."""
    steps = {f"{name}.{kind}": checkpoint["state_dict"][f"{name}.{kind}.s"] for name in names for kind in KINDS.values()}
    not_positive = [name for name, tensor in steps.items() if (tensor <= 0).any()]
    if not_positive:
        print(f"warning: {source}: step sizes that are not positive: {', '.join(not_positive)}")
    above = [name for name, tensor in steps.items() if is_foreign(checkpoint) and (tensor > 1).any()]
    if above:
        print(f"warning: {source}: step sizes above 1, where LIMPQ clamps them: {', '.join(above)}")


def trained(config):
    """What an indicators file says of the configuration (nested, of plain values) that it was made with."""
    flat = flatten(config)
    return {key.removeprefix("dataloader."): flat[key] for key in TRAINED if key in flat}


def _indicators(steps, quantizer, bits, source, mask=None):
    """{bit: indicator} of one quantizer; `mask` is that of its weight, where it is pruned."""
    tensor, ready = steps.get(f"{quantizer}.s"), steps.get(f"{quantizer}.init_state")
    if tensor is None or tensor.dim() == 0 or len(tensor) != len(bits):
        found = "nothing" if tensor is None else f"{tensor.numel()} step sizes"
        raise UserError(f"{source}: {quantizer}: found {found}, expected one step size per candidate {list(bits)}")
    if ready is not None and ready.shape != (len(bits),):
        raise UserError(f"{source}: {quantizer}: found {ready.numel()} marks of trained step sizes, expected one per "
                        f"candidate {list(bits)}")
    if ready is not None and not ready.any():  # see _warn_of_zeros
        return dict.fromkeys(bits, SMALLEST_STEP)
    kept = _channels_left(mask, tensor, quantizer, source)
    row = {}
    for index, bit in enumerate(bits):
        value = tensor[index][kept].float().mean().item()
        if not tensor[index].isfinite().all():
            raise UserError(f"{source}: {quantizer}: the step size at {bit} bits is {value:g}, expected a finite number")
        if ready is not None and not ready[index]:
            raise UserError(f"{source}: {quantizer}: the step size at {bit} bits was never trained")
        row[bit] = value
    return row


def _channels_left(mask, steps, quantizer, source):
    """What picks the step sizes that count out of those of one bit-width: all, but those of channels that are pruned."""
    if mask is None or steps.dim() < 2:
        return ...
    if not is_mask(mask) or mask.dim() == 0 or len(mask) != steps.shape[1]:
        raise UserError(f"{source}: masks: {quantizer.removesuffix('.quan_w_fn')}.weight is not a mask of "
                        f"{steps.shape[1]} channels")
    left = mask.reshape(len(mask), -1).any(1)
    return left if left.any() else ...


def extract_all(paths, bits=None, of="steps"):
    """The content of an indicators file with the candidates of one checkpoint, or of several of one network, each trained at
    bit-widths of its own; `bits` are those of a single checkpoint that does not say them itself.

    Raises:
        UserError: naming the file that is no such checkpoint, or two that do not fit each other, and the key.
    """
    if len(paths) == 1:
        return extract(load_checkpoint(paths[0]), paths[0], bits, of)
    if of == "loss_share":
        raise UserError("--of: loss_share compares the candidates of one training; take joint_fisher of several checkpoints")
    if bits:
        raise UserError("--b: goes with a single checkpoint; several have to carry their candidates themselves")
    contents, described = {}, {}
    for path in paths:
        if path in contents:
            raise UserError(f"{path}: stands twice among the checkpoints")
        checkpoint = load_checkpoint(path)
        if not checkpoint.get("bits"):
            raise UserError(f"{path}: does not say its candidate bit-widths, which each of several checkpoints has to")
        contents[path] = extract(checkpoint, path, of=of)
        described[path] = {**contents[path], "signed": signedness_of(checkpoint)}
        check_same_network(described[paths[0]], described[path], paths[0], path)
    return combine(contents)


def check_same_network(one, other, path, other_path):
    """Refuse two checkpoints of different networks, or of one with other signs of activations, naming where they differ."""
    if same_arch(one.get("arch"), other.get("arch")):
        other = {**other, "arch": one.get("arch")}
    for key in OF_THE_NETWORK:
        rows = [{key: described.get(key)} for described in (one, other)]
        differing = differing_keys(*rows)
        if differing:
            found, found_there = (describe(flatten(row).get(differing[0], "nothing")) for row in rows)
            raise UserError(f"{differing[0]}: found {found} in {path}, but {found_there} in {other_path}; the indicators of a "
                            "file are those of one network")


def combine(contents):
    """One content with the candidates of several, in descending order; {path: content}, of one network."""
    owners = {}
    for path, content in contents.items():
        for bit in content["bits"]:
            if bit in owners:
                raise UserError(f"{path}: was trained at {bit} bits, as {owners[bit]} was; give one checkpoint for each")
            owners[bit] = path
    bits, first = sorted(owners, reverse=True), next(iter(contents.values()))
    tables = {kind: {name: {bit: contents[owners[bit]][kind][name][bit] for bit in bits} for name in first[kind]}
              for kind in ("weight", "act")}
    return {**first, **tables, "bits": bits}


def not_growing(content):
    """[(kind, layer, bit)] where an indicator is smaller than that of the next larger candidate."""
    found = []
    for kind in ("weight", "act"):
        for name, row in content[kind].items():
            bits = sorted(row, reverse=True)
            found += [(kind, name, bit) for wider, bit in zip(bits, bits[1:], strict=False) if row[bit] < row[wider]]
    return found


def _loss_shares(checkpoint, source):
    tables, factors = loss_shares(checkpoint, source)
    print("\n".join(describe_factors(factors)))
    return tables


EXTRACTED = {"steps": None, "loss_share": _loss_shares, "joint_fisher": joint_fisher}


def write(path, content):
    """Write an indicators file and say so, with a warning about indicators that do not grow."""
    for kind in ("weight", "act"):
        for name, row in content[kind].items():
            if not all(map(math.isfinite, row.values())):
                raise UserError(f"{name}: its indicators ({kind}) are not finite: {row}")
    rising = not_growing(content)
    if rising:
        shown = ", ".join(f"{name} ({kind}, {bit} bits)" for kind, name, bit in rising[:5])
        print(f"warning: {len(rising)} indicators do not grow as bits shrink: {shown}"
              + (", ..." if len(rising) > 5 else ""))
    write_indicators(path, content)
    bits = sorted(content["weight"][content["layer_name"][0]], reverse=True)
    print(f"{path}: indicators of {len(content['layer_name'])} layers at {bits} bits")
