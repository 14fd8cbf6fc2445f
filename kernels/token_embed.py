r"""Fused Triton kernels of the token embedding: a strided convolution and its layer norm.

.. math:: y[p] = \mathrm{LN}(u[p]), \quad u[p, d] = c[d]
    + \sum_{cij} w[d, cij] \, x[c, p s + (i, j) - \mathrm{padding}]

The convolution is a product of patches, gathered on load and never stored, with the filters. The
gradient recomputes it from ``x``. Rows of tiles are tokens: all channels of one lie in one warp,
where the norm sums them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launches
from .common import cdiv, padded, precision, programs, refusal, sum_rows
from .layer_norm import normalise, normalise_backward

__all__ = ["backward", "forward", "supports"]

LARGEST_WIDTH = 128
# Where no axis of a tile is contiguous in memory, Triton spreads the threads along the first, and
# from 3.7 on along the last.
LANES_LAST = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7))


def supports(x: Tensor, filters: Tensor) -> str | None:
    """Return why these kernels cannot take images ``x`` ``[B, C, H, W]``, or None if they can."""
    if reason := refusal(x):
        return reason
    if not 16 <= filters.shape[0] <= LARGEST_WIDTH:
        return f"takes 16 to {LARGEST_WIDTH} output channels, not {filters.shape[0]}"
    # Offsets inside an image are 32-bit numbers.
    if max(x[:1].numel(), filters.shape[0] * x.shape[2] * x.shape[3]) >= 2**31:
        return f"takes fewer than 2 ** 31 values per image, not {list(x.shape[1:])}"
    return None


def _lines(x: Tensor, size: int, stride: int, padding: int) -> tuple[int, int]:
    rows, columns = ((n + 2 * padding - size) // stride + 1 for n in x.shape[2:])
    return rows, columns


def _blocks(launch: dict[str, int], filters: Tensor) -> dict[str, int]:
    """Return how many of a filter's weights one block has, of how many taps, and how many blocks.

    A block is TAPS taps of BLOCK_K // TAPS channels: all channels where they are few, else one tap.
    """
    channels, taps = filters.shape[1], filters[0, 0].numel()
    block = min(launch["BLOCK_K"], padded(channels * taps))
    together = min(taps, max(1, block // channels))
    blocks = cdiv(taps, together) * cdiv(channels, block // together)
    return launch | {"BLOCK_K": block, "TAPS": together, "BLOCKS": blocks}


@triton.jit
def _weights(block, C: tl.constexpr, SIZE: tl.constexpr, BLOCK_K: tl.constexpr, TAPS: tl.constexpr):
    """Return channels and taps (i SIZE + j) of the weights of a block, and which of them exist."""
    o_k = tl.arange(0, BLOCK_K)
    chunks: tl.constexpr = (C + BLOCK_K // TAPS - 1) // (BLOCK_K // TAPS)
    c = block % chunks * (BLOCK_K // TAPS) + o_k // TAPS
    tap = block // chunks * TAPS + o_k % TAPS
    return c, tap, (c < C) & (tap < SIZE * SIZE)


@triton.jit
def _lanes(values):
    """Lay values along the axis of a tile that threads are spread along."""
    return values[None, :] if LANES_LAST else values[:, None]


@triton.jit
def _others(values):
    """Lay values along the other axis of the tile."""
    return values[:, None] if LANES_LAST else values[None, :]


@triton.jit
def _lanes_first(tile):
    """Turn a tile of threads along their axis into rows of that axis, or back."""
    return tl.trans(tile) if LANES_LAST else tile


@triton.jit
def _patches(
    x_ptr,
    block,
    o_p,
    H,
    W,
    OH,
    OW,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAPS: tl.constexpr,
):
    """Gather ``[p, k]``: weight k of a block of the filters meets this value at output pixel p.

    Threads are spread along pixels. From BLOCK_P = 32 num_warps on, every thread has all weights of
    one pixel: what depends on k is a constant of its code, what depends on p is found once, and a
    value costs an address, a load and a store to shared memory.
    """
    c, tap, m_k = _weights(block, C, SIZE, BLOCK_K, TAPS)
    i = tap // SIZE
    j = tap % SIZE
    top = o_p // OW * STRIDE - PADDING
    left = o_p % OW * STRIDE - PADDING
    row = _lanes(top) + _others(i)
    column = _lanes(left) + _others(j)
    mask = (row >= 0) & (row < H) & (column >= 0) & (column < W)
    mask &= _lanes(o_p < OH * OW) & _others(m_k)
    corner_ptr = x_ptr + (top * W + left)
    x = tl.load(_lanes(corner_ptr) + _others(c * (H * W) + i * W + j), mask=mask, other=0.0)
    return _lanes_first(x)


@triton.jit
def _add_block(
    u,
    x_ptr,
    filters_ptr,
    block,
    o_p,
    H,
    W,
    OH,
    OW,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add one block of the filters' weights to the convolution; return also the patches."""
    x = _patches(
        x_ptr, block, o_p, H, W, OH, OW, C, STRIDE, PADDING, SIZE, BLOCK_K, TAPS
    )  # [BLOCK_P, BLOCK_K]
    c, tap, m_k = _weights(block, C, SIZE, BLOCK_K, TAPS)
    o_d = tl.arange(0, BLOCK_D)
    w = tl.load(
        filters_ptr + _lanes(c * (SIZE * SIZE) + tap) + _others(o_d * (C * SIZE * SIZE)),
        mask=_lanes(m_k) & _others(o_d < D),
        other=0.0,
    )
    w = _lanes_first(w.to(x.dtype))  # [BLOCK_K, BLOCK_D]
    u = tl.dot(x, w, u, input_precision=PRECISION)
    return u, x


