"""What a network costs at a policy's bits: size in MB and BitOPs."""

from util.exchange import FLOAT_BIT

FIXED_BIT = 8
MB = 8 * 2**20  # bits in 2^20 bytes


def policy_cost(layers, weight_bits, act_bits, left=None):
    """Size and BitOPs of a network, as the search counts them; without normalization and biases.

    Args:
        layers: {name: LayerCall} of all layers.
        weight_bits, act_bits: {name: bit}; layers that are not named count with 8 bits.
        left: {name: number of weights that are not pruned}; None for a dense network.

    Returns:
        {'size_mb', 'ratio', 'gbitops', 'gbitops_exact'}: MB are 2^20 bytes, the ratio is against 32-bit weights,
        BitOPs are 1e9 of sum macs * weight bit * activation bit, with the published and with the exact count of MACs.
        A pruned network has in addition {'sparsity', 'sparse_size_mb', 'sparse_ratio', 'gbitops_effective',
        'gbitops_effective_exact'}: the share of weights that are zero; its sparse_size(); BitOPs of the MACs with a
        non-zero weight.
    """
    bits = {name: (weight_bits.get(name, FIXED_BIT), act_bits.get(name, FIXED_BIT)) for name in layers}
    whole = {name: call.params for name, call in layers.items()}
    full_size = FLOAT_BIT * sum(whole.values())
    size = sum(params * bits[name][0] for name, params in whole.items())
    cost = {"size_mb": size / MB, "ratio": full_size / size, "gbitops": _gbitops(layers, bits, whole, "macs_published"),
            "gbitops_exact": _gbitops(layers, bits, whole, "macs_exact")}
    if left is None:
        return cost
    size = sum(sparse_size(params, left[name], bits[name][0]) for name, params in whole.items())
    return cost | {"sparsity": 1 - sum(left.values()) / sum(whole.values()),
                   "sparse_size_mb": size / MB, "sparse_ratio": full_size / size,
                   "gbitops_effective": _gbitops(layers, bits, left, "macs_published"),
                   "gbitops_effective_exact": _gbitops(layers, bits, left, "macs_exact")}


def full_precision_cost(layers, left=None):
    """The same with 32 bits everywhere."""
    bits = dict.fromkeys(layers, FLOAT_BIT)
    return policy_cost(layers, bits, bits, left)


def _gbitops(layers, bits, left, count):
    """1e9 BitOPs of the MACs with one of the weights that are left, by one of the two counts."""
    return sum(nonzero_macs(call, left[name], getattr(call, count)) * bits[name][0] * bits[name][1]
               for name, call in layers.items()) / 1e9


def nonzero_macs(call, left, macs):
    """Those of a layer's MACs whose weight is one of the `left` that are not pruned: each weight is used equally often."""
    return macs * left // call.params


def sparse_size(params, left, bit):
    """Bits that a pruned layer takes: dense, or one bit per weight that says where it is not zero, and these weights."""
    return min(params * bit, params + left * bit)
