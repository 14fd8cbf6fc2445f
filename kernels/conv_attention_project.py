r"""The depthwise projections of the attention, with the statistics of their batch normalisation.

.. math:: t[n, d] = \sum_{ij} w_t[d, ij] \, \mathrm{LN}(x)[d, n s_t + (i, j) - k // 2], \quad
    t \in \{a, b, c\}

from images ``x``, whose layer norm (if there is one) is made on load, to raw tokens, channels last,
with each channel's mean and biased variance over the batch. Statistics are those of the stored,
rounded tokens, which is what the attention normalises; the gradient takes them so too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launches
from .common import padded
from .layer_norm import normalise


@triton.jit
def _project_tile(
    x_ptr,
    filters_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    out_ptr,
    parts_ptr,
    tile,
    tokens,
    H,
    W,
    OW,
    stride_xd,
    stride_xh,
    stride_xw,
    eps,
    STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    NORM: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """Convolve one tile of tokens of one image; write it, its mean and its squared deviations."""
    o_t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    mask = (o_t < tokens)[:, None] & m_d[None, :]
    row = o_t // OW * STRIDE - SIZE // 2
    column = o_t % OW * STRIDE - SIZE // 2
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    if NORM:
        norm_weight = tl.load(norm_weight_ptr + o_d, mask=m_d, other=0.0)
        norm_bias = tl.load(norm_bias_ptr + o_d, mask=m_d, other=0.0)
    for i in range(SIZE):
        for j in tl.static_range(SIZE):
            inside = (row + i >= 0) & (row + i < H) & (column + j >= 0) & (column + j < W)
            inside = mask & inside[:, None]
            place = (row + i) * stride_xh + (column + j) * stride_xw
            weight = tl.load(filters_ptr + (o_d * SIZE + i) * SIZE + j, mask=m_d, other=0.0)
            x = tl.load(
                x_ptr + place[:, None] + o_d[None, :] * stride_xd, mask=inside, other=0.0
            ).to(tl.float32)
            if NORM:
                unit, _rstd = normalise(x, m_d, eps, D)
                x = tl.where(inside, unit * norm_weight[None, :] + norm_bias[None, :], 0.0)
            acc += x * weight[None, :]
    stored = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + o_t[:, None] * D + o_d[None, :], stored, mask=mask)
    if MOMENTS:
        count = tl.minimum(tokens - tile * BLOCK_T, BLOCK_T)
        wide = tl.where(mask, stored.to(tl.float32), 0.0)
        mean = tl.sum(wide, 0) / count
        centred = tl.where(mask, wide - mean[None, :], 0.0)
        tl.store(parts_ptr + o_d, mean, mask=m_d)
        tl.store(parts_ptr + D + o_d, tl.sum(centred * centred, 0), mask=m_d)


@triton.jit
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
    q_tiles,
    k_tiles,
    tiles,
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
    NORM: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """Convolve BLOCK_T tokens of one projection of one image, all channels.

    An image's ``tiles`` follow one another, queries' first, so that keys find it in L2::

        image 0: [ a tile ][ a tile ] ... [ b tile ] ... [ c tile ] ...   image 1: ...

    Each program owns one. 2 D numbers per query and D per key cross the device's memory: 0.023 ms
    at batch 128 and D = 32; SIZE ** 2 multiplications a number. A layer norm is made anew for each
    tap, so that what it gives is never written. Accumulates in fp32, taps in order.
    ``parts`` ``[programs, 2, D]`` gets each tile's mean and sum of squared deviations from it.
    """
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    x_ptr += i_b * stride_xb
    parts_ptr += tl.program_id(0).to(tl.int64) * 2 * D
    keys = OH * OW
    if tile < q_tiles:
        _project_tile(
            x_ptr,
            q_ptr,
            norm_weight_ptr,
            norm_bias_ptr,
            a_ptr + i_b * H * W * D,
            parts_ptr,
            tile,
            H * W,
            H,
            W,
            W,
            stride_xd,
            stride_xh,
            stride_xw,
            eps,
            1,
            SIZE,
            D,
            BLOCK_D,
            BLOCK_T,
            NORM,
            MOMENTS,
        )
    elif tile < q_tiles + k_tiles:
        _project_tile(
            x_ptr,
            k_ptr,
            norm_weight_ptr,
            norm_bias_ptr,
            b_ptr + i_b * keys * D,
            parts_ptr,
            tile - q_tiles,
            keys,
            H,
            W,
            OW,
            stride_xd,
            stride_xh,
            stride_xw,
            eps,
            STRIDE,
            SIZE,
            D,
            BLOCK_D,
            BLOCK_T,
            NORM,
            MOMENTS,
        )
    else:
        _project_tile(
            x_ptr,
            v_ptr,
            norm_weight_ptr,
            norm_bias_ptr,
            c_ptr + i_b * keys * D,
            parts_ptr,
            tile - q_tiles - k_tiles,
            keys,
            H,
            W,
            OW,
            stride_xd,
            stride_xh,
            stride_xw,
            eps,
            STRIDE,
            SIZE,
            D,
            BLOCK_D,
            BLOCK_T,
            NORM,
            MOMENTS,
        )


@triton.jit
def _conv_attention_moments_kernel(
    parts_ptr,
    mean_ptr,
    variance_ptr,
    batch,
    q_tiles,
    k_tiles,
    tiles,
    queries,
    keys,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Combine the means and squared deviations of all tiles of a projection.

    One program owns BLOCK_C channels of one projection and walks over its tiles in all images:
    with n, m and s of a tile, the batch's mean is sum(n m) / n and its variance
    (sum(s) + sum(n m^2)) / n - mean^2. These sums are in float64, where they lose nothing.
    """
    i_p = tl.program_id(0)
    first = tl.where(i_p == 0, 0, q_tiles + (i_p - 1) * k_tiles)
    own = tl.where(i_p == 0, q_tiles, k_tiles)
    tokens = tl.where(i_p == 0, queries, keys)
    o_d = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_d = o_d < D
    sums = tl.zeros([BLOCK_C], tl.float64)
    squares = tl.zeros([BLOCK_C], tl.float64)
    for start in range(0, batch * own, BLOCK_ROWS):
        o_r = start + tl.arange(0, BLOCK_ROWS)
        tile = o_r % own
        mask = (o_r < batch * own)[:, None] & m_d[None, :]
        count = tl.minimum(tokens - tile * BLOCK_T, BLOCK_T).to(tl.float64)[:, None]
        place = (o_r // own * tiles + first + tile).to(tl.int64) * 2 * D
        offsets = place[:, None] + o_d[None, :]
        mean = tl.load(parts_ptr + offsets, mask=mask, other=0.0).to(tl.float64)
        spread = tl.load(parts_ptr + D + offsets, mask=mask, other=0.0).to(tl.float64)
        sums += tl.sum(count * mean, 0)
        squares += tl.sum(spread + count * mean * mean, 0)
    total = tokens.to(tl.float64) * batch
    mean = sums / total
    variance = squares / total - mean * mean
    # Rounding may leave a constant channel a variance just below 0; a NaN stays one.
    variance = tl.where(variance < 0, 0.0, variance)
    tl.store(mean_ptr + i_p * D + o_d, mean.to(tl.float32), mask=m_d)
    tl.store(variance_ptr + i_p * D + o_d, variance.to(tl.float32), mask=m_d)


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
    queries, keys = height * breadth, rows * columns
    a = x.new_empty(batch, queries, width)
    b = x.new_empty(batch, keys, width)
    c = x.new_empty(0) if v is None else torch.empty_like(b)
    projections = 2 if v is None else 3
    shape = (projections, width) if moments else (0,)
    mean, variance = q.new_empty(shape), q.new_empty(shape)
    if batch == 0:
        return a, b, c, mean.zero_(), variance.zero_()
    launch = launches.find("conv_attention_project_fwd", x, launches.width_class(width))
    block = launch["BLOCK_T"]
    q_tiles, k_tiles = triton.cdiv(queries, block), triton.cdiv(keys, block)
    tiles = q_tiles + (projections - 1) * k_tiles
    parts = q.new_empty(batch * tiles, 2, width) if moments else mean
    _conv_attention_project_fwd_kernel[(batch * tiles,)](
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
        q_tiles,
        k_tiles,
        tiles,
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
        NORM=norm_weight is not None,
        MOMENTS=moments,
        **launch,
    )
    if moments:
        launch = launches.find("conv_attention_moments", parts)
        _conv_attention_moments_kernel[(projections, triton.cdiv(width, launch["BLOCK_C"]))](
            parts,
            mean,
            variance,
            batch,
            q_tiles,
            k_tiles,
            tiles,
            queries,
            keys,
            D=width,
            BLOCK_T=block,
            **launch,
        )
    return a, b, c, mean, variance
