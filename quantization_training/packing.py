"""Integers packed without gaps: b bits each, one after the other, in a stream of bytes. Pure functions of arrays.

Value i takes the bits i*b to i*b + b-1 of the stream, its lowest bit first, and bit j of the stream is bit j % 8 (the lowest
is 0) of byte j // 8. Negative integers are in two's complement. The last byte is filled up with zeros.
"""

import numpy as np


def packed_length(count, bits):
    """Bytes that `count` integers of `bits` bits take."""
    return -(-count * bits // 8)


def pack(values, bits):
    """Pack integers of `bits` bits, 1 to 8.

    Args:
        values: integer array of any shape, taken in C order; from 0 to 2^bits - 1, or from -2^(bits-1) to 2^(bits-1) - 1.

    Returns:
        uint8 array [packed_length(values.size, bits)].

    Examples:
        >>> pack(np.array([1, 2, 3, -1]), 2).tolist()
        [249]
    """
    column = values.astype(np.uint8, order="C").reshape(-1, 1)
    return np.packbits(np.unpackbits(column, axis=1, count=bits, bitorder="little"), bitorder="little")


def unpack(stream, bits, signed, count):
    """The `count` integers that pack() was given: int8 array [count] where `signed`, else uint8.

    Raises:
        ValueError: where the stream has another length, or does not end in zeros.

    Examples:
        >>> unpack(np.array([249], dtype=np.uint8), 2, signed=True, count=4).tolist()
        [1, -2, -1, -1]
    """
    length, used = packed_length(count, bits), count * bits % 8
    if len(stream) != length:
        raise ValueError(f"{count} integers of {bits} bits take {length} bytes, not {len(stream)}")
    if used and stream[-1] >> used:
        raise ValueError("bits follow the last integer")
    rows = np.unpackbits(stream, count=count * bits, bitorder="little").reshape(count, bits)
    values = np.packbits(rows, axis=1, bitorder="little").reshape(count)
    if not signed:
        return values
    top = np.uint8(2 ** (bits - 1))
    return ((values ^ top) - top).view(np.int8)  # wraps around as two's complement does


def pack_sparse(values, kept, bits):
    """Pack only the integers where the bool array `kept` is True, the others being zeros: (packed `kept`, packed integers)."""
    return pack(kept, 1), pack(values[kept], bits)


def unpack_sparse(chart, stream, bits, signed, count):
    """(integers [count] that pack_sparse() was given, zeros among them; bool [count], `kept`); errors are those of unpack."""
    kept = unpack(chart, 1, signed=False, count=count).view(bool)
    some = unpack(stream, bits, signed, int(np.count_nonzero(kept)))
    values = np.zeros(count, dtype=some.dtype)
    values[kept] = some
    return values, kept
