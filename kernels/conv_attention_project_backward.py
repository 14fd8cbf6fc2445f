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
from .conv_attention_project import addressable, strided
from .layer_norm import normalise, normalise_backward


@triton.jit
def _add_tap(
    dx,
    x,
    dt_ptr,
    t_ptr,
    filters_ptr,
    parts_ptr,
    row,
    column,
    OH,
    OW,
    mask,
    mean,
    dmean,
    dvariance,
    tap,
    TAPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """Add what one tap of one projection gives to ``dx``; write this tile's share of its filters.

    ``row`` and ``column`` are the places of the tokens, which need not be inside.
    """
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    mask &= ((row >= 0) & (row < OH) & (column >= 0) & (column < OW))[:, None]
    offsets = (row * OW + column)[:, None] * D + o_d[None, :]
    g = tl.load(dt_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if MOMENTS:
        t = tl.load(t_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        g = tl.where(mask, g + (dmean[None, :] + dvariance[None, :] * (t - mean[None, :])), 0.0)
    weight = tl.load(filters_ptr + o_d * TAPS + tap, mask=m_d, other=0.0)
    tl.store(parts_ptr + o_d * TAPS + tap, tl.sum(g * x, 0), mask=m_d)
    return dx + g * weight[None, :]


@triton.jit
def _add_strided_taps(
    dx,
    x,
    dt_ptr,
    t_ptr,
    filters_ptr,
    parts_ptr,
    row,
    column,
    top,
    left,
    OH,
    OW,
    mask,
    mean,
    dmean,
    dvariance,
    STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """Add what all taps of one projection give to ``dx`` at pixels of one residue."""
    TAPS: tl.constexpr = SIZE * SIZE
    o_d = tl.arange(0, BLOCK_D)
    for tap in range(TAPS):
        i = SIZE // 2 - tap // SIZE
        j = SIZE // 2 - tap % SIZE
        # The remainder of what may be negative, whose sign differs between C and Python.
        if ((top + i + SIZE * STRIDE) % STRIDE == 0) & ((left + j + SIZE * STRIDE) % STRIDE == 0):
            dx = _add_tap(
                dx,
                x,
                dt_ptr,
                t_ptr,
                filters_ptr,
                parts_ptr,
                (row + i + SIZE * STRIDE) // STRIDE - SIZE,
                (column + j + SIZE * STRIDE) // STRIDE - SIZE,
                OH,
                OW,
                mask,
                mean,
                dmean,
                dvariance,
                tap,
                TAPS,
                D,
                BLOCK_D,
                MOMENTS,
            )
        else:
            zero = tl.zeros([BLOCK_D], tl.float32)
            tl.store(parts_ptr + o_d * TAPS + tap, zero, mask=o_d < D)
    return dx


@triton.jit
def _load_moments(
    mean_ptr, dmean_ptr, dvariance_ptr, i_p, count, o_d, m_d, MOMENTS: tl.constexpr, D: tl.constexpr
):
    mean = tl.zeros([o_d.shape[0]], tl.float32)
    dmean = mean
    dvariance = mean
    if MOMENTS:
        mean = tl.load(mean_ptr + i_p * D + o_d, mask=m_d, other=0.0)
        dmean = tl.load(dmean_ptr + i_p * D + o_d, mask=m_d, other=0.0) / count
        dvariance = tl.load(dvariance_ptr + i_p * D + o_d, mask=m_d, other=0.0) * 2 / count
    return mean, dmean, dvariance


@triton.jit
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
    tiles,
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
    STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_V: tl.constexpr,
    NORM: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """Write ``dx`` at BLOCK_T pixels of one image, and this tile's share of all filters' gradients.

    One program owns BLOCK_T pixels of one residue (y mod STRIDE, x mod STRIDE) and all channels; it
    reads ``x`` there once, and for each tap the gradients of the tokens that saw these pixels
    through it; through most taps of keys and values none did, the same for all of the program::

        pixels    for each tap (i, j) of q, k, v:  g = total gradient at token (pixel - tap) / s
        BLOCK_T       dx += g w[tap],   dw[tap] += sum over pixels of g x

    The total gradient ``dt + (dmean + 2 dvariance (t - mean)) / n`` is made on load. Bytes: 4 D
    numbers per query (x, da, a, dx) and 2 D per key, 0.046 ms at batch 128 and D = 32; every tap
    after the first finds them in L1. 2 multiplications and a share of a tree sum per tap and
    number. ``parts`` is ``[programs, (2 or 3) D SIZE ** 2]``, with a layer norm 2 D more, of its
    weight and bias. Accumulates in fp32, taps in order.
    """
    residue = tl.program_id(0) % (STRIDE * STRIDE)
    tile = tl.program_id(0) // (STRIDE * STRIDE) % tiles
    i_b = (tl.program_id(0) // (STRIDE * STRIDE) // tiles).to(tl.int64)
    top = residue // STRIDE
    left = residue % STRIDE
    # An image narrower than the stride leaves some residues without pixels.
    columns = tl.maximum(tl.cdiv(W - left, STRIDE), 1)
    o_t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    row = o_t // columns * STRIDE + top
    column = o_t % columns * STRIDE + left
    mask = ((row < H) & (column < W))[:, None] & m_d[None, :]
    TAPS: tl.constexpr = SIZE * SIZE
    FILTERS: tl.constexpr = (3 if HAS_V else 2) * D * TAPS
    parts_ptr += tl.program_id(0).to(tl.int64) * (FILTERS + (2 * D if NORM else 0))
    queries = i_b * H * W * D
    keys = i_b * OH * OW * D
    place = row * stride_xh + column * stride_xw
    x_ptr += i_b * stride_xb
    x = tl.load(x_ptr + place[:, None] + o_d[None, :] * stride_xd, mask=mask, other=0.0)
    x = x.to(tl.float32)
    if NORM:
        norm_weight = tl.load(norm_weight_ptr + o_d, mask=m_d, other=0.0)
        norm_bias = tl.load(norm_bias_ptr + o_d, mask=m_d, other=0.0)
        unit, rstd = normalise(x, m_d, eps, D)
        x = tl.where(mask, unit * norm_weight[None, :] + norm_bias[None, :], 0.0)

    dx = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    mean, dmean, dvariance = _load_moments(
        mean_ptr, dmean_ptr, dvariance_ptr, 0, q_count, o_d, m_d, MOMENTS, D
    )
    for tap in range(TAPS):
        dx = _add_tap(
            dx,
            x,
            da_ptr + queries,
            a_ptr + queries,
            q_ptr,
            parts_ptr,
            row + SIZE // 2 - tap // SIZE,
            column + SIZE // 2 - tap % SIZE,
            H,
            W,
            mask,
            mean,
            dmean,
            dvariance,
            tap,
            TAPS,
            D,
            BLOCK_D,
            MOMENTS,
        )
    mean, dmean, dvariance = _load_moments(
        mean_ptr, dmean_ptr, dvariance_ptr, 1, k_count, o_d, m_d, MOMENTS, D
    )
    dx = _add_strided_taps(
        dx,
        x,
        db_ptr + keys,
        b_ptr + keys,
        k_ptr,
        parts_ptr + D * TAPS,
        row,
        column,
        top,
        left,
        OH,
        OW,
        mask,
        mean,
        dmean,
        dvariance,
        STRIDE,
        SIZE,
        D,
        BLOCK_D,
        MOMENTS,
    )
    if HAS_V:
        mean, dmean, dvariance = _load_moments(
            mean_ptr, dmean_ptr, dvariance_ptr, 2, k_count, o_d, m_d, MOMENTS, D
        )
        dx = _add_strided_taps(
            dx,
            x,
            dc_ptr + keys,
            c_ptr + keys,
            v_ptr,
            parts_ptr + 2 * D * TAPS,
            row,
            column,
            top,
            left,
            OH,
            OW,
            mask,
            mean,
            dmean,
            dvariance,
            STRIDE,
            SIZE,
            D,
            BLOCK_D,
            MOMENTS,
        )
    if NORM:
        tl.store(parts_ptr + FILTERS + o_d, tl.sum(dx * unit, 0), mask=m_d)
        tl.store(parts_ptr + FILTERS + D + o_d, tl.sum(dx, 0), mask=m_d)
        dx = normalise_backward(dx * norm_weight[None, :], unit, rstd, D)
    offsets = (row * W + column)[:, None] * D + o_d[None, :]
    tl.store(dx_ptr + queries + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)


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
    tiles = triton.cdiv(rows * columns, launch["BLOCK_T"])
    programs = batch * tiles * kv_stride**2
    sums = [t for t in (dq, dk, dv, *dnorm) if t.numel()]
    parts = q.new_empty(programs, sum(t.numel() for t in sums))
    _conv_attention_project_bwd_kernel[(programs,)](
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
        tiles,
        float(batch * height * breadth),
        float(batch * rows * columns),
        height,
        breadth,
        rows,
        columns,
        *x.stride(),
        eps,
        STRIDE=kv_stride,
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
