"""Blur and group maximum of the steerable block, and their transpose.

Both walk down columns. A lane owns COLUMNS neighbouring columns of one field with all its G
elements, so that the blur along x and the maximum over the group stay within a thread::

    lanes ->   [ field 0, segment 0: columns 0-3 | 4-7 | ... ] [ segment 1: ... ] [ field 1: ... ]
    rows  |    each row is blurred along x as it comes and added, times its weight, to the TAPS
          v    rows of the blur along y that it belongs to; the oldest of these is then complete
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launches
from .lift_tile import Sizes, cdiv


@triton.jit
def _columns(ptr, mask, COLUMNS: tl.constexpr):
    """Load COLUMNS neighbours of each lane at once: a tuple of float32 [BLOCK]."""
    if COLUMNS == 1:
        columns = (tl.load(ptr, mask=mask, other=0.0).to(tl.float32),)
    else:
        p = ptr[:, None] + tl.arange(0, COLUMNS)[None, :]
        b = tl.load(p, mask=mask[:, None], other=0.0).to(tl.float32)
        if COLUMNS == 2:
            columns = tl.split(b)
        else:
            even, odd = tl.split(tl.reshape(b, (b.shape[0], 2, 2)))
            first, third = tl.split(even)
            second, fourth = tl.split(odd)
            columns = (first, second, third, fourth)
    return columns


@triton.jit
def _store_columns(ptr, columns, mask, COLUMNS: tl.constexpr):
    """Store what ``_columns`` would load."""
    if COLUMNS == 1:
        tl.store(ptr, columns[0].to(ptr.dtype.element_ty), mask=mask)
    else:
        o_c = tl.arange(0, COLUMNS)
        if COLUMNS == 2:
            b = tl.join(columns[0], columns[1])
        else:
            b = tl.join(tl.join(columns[0], columns[2]), tl.join(columns[1], columns[3]))
            b = tl.reshape(b, (b.shape[0], 4))
        p = ptr[:, None] + o_c[None, :]
        tl.store(p, b.to(ptr.dtype.element_ty), mask=mask[:, None])


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
            rest = rest + (sums[i] + row * line[TAPS - 1 - i],)  # noqa: RUF005
        rest = rest + (row * line[0],)  # noqa: RUF005
    return done, rest


@triton.jit
def _line(line_ptr, TAPS: tl.constexpr, REVERSED: tl.constexpr):
    """Load the weights of the blur; without one they are (1,)."""
    line = ()
    for i in tl.static_range(TAPS):
        if line_ptr is None:
            line = line + (1.0,)  # noqa: RUF005
        else:
            line = line + (tl.load(line_ptr + (TAPS - 1 - i if REVERSED else i)),)  # noqa: RUF005
    return line


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
    per_segment,
    segments,
    columns,
    lanes,
    G: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    POOL: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Blur the rectified values and take the maximum over the group.

    One program owns BLOCK lanes and walks down their segments of per_segment rows of results. Per
    value 2 TAPS multiply-adds and 2 bytes from memory (twice that from the first-level cache); per
    output 3 bytes written.
    """
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i_f = (lane // (segments * columns)).to(tl.int64)
    first = lane // columns % segments * per_segment
    o_x = lane % columns * COLUMNS
    there = lane < lanes
    line = _line(line_ptr, TAPS, REVERSED=False)
    p_v = v_ptr + (i_f * G * H1 + first * STRIDE) * pitch + o_x * STRIDE
    sums = ((tl.zeros([BLOCK], tl.float32),) * (TAPS - 1),) * (G * COLUMNS)
    # What COLUMNS results lie above, in loads of COLUMNS values.
    LOADS: tl.constexpr = ((COLUMNS - 1) * STRIDE + TAPS - 1) // COLUMNS + 1
    for row in tl.range((per_segment - 1) * STRIDE + TAPS):
        m_row = there & (first * STRIDE + row < H1)
        blurred = ()
        still_open = ()
        for g in tl.static_range(G):
            b_v = ()
            for i in tl.static_range(LOADS):
                m_v = m_row & (o_x * STRIDE + i * COLUMNS < pitch)
                b_v = b_v + _columns(p_v + (g * H1 + row) * pitch + i * COLUMNS, m_v, COLUMNS)
            for c in tl.static_range(COLUMNS):
                b_h = b_v[c * STRIDE] * line[0]
                for j in tl.static_range(1, TAPS):
                    b_h += b_v[c * STRIDE + j] * line[j]
                done, rest = _add_row(sums[g * COLUMNS + c], b_h, line, TAPS)
                blurred = blurred + (done,)  # noqa: RUF005
                still_open = still_open + (rest,)  # noqa: RUF005
        sums = still_open
        o_y = first + (row - (TAPS - 1)) // STRIDE
        m_y = there & (row >= TAPS - 1) & ((row - (TAPS - 1)) % STRIDE == 0) & (o_y < H3)
        for c in tl.static_range(COLUMNS):
            m = m_y & (o_x + c < W3)
            if POOL:
                best = blurred[c]
                arg = tl.zeros([BLOCK], tl.int32)
                for g in tl.static_range(1, G):
                    # The first NaN wins, else the first of the largest.
                    stays = (blurred[g * COLUMNS + c] <= best) | (best != best)
                    best = tl.where(stays, best, blurred[g * COLUMNS + c])
                    arg = tl.where(stays, arg, g)
                o = (i_f * H3 + o_y) * W3 + o_x + c
                tl.store(y_ptr + o, best.to(y_ptr.dtype.element_ty), mask=m)
                tl.store(arg_ptr + o, arg.to(tl.uint8), mask=m)
            else:
                for g in tl.static_range(G):
                    o = ((i_f * G + g) * H3 + o_y) * W3 + o_x + c
                    b_y = blurred[g * COLUMNS + c]
                    tl.store(y_ptr + o, b_y.to(y_ptr.dtype.element_ty), mask=m)


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
    per_segment,
    segments,
    columns,
    lanes,
    G: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    POOL: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Send dy to the winning elements and through the transposed blur: planar [B, F G, H1, pitch].

    Mirrors the blur: one program owns BLOCK lanes and walks down their segments of per_segment rows
    of values. Per value 2 TAPS multiply-adds and 2 bytes written; dy and arg are read once from
    memory, and twice from the first-level cache.
    """
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i_f = (lane // (segments * columns)).to(tl.int64)
    first = lane // columns % segments * per_segment
    o_x = lane % columns * COLUMNS
    there = lane < lanes
    line = _line(line_ptr, TAPS, REVERSED=True)
    p_dv = dv_ptr + (i_f * G * H1 + first) * pitch + o_x
    sums = ((tl.zeros([BLOCK], tl.float32),) * (TAPS - 1),) * (G * COLUMNS)
    for row in tl.range(-(TAPS - 1), per_segment):
        y = first + row
        o_y = y // STRIDE
        m_y = there & (y >= 0) & (y % STRIDE == 0) & (o_y < H3)
        still_open = ()
        for g in tl.static_range(G):
            if (g == 0) or not POOL:
                # With POOL one map for all g, each g of which takes what it won.
                b_dy = ()
                b_arg = ()
                for i in tl.static_range(COLUMNS + TAPS - 1):
                    x = o_x + (i - (TAPS - 1))
                    m = m_y & (x >= 0) & (x % STRIDE == 0) & (x // STRIDE < W3)
                    if POOL:
                        o = (i_f * H3 + o_y) * W3 + x // STRIDE
                        b_arg = b_arg + (tl.load(arg_ptr + o, mask=m, other=255),)  # noqa: RUF005
                    else:
                        o = ((i_f * G + g) * H3 + o_y) * W3 + x // STRIDE
                    b_dy = b_dy + (tl.load(dy_ptr + o, mask=m, other=0.0).to(tl.float32),)  # noqa: RUF005
            own = b_dy
            if POOL:
                own = ()
                for i in tl.static_range(COLUMNS + TAPS - 1):
                    own = own + (tl.where(b_arg[i] == g, b_dy[i], 0.0),)  # noqa: RUF005
            complete = ()
            for c in tl.static_range(COLUMNS):
                b_h = own[c] * line[0]
                for j in tl.static_range(1, TAPS):
                    b_h += own[c + j] * line[j]
                done, rest = _add_row(sums[g * COLUMNS + c], b_h, line, TAPS)
                complete = complete + (done,)  # noqa: RUF005
                still_open = still_open + (rest,)  # noqa: RUF005
            m_dv = there & (row >= 0) & (y < H1)
            _store_columns(p_dv + (g * H1 + row) * pitch, complete, m_dv, COLUMNS)
        sums = still_open


def blur_and_pool(
    v: Tensor, line: Tensor | None, y: Tensor, arg: Tensor, *, stride: int, pool: bool, s: Sizes
) -> None:
    """Write the blurred values ``y``, or their maximum over the group and its ``arg``."""
    _walk("lift_blur", (v, line, y, arg), line, y, y.shape[-2:], stride, pool, s)


def unblur(
    dy: Tensor, arg: Tensor, line: Tensor | None, *, stride: int, pool: bool, s: Sizes
) -> Tensor:
    """Return the gradient of the values that ``blur_and_pool`` blurred, planar."""
    shape = (dy.shape[0], s.fields * s.order, s.h1, s.pitch)
    dv = torch.empty(shape, dtype=dy.dtype, device=dy.device)
    _walk("lift_unblur", (dy, arg, line, dv), line, dy, (s.h1, s.pitch), stride, pool, s)
    return dv


def _walk(
    name: str,
    tensors: tuple[Tensor | None, ...],
    line: Tensor | None,
    y: Tensor,
    walked: tuple[int, ...],
    stride: int,
    pool: bool,
    s: Sizes,
) -> None:
    """Walk down images of ``walked`` rows and columns, in segments of at least 8 rows."""
    kernel = {"lift_blur": _lift_blur_kernel, "lift_unblur": _lift_unblur_kernel}[name]
    launch = launches.find(name, y)
    # As many columns as there are registers for: TAPS - 1 sums of each, for each element.
    width = 4 if s.order <= 4 else 2 if s.order <= 8 else 1
    each = max(8, cdiv(walked[0], 4))
    segments, columns = cdiv(walked[0], each), cdiv(walked[1], width)
    lanes = y.shape[0] * s.fields * segments * columns
    kernel[(cdiv(lanes, launch["BLOCK"]),)](
        *tensors, s.h1, *y.shape[-2:], s.pitch, each, segments, columns, lanes, G=s.order,
        TAPS=1 if line is None else line.numel(), STRIDE=stride, POOL=pool, COLUMNS=width, **launch,
    )  # fmt: skip