@triton.jit
def _convolve(
    x_ptr,
    filters_ptr,
    bias_ptr,
    o_p,
    H,
    W,
    OH,
    OW,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return convolution plus bias at one tile ``[BLOCK_P, BLOCK_D]``, and block 0's patches."""
    o_d = tl.arange(0, BLOCK_D)
    u = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    u, x = _add_block(
        u,
        x_ptr,
        filters_ptr,
        0,
        o_p,
        H,
        W,
        OH,
        OW,
        C,
        STRIDE,
        PADDING,
        SIZE,
        D,
        BLOCK_D,
        BLOCK_K,
        TAPS,
        PRECISION,
    )
    for block in tl.range(1, BLOCKS, num_stages=1):
        u, _x = _add_block(
            u,
            x_ptr,
            filters_ptr,
            block,
            o_p,
            H,
            W,
            OH,
            OW,
            C,
            STRIDE,
            PADDING,
            SIZE,
            D,
            BLOCK_D,
            BLOCK_K,
            TAPS,
            PRECISION,
        )
    return u + tl.load(bias_ptr + o_d, mask=o_d < D, other=0.0)[None, :], x


@triton.jit
def _store_filters(
    out_ptr,
    dfilters,
    block,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAPS: tl.constexpr,
):
    """Store one block ``[BLOCK_K, BLOCK_D]`` of the filters' gradient in the filters' order."""
    c, tap, m_k = _weights(block, C, SIZE, BLOCK_K, TAPS)
    o_d = tl.arange(0, BLOCK_D)
    tl.store(
        out_ptr + _lanes(c * (SIZE * SIZE) + tap) + _others(o_d * (C * SIZE * SIZE)),
        _lanes_first(dfilters),
        mask=_lanes(m_k) & _others(o_d < D),
    )


@triton.jit
def _token_embed_fwd_kernel(
    x_ptr,
    filters_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    y_ptr,
    eps,
    H,
    W,
    OH,
    OW,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute BLOCK_P tokens of one image, all channels.

    One program owns a tile whose rows are output pixels::

        patches [BLOCK_P, C SIZE^2]  x  filters [C SIZE^2, D]  -> u -> LN over each row -> y

    The weights of the filters are walked over BLOCK_K at a time. Bytes: the image once and D
    numbers per token, 0.023 ms at batch 128, 10 x 121 x 121 to 32 x 61 x 61; 2 C SIZE^2 D
    operations on the tensor cores per token (2.7 GFLOP). Accumulates in fp32, blocks in order.
    """
    pixels = OH * OW
    tiles = tl.cdiv(pixels, BLOCK_P)
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    o_p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    u, _x = _convolve(
        x_ptr + i_b * C * H * W,
        filters_ptr,
        bias_ptr,
        o_p,
        H,
        W,
        OH,
        OW,
        C,
        STRIDE,
        PADDING,
        SIZE,
        D,
        BLOCK_D,
        BLOCK_P,
        BLOCK_K,
        TAPS,
        BLOCKS,
        PRECISION,
    )
    unit, _rstd = normalise(u, m_d, eps, D)
    norm_weight = tl.load(norm_weight_ptr + o_d, mask=m_d, other=0.0)
    norm_bias = tl.load(norm_bias_ptr + o_d, mask=m_d, other=0.0)
    y = unit * norm_weight[None, :] + norm_bias[None, :]
    tl.store(
        y_ptr + i_b * pixels * D + o_p[:, None] * D + o_d[None, :],
        y.to(y_ptr.dtype.element_ty),
        mask=(o_p < pixels)[:, None] & m_d[None, :],
    )


@triton.jit
def _token_embed_bwd_kernel(
    dy_ptr,
    x_ptr,
    filters_ptr,
    bias_ptr,
    norm_weight_ptr,
    du_ptr,
    parts_ptr,
    eps,
    tiles,
    H,
    W,
    OH,
    OW,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    STORE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Recompute the convolution, undo the layer norm, and sum the parameters' gradients.

    One program owns a run of the batch's ``tiles`` of BLOCK_P tokens, and one row of ``parts``::

        patches -> u -> LN -> du = LN'(dy)                    [BLOCK_P, D]
           `------------------ du^T patches -> dfilters       [D, C SIZE^2]

    If the filters' weights are one block, the patches are at hand and ``dfilters`` is summed here;
    else ``du`` is stored for another kernel, as it is for the input's gradient. ``parts`` is
    ``[runs, (D C SIZE^2) + 3 D]``: dfilters if summed here, dbias, dnorm_weight, dnorm_bias. Bytes:
    the image once, D numbers per token, and D more for ``du``; 0.023 to 0.033 ms at batch 128, 10 x
    121 x 121 to 32 x 61 x 61. Accumulates in fp32, tiles in order.
    """
    i_p = tl.program_id(0)
    begin = (i_p.to(tl.int64) * tiles // tl.num_programs(0)).to(tl.int32)
    end = ((i_p + 1).to(tl.int64) * tiles // tl.num_programs(0)).to(tl.int32)
    pixels = OH * OW
    image_tiles = tl.cdiv(pixels, BLOCK_P)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    weights: tl.constexpr = D * C * SIZE * SIZE if BLOCKS == 1 else 0

    dfilters = tl.zeros([BLOCK_D, BLOCK_K], tl.float32)
    dbias = tl.zeros([BLOCK_D], tl.float32)
    dnorm_weight = tl.zeros([BLOCK_D], tl.float32)
    dnorm_bias = tl.zeros([BLOCK_D], tl.float32)
    for tile in tl.range(begin, end, num_stages=1, disable_licm=True):
        image = (tile // image_tiles).to(tl.int64)
        o_p = tile % image_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = (o_p < pixels)[:, None] & m_d[None, :]
        offsets = o_p[:, None] * D + o_d[None, :]
        u, x = _convolve(
            x_ptr + image * C * H * W,
            filters_ptr,
            bias_ptr,
            o_p,
            H,
            W,
            OH,
            OW,
            C,
            STRIDE,
            PADDING,
            SIZE,
            D,
            BLOCK_D,
            BLOCK_P,
            BLOCK_K,
            TAPS,
            BLOCKS,
            PRECISION,
        )
        unit, rstd = normalise(u, m_d, eps, D)
        dy = tl.load(dy_ptr + image * pixels * D + offsets, mask=mask, other=0.0).to(tl.float32)
        # What takes dy comes first, so that its registers are free for du.
        dnorm_weight += tl.sum(dy * unit, 0)
        dnorm_bias += tl.sum(dy, 0)
        norm_weight = tl.load(norm_weight_ptr + o_d, mask=m_d, other=0.0)
        du = normalise_backward(dy * norm_weight[None, :], unit, rstd, D)
        du = tl.where(mask, du, 0.0)
        dbias += tl.sum(du, 0)
        du = du.to(x.dtype)
        if STORE:
            tl.store(du_ptr + image * pixels * D + offsets, du, mask=mask)
        if BLOCKS == 1:
            # Rows are channels: where they are weights, ptxas (Triton 3.6, 3.7) adds to a matrix
            # descriptor of Hopper's that nothing has written.
            dfilters = tl.dot(tl.trans(du), x, dfilters, input_precision=PRECISION)

    parts_ptr += i_p.to(tl.int64) * (weights + 3 * D)
    if BLOCKS == 1:
        _store_filters(parts_ptr, tl.trans(dfilters), 0, C, SIZE, D, BLOCK_D, BLOCK_K, TAPS)
    parts_ptr += weights
    tl.store(parts_ptr + o_d, dbias, mask=m_d)
    tl.store(parts_ptr + D + o_d, dnorm_weight, mask=m_d)
    tl.store(parts_ptr + 2 * D + o_d, dnorm_bias, mask=m_d)


@triton.jit
def _token_embed_bwd_filters_kernel(
    du_ptr,
    x_ptr,
    parts_ptr,
    tiles,
    H,
    W,
    OH,
    OW,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum the gradient of the filters that are too many weights for one block.

    Program (i, j) owns the i-th run of the batch's ``tiles`` of BLOCK_P tokens and the j-th block
    of weights: patches^T ``[BLOCK_K, BLOCK_P]`` x ``du [BLOCK_P, D]``. ``parts`` is ``[runs,
    D C SIZE^2]``. Bytes: the image once, and ``du`` once per block, from L2 for all but one.
    Accumulates in fp32, tiles in order.
    """
    i_p = tl.program_id(0)
    block = tl.program_id(1)
    begin = (i_p.to(tl.int64) * tiles // tl.num_programs(0)).to(tl.int32)
    end = ((i_p + 1).to(tl.int64) * tiles // tl.num_programs(0)).to(tl.int32)
    pixels = OH * OW
    image_tiles = tl.cdiv(pixels, BLOCK_P)
    o_d = tl.arange(0, BLOCK_D)
    dfilters = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for tile in tl.range(begin, end, num_stages=1):
        image = (tile // image_tiles).to(tl.int64)
        o_p = tile % image_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
        du = tl.load(
            du_ptr + image * pixels * D + o_p[:, None] * D + o_d[None, :],
            mask=(o_p < pixels)[:, None] & (o_d < D)[None, :],
            other=0.0,
        )
        x = _patches(
            x_ptr + image * C * H * W,
            block,
            o_p,
            H,
            W,
            OH,
            OW,
            C,
            STRIDE,
            PADDING,
            SIZE,
            BLOCK_K,
            TAPS,
        )
        dfilters = tl.dot(tl.trans(x), du, dfilters, input_precision=PRECISION)
    parts_ptr += i_p.to(tl.int64) * (D * C * SIZE * SIZE)
    _store_filters(parts_ptr, dfilters, block, C, SIZE, D, BLOCK_D, BLOCK_K, TAPS)


@triton.jit
def _token_embed_bwd_input_kernel(
    du_ptr,
    filters_ptr,
    dx_ptr,
    H,
    W,
    OH,
    OW,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the gradient of BLOCK_C channels at BLOCK_P cells of STRIDE x STRIDE pixels.

    One program walks over the residues (y mod STRIDE, x mod STRIDE), the pixels of a cell: pixels
    of one residue all meet the same taps of the filters, about SIZE^2 / STRIDE^2 of them, so no
    product is with zeros, and what is not finite stays where it belongs::

        STRIDE = 2     0 1 0 1      residue 0 meets taps (0, 0), (0, 2), (2, 0), (2, 2) of a 3x3
                       2 3 2 3      filter with padding 2, residue 3 tap (1, 1) alone

    Bytes: D numbers per token, read once per tap, from L1 for most, and C per pixel, 0.023 ms at
    batch 128, 10 x 121 x 121 to 32 x 61 x 61. Accumulates in fp32, taps in order.
    """
    across = tl.cdiv(W, STRIDE)
    tiles = tl.cdiv(tl.cdiv(H, STRIDE) * across, BLOCK_P)
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    o_p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    row = o_p // across
    column = o_p % across
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    du_ptr += i_b * OH * OW * D
    dx_ptr += i_b * C * H * W
    for residue in range(STRIDE * STRIDE):
        top = residue // STRIDE
        left = residue % STRIDE
        dx = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        for i in range((top + PADDING) % STRIDE, SIZE, STRIDE):
            for j in range((left + PADDING) % STRIDE, SIZE, STRIDE):
                # Both are whole numbers of strides from the cell.
                o_row = row + (top + PADDING - i) // STRIDE
                o_column = column + (left + PADDING - j) // STRIDE
                inside = (o_row >= 0) & (o_row < OH) & (o_column >= 0) & (o_column < OW)
                du = tl.load(
                    du_ptr + (o_row * OW + o_column)[:, None] * D + o_d[None, :],
                    mask=inside[:, None] & m_d[None, :],
                    other=0.0,
                )  # [BLOCK_P, BLOCK_D]
                # Threads lie along channels, whose weights are near each other.
                w = tl.load(
                    filters_ptr
                    + (_lanes(o_c) * (SIZE * SIZE) + _others(o_d) * (C * SIZE * SIZE))
                    + (i * SIZE + j),
                    mask=_lanes(m_c) & _others(m_d),
                    other=0.0,
                )
                w = tl.trans(_lanes_first(w.to(du.dtype)))  # [BLOCK_D, BLOCK_C]
                dx = tl.dot(du, w, dx, input_precision=PRECISION)
        y = row * STRIDE + top
        x = column * STRIDE + left
        tl.store(
            dx_ptr + _lanes(y * W + x) + _others(o_c * (H * W)),
            _lanes_first(dx.to(dx_ptr.dtype.element_ty)),
            mask=_lanes((y < H) & (x < W)) & _others(m_c),
        )


def forward(
    x: Tensor,
    filters: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    stride: int,
    padding: int,
    eps: float,
) -> Tensor:
    """Turn images into normalised tokens.

    Args:
        x: ``[B, C, H, W]``.
        filters: ``[D, C, k, k]``, fp32 as are all parameters.
        bias: ``[D]``.
        norm_weight: ``[D]``.
        norm_bias: ``[D]``.
        stride: step in pixels.
        padding: zeros added on each side.
        eps: added to the variance of the layer norm.

    Returns:
        ``y`` ``[B, H1, W1, D]``, contiguous.
    """
    x = x.contiguous()
    width, channels, size = filters.shape[:3]
    rows, columns = _lines(x, size, stride, padding)
    y = x.new_empty(x.shape[0], rows, columns, width)
    if y.numel() == 0:
        return y
    launch = _blocks(launches.find("token_embed_fwd", x, launches.width_class(width)), filters)
    _token_embed_fwd_kernel[(x.shape[0] * cdiv(rows * columns, launch["BLOCK_P"]),)](
        x,
        filters,
        bias,
        norm_weight,
        norm_bias,
        y,
        eps,
        *x.shape[2:],
        rows,
        columns,
        C=channels,
        STRIDE=stride,
        PADDING=padding,
        SIZE=size,
        D=width,
        BLOCK_D=padded(width),
        PRECISION=precision(convolution=True),
        **launch,
    )
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    filters: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    stride: int,
    padding: int,
    eps: float,
    input_gradient: bool,
) -> tuple[Tensor, ...]:
    """Return the gradients of :func:`forward` for ``dy`` ``[B, H1, W1, D]``.

    The first, ``dx``, is empty without ``input_gradient``; the rest are those of ``filters``,
    ``bias``, ``norm_weight`` and ``norm_bias``.
    """
    dy, x = dy.contiguous(), x.contiguous()
    parameters = filters, bias, norm_weight, norm_bias
    dx = torch.empty_like(x) if input_gradient else x.new_empty(0)
    if dy.numel() == 0:
        return dx.zero_(), *(torch.zeros_like(p) for p in parameters)
    batch, channels, height, breadth = x.shape
    width, size = filters.shape[0], filters.shape[-1]
    rows, columns = dy.shape[1:3]
    shape = launches.width_class(width)
    pixels = height, breadth, rows, columns
    common = {
        "C": channels,
        "STRIDE": stride,
        "PADDING": padding,
        "SIZE": size,
        "D": width,
        "BLOCK_D": padded(width),
        "PRECISION": precision(convolution=True),
    }
    sums = tuple(torch.empty_like(p) for p in parameters)

    launch = _blocks(launches.find("token_embed_bwd", x, shape), filters)
    one_block = launch["BLOCKS"] == 1
    tiles = batch * cdiv(rows * columns, launch["BLOCK_P"])
    count = programs(x, launch.pop("RESIDENT"), tiles)
    parts = filters.new_empty(count, (filters.numel() if one_block else 0) + 3 * width)
    store = input_gradient or not one_block
    du = torch.empty_like(dy) if store else dx
    _token_embed_bwd_kernel[(count,)](
        dy,
        x,
        filters,
        bias,
        norm_weight,
        du,
        parts,
        eps,
        tiles,
        *pixels,
        STORE=store,
        **common,
        **launch,
    )
    sum_rows(parts, sums if one_block else sums[1:])
    if not one_block:
        launch = _blocks(launches.find("token_embed_bwd_filters", x, shape), filters)
        blocks = launch.pop("BLOCKS")
        tiles = batch * cdiv(rows * columns, launch["BLOCK_P"])
        # All blocks' programs are resident together.
        count = max(1, programs(x, launch.pop("RESIDENT"), tiles * blocks) // blocks)
        parts = filters.new_empty(count, filters.numel())
        _token_embed_bwd_filters_kernel[(count, blocks)](
            du, x, parts, tiles, *pixels, **common, **launch
        )
        sum_rows(parts, sums[:1])
    if input_gradient:
        launch = launches.find("token_embed_bwd_input", x, shape)
        launch["BLOCK_C"] = min(launch["BLOCK_C"], padded(channels))
        cells = cdiv(height, stride) * cdiv(breadth, stride)
        tiles = batch * cdiv(cells, launch["BLOCK_P"])
        _token_embed_bwd_input_kernel[(tiles, cdiv(channels, launch["BLOCK_C"]))](
            du, filters, dx, *pixels, **common, **launch
        )
    return dx, *sums
