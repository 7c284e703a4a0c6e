"""What all quantizers share."""

from torch import nn


def integer_range(bit, signed, symmetric=False):
    """The integers that `bit` bits hold, as (Qn, Qp): the range is [-Qn, Qp] (arXiv 1902.08153, section 2).

    Examples:
        >>> integer_range(3, signed=False), integer_range(3, signed=True), integer_range(3, True, symmetric=True)
        ((0, 7), (4, 3), (3, 3))
    """
    if not signed:
        return 0, 2**bit - 1
    top = 2 ** (bit - 1) - 1
    return (top if symmetric else top + 1), top


class Quantizer(nn.Module):
    """Maps a tensor to its quantized value, of the same shape, at the selected candidate bit-width."""

    bits = ()

    def select(self, bit):
        """Choose among the candidate bit-widths."""


class IdentityQuan(Quantizer):
    """Leaves a tensor as it is."""

    def forward(self, x):
        return x
