r"""The depthwise projections of the attention, with the statistics of their batch normalisation.

.. math:: t[n, d] = \sum_{ij} w_t[d, ij] \, \mathrm{LN}(x)[d, n s_t + (i, j) - k // 2], \quad
    t \in \{a, b, c\}

from images ``x``, whose layer norm (if there is one) is made on load, to raw tokens, channels last,
with each channel's mean and biased variance over the batch. Statistics are those of the stored,
rounded tokens, which is what the attention normalises; the gradient takes them so too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launches
from .common import cdiv, padded, programs
from .layer_norm import normalise

# Windows of larger cells are more than a program could keep, or compile.
LARGEST_CELL = 4
# Programs that a multiprocessor has room for, and cells below which one only repeats its halo.
RESIDENT, LEAST = 4, 4


@triton.jit
def load_filters(filters_ptr, o_d, m_d, TAPS: tl.constexpr):
    """Load the filters of all channels: a tuple of float32 [1, D], one for each tap."""
    filters = ()
    for tap in tl.static_range(TAPS):
        tapped = tl.load(filters_ptr + o_d * TAPS + tap, mask=m_d, other=0.0)
        filters = filters + (tapped[None, :],)
    return filters


@triton.jit
def within(row, column, H, W):
    """Whether places in one row are inside an image: one unsigned comparison for each."""
    end = tl.where((row >= 0) & (row < H), W, 0)
    return column.to(tl.uint32) < end.to(tl.uint32)


@triton.jit
def load_row(
    p_x,
    row,
    left,
    m_d,
    H,
    W,
    stride_xh,
    stride_xw,
    WIDE: tl.constexpr,
):
    """Load one row of the lanes' windows, as it is in memory: a tuple of [BLOCK_T, D]."""
    pixels = ()
    for j in tl.static_range(WIDE):
        mask = within(row, left + j, H, W)[:, None] & m_d[None, :]
        x = tl.load(p_x + (row * stride_xh + j * stride_xw), mask=mask, other=0.0)
        pixels = pixels + (x,)
    return pixels


@triton.jit
def _normalised(
    raw,
    row,
    left,
    m_d,
    norm_weight,
    norm_bias,
    H,
    W,
    eps,
    WIDE: tl.constexpr,
    D: tl.constexpr,
    NORM: tl.constexpr,
):
    """Return a row from :func:`load_row` after the layer norm: a tuple of float32 [BLOCK_T, D]."""
    pixels = ()
    for j in tl.static_range(WIDE):
        x = raw[j].to(tl.float32)
        if NORM:
            unit, _rstd = normalise(x, m_d, eps, D)
            mask = within(row, left + j, H, W)[:, None] & m_d[None, :]
            x = tl.where(mask, unit * norm_weight[None, :] + norm_bias[None, :], 0.0)
        pixels = pixels + (x,)
    return pixels


