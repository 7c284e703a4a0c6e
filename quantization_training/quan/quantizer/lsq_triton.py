"""LSQ on GPUs, of CUDA or ROCm, in one pass forward and one pass backward, in Triton; what lsq.cpp computes on the CPU.

A tensor is seen as `rows` rows of `columns` values that lie one after the other; each row has a step size. A program computes
a tile of TILE values: a part of one row, or several short rows. Programs leave the sums of their rows side by side, and these
are added in order, so that results are the same to the bit whenever they are computed.

A tile has no fewer values than a program has threads (WARPS warps of 32, on ROCm 64): each value is read and written by one
thread only, so that a gradient may be written over the one that was read. Triton sees numbers below 2^31 as 32-bit integers,
so places are computed from numbers made 64-bit ones first. The numbers of a tile's program, rows, columns and tiles say all
about where it reads and writes, which is therefore right for every tensor when it is right for these.
"""

import torch
import triton
import triton.language as tl

TILE, WARPS = 4096, 8
LARGEST = 2**22  # up to there nearest() is right in float32
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # the arithmetic of all of them is float32's
QUANTIZE = [(torch.float64, torch.float64), *((v, q) for v in FLOATS for q in FLOATS)]  # (type of v, type of the result)
DIFFERENTIATE = [(torch.float64, torch.float64), *((grad, v) for grad in FLOATS for v in FLOATS)]  # (of the gradient, of v)


def quantize(v, steps, rows, columns, qn, qp, q):
    """Write round(clip(v/s, -qn, qp)) * s into q. All lie densely, in the same order, on one device."""
    _launch(quantize_tile, rows, columns, qn, qp, v, (v, steps, q))


def differentiate(grad, v, steps, rows, columns, qn, qp, grad_v, has_errors):
    """Write the gradient of v into grad_v, which may be grad, or None.

    Returns:
        for each row, in float64, (gradient of its step, sum of gradient * (integer - v/s) over its values): [1 or 2, rows];
        the second where `has_errors` is set.
    """
    sums = torch.empty(1 + has_errors, rows, _tiling(rows, columns)[2], dtype=steps.dtype, device=v.device)
    _launch(differentiate_tile, rows, columns, qn, qp, v, (grad, v, steps, grad_v, sums), HAS_ERRORS=has_errors)
    return sums.sum(-1, dtype=torch.float64)


def check():
    """Compute something small on the current GPU; raises what Triton raises where it finds no C compiler, or cannot compile
    for this GPU."""
    v = torch.ones(1, device="cuda")
    quantize(v, v, 1, 1, 2, 1, torch.empty_like(v))
    differentiate(v, v, v, 1, 1, 2, 1, torch.empty_like(v), True)


def _tiling(rows, columns):
    """(rows, columns) of a tile, and how many lie side by side in a row."""
    width = TILE if rows == 1 else min(triton.next_power_of_2(max(columns, 1)), TILE)
    return TILE // width, width, -(-columns // width)


def _launch(tile, rows, columns, qn, qp, v, tensors, **options):
    """Run programs for all of v on its device, which need not be the current one."""
    assert max(qn, qp) <= LARGEST and v.numel() == rows * columns
    height, width, tiles = _tiling(rows, columns)
    if v.numel():
        with torch.cuda.device_of(v):
            tile[(-(-rows // height) * tiles,)](*tensors, rows, columns, tiles, -float(qn), float(qp), **options,
                                                ROWS=height, COLUMNS=width, num_warps=WARPS)


@triton.jit
def places(program, rows, columns, tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of a program's tile: its rows [ROWS], its number among the `tiles` side by side, and the places of its values and which
    of them exist, both [ROWS, COLUMNS]."""
    program = program.to(tl.int64)
    tile = program % tiles
    row = program // tiles * ROWS + tl.arange(0, ROWS)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    return row, tile, row[:, None] * columns + column[None, :], (row < rows)[:, None] & (column < columns)[None, :]


@triton.jit
def divided(v, step):
    """v / step as IEEE 754 rounds it, which Triton's operator does in float64 only."""
    return v.to(tl.float64) / step if step.dtype == tl.float64 else tl.div_rn(v.to(tl.float32), step)


@triton.jit
def clip(x, low, high):
    """x, brought into [low, high]; what is not a number stays so."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def nearest(x, v):
    """The nearest integer, ties to even, of |x| up to 2^22; what is not a number stays so, and zero has the sign of v, as on
    the CPU.

    Adding a number so large that no digit is left behind the point rounds, as every addition does. Compilers must keep the
    addition and the subtraction apart: to rearrange floating-point operations they need a leave that Triton does not give.
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


@triton.jit
def quantize_tile(v, steps, q, rows, columns, tiles, low, high, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, tile, place, exists = places(tl.program_id(0), rows, columns, tiles, ROWS, COLUMNS)
    step = tl.load(steps + row, row < rows, 1.0)[:, None]
    scaled = divided(tl.load(v + place, exists, 0.0), step)
    tl.store(q + place, (nearest(clip(scaled, low, high), scaled) * step).to(q.dtype.element_ty), exists)


@triton.jit
def differentiate_tile(grad, v, steps, grad_v, sums, rows, columns, tiles, low, high, HAS_ERRORS: tl.constexpr,
                       ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, tile, place, exists = places(tl.program_id(0), rows, columns, tiles, ROWS, COLUMNS)
    step = tl.load(steps + row, row < rows, 1.0)[:, None]
    scaled = divided(tl.load(v + place, exists, 0.0), step)
    given = tl.load(grad + place, exists, 0.0).to(scaled.dtype)
    clipped = clip(scaled, low, high)
    integer, is_inside = nearest(clipped, scaled), scaled == clipped
    # Where nothing exists, zeros were loaded, whose terms are zero.
    tl.store(sums + row * tiles + tile, tl.sum(given * (integer - tl.where(is_inside, scaled, 0.0)), 1), row < rows)
    if HAS_ERRORS:
        tl.store(sums + (rows + row) * tiles + tile, tl.sum(given * (integer - scaled), 1), row < rows)
    if grad_v is not None:
        tl.store(grad_v + place, tl.where(is_inside, given, 0.0).to(grad_v.dtype.element_ty), exists)
