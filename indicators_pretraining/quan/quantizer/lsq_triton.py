"""LSQ on GPUs, of CUDA or ROCm, in one pass forward and one pass backward, in Triton; what lsq.cpp computes on the CPU.

A tensor is seen as `rows` rows of `columns` values that lie one after the other; each row has a step size. Programs compute
tiles of TILE values: a part of one row, or several short rows. Backward, n programs share the tiles of the same rows, of
which each takes every n-th; the sums that they leave lie side by side and are added in a fixed order, so that results are the
same to the bit in every run.

A tile has no fewer values than a program has threads (WARPS warps of 32, on ROCm 64): each value is read and written by one
thread only, so that a gradient may be written over the one that was read. Triton sees numbers below 2^31 as 32-bit integers,
so places are computed from numbers made 64-bit ones first. The numbers of a tile's rows, rows, columns and tiles say all
about where it is read and written, which is therefore right for every tensor when it is right for these. Triton compiles a
kernel anew where a number is one, or divisible by 16: for rows and columns, which it makes faster, and for no others.
"""

import torch
import triton
import triton.language as tl

TILE, WARPS = 2048, 4
PARTS = 2048  # about so many programs share the tiles backward: enough for a GPU, and few sums
WIDTHS = (1, 64, PARTS)  # of what is added up: few, since each of them is compiled
LARGEST = 2**22  # up to there nearest() is right in float32
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # the arithmetic of all of them is float32's
QUANTIZE = [(torch.float64, torch.float64), *((v, q) for v in FLOATS for q in FLOATS)]  # (type of v, type of the result)
DIFFERENTIATE = [(torch.float64, torch.float64), *((grad, v) for grad in FLOATS for v in FLOATS)]  # (of the gradient, of v)