@triton.jit
def _convolve(
    window, filters, y: tl.constexpr, x: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr
):
    """Return the token whose first tap is pixel (y, x) of the window."""
    acc = window[y * WIDE + x] * filters[0]
    for tap in tl.static_range(1, SIZE * SIZE):
        acc += window[(y + tap // SIZE) * WIDE + x + tap % SIZE] * filters[tap]
    return acc


@triton.jit
def _store_token(t_ptr, offsets, acc, mask, moments, is_first, MOMENTS: tl.constexpr):
    """Store tokens; add them to each lane's sum, and to its squares about the lane's first one."""
    stored = acc.to(t_ptr.dtype.element_ty)
    tl.store(t_ptr + offsets, stored, mask=mask)
    if MOMENTS:
        shift, total, lost, squares = moments
        wide = tl.where(mask, stored.to(tl.float32), 0.0)
        shift = tl.where(is_first, wide, shift)
        beyond = tl.where(mask, wide - shift, 0.0)
        squares += beyond * beyond
        # A sum of long numbers loses digits, which the next one gives back.
        if t_ptr.dtype.element_ty == tl.float32:
            wide -= lost
            lost = (total + wide - total) - wide
        total += wide
        moments = shift, total, lost, squares
    return moments


@triton.jit
def _store_moments(part_ptr, moments, count, o_d, m_d, D: tl.constexpr):
    """Write the sums of the lanes' ``count`` tokens each, and of their squares, in float64."""
    shift, total, lost, squares = moments
    shift = shift.to(tl.float64)
    total = total.to(tl.float64) - lost.to(tl.float64)
    squares = squares.to(tl.float64) + shift * (2 * total - count.to(tl.float64)[:, None] * shift)
    tl.store(part_ptr + o_d, tl.sum(total, 0), mask=m_d)
    tl.store(part_ptr + D + o_d, tl.sum(squares, 0), mask=m_d)


@triton.jit(do_not_specialize=["lanes", "per_program"])
def _conv_attention_project_fwd_kernel(
    x_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    parts_ptr,
    lanes,
    rows,
    columns,
    per_program,
    H,
    W,
    OH,
    OW,
    stride_xb,
    stride_xd,
    stride_xh,
    stride_xw,
    eps,
    APART: tl.constexpr,
    CELL: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_V: tl.constexpr,
    NORM: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """Walk down columns of cells of CELL ** 2 pixels, and convolve what belongs to each.

    One program owns BLOCK_T lanes, which are columns of cells of any images, and ``per_program``
    cells of each. A cell has CELL ** 2 queries, and one key if it is an ``APART``-th one::

        window of a cell, CELL = 2, SIZE = 3        . . . .   the last step's, kept in registers
        (the next lane's begins at its third        . Q q .   (Q: queries that see what a key does)
        column)                                     . q q .   CELL new rows: loaded, normalised
                                                    . . . .

    So a pixel is read and normalised (CELL + SIZE - 1) / CELL times, 2 in the model, and not once
    for each tap; filters stay in registers. 2 D numbers per query and D per key cross the device's
    memory: 0.023 ms at batch 128 and D = 32. Accumulates in fp32, taps in order.
    ``parts`` ``[programs, 2 or 3, 2, D]`` gets the sums of tokens and of their squares in float64.
    """
    TAPS: tl.constexpr = SIZE * SIZE
    HALO: tl.constexpr = SIZE // 2
    WIDE: tl.constexpr = CELL + SIZE - 1
    lane = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    there = lane < lanes
    i_b = (lane // columns).to(tl.int64)
    cell = lane % columns
    first = tl.program_id(1) * per_program
    end = tl.minimum(first + per_program, rows)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    # Lanes that are none see nothing: their windows are beyond the image.
    left = tl.where(there, cell * CELL - HALO, W)
    p_x = x_ptr + (i_b * stride_xb + left * stride_xw)[:, None] + o_d[None, :] * stride_xd
    o_q = (i_b * H * W + cell * CELL)[:, None] * D + o_d[None, :]
    o_k = (i_b * OH * OW + cell // APART)[:, None] * D + o_d[None, :]
    q = load_filters(q_ptr, o_d, m_d, TAPS)
    k = load_filters(k_ptr, o_d, m_d, TAPS)
    v = load_filters(v_ptr, o_d, m_d, TAPS if HAS_V else 0)
    norm_weight = m_d
    norm_bias = m_d
    if NORM:
        norm_weight = tl.load(norm_weight_ptr + o_d, mask=m_d, other=0.0)
        norm_bias = tl.load(norm_bias_ptr + o_d, mask=m_d, other=0.0)
    q_moments = (tl.zeros([BLOCK_T, BLOCK_D], tl.float32),) * (4 if MOMENTS else 0)
    k_moments = q_moments
    v_moments = q_moments
    window = ()
    for i in tl.static_range(SIZE - 1):
        row = first * CELL - HALO + i
        fresh = load_row(p_x, row, left, m_d, H, W, stride_xh, stride_xw, WIDE)
        window = window + _normalised(
            fresh, row, left, m_d, norm_weight, norm_bias, H, W, eps, WIDE, D, NORM
        )
    fresh = ()
    for y in tl.static_range(CELL):
        row = first * CELL + HALO + y
        fresh = fresh + load_row(p_x, row, left, m_d, H, W, stride_xh, stride_xw, WIDE)
    first_key = (first + APART - 1) // APART * APART
    for i_r in tl.range(first, end):
        for y in tl.static_range(CELL):
            window = window + _normalised(
                fresh[y * WIDE : (y + 1) * WIDE],
                i_r * CELL + HALO + y,
                left,
                m_d,
                norm_weight,
                norm_bias,
                H,
                W,
                eps,
                WIDE,
                D,
                NORM,
            )
        # Fetched a step before they are wanted: memory answers while this step is computed.
        fresh = ()
        for y in tl.static_range(CELL):
            row = tl.where(i_r + 1 < end, (i_r + 1) * CELL + HALO + y, -1)
            fresh = fresh + load_row(p_x, row, left, m_d, H, W, stride_xh, stride_xw, WIDE)
        for y in tl.static_range(CELL):
            for x in tl.static_range(CELL):
                row = i_r * CELL + y
                mask = within(row, left + HALO + x, H, W)[:, None] & m_d[None, :]
                acc = _convolve(window, q, y, x, SIZE, WIDE)
                is_first = (i_r == first) & (y + x == 0)
                q_moments = _store_token(
                    a_ptr, o_q + (row * W + x) * D, acc, mask, q_moments, is_first, MOMENTS
                )
        mask = (there & (i_r % APART == 0) & (cell % APART == 0))[:, None] & m_d[None, :]
        offsets = o_k + i_r // APART * OW * D
        is_first = i_r == first_key
        acc = _convolve(window, k, 0, 0, SIZE, WIDE)
        k_moments = _store_token(b_ptr, offsets, acc, mask, k_moments, is_first, MOMENTS)
        if HAS_V:
            acc = _convolve(window, v, 0, 0, SIZE, WIDE)
            v_moments = _store_token(c_ptr, offsets, acc, mask, v_moments, is_first, MOMENTS)
        window = window[CELL * WIDE :]
    if MOMENTS:
        program = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
        parts_ptr += program * (3 if HAS_V else 2) * 2 * D
        queries = (tl.minimum(end * CELL, H) - first * CELL) * tl.minimum(W - cell * CELL, CELL)
        keys = (end + APART - 1) // APART - (first + APART - 1) // APART
        queries = tl.where(there, queries, 0)
        keys = tl.where(there & (cell % APART == 0), keys, 0)
        _store_moments(parts_ptr, q_moments, queries, o_d, m_d, D)
        _store_moments(parts_ptr + 2 * D, k_moments, keys, o_d, m_d, D)
        if HAS_V:
            _store_moments(parts_ptr + 4 * D, v_moments, keys, o_d, m_d, D)


@triton.jit(do_not_specialize=["rows", "queries", "keys"])
def _conv_attention_moments_kernel(
    parts_ptr,
    mean_ptr,
    variance_ptr,
    rows,
    queries,
    keys,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Turn the sums that the programs left of a projection into its mean and its variance.

    One program owns BLOCK_C channels of one projection and walks over its ``rows`` parts. All is in
    float64, where the mean's square may be subtracted from that of the tokens.
    """
    i_p = tl.program_id(0)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < D
    parts_ptr += i_p * 2 * D + o_c[None, :]
    sums = tl.zeros([BLOCK_C], tl.float64)
    squares = tl.zeros([BLOCK_C], tl.float64)
    for start in range(0, rows, BLOCK_ROWS):
        o_r = start + tl.arange(0, BLOCK_ROWS)
        mask = (o_r < rows)[:, None] & m_c[None, :]
        part_ptr = parts_ptr + (o_r.to(tl.int64) * tl.num_programs(0) * 2 * D)[:, None]
        sums += tl.sum(tl.load(part_ptr, mask=mask, other=0.0), 0)
        squares += tl.sum(tl.load(part_ptr + D, mask=mask, other=0.0), 0)
    count = tl.where(i_p == 0, queries, keys).to(tl.float64)
    mean = sums / count
    variance = squares / count - mean * mean
    # Rounding may leave a constant channel a variance just below 0; a NaN stays one.
    variance = tl.where(variance < 0, 0.0, variance)
    tl.store(mean_ptr + i_p * D + o_c, mean.to(tl.float32), mask=m_c)
    tl.store(variance_ptr + i_p * D + o_c, variance.to(tl.float32), mask=m_c)


class Walk(NamedTuple):
    """How the programs of a launch share the cells of a batch: arguments of its kernel."""

    lanes: int
    rows: int
    columns: int
    per_program: int

    def grid(self, block: int) -> tuple[int, int]:
        """Return the programs along lanes, BLOCK_T each, and down the cells of a lane."""
        return cdiv(self.lanes, block), cdiv(self.rows, self.per_program)


def walk(x: Tensor, cell: int, block: int, most: int) -> Walk:
    """Share cells evenly among programs of ``block`` lanes and at most ``most`` cells of each.

    A lane is divided further where few images would leave multiprocessors without programs: each
    step down it waits for the one before.
    """
    batch, _, height, breadth = x.shape
    rows, columns = cdiv(height, cell), cdiv(breadth, cell)
    lanes = batch * columns
    across = cdiv(lanes, block)
    fill = programs(x, RESIDENT, across * cdiv(rows, LEAST)) // across
    return Walk(lanes, rows, columns, cdiv(rows, max(fill, cdiv(rows, most))))


def cell_size(stride: int) -> int:
    """Return the side of a cell: the stride, so that it has one key, or 1 if that is too large."""
    return stride if stride <= LARGEST_CELL else 1


def strided(size: int, stride: int) -> int:
    """Return the length of a line of ``size`` under an odd filter with half its size as padding."""
    return (size - 1) // stride + 1


def addressable(x: Tensor) -> Tensor:
    """Return ``x``, or a copy of it if offsets inside one image exceed 32 bits."""
    span = sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:], strict=True))
    return x if span < 2**31 else x.contiguous(memory_format=torch.channels_last)


def project(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    kv_stride: int,
    moments: bool,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Convolve images with the depthwise filters of queries, keys and values.

    Args:
        x: ``[B, D, H, W]``, any strides; ``channels_last`` is the fast case.
        q: ``[D, 1, k, k]``, filters of the queries, stride 1.
        k: as ``q``, of the keys, stride ``kv_stride``.
        v: as ``k``, of the values; None where they are the keys.
        norm_weight: ``[D]``, scale of the layer norm in front; None for no norm.
        norm_bias: ``[D]``, its shift; given if ``norm_weight`` is.
        kv_stride: stride of keys and values.
        moments: whether to compute the statistics.
        eps: added to the variance of the layer norm.

    Returns:
        ``a`` ``[B, N, D]``, ``b`` ``[B, M, D]``, ``c`` as ``b`` or empty; ``mean`` and biased
        ``variance`` ``[2 or 3, D]`` in fp32, or empty.
    """
    x = addressable(x)
    batch, width, height, breadth = x.shape
    rows, columns = strided(height, kv_stride), strided(breadth, kv_stride)
    a = x.new_empty(batch, height * breadth, width)
    b = x.new_empty(batch, rows * columns, width)
    c = x.new_empty(0) if v is None else torch.empty_like(b)
    projections = 2 if v is None else 3
    shape = (projections, width) if moments else (0,)
    mean, variance = q.new_empty(shape), q.new_empty(shape)
    if batch == 0:
        return a, b, c, mean.zero_(), variance.zero_()
    launch = launches.find("conv_attention_project_fwd", x, launches.width_class(width))
    cell = cell_size(kv_stride)
    cells = walk(x, cell, launch["BLOCK_T"], launch.pop("ROWS"))
    grid = cells.grid(launch["BLOCK_T"])
    count = grid[0] * grid[1]
    parts = q.new_empty(count, projections, 2, width, dtype=torch.float64) if moments else mean
    _conv_attention_project_fwd_kernel[grid](
        x,
        q,
        k,
        k if v is None else v,
        q if norm_weight is None else norm_weight,
        q if norm_bias is None else norm_bias,
        a,
        b,
        c,
        parts,
        *cells,
        height,
        breadth,
        rows,
        columns,
        *x.stride(),
        eps,
        APART=kv_stride // cell,
        CELL=cell,
        SIZE=q.shape[-1],
        D=width,
        BLOCK_D=padded(width),
        HAS_V=v is not None,
        NORM=norm_weight is not None,
        MOMENTS=moments,
        **launch,
    )
    if moments:
        launch = launches.find("conv_attention_moments", mean)
        _conv_attention_moments_kernel[(projections, cdiv(width, launch["BLOCK_C"]))](
            parts,
            mean,
            variance,
            count,
            batch * height * breadth,
            batch * rows * columns,
            D=width,
            **launch,
        )
    return a, b, c, mean, variance
