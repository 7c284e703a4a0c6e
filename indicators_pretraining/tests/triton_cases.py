"""The Triton kernels in Triton's interpreter, which test_triton.py runs in a process of its own, against tensor operations.

Memory that may be neither read nor written lies right before or right after every tensor: an access out of bounds, an illegal
one on a GPU, ends the process. Small tiles make small tensors cross the edges of many.
"""

import contextlib
import ctypes
import math
import mmap

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from triton.runtime import interpreter

from quan.func import QuanConv2d, QuanLinear
from quan.quantizer import LsqQuan, integer_range, kernel, lsq_triton
from quan.quantizer.lsq import gradients, lsq, quantized
from util.errors import UserError

FENCE = 1 << 20  # bytes
SHAPES = [(1,), (7,), (64,), (3, 70), (5, 3, 2, 3), (2, 6, 1, 9), (9, 1, 3, 3), (4, 1, 1, 1), (0, 3), (3, 0), ()]
SINGLE = [torch.float32, torch.bfloat16, torch.float16]
convert, make, make_like = interpreter._convert_float, torch.empty, torch.empty_like


def convert_as_a_gpu_does(data, source, target, rounding):
    """The interpreter cuts off what bfloat16 does not hold; GPUs round."""
    if (source, target) != (tl.float32, tl.bfloat16):
        return convert(data, source, target, rounding)
    rounded = torch.from_numpy(np.ascontiguousarray(data)).bfloat16()
    return rounded.view(torch.int16).numpy().view(np.uint16)


def multiply_and_add_as_a_gpu_does(self, x, y, z):
    """The interpreter rounds the product before it adds. Here float64 holds it, and the sum, where that is not exact, is
    brought to the neighbour with an odd last digit, so that it is rounded only once."""
    assert x.data.dtype == np.float32
    with np.errstate(all="ignore"):
        product, added = np.float64(x.data) * y.data, np.float64(z.data)
        total = product + added
        rest = product - (total - (total - product)) + (added - (total - product))
        is_even = np.ascontiguousarray(total).view(np.int64) % 2 == 0
        total = np.where(np.isfinite(rest) & (rest != 0) & is_even, np.nextafter(total, np.inf * np.sign(rest)), total)
        return interpreter.TensorHandle(total.astype(np.float32), z.dtype.scalar)


interpreter._convert_float = convert_as_a_gpu_does
interpreter.InterpreterBuilder.create_fma = multiply_and_add_as_a_gpu_does


def fenced(shape, dtype, strides=None, at_end=True):
    """Memory for a dense tensor, right after or right before some that may not be touched."""
    strides, length = strides or make(shape, device="meta").stride(), math.prod(shape)
    if not length:
        return torch.zeros(0, dtype=dtype).as_strided(shape, strides)
    size = length * dtype.itemsize
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + 2 * FENCE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for begin in (address, address + FENCE + pages):
        assert not ctypes.CDLL(None).mprotect(ctypes.c_void_p(begin), ctypes.c_size_t(FENCE), 0)
    offset = FENCE + (pages - size if at_end else 0)
    return torch.frombuffer(memory, dtype=dtype, count=length, offset=offset).as_strided(shape, strides)


def in_fence(tensor, at_end=True):
    """A copy, of the same layout."""
    return fenced(tensor.shape, tensor.dtype, make_like(tensor).stride(), at_end).copy_(tensor)


@contextlib.contextmanager
def triton_computes(tile=lsq_triton.TILE, at_end=True):
    """LSQ on the CPU by Triton in tiles of `tile` values, which takes and gives tensors in fences."""
    def empty(*shape, dtype, device):
        return fenced(shape, dtype, at_end=at_end)

    def empty_like(tensor, dtype=None):
        return fenced(tensor.shape, dtype or tensor.dtype, make_like(tensor).stride(), at_end)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lsq_triton, "check", lambda: None)
        kernel.use("compiled", "cuda")
        patched.setattr(kernel, "_device", "cpu")
        patched.setattr(lsq_triton, "TILE", tile)
        patched.setattr(lsq_triton, "PARTS", lsq_triton.PARTS if tile == lsq_triton.TILE else 3)
        patched.setattr(torch, "empty", empty)
        patched.setattr(torch, "empty_like", empty_like)
        try:
            yield
        finally:
            patched.undo()
            kernel.use("plain")


