"""Extract the importance indicators from a checkpoint: python importance_extractor.py CHECKPOINT --output FILE.pkl"""

import math
import os

from model.masks import is_mask
from util.checkpoint import load_checkpoint
from util.command import Parser
from util.config import check_bits
from util.errors import UserError, user_errors_on_one_line
from util.exchange import strip_prefix, write_indicators

CARRIED = ("arch", "input_size", "num_classes", "bits", "layers", "fixed", "products")


def extract(checkpoint, source, bits=None):
    """Read the trained step sizes of a jointly trained network.

    Args:
        checkpoint: as util.checkpoint.load_checkpoint gives it.
        source: its path, for messages.
        bits: candidate bit-widths of a checkpoint that does not say them itself.

    Returns:
        the content of an indicators file: 'weight' and 'act' are {layer: {bit: step size}}, 'layer_name' the layers in
        network order. The indicator of a layer with one step size per channel is their mean, over the channels of which
        something remains.

    Raises:
        UserError: naming the layer whose step size is missing, not finite or not positive, or whose mask is none.
    """
    if bits and checkpoint.get("bits") and list(bits) != checkpoint["bits"]:
        raise UserError(f"--b: found {list(bits)}, but {source} was trained at {checkpoint['bits']}")
    bits = checkpoint.get("bits") or bits
    if not bits:
        raise UserError(f"{source}: does not say its candidate bit-widths; give them by --b, in the order of training")
    check_bits("--b", bits)
    steps = checkpoint["state_dict"]
    names = list(checkpoint.get("layers") or [name.removesuffix(".quan_w_fn.s") for name in steps
                                              if name.endswith(".quan_w_fn.s")])
    if not names:
        raise UserError(f"{source}: holds no step sizes; is it a checkpoint of indicators_pretraining?")
    masks = checkpoint.get("masks", {})
    content = {"weight": {name: _indicators(steps, f"{name}.quan_w_fn", bits, source, masks.get(f"{name}.weight"))
                          for name in names},
               "act": {name: _indicators(steps, f"{name}.quan_a_fn", bits, source) for name in names}}
    content["layer_name"] = [strip_prefix(name) for name in names]
    content.update({key: checkpoint[key] for key in CARRIED if key in checkpoint})
    return content


def _indicators(steps, quantizer, bits, source, mask=None):
    """{bit: indicator} of one quantizer; `mask` is that of its weight, where it is pruned."""
    tensor, ready = steps.get(f"{quantizer}.s"), steps.get(f"{quantizer}.init_state")
    if tensor is None or tensor.dim() == 0 or len(tensor) != len(bits):
        found = "nothing" if tensor is None else f"{tensor.numel()} step sizes"
        raise UserError(f"{source}: {quantizer}: found {found}, expected one step size per candidate {list(bits)}")
    if ready is not None and ready.shape != (len(bits),):
        raise UserError(f"{source}: {quantizer}: found {ready.numel()} marks of trained step sizes, expected one per "
                        f"candidate {list(bits)}")
    kept = _channels_left(mask, tensor, quantizer, source)
    row = {}
    for index, bit in enumerate(bits):
        value = tensor[index][kept].float().mean().item()
        if not math.isfinite(value) or tensor[index].min() <= 0:
            raise UserError(f"{source}: {quantizer}: the step size at {bit} bits is {value:g}, expected a positive number")
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


def not_growing(content):
    """[(kind, layer, bit)] where an indicator is smaller than that of the next larger candidate."""
    found = []
    for kind in ("weight", "act"):
        for name, row in content[kind].items():
            bits = sorted(row, reverse=True)
            found += [(kind, name, bit) for wider, bit in zip(bits, bits[1:], strict=False) if row[bit] < row[wider]]
    return found


def parse_arguments(arguments=None):
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoint", help="<name>_checkpoint.pth.tar or <name>_best.pth.tar of main.py")
    parser.add_argument("--output", required=True, metavar="FILE.pkl")
    parser.add_argument("--b", nargs="+", type=int, metavar="BIT",
                        help="candidates, in the order of training, of a checkpoint that does not carry them")
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse_arguments(arguments)
    if os.path.exists(options.output) and os.path.samefile(options.output, options.checkpoint):
        raise UserError(f"--output: {options.output} is the checkpoint itself")
    content = extract(load_checkpoint(options.checkpoint), options.checkpoint, options.b)
    rising = not_growing(content)
    if rising:
        shown = ", ".join(f"{name} ({kind}, {bit} bits)" for kind, name, bit in rising[:5])
        print(f"warning: {len(rising)} indicators do not grow as bits shrink: {shown}"
              + (", ..." if len(rising) > 5 else ""))
    write_indicators(options.output, content)
    bits = sorted(content["weight"][content["layer_name"][0]], reverse=True)
    print(f"{options.output}: indicators of {len(content['layer_name'])} layers at {bits} bits")


if __name__ == "__main__":
    with user_errors_on_one_line():
        main()