def quantize(v, steps, rows, columns, qn, qp, q):
    """Write round(clip(v/s, -qn, qp)) * s into q. All lie densely, in the same order, on one device."""
    _check(v, rows, columns, qn, qp)
    height, width, tiles = _tiling(rows, columns)
    if v.numel():
        with torch.cuda.device_of(v):  # which need not be the current one
            quantize_tile[(-(-rows // height) * tiles,)](v, steps, q, rows, columns, tiles, -float(qn), float(qp),
                                                         ROWS=height, COLUMNS=width, num_warps=WARPS)


def differentiate(grad, v, steps, rows, columns, qn, qp, grad_v, scale, has_errors):
    """Write the gradient of v into grad_v, which may be grad, or None.

    Returns:
        (the gradient of each step, times `scale`, [rows]; in float64, for each row the sum of gradient * (q - v) over its
        values where `has_errors` is set, else None).
    """
    _check(v, rows, columns, qn, qp)
    height, width, tiles = _tiling(rows, columns)
    blocks = -(-rows // height)
    parts = min(tiles, max(1, PARTS // max(blocks, 1)))
    grad_s = torch.empty(rows, dtype=steps.dtype, device=v.device)
    errors = torch.empty(rows, dtype=torch.float64, device=v.device) if has_errors else None
    if not v.numel():
        return grad_s.zero_(), errors.zero_() if has_errors else None
    sums = torch.empty(1 + has_errors, rows, parts, dtype=steps.dtype, device=v.device)
    with torch.cuda.device_of(v):
        differentiate_tiles[(blocks * parts,)](grad, v, steps, grad_v, sums, rows, columns, tiles, parts, -float(qn),
                                               float(qp), HAS_ERRORS=has_errors, ROWS=height, COLUMNS=width, num_warps=WARPS)
        width = next(width for width in WIDTHS if width >= parts)
        height = max(1, TILE // width)
        add_up[(-(-rows // height),)](sums, steps, grad_s, errors, rows, parts, scale if steps.dtype == torch.float32 else 1.0,
                                      ROWS=height, COLUMNS=width, num_warps=WARPS)
    return grad_s if steps.dtype == torch.float32 else grad_s * scale, errors  # numbers come to kernels in float32


def check():
    """Compute something small on the current GPU; raises what Triton raises where it finds no C compiler, or cannot compile
    for this GPU."""
    v = torch.ones(1, device="cuda")
    quantize(v, v, 1, 1, 2, 1, torch.empty_like(v))
    differentiate(v, v, v, 1, 1, 2, 1, torch.empty_like(v), 1.0, True)


def _check(v, rows, columns, qn, qp):
    assert max(qn, qp) <= LARGEST and v.numel() == rows * columns


def _tiling(rows, columns):
    """(rows, columns) of a tile, and how many lie side by side in a row."""
    width = TILE if rows == 1 else min(triton.next_power_of_2(max(columns, 1)), TILE)
    return TILE // width, width, -(-columns // width)


@triton.jit
def places(block, tile, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of a tile, given by the number of its block of rows and its own among those side by side, in 64 bits: its rows [ROWS],
    and the places of its values and which of them exist, both [ROWS, COLUMNS]."""
    row = block * ROWS + tl.arange(0, ROWS)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    return row, row[:, None] * columns + column[None, :], (row < rows)[:, None] & (column < columns)[None, :]


@triton.jit
def divided(v, step):
    """v / step, rounded as IEEE 754 has it.

    Division on GPUs takes a slow way for zeros, half of what a ReLU gives, and twice the time of the whole kernel. In float32
    the product with the inverse is corrected instead: from an inverse that is rounded to nearest, one correction gives the
    quotient rounded to nearest (Markstein, IBM Journal of Research and Development 34, 1990), where no number is infinite.
    """
    if step.dtype == tl.float64:
        quotient = v.to(tl.float64) / step
    else:
        v = v.to(tl.float32)
        inverse = tl.div_rn(tl.full(step.shape, 1.0, tl.float32), step)
        product = v * inverse
        mended = tl.fma(tl.fma(-step, product, v), inverse, product)
        quotient = tl.where(tl.abs(product) == float("inf"), product, mended)
    return quotient


@triton.jit
def clip(x, low, high):
    """x, brought into [low, high]; what is not a number stays so."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def nearest(x, v):
    """The nearest integer, ties to even, of |x| up to 2^22; what is not a number stays so, and zero has the sign of v, as on
    the CPU.

    Adding a number so large that no digit is left behind the point rounds, as every addition does. Compilers must keep the
    addition and the subtraction apart: to rearrange floating-point operations they need a permission that Triton does not
    give.
    """
    if x.dtype == tl.float64:
        rounded = x + 6755399441055744.0  # 1.5 * 2^52
        rounded = rounded - 6755399441055744.0
        bits = rounded.to(tl.int64, bitcast=True) | (v.to(tl.int64, bitcast=True) & -0x8000000000000000)
    else:
        rounded = x + 12582912.0  # 1.5 * 2^23
        rounded = rounded - 12582912.0
        bits = rounded.to(tl.int32, bitcast=True) | (v.to(tl.int32, bitcast=True) & -0x80000000)
    return bits.to(x.dtype, bitcast=True)


@triton.jit(do_not_specialize=["tiles"])
def quantize_tile(v, steps, q, rows, columns, tiles, low, high, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    row, place, exists = places(program // tiles, program % tiles, rows, columns, ROWS, COLUMNS)
    step = tl.load(steps + row, row < rows, 1.0)[:, None]
    value = tl.load(v + place, exists, 0.0).to(step.dtype)
    tl.store(q + place, (nearest(clip(divided(value, step), low, high), value) * step).to(q.dtype.element_ty), exists)


@triton.jit(do_not_specialize=["tiles", "parts"])
def differentiate_tiles(grad, v, steps, grad_v, sums, rows, columns, tiles, parts, low, high, HAS_ERRORS: tl.constexpr,
                        ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    block, part = program // parts, program % parts
    row = block * ROWS + tl.arange(0, ROWS)
    step = tl.load(steps + row, row < rows, 1.0)[:, None]
    slopes = tl.zeros([ROWS, COLUMNS], step.dtype)
    errors = tl.zeros([ROWS, COLUMNS], step.dtype)
    for tile in range(part, tiles, parts):
        _, place, exists = places(block, tile, rows, columns, ROWS, COLUMNS)
        value = tl.load(v + place, exists, 0.0).to(step.dtype)
        given = tl.load(grad + place, exists, 0.0).to(step.dtype)
        scaled = divided(value, step)
        clipped = clip(scaled, low, high)
        integer, is_inside = nearest(clipped, value), scaled == clipped
        # Where nothing exists, zeros were loaded, whose terms are zero.
        slopes += given * (integer - tl.where(is_inside, scaled, 0.0))
        if HAS_ERRORS:
            errors += given * (integer - scaled)
        if grad_v is not None:
            tl.store(grad_v + place, tl.where(is_inside, given, 0.0).to(grad_v.dtype.element_ty), exists)
    tl.store(sums + row * parts + part, tl.sum(slopes, 1), row < rows)
    if HAS_ERRORS:
        tl.store(sums + (rows + row) * parts + part, tl.sum(errors, 1), row < rows)


@triton.jit(do_not_specialize=["parts"])
def add_up(sums, steps, grad_s, errors, rows, parts, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, place, exists = places(tl.program_id(0).to(tl.int64), 0, rows, parts, ROWS, COLUMNS)
    slope = tl.sum(tl.load(sums + place, exists, 0.0).to(tl.float64), 1)
    tl.store(grad_s + row, slope.to(grad_s.dtype.element_ty) * scale, row < rows)
    if errors is not None:
        error = tl.sum(tl.load(sums + place + rows * parts, exists, 0.0).to(tl.float64), 1)
        tl.store(errors + row, error * tl.load(steps + row, row < rows, 0.0), row < rows)