def laid_out(tensor, layout):
    if layout == "channels last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "transposed" and tensor.dim():
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "with gaps" and tensor.dim():
        return torch.stack([tensor, tensor], -1)[..., 1]
    return in_fence(tensor)


@st.composite
def problems(draw):
    """(v, steps, Qn, Qp, tile, whether fences lie behind): some values between two integers, on bounds, or no numbers."""
    shape, dtype, at_end = draw(st.sampled_from(SHAPES)), draw(st.sampled_from([*SINGLE, torch.float64])), draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    qn, qp = integer_range(draw(st.integers(2, 8)), *draw(st.sampled_from([(False, False), (True, False), (True, True)])))
    arithmetic = kernel.ARITHMETIC[dtype]
    steps = torch.rand([3, *([shape[0]] if shape and draw(st.booleans()) else [])], generator=generator) + 0.05
    s = in_fence(steps.to(arithmetic), at_end)[draw(st.integers(0, 2))]  # as a quantizer takes it from its parameter
    s = s.view(-1, *[1] * (len(shape) - 1)) if s.dim() else s
    v = torch.randn(shape, generator=generator) * draw(st.sampled_from([0.1, 1.0, 20.0]))
    special = s * draw(st.sampled_from([-qn, qp, 0.5, 1.5, -0.2, 0.0]))
    v = torch.where(torch.rand(shape, generator=generator) < 0.3, special, v).to(dtype)
    if v.numel() and draw(st.booleans()):
        v.view(-1)[draw(st.integers(0, v.numel() - 1))] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    layout = draw(st.sampled_from(["contiguous", "channels last", "transposed", "with gaps"]))
    return laid_out(v, layout), s, qn, qp, draw(st.sampled_from([32, 128, 4096])), at_end


def equal(one, other):
    """Whether two tensors are the same, NaN at the same places."""
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.isnan(), other.isnan()) and torch.equal(
        one.nan_to_num(), other.nan_to_num())


def same_bits(one, other):
    one, other = (tensor.flatten().contiguous() for tensor in (one, other))
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@settings(max_examples=100)
@given(st.data(), problems())
def test_values_equal_tensor_operations(data, problem):
    v, s, qn, qp, tile, at_end = problem
    dtype = data.draw(st.sampled_from([v.dtype] if v.dtype == torch.float64 else SINGLE))
    with triton_computes(tile, at_end):
        assert kernel.takes(v, s)
        q = kernel.quantize(v, s, qn, qp, dtype)
    assert equal(q, ((v.to(s.dtype) / s).clamp(-qn, qp).round() * s).to(dtype))


@st.composite
def incoming(draw, v):
    """A gradient of a tensor's shape: in its layout or another one, or each value the same one in memory."""
    dtype = draw(st.sampled_from([v.dtype] if v.dtype == torch.float64 else SINGLE))
    grad = torch.randn(v.shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31)))).to(dtype)
    kind = draw(st.sampled_from(["as v", "contiguous", "channels last", "transposed", "with gaps", "expanded"]))
    if kind == "expanded":
        return in_fence(grad.new_full((), 0.7)).expand(v.shape)
    if kind == "as v":
        return in_fence(torch.empty_like(v, dtype=dtype).copy_(grad))
    return laid_out(grad, kind)


@settings(max_examples=120)
@given(st.data(), problems(), st.booleans(), st.booleans(), st.booleans())
def test_gradients_equal_float64(data, problem, needs_v, may_overwrite, has_changes):
    v, s, qn, qp, tile, at_end = problem
    grad, changes = data.draw(incoming(v)), [] if has_changes else None
    before = grad.clone()
    with triton_computes(tile, at_end):
        grad_v, grad_s = gradients(grad, v, s, qn, qp, 0.5, needs_v, may_overwrite, changes)
    scaled, given = v.to(s.dtype) / s, before.double()
    integers, inside = scaled.clamp(-qn, qp).round().double(), (scaled >= -qn) & (scaled <= qp)
    assert (grad_v is not None) == needs_v
    if needs_v:
        assert equal(grad_v, torch.where(inside, before.to(s.dtype), 0.0).to(v.dtype))
        places = [torch.arange(2 * v.numel()).as_strided(v.shape, tensor.stride()) for tensor in (grad, kernel._dense(v))]
        is_taken = may_overwrite and grad.dtype == v.dtype and torch.equal(*places)
        assert not v.numel() or (grad_v.data_ptr() == grad.data_ptr()) == is_taken
    if not (needs_v and may_overwrite):
        assert equal(grad, before)
    slope = integers - torch.where(inside, scaled, 0.0).double()
    check_sum(grad_s, 0.5 * given * slope, s.shape)
    if has_changes:
        assert len(changes) == 1 and changes[0].dtype == torch.float64
        check_sum(changes[0], given * (integers - scaled.double()) * s.double(), ())


