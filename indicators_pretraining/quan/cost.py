"""What a network costs at a policy's bits: size in MB and BitOPs."""

FIXED_BIT = 8
FLOAT_BIT = 32
MB = 8 * 2**20  # bits in 2^20 bytes


def policy_cost(layers, weight_bits, act_bits):
    """Size and BitOPs of a network, as the search counts them.

    Args:
        layers: {name: LayerCall} of all layers.
        weight_bits, act_bits: {name: bit}; layers that are not named count with 8 bits.

    Returns:
        {'size_mb', 'ratio', 'gbitops', 'gbitops_exact'}: MB are 2^20 bytes, the ratio is against 32-bit weights,
        BitOPs are 1e9 of sum macs * weight bit * activation bit, with the published and with the exact count of MACs.
        Weights of convolutions and linear layers are counted, normalization and biases are not.
    """
    bits = {name: (weight_bits.get(name, FIXED_BIT), act_bits.get(name, FIXED_BIT)) for name in layers}
    return _cost(layers, bits)


def full_precision_cost(layers):
    """The same with 32 bits everywhere."""
    return _cost(layers, dict.fromkeys(layers, (FLOAT_BIT, FLOAT_BIT)))


def _cost(layers, bits):
    size = sum(call.params * bits[name][0] for name, call in layers.items())
    whole = sum(call.params * FLOAT_BIT for call in layers.values())
    product = {name: weight * act for name, (weight, act) in bits.items()}
    return {"size_mb": size / MB, "ratio": whole / size,
            "gbitops": sum(call.macs_published * product[name] for name, call in layers.items()) / 1e9,
            "gbitops_exact": sum(call.macs_exact * product[name] for name, call in layers.items()) / 1e9}
