r"""The gradient of the attention's depthwise projections and of their statistics.

.. math::
    g_t = dt + (d\mathrm{mean} + 2 \, d\mathrm{variance} \, (t - \mathrm{mean})) / n, \quad
    dz[p] = \sum_{t, ij} w_t[ij] \, g_t[(p - ij + k // 2) / s_t], \quad
    dw_t[ij] = \sum_p g_t[(p - ij + k // 2) / s_t] \, z[p]

where a place between two tokens, or outside, counts as 0; ``z`` is ``x``, or its layer norm, whose
gradient takes ``dz`` to ``dx`` before it leaves the registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launches
from .common import padded, sum_rows
from .conv_attention_project import (
    addressable,
    cell_size,
    load_filters,
    load_row,
    strided,
    walk,
    within,
)
from .layer_norm import normalise, normalise_backward


@triton.jit
def _seen(row, column, OH, OW, APART: tl.constexpr):
    """Whether cells have a token: they are inside, and the ``APART``-th both ways."""
    inside = within(row, column, OH * APART, OW * APART)
    if APART > 1:
        inside &= (row % APART == 0) & (column % APART == 0)
    return inside


@triton.jit
def _load_gradients(
    dt_ptr,
    t_ptr,
    o_t,
    row,
    column,
    OH,
    OW,
    m_d,
    WIDE: tl.constexpr,
    APART: tl.constexpr,
    D: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """Load one row of the lanes' windows, as it is in memory: a tuple of [BLOCK_T, D].

    First the gradients, then with MOMENTS the tokens. ``row`` and ``column`` of the window's first
    are in cells, the ``APART``-th of which have a token; ``o_t`` are the offsets of the images.
    """
    gradients = ()
    tokens = ()
    for j in tl.static_range(WIDE):
        mask = _seen(row, column + j, OH, OW, APART)[:, None] & m_d[None, :]
        place = o_t + row // APART * OW * D + ((column.to(tl.int64) + j) // APART * D)[:, None]
        gradients = gradients + (tl.load(dt_ptr + place, mask=mask, other=0.0),)
        if MOMENTS:
            tokens = tokens + (tl.load(t_ptr + place, mask=mask, other=0.0),)
    return gradients + tokens


@triton.jit
def _total_gradients(
    raw,
    row,
    column,
    OH,
    OW,
    m_d,
    moments,
    WIDE: tl.constexpr,
    APART: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """Return the total gradients of a row from :func:`_load_gradients`, in float32."""
    gradients = ()
    for j in tl.static_range(WIDE):
        g = raw[j].to(tl.float32)
        if MOMENTS:
            mean, dmean, dvariance = moments
            t = raw[WIDE + j].to(tl.float32)
            g += dmean[None, :] + dvariance[None, :] * (t - mean[None, :])
            mask = _seen(row, column + j, OH, OW, APART)[:, None] & m_d[None, :]
            g = tl.where(mask, g, 0.0)
        gradients = gradients + (g,)
    return gradients


@triton.jit
def _load_cell(
    da_ptr,
    a_ptr,
    db_ptr,
    b_ptr,
    dc_ptr,
    c_ptr,
    p_x,
    o_q,
    o_k,
    i_r,
    column,
    q_left,
    k_left,
    H,
    W,
    OH,
    OW,
    stride_xh,
    stride_xw,
    m_d,
    APART: tl.constexpr,
    CELL: tl.constexpr,
    HALO: tl.constexpr,
    AFTER: tl.constexpr,
    WIDE: tl.constexpr,
    K_WIDE: tl.constexpr,
    D: tl.constexpr,
    HAS_V: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """Load what cells ``i_r`` add to the windows, and their pixels: four tuples of [BLOCK_T, D]."""
    q_fresh = ()
    pixels = ()
    v_fresh = ()
    for y in tl.static_range(CELL):
        q_fresh = q_fresh + _load_gradients(
            da_ptr, a_ptr, o_q, i_r * CELL + HALO + y, q_left, H, W, m_d, WIDE, 1, D, MOMENTS
        )
        pixels = pixels + load_row(
            p_x, i_r * CELL + y, column, m_d, H, W, stride_xh, stride_xw, CELL
        )
    k_fresh = _load_gradients(
        db_ptr, b_ptr, o_k, i_r + AFTER, k_left, OH, OW, m_d, K_WIDE, APART, D, MOMENTS
    )
    if HAS_V:
        v_fresh = _load_gradients(
            dc_ptr, c_ptr, o_k, i_r + AFTER, k_left, OH, OW, m_d, K_WIDE, APART, D, MOMENTS
        )
    return q_fresh, k_fresh, v_fresh, pixels


@triton.jit
def _load_moments(
    mean_ptr, dmean_ptr, dvariance_ptr, i_p, count, o_d, m_d, MOMENTS: tl.constexpr, D: tl.constexpr
):
    """Load what the total gradient takes of a projection's moments, shared among its tokens."""
    moments = ()
    if MOMENTS:
        mean = tl.load(mean_ptr + i_p * D + o_d, mask=m_d, other=0.0)
        dmean = tl.load(dmean_ptr + i_p * D + o_d, mask=m_d, other=0.0) / count
        dvariance = tl.load(dvariance_ptr + i_p * D + o_d, mask=m_d, other=0.0) * 2 / count
        moments = (mean, dmean, dvariance)
    return moments