def check_sum(found, terms, shape):
    """That a sum is that of the terms, as near as its type comes; where they are no numbers, it is none."""
    wanted = terms.sum_to_size(shape)
    error, is_finite = (found - wanted).abs(), wanted.isfinite()
    assert found.shape == wanted.shape and torch.equal(found.isfinite(), is_finite)
    assert (error <= 1e-6 * terms.abs().sum_to_size(shape))[is_finite].all()


@settings(max_examples=25)
@given(problems())
def test_the_bits_are_those_of_the_compiled_loops_and_the_same_each_time(problem):
    v, s, qn, qp, tile, at_end = problem
    grad = torch.randn(v.shape, generator=torch.Generator().manual_seed(0)).to(v.dtype)
    found = []
    for _ in range(2):
        with triton_computes(tile, at_end):
            found.append((kernel.quantize(v, s, qn, qp, v.dtype), *gradients(grad, v, s, qn, qp)))
    assert all(map(same_bits, *found))
    try:
        kernel.use("compiled")
    except UserError as error:
        pytest.skip(str(error))
    q, grad_v = kernel.quantize(v, s, qn, qp, v.dtype), gradients(grad, v, s, qn, qp)[0]
    kernel.use("plain")
    if q is not None:  # float16 has no such loops
        is_number = ~v.isnan()
        assert same_bits(q[is_number], found[0][0][is_number]) and same_bits(grad_v, found[0][1])


def test_every_tie_is_rounded_to_the_even_integer():
    v, s = torch.arange(-600, 600) / 2, torch.tensor(1.0)
    for dtype in (torch.float32, torch.float64):
        with triton_computes():
            q = kernel.quantize(v.to(dtype), s.to(dtype), 300, 300, dtype)
        assert same_bits(q, v.to(dtype).round())


@triton.jit
def write_quotients(v, step, quotients, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(quotients + place, lsq_triton.divided(tl.load(v + place), tl.load(step + place)))


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.sampled_from([1e-5, 1e-3, 1.0, 1e4]))
def test_quotients_are_rounded_as_ieee_754_has_it(seed, size):
    generator = torch.Generator().manual_seed(seed)
    v, step = torch.randn(1024, generator=generator) * 4, (torch.rand(1024, generator=generator) + 1e-3) * size
    step[:256] = step[:256].view(torch.int32).bitwise_or(0x7FFF00).view(torch.float32)  # near the next power of two
    v[:8] = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 3e38, -3e38, 1e-30])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        values, steps = v.to(dtype), step.double() if dtype == torch.float64 else step
        wanted, found = values.to(steps.dtype) / steps, torch.empty_like(steps)
        write_quotients[(1,)](values, steps, found, SIZE=1024)
        assert torch.equal(found.nan_to_num(7), wanted.nan_to_num(7))


