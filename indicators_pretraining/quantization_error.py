"""The least mean squared error that quantization can have, over all step sizes."""

import torch
import torch.nn.functional as F

from quan.quantizer import integer_range
from quan.quantizer.lsq import quantized

GRID = 4096  # step sizes that are tried
REFINED = 64  # of these, the best, each of which is then moved to the minimum near it
ROUNDS = 32


def least_errors(values, bits, signed, symmetric=False):
    """How well each bit-width can hold some values, with one step size for all of them.

    Args:
        values: tensor of any shape, finite.
        bits: bit-widths.
        signed, symmetric: of the range of integers, as integer_range takes them.

    Returns:
        {bit: mean of (values - quantized values)^2 at the step size with which it is least}, in the order of `bits`.

    Examples:
        >>> least_errors(torch.tensor([0.0, 0.5, 1.0, 1.5]), [2], signed=False)
        {2: 0.0}
    """
    ordered, errors = OrderedValues(values), {}
    for bit in sorted(bits):
        qn, qp = integer_range(bit, signed, symmetric)
        error = ordered.error(ordered.best_step(qn, qp), qn, qp)
        errors[bit] = min(error, *errors.values()) if errors else error  # a wider range holds a narrower one
    return {bit: errors[bit] for bit in bits}


class OrderedValues:
    """Values in ascending order with the sums of their beginnings, so that the error of a step size is a matter of looking up
    where the integers begin."""

    def __init__(self, values):
        self.values = values.flatten().double().sort().values
        self.sums = F.pad(self.values.cumsum(0), (1, 0))
        self.square = self.values.square().sum()

    def error(self, step, qn, qp):
        """The mean squared error of one step size."""
        return (self.values - quantized(self.values, step, qn, qp)).square().mean().item()

    def best_step(self, qn, qp):
        """The step size of least error, to within the fineness of the search.

        At a minimum, s = sum(k v) / sum(k^2) with k the integer of each value. As k grows with |v| up to max(Qn, Qp), s is
        at least mean|v| / max(Qn, Qp), and at most max|v|; on a side without integers, v counts as 0.
        """
        sizes = self.values.abs() if qn else self.values.clamp(min=0)
        largest = sizes.max()
        if not largest:
            return torch.ones_like(largest)  # all that is quantized is 0, at any step size
        smallest = sizes.mean() / (2 * max(qn, qp))  # Qn and Qp differ by one, hence the 2
        steps = smallest * (largest / smallest) ** torch.linspace(0, 1, GRID, dtype=torch.float64)
        errors, fitting = self.fit(steps, qn, qp)
        steps = steps[errors.argsort(stable=True)[:REFINED]]
        for _ in range(ROUNDS):  # to fit the step to the integers, and these to the step, lowers the error each time
            _, steps = self.fit(steps, qn, qp)
        errors, _ = self.fit(steps, qn, qp)
        return steps[errors.argmin()]

    def fit(self, steps, qn, qp):
        """(summed squared error of each step size, step size that suits the integers it leads to best).

        With k the integer of each value, the error is sum(v^2) - 2 s sum(k v) + s^2 sum(k^2).
        """
        integers = torch.arange(-qn, qp + 1, dtype=torch.float64)
        begins = torch.searchsorted(self.values, steps[:, None] * (integers[1:] - 0.5))
        edges = F.pad(F.pad(begins, (1, 0)), (0, 1), value=len(self.values))
        products = self.sums[edges].diff() @ integers
        squares = edges.diff().double() @ integers.square()
        errors = self.square - 2 * steps * products + steps.square() * squares
        return errors, torch.where(squares > 0, products / squares, steps)
