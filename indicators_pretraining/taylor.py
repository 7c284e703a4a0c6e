"""What the quantization of each weight and input changes in the loss, from the gradients that joint training computes anyway.

In the pass at b bits let v be a weight or the input of a layer, Q(v) its quantized value, D = Q(v) - v, and g the gradient of
the loss L, the mean over the images of a step, for Q(v). The backward pass sums T = g . D over all values, for each tensor.

Loss share. Let H be the Hessian of L for all tensors together, g0 its gradient where nothing is quantized. To second order

    g = g0 + H D,    L(Q(v)) - L(v) = g0 . D + D.H.D / 2.

Training leaves g0 near 0 on average, so mean(T) = D.H.D, summed over tensors, is twice the loss that quantization adds; the
part of it that belongs to one tensor, crossed terms shared evenly, is its own T. Hence

    I[tensor, b] = k[b] * max(mean T, 0),    k[b] = (mean L at b - mean L at the highest bits) / sum of max(mean T, 0),

so that the indicators at b bits add up to what b bits cost, 0 at the highest. Where the expansion holds, k is near 1/2, which
is taken where b bits cost nothing.

Joint Fisher. Near a minimum the Hessian of a mean negative log-likelihood is the Fisher information E[h h'], h the gradient
of one image, so what D alone adds is E[(h . D)^2] / 2. With B images per step, T is the mean of B such products: its
variance is Var(h . D) / B and its mean that of h . D. Hence I = (B Var(T) + mean(T)^2) / 2, never negative. It takes the
labels for draws from the network's own predictions, and the images of a batch, which BatchNorm couples in training, for
independent.
"""

from functools import reduce

import torch

from quan.func import KINDS
from util import distributed
from util.errors import UserError

STEPS, SUM, SQUARES = range(3)
EXPECTED, PLAUSIBLE = 0.5, (0.25, 1.0)  # of k


class TaylorSums:
    """Sums over the steps of an epoch: of T for each tensor and bit-width, and of the loss.

    Args:
        switch: the BitSwitch of the jointly trained network.

    Attributes:
        sums: float64 [2 * layers + 1, bits, 3]: weights, inputs, and last the loss; number of steps, sum, sum of squares.
    """

    def __init__(self, switch):
        self.bits = switch.bits
        self.quantizers = [getattr(layer, name) for name in KINDS.values() for layer in switch.layers.values()]
        self.sums = torch.zeros(len(self.quantizers) + 1, len(self.bits), 3, dtype=torch.float64)
        self.images = 0

    def start_epoch(self):
        self.sums.zero_()

    def start_pass(self):
        """Let the next backward pass leave its T."""
        for quantizer in self.quantizers:
            quantizer.changes = []

    def end_pass(self, bit, loss, images):
        """Add what the pass at `bit` bits left, its loss, and from how many images of this process."""
        found = [reduce(torch.add, quantizer.changes) if quantizer.changes else loss.new_zeros((), dtype=torch.float64)
                 for quantizer in self.quantizers]
        values = torch.stack([*found, loss.detach().double()])
        self.sums = self.sums.to(values.device)
        self.sums[:, self.bits.index(bit)] += torch.stack([torch.ones_like(values), values, values.square()], 1)
        self.images = images
        self.stop()

    def stop(self):
        for quantizer in self.quantizers:
            quantizer.changes = None

    def as_plain(self):
        """What goes into the checkpoint: images per process and step, and the sums of every process."""
        return {"images": self.images, "sums": distributed.gather_objects(self.sums.cpu())}

    def restore(self, found):
        """Continue from a ResumeCheckpoint inside an epoch; of another number of processes, the first takes over all sums."""
        if "taylor" not in found.content:
            return
        sums, self.images = found.content["taylor"]["sums"], found.content["taylor"]["images"]
        if any(each.shape != self.sums.shape for each in sums):
            raise UserError(f"{found.path}: taylor: holds sums of other layers or bit-widths")
        if len(sums) == distributed.world_size():
            self.sums.copy_(sums[distributed.rank()])
        elif distributed.is_main():
            self.sums.copy_(torch.stack(sums).sum(0))


def loss_shares(checkpoint, source):
    """({kind: {layer: {bit: loss share}}}, {bit: k}) of a checkpoint of joint training.

    Raises:
        UserError: where it holds no sums, or those of a single bit-width.
    """
    sums, names, bits = _sums_of(checkpoint, source)
    if len(bits) == 1:
        raise UserError(f"--of: loss_share compares bit-widths with the highest, but {source} was trained at {bits} alone; "
                        "take joint_fisher")
    means = sums[..., SUM] / sums[..., STEPS]
    shares, losses = means[:-1].clamp(min=0), means[-1]
    gaps = losses - losses[bits.index(max(bits))]
    totals = shares.sum(0)
    factors = torch.where((gaps > 0) & (totals > 0), gaps / totals, EXPECTED)
    factors[bits.index(max(bits))] = 0
    return _tables(shares * factors, names, bits), dict(zip(bits, factors.tolist(), strict=True))


def joint_fisher(checkpoint, source):
    """{kind: {layer: {bit: joint Fisher}}} of a checkpoint of joint training.

    Raises:
        UserError: where it holds no sums, or those of a single step, which do not show how T varies.
    """
    sums, names, bits = _sums_of(checkpoint, source)
    steps, total, squares = sums[:-1].unbind(-1)
    if (steps < 2).any():
        raise UserError(f"{source}: its sums of T are of one step, which does not show how T varies; end the epoch, or take a "
                        "smaller dataloader.batch_size")
    mean = total / steps
    variance = (squares - steps * mean.square()).clamp(min=0) / (steps - 1)
    return _tables((checkpoint["taylor"]["images"] * variance + mean.square()) / 2, names, bits)


def describe_factors(factors):
    """Lines about k, with a warning where it is far from 1/2; factors: {bit: k}."""
    below = {bit: factor for bit, factor in factors.items() if bit != max(factors)}
    shown = ", ".join(f"{factor:.2f} at {bit} bits" + (" (not measured: they cost nothing)" if factor == EXPECTED else "")
                      for bit, factor in below.items())
    odd = [str(bit) for bit, factor in below.items() if not PLAUSIBLE[0] <= factor <= PLAUSIBLE[1]]
    warning = [f"warning: k is far from 1/2 at {', '.join(odd)} bits, so the loss is not near a minimum, or its second order "
               "does not describe it; compare with --of joint_fisher"] if odd else []
    return [f"k, the part of the first-order changes that the loss gains (1/2 where the loss is quadratic): {shown}", *warning]


def _sums_of(checkpoint, source):
    """(sums over all processes, layers, bits)."""
    if "taylor" not in checkpoint:
        raise UserError(f"{source}: holds no sums of T; it was trained before they were kept, or with "
                        "in_place_distillation. --of steps needs none, and sensitivity.py measures others")
    sums = torch.stack(checkpoint["taylor"]["sums"]).sum(0)
    names, bits = list(checkpoint["layers"]), checkpoint["bits"]
    if sums.shape != (2 * len(names) + 1, len(bits), 3) or not (sums[..., STEPS] > 0).all():
        raise UserError(f"{source}: its sums of T do not cover every layer and bit-width; train for an epoch")
    return sums, names, bits


def _tables(values, names, bits):
    rows = [dict(zip(bits, row, strict=True)) for row in values.tolist()]
    return {kind: dict(zip(names, rows[index * len(names):][:len(names)], strict=True)) for index, kind in enumerate(KINDS)}