@triton.jit
def write_places(program, rows, columns, tiles, row_of, place_of, exists_of, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    program = tl.full((), 0, tl.int64) + program
    row, place, exists = lsq_triton.places(program // tiles, program % tiles, rows, columns, ROWS, COLUMNS)
    own = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(row_of + tl.arange(0, ROWS), row)
    tl.store(place_of + own, place)
    tl.store(exists_of + own, exists)


@pytest.mark.parametrize("rows, columns", [(1, 2**34 + 5), (1, 2**31 - 1), (1, 2**31), (10**6, 9217), (2**28, 9),
                                           (2**31 - 3, 2), (70_000, 70_000), (3, 2**33)])
def test_places_beyond_2_to_the_31_are_right(rows, columns):
    height, width, tiles = lsq_triton._tiling(rows, columns)
    last = -(-rows // height) * tiles - 1
    assert last < 2**31  # what CUDA allows
    for program in {0, 1, last // 2, last - 1, last}:
        places = [torch.zeros(size, dtype=torch.int64) for size in (height, height * width, height * width)]
        write_places[(1,)](program, rows, columns, tiles, *places, ROWS=height, COLUMNS=width)
        row = torch.arange(height) + program // tiles * height
        column = torch.arange(width) + program % tiles * width
        assert torch.equal(places[0], row)
        assert torch.equal(places[1], (row[:, None] * columns + column).flatten())
        assert torch.equal(places[2].bool(), ((row < rows)[:, None] & (column < columns)).flatten())


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 4095), (1, 4096), (1, 10**8), (64, 9), (2048, 4608), (5, 10**7)])
def test_a_tile_has_a_value_for_each_thread_and_tiles_cover_all(rows, columns):
    height, width, tiles = lsq_triton._tiling(rows, columns)
    assert height * width == lsq_triton.TILE >= 64 * lsq_triton.WARPS
    assert (tiles - 1) * width < columns <= tiles * width


# ---------------------------------------------------------------------------------------------------------------------
# Where quantizers are used.


def layers():
    torch.manual_seed(0)
    for channels in (False, True):
        for module, shape in [(nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 7)), (nn.Conv2d(6, 6, 3, groups=6), (2, 6, 5, 7)),
                              (nn.Linear(7, 5), (3, 7)), (nn.Linear(7, 5, bias=False), (2, 3, 7))]:
            kind = QuanLinear if isinstance(module, nn.Linear) else QuanConv2d
            steps = module.weight.shape[0] if channels else None
            layer = kind(module, LsqQuan([4, 3], signed=True, channels=steps), LsqQuan([4, 3], signed=True)).train()
            layer.select(3)  # whose steps are no first ones of their parameter
            x = torch.randn(shape)
            yield layer, (x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x).requires_grad_()


def computed(layer, x, precision, kept):
    """The output, and the gradients of x and of the parameters; to `kept` comes what the layer keeps for the backward pass."""
    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autocast("cpu", precision, enabled=precision != torch.float32), \
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = layer(x)
    return out, *torch.autograd.grad(out.float().square().sum(), [x, *layer.parameters()])


def noted(functions, calls):
    """Let a call of one of these functions append (its name, types, whether it writes over a gradient) to `calls`."""
    def noting(types, function):
        def call(*arguments):
            calls.append((function.__name__, types, len(arguments) > 7 and arguments[7] is arguments[0]))
            return function(*arguments)
        return call

    functions.update({types: noting(types, function) for types, function in functions.items()})


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_layers_compute_by_the_kernels_and_keep_no_more_than_on_the_cpu(precision):
    for layer, x in layers():
        layer(x)  # steps take their values
        kept, calls = [], []
        with triton_computes():
            noted(kernel._quantize, calls)
            noted(kernel._differentiate, calls)
            found = computed(layer, x, precision, kept)
        for ours, theirs in zip(found, computed(layer, x, precision, []), strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.detach().abs().max()))
        is_half = precision == torch.bfloat16  # then the quantized weight, of half the size, is kept
        forward = "quantize", (torch.float32, precision), False
        backward = "differentiate", (precision, torch.float32), not is_half
        assert calls == [forward] * (3 if is_half else 4) + [backward] * 2
        known = {tensor.untyped_storage().data_ptr() for tensor in (x, *layer.parameters())}
        beside = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in known]
        assert [(tensor.shape, tensor.dtype) for tensor in beside] == [(layer.weight.shape, precision)] * is_half


def test_lsq_with_gradients_that_are_expanded():
    v, s = torch.randn(3, 4, 5, 5).requires_grad_(), torch.tensor(0.4).requires_grad_()
    with triton_computes(16):
        found = torch.autograd.grad(lsq(v, s, 4, 3, 0.5).sum(), [v, s])
    for ours, theirs in zip(found, torch.autograd.grad(lsq(v, s, 4, 3, 0.5).sum(), [v, s]), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_tensors_elsewhere_and_of_other_types_are_left_to_tensor_operations():
    v, s = torch.randn(6), torch.tensor(0.4)
    with triton_computes(16):
        assert kernel.takes(v, s) and not kernel.takes(v.to("meta"), s) and not kernel.takes(v, s.to("meta"))
        assert not kernel.takes(v, s.double()) and not kernel.takes(v.int(), s)
        assert kernel.quantize(v, s, 4, 3, torch.float64) is None
        assert quantized(v, s, 4, 3, torch.float64).dtype == torch.float64
        assert gradients(v.double(), v, s, 4, 3)[0].dtype == torch.float32
