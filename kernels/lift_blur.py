"""Blur and group maximum of the steerable block, and their transpose.

A lane owns 4 neighbouring columns, and blurs them along y by itself. For the blur along x that
follows it asks the lanes of its warp beside it (``tl.gather``), which costs a fourth of a
multiply-add per tap, where loading the neighbours' columns as well would double loads, conversions
and, in the transpose, the choices of the winner::

    rows |  [ lane 0: columns 0-3 | lane 1: 4-7 | ... | lane 31 ]   a strip of rows
         v  [ lane 0              | lane 1      | ... | lane 31 ]   the next

The blur takes a strip of few rows, one element of the group after the other, with all loads of an
element under way at once; what it loads twice comes from a cache. The transpose has little to load
and walks down long strips.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launches
from .common import cdiv, power_of_2
from .lift_tile import Sizes

# Columns of a lane (``_across`` counts on 4), and lanes that can ask each other: those of a warp.
COLUMNS = tl.constexpr(4)
WARP = 32


@triton.jit
def _line(line_ptr, TAPS: tl.constexpr, REVERSED: tl.constexpr):
    """Load the weights of the blur; without one they are (1,)."""
    line = ()
    for i in tl.static_range(TAPS):
        if line_ptr is None:
            line = line + (1.0,)
        else:
            line = line + (tl.load(line_ptr + (TAPS - 1 - i if REVERSED else i)),)
    return line


@triton.jit
def _add_row(sums, row, line, TAPS: tl.constexpr):
    """Add a row to the sums under way, oldest first: the complete one, and those still open."""
    if TAPS == 1:
        done = row * line[0]
        rest = ()
    else:
        done = sums[0] + row * line[TAPS - 1]
        rest = ()
        for i in tl.static_range(1, TAPS - 1):
            rest = rest + (sums[i] + row * line[TAPS - 1 - i],)
        rest = rest + (row * line[0],)
    return done, rest


@triton.jit
def _place(
    height, rows, strips, tiles, LANES: tl.constexpr, HALO: tl.constexpr, STRIPS: tl.constexpr
):
    """Return a program's map, and of its [LANES, STRIPS] the first row, rows to skip, lane, column.

    The last strip begins where it ends with the map. It does not store the rows that it shares with
    the one before: the same sum may be rounded otherwise in another of a program's rows.
    """
    program = tl.program_id(0)
    lane = tl.arange(0, LANES)[:, None] + tl.zeros([1, STRIPS], tl.int32)
    strip = program // tiles % strips * STRIPS + tl.arange(0, STRIPS)[None, :]
    first = tl.minimum(strip * rows, height - rows)
    skip = strip * rows - first
    x = program % tiles * ((LANES - HALO) * COLUMNS) + lane * COLUMNS
    return (program // tiles // strips).to(tl.int64), first, skip, lane, x


@triton.jit
def _columns(ptr):
    """Load the columns of each lane at once: a tuple of float32 [LANES, STRIPS]."""
    b = tl.load(ptr[:, :, None] + tl.arange(0, COLUMNS)[None, None, :]).to(tl.float32)
    even, odd = tl.split(tl.reshape(b, (b.shape[0], b.shape[1], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _store_columns(ptr, columns, mask):
    """Store the columns of each lane; ptr and mask are [LANES, STRIPS, COLUMNS]."""
    b = tl.join(tl.join(columns[0], columns[2]), tl.join(columns[1], columns[3]))
    b = tl.reshape(b, (ptr.shape[0], ptr.shape[1], COLUMNS))
    tl.store(ptr, b.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _across(columns, line, lane, SHIFT: tl.constexpr, TAPS: tl.constexpr, LANES: tl.constexpr):
    """Blur along x, from SHIFT columns beside a lane's own on.

    The neighbours of the outermost lanes are those of the other end.
    """
    window = ()
    for i in tl.static_range(SHIFT, SHIFT + TAPS - 1 + COLUMNS):
        b = columns[i & 3]
        if i >> 2 != 0:
            b = tl.gather(b, (lane + (i >> 2)) & (LANES - 1), 0)
        window = window + (b,)
    across = ()
    for c in tl.static_range(COLUMNS):
        b = window[c] * line[0]
        for j in tl.static_range(1, TAPS):
            b += window[c + j] * line[j]
        across = across + (b,)
    return across


@triton.jit
def _lift_blur_kernel(
    v_ptr,
    line_ptr,
    y_ptr,
    arg_ptr,
    H1,
    H3,
    W3,
    pitch,
    strips,
    tiles,
    G: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    POOL: tl.constexpr,
    ROWS: tl.constexpr,
    STRIPS: tl.constexpr,
    LANES: tl.constexpr,
    HALO: tl.constexpr,
):
    """Blur the rectified values and take the maximum over the group.

    A lane owns ROWS rows of results and takes one element after the other, all of whose loads are
    under way at once. Per value 2 TAPS multiply-adds and 2 bytes from memory, (ROWS + TAPS - 1) /
    ROWS times that from a cache; per output 3 bytes written, through shared memory, so that
    neighbouring threads write neighbouring elements of rows that need not be aligned.
    """
    plane, first, skip, lane, x = _place(H3, ROWS, strips, tiles, LANES, HALO, STRIPS)
    line = _line(line_ptr, TAPS, REVERSED=False)
    # No result that is kept has columns beyond the pitch under it.
    o_v = tl.minimum(x // COLUMNS, pitch // COLUMNS - 1) * COLUMNS
    p_v = v_ptr + (plane * G * H1 + first * STRIDE) * pitch + o_v
    best = ((tl.full([LANES, STRIPS], float("-inf"), tl.float32),) * COLUMNS,) * ROWS
    arg = ((tl.zeros([LANES, STRIPS], tl.int32),) * COLUMNS,) * ROWS
    for g in tl.range(G):
        rows = ()
        for i in tl.static_range((ROWS - 1) * STRIDE + TAPS):
            rows = rows + (_columns(p_v + i * pitch),)
        p_v += H1 * pitch
        best_now = ()
        arg_now = ()
        for r in tl.static_range(ROWS):
            down = ()
            for c in tl.static_range(COLUMNS):
                b = rows[r * STRIDE][c] * line[0]
                for j in tl.static_range(1, TAPS):
                    b += rows[r * STRIDE + j][c] * line[j]
                down = down + (b,)
            values = _across(down, line, lane, 0, TAPS, LANES)
            largest = ()
            winner = ()
            for c in tl.static_range(COLUMNS):
                # The first NaN wins, else the first of the largest: whoever changes the maximum.
                more = tl.maximum(best[r][c], values[c], propagate_nan=tl.PropagateNan.ALL)
                same = more.to(tl.int32, bitcast=True) == best[r][c].to(tl.int32, bitcast=True)
                largest = largest + (more,)
                winner = winner + (tl.where(same, arg[r][c], g),)
            best_now = best_now + (largest,)
            arg_now = arg_now + (winner,)
        best = best_now
        arg = arg_now
    o_x = x[:, :, None] + tl.arange(0, COLUMNS)[None, None, :]
    m = (lane < LANES - HALO)[:, :, None] & (o_x % STRIDE == 0) & (o_x // STRIDE < W3)
    o = ((plane * H3 + first) * W3)[:, :, None] + o_x // STRIDE
    for r in tl.static_range(ROWS):
        m_r = m & (r >= skip)[:, :, None]
        _store_columns(y_ptr + o + r * W3, best[r], m_r)
        if POOL:
            _store_columns(arg_ptr + o + r * W3, arg[r], m_r)


@triton.jit
def _row(dy_ptr, arg_ptr, plane, y, x, H3, W3, STRIDE: tl.constexpr, POOL: tl.constexpr):
    """Load the columns of dy and of arg above row ``y`` of values, as they are stored."""
    o_y = y // STRIDE
    m_y = (y >= 0) & (y % STRIDE == 0) & (o_y < H3)
    row = (plane * H3 + o_y) * W3
    b_dy = ()
    b_arg = ()
    for c in tl.static_range(COLUMNS):
        o = (x + c) // STRIDE
        m = m_y & (x + c >= 0) & ((x + c) % STRIDE == 0) & (o < W3)
        b_dy = b_dy + (tl.load(dy_ptr + row + o, mask=m, other=0.0),)
        if POOL:
            b_arg = b_arg + (tl.load(arg_ptr + row + o, mask=m, other=255),)
    return b_dy, b_arg


@triton.jit
def _lift_unblur_kernel(
    dy_ptr,
    arg_ptr,
    line_ptr,
    dv_ptr,
    H1,
    H3,
    W3,
    pitch,
    rows,
    strips,
    tiles,
    G: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    POOL: tl.constexpr,
    ELEMENTS: tl.constexpr,
    STRIPS: tl.constexpr,
    LANES: tl.constexpr,
    HALO: tl.constexpr,
):
    """Send dy to the winning elements and through the transposed blur: planar [B, F G, H1, pitch].

    A lane walks down ``rows`` rows of values of ELEMENTS elements at a time, with the next row of
    dy under way: each goes into the TAPS rows of the blur along y that it belongs to, the oldest of
    which is then complete. Per value 2 TAPS multiply-adds and 2 bytes written; dy and arg are read
    once for the elements of a program.
    """
    part, first, skip, lane, x = _place(H1, rows, strips, tiles, LANES, HALO, STRIPS)
    PARTS: tl.constexpr = (G + ELEMENTS - 1) // ELEMENTS
    plane = part // PARTS
    g_first = (part % PARTS).to(tl.int32) * ELEMENTS
    x -= HALO * COLUMNS
    line = _line(line_ptr, TAPS, REVERSED=True)
    m_x = (lane >= HALO) & (x < pitch)
    p_dv = dv_ptr + ((plane * G + g_first) * H1 + first) * pitch + x
    p_dv = p_dv[:, :, None] + tl.arange(0, COLUMNS)[None, None, :]
    sums = (((tl.zeros([LANES, STRIPS], tl.float32),) * (TAPS - 1),) * COLUMNS,) * ELEMENTS
    ahead = _row(dy_ptr, arg_ptr, plane, first - (TAPS - 1), x, H3, W3, STRIDE, POOL)
    for row in tl.range(1 - TAPS, rows, loop_unroll_factor=2):
        b_dy, b_arg = ahead
        ahead = _row(dy_ptr, arg_ptr, plane, first + row + 1, x, H3, W3, STRIDE, POOL)
        still_open = ()
        for g in tl.static_range(ELEMENTS):
            down = ()
            rests = ()
            for c in tl.static_range(COLUMNS):
                own = b_dy[c].to(tl.float32)
                if POOL:
                    own = tl.where(b_arg[c] == g_first + g, own, 0.0)
                done, rest = _add_row(sums[g][c], own, line, TAPS)
                down = down + (done,)
                rests = rests + (rest,)
            still_open = still_open + (rests,)
            values = _across(down, line, lane, 1 - TAPS, TAPS, LANES)
            m = m_x & (row >= skip) & (g_first + g < G)
            _store_columns(p_dv + (g * H1 + row) * pitch, values, m[:, :, None])
        sums = still_open


def blur_and_pool(
    v: Tensor, line: Tensor | None, y: Tensor, arg: Tensor, *, stride: int, pool: bool, s: Sizes
) -> None:
    """Write the blurred values ``y``, or their maximum over the group and its ``arg``."""
    launch = launches.find("lift_blur", y)
    taps, under, halo = _under(line, y, stride)
    lanes = min(WARP, power_of_2(under + halo))
    strips = launch.pop("BLOCK") // lanes
    h3, w3 = y.shape[-2:]
    rows = min(launch.pop("ROWS"), 1 << (h3.bit_length() - 1))
    blocks, tiles = cdiv(h3, rows * strips), cdiv(under, lanes - halo)
    # Without the maximum every element is a field of its own.
    order, maps = (s.order, s.fields) if pool else (1, s.fields * s.order)
    _lift_blur_kernel[(y.shape[0] * maps * blocks * tiles,)](
        v, line, y, arg, s.h1, h3, w3, s.pitch, blocks, tiles, G=order, TAPS=taps, STRIDE=stride,
        POOL=pool, ROWS=rows, STRIPS=strips, LANES=lanes, HALO=halo, **launch,
    )  # fmt: skip


def unblur(
    dy: Tensor, arg: Tensor, line: Tensor | None, *, stride: int, pool: bool, s: Sizes
) -> Tensor:
    """Return the gradient of the values that ``blur_and_pool`` blurred, planar."""
    dv = torch.empty(
        dy.shape[0], s.fields * s.order, s.h1, s.pitch, dtype=dy.dtype, device=dy.device
    )
    launch = launches.find("lift_unblur", dy)
    taps, under, halo = _under(line, dy, stride)
    lanes = power_of_2(max(under + halo, s.pitch // COLUMNS.value))
    if lanes <= WARP:
        halo = 0  # The first lanes' neighbours are the last, which are under no dy.
    else:
        lanes = WARP
    strips = launch.pop("BLOCK") // lanes
    rows = cdiv(s.h1, cdiv(s.h1, launch.pop("ROWS")))
    blocks, tiles = cdiv(s.h1, rows * strips), cdiv(s.pitch, COLUMNS.value * (lanes - halo))
    order, maps = (s.order, s.fields) if pool else (1, s.fields * s.order)
    parts = cdiv(order, 4)
    _lift_unblur_kernel[(dy.shape[0] * maps * parts * blocks * tiles,)](
        dy, arg, line, dv, s.h1, *dy.shape[-2:], s.pitch, rows, blocks, tiles, G=order, TAPS=taps,
        STRIDE=stride, POOL=pool, ELEMENTS=cdiv(order, parts), STRIPS=strips, LANES=lanes,
        HALO=halo, **launch,
    )  # fmt: skip
    return dv


def _under(line: Tensor | None, y: Tensor, stride: int) -> tuple[int, int, int]:
    """Return taps of the blur, and the lanes under the first of them and under the others."""
    taps = 1 if line is None else line.numel()
    under = cdiv((y.shape[-1] - 1) * stride + 1, COLUMNS.value)
    return taps, under, cdiv(taps - 1, COLUMNS.value)
