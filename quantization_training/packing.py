"""Integers packed without gaps: b bits each, one after the other, in a stream of bytes. Pure functions of arrays.

Value i takes the bits i*b to i*b + b-1 of the stream, its lowest bit first, and bit j of the stream is bit j % 8 (the lowest
is 0) of byte j // 8. Negative integers are in two's complement. The last byte is filled up with zeros.
"""

import numpy as np

GROUP = 8  # values that are packed together: they fill b whole bytes


def packed_length(count, bits):
    """Bytes that `count` integers of `bits` bits take.

    Examples:
        >>> packed_length(8, 3), packed_length(9, 3)
        (3, 4)
    """
    return -(-count * bits // 8)


def pack(values, bits):
    """Pack integers of `bits` bits.

    Args:
        values: integer array of any shape, taken in C order; from 0 to 2^bits - 1, or from -2^(bits-1) to 2^(bits-1) - 1.
        bits: 1 to 8.

    Returns:
        uint8 array [packed_length(values.size, bits)].

    Examples:
        >>> pack(np.array([1, 2, 3, -1]), 2).tolist()
        [249]
    """
    padded = np.zeros(-(-values.size // GROUP) * GROUP, dtype=np.uint8)
    padded[:values.size] = values.reshape(-1).astype(np.uint8, copy=False) & np.uint8(2**bits - 1)
    padded = padded.reshape(-1, GROUP)
    words = np.zeros(len(padded), dtype="<u8")
    for place in range(GROUP):
        words |= padded[:, place].astype("<u8") << np.uint64(place * bits)
    stream = words.view(np.uint8).reshape(-1, GROUP)[:, :bits].reshape(-1)
    return stream[:packed_length(values.size, bits)].copy()


def unpack(stream, bits, signed, count):
    """The integers that pack() was given.

    Args:
        stream: uint8 array [packed_length(count, bits)].
        bits: 1 to 8.
        signed: whether the highest bit of an integer counts negatively.
        count: how many integers there are.

    Returns:
        int8 array [count] where `signed`, else uint8.

    Raises:
        ValueError: where the stream has another length, or does not end in zeros.

    Examples:
        >>> unpack(np.array([249], dtype=np.uint8), 2, signed=True, count=4).tolist()
        [1, -2, -1, -1]
    """
    _check_stream(stream, bits, count)
    padded = np.zeros((-(-count // GROUP), bits), dtype=np.uint8)
    padded.reshape(-1)[:len(stream)] = stream
    words = np.zeros((len(padded), GROUP), dtype=np.uint8)
    words[:, :bits] = padded
    words = words.view("<u8").reshape(-1)
    values = np.empty((len(words), GROUP), dtype=np.uint8)
    mask = np.uint64(2**bits - 1)
    for place in range(GROUP):
        values[:, place] = (words >> np.uint64(place * bits)) & mask
    values = values.reshape(-1)[:count]
    if not signed:
        return values
    top = np.uint8(2 ** (bits - 1))
    return ((values ^ top) - top).view(np.int8)  # wraps around as two's complement does


def _check_stream(stream, bits, count):
    length = packed_length(count, bits)
    if len(stream) != length:
        raise ValueError(f"{count} integers of {bits} bits take {length} bytes, not {len(stream)}")
    used = count * bits % 8
    if used and stream[-1] >> used:
        raise ValueError("bits follow the last integer")


def pack_sparse(values, kept, bits):
    """Pack only some of the integers, with a map of one bit per integer that says which.

    Args:
        values: as for pack().
        kept: bool array of the same shape; values are zero where it is False.

    Returns:
        (map uint8 [packed_length(values.size, 1)], the others as pack() gives them).
    """
    return pack(kept, 1), pack(values.reshape(-1)[kept.reshape(-1)], bits)


def unpack_sparse(chart, stream, bits, signed, count):
    """The integers that pack_sparse() was given, zeros among them, and the map.

    Args:
        chart, stream: the map and the packed integers.
        bits, signed: as for unpack().
        count: how many integers there are with the zeros.

    Returns:
        (integers [count], bool [count]).

    Raises:
        ValueError: where map or stream has another length, or does not end in zeros.
    """
    kept = unpack(chart, 1, signed=False, count=count).view(bool)
    some = unpack(stream, bits, signed, int(np.count_nonzero(kept)))
    values = np.zeros(count, dtype=some.dtype)
    values[kept] = some
    return values, kept
