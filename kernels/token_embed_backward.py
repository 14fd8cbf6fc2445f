"""The token embedding's gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launches
from .common import cdiv, padded, precision, programs, sum_rows
from .layer_norm import normalise, normalise_backward
from .token_embed_convolve import (
    blocks_of,
    convolve,
    lanes,
    lanes_first,
    others,
    patches,
    weights_of,
)


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
    c, tap, m_k = weights_of(block, C, SIZE, BLOCK_K, TAPS)
    o_d = tl.arange(0, BLOCK_D)
    tl.store(
        out_ptr + lanes(c * (SIZE * SIZE) + tap) + others(o_d * (C * SIZE * SIZE)),
        lanes_first(dfilters),
        mask=lanes(m_k) & others(o_d < D),
    )


@triton.jit(do_not_specialize=["tiles"])
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
        u, x = convolve(
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


@triton.jit(do_not_specialize=["tiles"])
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
        x = patches(
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
                    + (lanes(o_c) * (SIZE * SIZE) + others(o_d) * (C * SIZE * SIZE))
                    + (i * SIZE + j),
                    mask=lanes(m_c) & others(m_d),
                    other=0.0,
                )
                w = tl.trans(lanes_first(w.to(du.dtype)))  # [BLOCK_D, BLOCK_C]
                dx = tl.dot(du, w, dx, input_precision=PRECISION)
        y = row * STRIDE + top
        x = column * STRIDE + left
        tl.store(
            dx_ptr + lanes(y * W + x) + others(o_c * (H * W)),
            lanes_first(dx.to(dx_ptr.dtype.element_ty)),
            mask=lanes((y < H) & (x < W)) & others(m_c),
        )


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

    launch = blocks_of(launches.find("token_embed_bwd", x, shape), filters)
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
        launch = blocks_of(launches.find("token_embed_bwd_filters", x, shape), filters)
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
