"""Packed integers: nothing is lost, no bit is wasted, and the layout is the one that is written down."""

import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import packing
from packing import pack, pack_sparse, packed_length, unpack, unpack_sparse


@st.composite
def integers(draw):
    """(integers of any shape and sparsity, bits, whether they are signed)."""
    bits, signed = draw(st.integers(1, 8)), draw(st.booleans())
    low, high = (-2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    shape = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = rng.integers(low, high + 1, shape)
    values[rng.random(shape) < draw(st.sampled_from([0, 0.5, 0.9, 1]))] = 0
    return values, bits, signed


@given(integers())
def test_unpacking_gives_back_what_was_packed_in_as_few_bytes_as_there_can_be(case):
    values, bits, signed = case
    stream = pack(values, bits)
    assert len(stream) == packed_length(values.size, bits) == (values.size * bits + 7) // 8
    back = unpack(stream, bits, signed, values.size)
    assert back.dtype == (np.int8 if signed else np.uint8)
    assert np.array_equal(back.reshape(values.shape), values)


@given(integers(), st.booleans())
def test_a_map_and_what_is_not_zero_give_back_all(case, keeps_some_zeros):
    values, bits, signed = case
    kept = values != 0
    if keeps_some_zeros:
        kept.reshape(-1)[::3] = True
    chart, stream = pack_sparse(values, kept, bits)
    assert len(chart) + len(stream) == packed_length(values.size, 1) + packed_length(kept.sum(), bits)
    back, chosen = unpack_sparse(chart, stream, bits, signed, values.size)
    assert np.array_equal(back.reshape(values.shape), values) and np.array_equal(chosen.reshape(values.shape), kept)


@given(integers())
def test_the_layout_is_the_one_that_is_written_down(case):
    values, bits, _ = case
    stream = sum((int(value) % 2**bits) << index * bits for index, value in enumerate(values.reshape(-1)))
    assert pack(values, bits).tobytes() == stream.to_bytes(packed_length(values.size, bits), "little")


def test_a_stream_of_another_length_or_with_bits_after_its_end_is_refused():
    stream = pack(np.arange(7), 3)
    for wrong in (stream[:-1], np.append(stream, np.uint8(0)), stream | np.uint8(128)):
        with pytest.raises(ValueError, match=r"7 integers of 3 bits take 3 bytes|bits follow the last integer"):
            unpack(wrong, 3, False, 7)


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(packing, extraglobs={"np": np}).failed == 0