@triton.jit
def _add_taps(
    dz,
    dfilters,
    z,
    window,
    filters,
    y: tl.constexpr,
    x: tl.constexpr,
    FIRST: tl.constexpr,
    STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Add to ``dz`` and to the filters' gradients what the tokens that saw a pixel give.

    The pixel is (y, x) of its cell; a projection has a token at every ``STRIDE``-th pixel, and its
    window of them begins ``FIRST`` tokens before the cell.
    """
    HALO: tl.constexpr = SIZE // 2
    added = ()
    for tap in tl.static_range(SIZE * SIZE):
        if (y + HALO - tap // SIZE) % STRIDE == 0 and (x + HALO - tap % SIZE) % STRIDE == 0:
            g = window[
                (FIRST + (y + HALO - tap // SIZE) // STRIDE) * WIDE
                + FIRST
                + (x + HALO - tap % SIZE) // STRIDE
            ]
            dz += g * filters[tap]
            added = added + (dfilters[tap] + g * z,)
        else:
            added = added + (dfilters[tap],)
    return dz, added


@triton.jit
def _store_filters(part_ptr, dfilters, o_d, m_d, TAPS: tl.constexpr):
    for tap in tl.static_range(TAPS):
        tl.store(part_ptr + o_d * TAPS + tap, tl.sum(dfilters[tap], 0), mask=m_d)


@triton.jit(do_not_specialize=["lanes", "per_program", "q_count", "k_count"])
def _conv_attention_project_bwd_kernel(
    da_ptr,
    db_ptr,
    dc_ptr,
    dmean_ptr,
    dvariance_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    mean_ptr,
    x_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    dx_ptr,
    parts_ptr,
    lanes,
    rows,
    columns,
    per_program,
    q_count,
    k_count,
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
    """Walk down columns of cells, write ``dx`` there and the program's share of all other sums.

    Cells, lanes and the window that moves down are those of the forward kernel, here of the total
    gradients ``dt + (dmean + 2 dvariance (t - mean)) / n`` of the tokens that saw a cell's pixels::

        queries  . . . .      keys  K k     for each pixel of the cell, for each tap of a token
                 . q q .            k k     that saw it:  dz += g w[tap],   dw[tap] += g z
                 . q q .     (K: the cell's own)
                 . . . .

    What is summed over pixels stays in registers, a number per lane, until the program ends.
    Bytes: 4 D numbers per query (x, da, a, dx) and 2 D per key, 0.046 ms at batch 128 and D = 32.
    2 multiplications per tap and number. ``parts`` is ``[programs, (2 or 3) D SIZE ** 2]``, with a
    layer norm 2 D more, of its weight and bias. Accumulates in fp32, taps in order.
    """
    TAPS: tl.constexpr = SIZE * SIZE
    HALO: tl.constexpr = SIZE // 2
    WIDE: tl.constexpr = CELL + SIZE - 1
    # Cells whose keys reach this one, above it and below it.
    BEFORE: tl.constexpr = HALO // CELL
    AFTER: tl.constexpr = (CELL - 1 + HALO) // CELL
    K_WIDE: tl.constexpr = BEFORE + 1 + AFTER
    lane = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    i_b = (lane // columns).to(tl.int64)
    cell = lane % columns
    first = tl.program_id(1) * per_program
    end = tl.minimum(first + per_program, rows)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    p_x = x_ptr + (i_b * stride_xb + cell * CELL * stride_xw)[:, None] + o_d[None, :] * stride_xd
    # Lanes that are none see nothing: their pixels and tokens are beyond the image.
    column = tl.where(lane < lanes, cell * CELL, W + HALO)
    key_column = tl.where(lane < lanes, cell, OW * APART + BEFORE)
    o_q = (i_b * H * W * D)[:, None] + o_d[None, :]
    o_k = (i_b * OH * OW * D)[:, None] + o_d[None, :]
    q = load_filters(q_ptr, o_d, m_d, TAPS)
    k = load_filters(k_ptr, o_d, m_d, TAPS)
    v = load_filters(v_ptr, o_d, m_d, TAPS if HAS_V else 0)
    q_moments = _load_moments(mean_ptr, dmean_ptr, dvariance_ptr, 0, q_count, o_d, m_d, MOMENTS, D)
    k_moments = _load_moments(mean_ptr, dmean_ptr, dvariance_ptr, 1, k_count, o_d, m_d, MOMENTS, D)
    v_moments = k_moments
    if HAS_V:
        v_moments = _load_moments(
            mean_ptr, dmean_ptr, dvariance_ptr, 2, k_count, o_d, m_d, MOMENTS, D
        )
    if NORM:
        norm_weight = tl.load(norm_weight_ptr + o_d, mask=m_d, other=0.0)
        norm_bias = tl.load(norm_bias_ptr + o_d, mask=m_d, other=0.0)
    zero = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    dq = (zero,) * TAPS
    dk = (zero,) * TAPS
    dv = (zero,) * (TAPS if HAS_V else 0)
    dweight = zero
    dbias = zero
    q_left = column - HALO
    k_left = key_column - BEFORE
    q_window = ()
    k_window = ()
    v_window = ()
    for i in tl.static_range(SIZE - 1):
        row = first * CELL - HALO + i
        fresh = _load_gradients(da_ptr, a_ptr, o_q, row, q_left, H, W, m_d, WIDE, 1, D, MOMENTS)
        q_window = q_window + _total_gradients(
            fresh, row, q_left, H, W, m_d, q_moments, WIDE, 1, MOMENTS
        )
    for i in tl.static_range(BEFORE + AFTER):
        row = first - BEFORE + i
        fresh = _load_gradients(
            db_ptr, b_ptr, o_k, row, k_left, OH, OW, m_d, K_WIDE, APART, D, MOMENTS
        )
        k_window = k_window + _total_gradients(
            fresh, row, k_left, OH, OW, m_d, k_moments, K_WIDE, APART, MOMENTS
        )
        if HAS_V:
            fresh = _load_gradients(
                dc_ptr, c_ptr, o_k, row, k_left, OH, OW, m_d, K_WIDE, APART, D, MOMENTS
            )
            v_window = v_window + _total_gradients(
                fresh, row, k_left, OH, OW, m_d, v_moments, K_WIDE, APART, MOMENTS
            )
    q_fresh, k_fresh, v_fresh, z_fresh = _load_cell(
        da_ptr,
        a_ptr,
        db_ptr,
        b_ptr,
        dc_ptr,
        c_ptr,
        p_x,
        o_q,
        o_k,
        first,
        column,
        q_left,
        k_left,
        H,
        W,
        OH,
        OW,
        stride_xh,
        stride_xw,
        m_d,
        APART,
        CELL,
        HALO,
        AFTER,
        WIDE,
        K_WIDE,
        D,
        HAS_V,
        MOMENTS,
    )
    ROW: tl.constexpr = WIDE * (2 if MOMENTS else 1)
    for i_r in tl.range(first, end):
        for y in tl.static_range(CELL):
            q_window = q_window + _total_gradients(
                q_fresh[y * ROW : (y + 1) * ROW],
                i_r * CELL + HALO + y,
                q_left,
                H,
                W,
                m_d,
                q_moments,
                WIDE,
                1,
                MOMENTS,
            )
        k_window = k_window + _total_gradients(
            k_fresh, i_r + AFTER, k_left, OH, OW, m_d, k_moments, K_WIDE, APART, MOMENTS
        )
        if HAS_V:
            v_window = v_window + _total_gradients(
                v_fresh, i_r + AFTER, k_left, OH, OW, m_d, v_moments, K_WIDE, APART, MOMENTS
            )
        pixels = z_fresh
        # Fetched a step before they are wanted: memory answers while this step is computed.
        q_fresh, k_fresh, v_fresh, z_fresh = _load_cell(
            da_ptr,
            a_ptr,
            db_ptr,
            b_ptr,
            dc_ptr,
            c_ptr,
            p_x,
            o_q,
            o_k,
            tl.where(i_r + 1 < end, i_r + 1, rows + HALO + 1),
            column,
            q_left,
            k_left,
            H,
            W,
            OH,
            OW,
            stride_xh,
            stride_xw,
            m_d,
            APART,
            CELL,
            HALO,
            AFTER,
            WIDE,
            K_WIDE,
            D,
            HAS_V,
            MOMENTS,
        )
        for y in tl.static_range(CELL):
            for x in tl.static_range(CELL):
                row = i_r * CELL + y
                mask = within(row, column + x, H, W)[:, None] & m_d[None, :]
                z = pixels[y * CELL + x].to(tl.float32)
                if NORM:
                    unit, rstd = normalise(z, m_d, eps, D)
                    z = tl.where(mask, unit * norm_weight[None, :] + norm_bias[None, :], 0.0)
                dz, dq = _add_taps(zero, dq, z, q_window, q, y, x, HALO, 1, SIZE, WIDE)
                dz, dk = _add_taps(dz, dk, z, k_window, k, y, x, BEFORE, CELL, SIZE, K_WIDE)
                if HAS_V:
                    dz, dv = _add_taps(dz, dv, z, v_window, v, y, x, BEFORE, CELL, SIZE, K_WIDE)
                if NORM:
                    dz = tl.where(mask, dz, 0.0)
                    dweight += dz * unit
                    dbias += dz
                    dz = normalise_backward(dz * norm_weight[None, :], unit, rstd, D)
                offsets = o_q + (row * W + x) * D + (cell.to(tl.int64) * CELL * D)[:, None]
                tl.store(dx_ptr + offsets, dz.to(dx_ptr.dtype.element_ty), mask=mask)
        q_window = q_window[CELL * WIDE :]
        k_window = k_window[K_WIDE:]
        v_window = v_window[K_WIDE:]
    FILTERS: tl.constexpr = (3 if HAS_V else 2) * D * TAPS
    program = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    parts_ptr += program * (FILTERS + (2 * D if NORM else 0))
    _store_filters(parts_ptr, dq, o_d, m_d, TAPS)
    _store_filters(parts_ptr + D * TAPS, dk, o_d, m_d, TAPS)
    if HAS_V:
        _store_filters(parts_ptr + 2 * D * TAPS, dv, o_d, m_d, TAPS)
    if NORM:
        tl.store(parts_ptr + FILTERS + o_d, tl.sum(dweight, 0), mask=m_d)
        tl.store(parts_ptr + FILTERS + D + o_d, tl.sum(dbias, 0), mask=m_d)


def project_backward(
    da: Tensor,
    db: Tensor,
    dc: Tensor | None,
    dmean: Tensor | None,
    dvariance: Tensor | None,
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    mean: Tensor | None,
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    kv_stride: int,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of :func:`project`.

    Args:
        da: gradient of ``a``, as are ``db`` and ``dc`` (None without ``v``) of ``b`` and ``c``.
        dmean: gradient of the means, as is ``dvariance`` of the variances; None without moments.
        a: result of :func:`project`, as are ``b``, ``c`` and ``mean``; the rest are its arguments.

    Returns:
        ``dx`` ``[B, D, H, W]`` in channels-last memory; ``dq``, ``dk`` and ``dv`` (empty without
        ``v``), of the filters' shapes; ``dnorm_weight`` and ``dnorm_bias``, empty without a norm.
    """
    x = addressable(x)
    batch, width, height, breadth = x.shape
    dx = x.new_empty(batch, height, breadth, width).permute(0, 3, 1, 2)
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    dv = q.new_empty(0) if v is None else torch.empty_like(v)
    norm = norm_weight is not None
    dnorm = [q.new_empty(width if norm else 0) for _ in range(2)]
    if batch == 0:
        return dx, *(t.zero_() for t in (dq, dk, dv, *dnorm))
    da, db, a, b = da.contiguous(), db.contiguous(), a.contiguous(), b.contiguous()
    moments = dmean is not None
    launch = launches.find("conv_attention_project_bwd", x, launches.width_class(width))
    rows, columns = strided(height, kv_stride), strided(breadth, kv_stride)
    cell = cell_size(kv_stride)
    cells = walk(x, cell, launch["BLOCK_T"], launch.pop("ROWS"))
    grid = cells.grid(launch["BLOCK_T"])
    sums = [t for t in (dq, dk, dv, *dnorm) if t.numel()]
    parts = q.new_empty(grid[0] * grid[1], sum(t.numel() for t in sums))
    _conv_attention_project_bwd_kernel[grid](
        da,
        db,
        db if v is None else dc.contiguous(),
        dmean.contiguous() if moments else q,
        dvariance.contiguous() if moments else q,
        a,
        b,
        b if v is None else c.contiguous(),
        mean if moments else q,
        x,
        q,
        k,
        k if v is None else v,
        norm_weight if norm else q,
        norm_bias if norm else q,
        dx,
        parts,
        *cells,
        float(batch * height * breadth),
        float(batch * rows * columns),
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
        NORM=norm,
        MOMENTS=moments,
        **launch,
    )
    sum_rows(parts, sums)
    return dx, dq, dk, dv, *dnorm
