"""What a policy costs: size and BitOPs of the whole network, in exact integers. No files, no printing."""

from dataclasses import dataclass

from ilp import BITS_PER_MB, FIXED_BITS, FULL_PRECISION_BITS
from network import SearchSpace


@dataclass(frozen=True)
class Share:
    """A layer's bits, its parts of the network's size and published BitOPs, all dense, and the share of its zero weights."""

    macs: int
    weight_bits: int
    act_bits: int
    size: float
    bitops: float
    sparsity: float


@dataclass(frozen=True)
class Costs:
    """Size and BitOPs of a whole network under a policy, the fixed layers at 8 x 8 bits included, in exact integers."""

    network: SearchSpace
    solution: object

    def assigned(self):
        """(row, weight bits, activation bits) of every layer."""
        yield from zip(self.network.rows.values(), self.solution.weight_bits, self.solution.act_bits, strict=True)
        yield from ((row, FIXED_BITS, FIXED_BITS) for row in self.network.fixed.values())

    def size(self):
        """Weight storage in bits."""
        return sum(row.params * weight_bits for row, weight_bits, _ in self.assigned())

    def full_size(self):
        return sum(row.params * FULL_PRECISION_BITS for row, _, _ in self.assigned())

    def bitops(self, count):
        """BitOPs per image; count is 'published' or 'exact'."""
        return sum(getattr(row, f"macs_{count}") * weight_bits * act_bits
                   for row, weight_bits, act_bits in self.assigned())

    def full_bitops(self, count):
        return sum(getattr(row, f"macs_{count}") * FULL_PRECISION_BITS**2 for row, _, _ in self.assigned())

    def zeros(self):
        """(number of weights that are zero, number of weights in all)."""
        params = sum(row.params for row in self.network.all_rows())
        return params - sum(row.nonzero for row in self.network.all_rows()), params

    def sparse_size(self):
        """Weight storage in bits, each layer in the smaller of its dense and its sparse form."""
        return sum(row.sparse_size(weight_bits) for row, weight_bits, _ in self.assigned())

    def effective_bitops(self, count):
        """BitOPs per image of the MACs whose weight is not zero."""
        return sum(row.nonzero_macs(count) * weight_bits * act_bits for row, weight_bits, act_bits in self.assigned())

    def mean_bits(self):
        """Mean weight bits and mean activation bits over the searched layers."""
        layers = len(self.network.rows)
        return sum(self.solution.weight_bits) / layers, sum(self.solution.act_bits) / layers

    def shares(self):
        """{layer: Share} of every layer, the searched ones first."""
        size, bitops = self.size(), self.bitops("published")
        names = [*self.network.rows, *self.network.fixed]
        return {name: Share(row.macs_published, weight_bits, act_bits, row.params * weight_bits / size,
                            row.macs_published * weight_bits * act_bits / bitops, 1 - row.nonzero / row.params)
                for name, (row, weight_bits, act_bits) in zip(names, self.assigned(), strict=True)}

    def as_plain(self):
        """What policy files and the tables of sweeps hold."""
        weight_bits, act_bits = self.mean_bits()
        dense = {"size_mb": self.size() / BITS_PER_MB, "compression_ratio": self.full_size() / self.size(),
                 "bitops_published": self.bitops("published"), "bitops_exact": self.bitops("exact"),
                 "mean_weight_bits": weight_bits, "mean_act_bits": act_bits}
        if not self.network.sparse:
            return dense
        zeros, params = self.zeros()
        return dense | {"sparsity": zeros / params, "sparse_size_mb": self.sparse_size() / BITS_PER_MB,
                        "sparse_compression_ratio": self.full_size() / self.sparse_size(),
                        "effective_bitops_published": self.effective_bitops("published"),
                        "effective_bitops_exact": self.effective_bitops("exact")}
