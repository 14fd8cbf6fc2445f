r"""Fused Triton kernels of the token embedding: a strided convolution and its layer norm.

.. math:: y[p] = \mathrm{LN}(u[p]), \quad u[p, d] = c[d]
    + \sum_{cij} w[d, cij] \, x[c, p s + (i, j) - \mathrm{padding}]

The convolution is a product of the filters with patches that are gathered on load and never
stored. The gradient recomputes it from ``x``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launches
from .common import padded, precision, programs, refusal, sum_rows

__all__ = ["backward", "forward", "supports"]

LARGEST_WIDTH = 128


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


@triton.jit
def _patches(
    x_ptr,
    o_k,
    o_p,
    pixels,
    C,
    H,
    W,
    OW,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Gather ``[k, p]``: weight k = (c, i, j) of the filters meets this value at output pixel p."""
    c = o_k // (SIZE * SIZE)
    row = (o_p // OW * STRIDE - PADDING)[None, :] + (o_k // SIZE % SIZE)[:, None]
    column = (o_p % OW * STRIDE - PADDING)[None, :] + (o_k % SIZE)[:, None]
    mask = (c < C)[:, None] & (o_p < pixels)[None, :]
    mask &= (row >= 0) & (row < H) & (column >= 0) & (column < W)
    return tl.load(x_ptr + c[:, None] * (H * W) + row * W + column, mask=mask, other=0.0)


@triton.jit
def _convolve(
    x_ptr,
    filters_ptr,
    bias_ptr,
    o_p,
    pixels,
    C,
    H,
    W,
    OW,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return the convolution plus bias at one tile of output pixels, ``[BLOCK_D, BLOCK_P]``."""
    o_d = tl.arange(0, BLOCK_D)
    taps = C * SIZE * SIZE
    u = tl.zeros([BLOCK_D, BLOCK_P], tl.float32)
    for first in tl.range(0, taps, BLOCK_K, num_stages=1):
        o_k = first + tl.arange(0, BLOCK_K)
        x = _patches(x_ptr, o_k, o_p, pixels, C, H, W, OW, STRIDE, PADDING, SIZE)
        w = tl.load(
            filters_ptr + o_d[:, None] * taps + o_k[None, :],
            mask=(o_d < D)[:, None] & (o_k < taps)[None, :],
            other=0.0,
        )
        u = tl.dot(w.to(x.dtype), x, u, input_precision=PRECISION)
    return u + tl.load(bias_ptr + o_d, mask=o_d < D, other=0.0)[:, None]


@triton.jit
def _normalise(u, m_d, eps, D: tl.constexpr):
    """Return the columns of ``u`` (0 beyond D) with mean 0 and variance 1, and 1 / deviation."""
    mean = tl.sum(u, 0) / D
    centred = tl.where(m_d[:, None], u - mean[None, :], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
    return centred * rstd[None, :], rstd


@triton.jit
def _token_embed_fwd_kernel(
    x_ptr,
    filters_ptr,
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    y_ptr,
    eps,
    C,
    H,
    W,
    OH,
    OW,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute BLOCK_P tokens of one image, all channels.

    One program owns a tile whose columns are output pixels::

        filters [D, C SIZE^2]  x  patches [C SIZE^2, BLOCK_P]  -> u -> LN over each column -> y

    The weights of the filters are walked over BLOCK_K at a time. Bytes: the image once and D
    numbers per token, 0.023 ms at batch 128, 10 x 121 x 121 to 32 x 61 x 61; 2 C SIZE^2 D
    operations on the tensor cores per token (2.7 GFLOP). Accumulates in fp32, weights in order.
    """
    pixels = OH * OW
    tiles = tl.cdiv(pixels, BLOCK_P)
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    o_p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    u = _convolve(
        x_ptr + i_b * C * H * W,
        filters_ptr,
        bias_ptr,
        o_p,
        pixels,
        C,
        H,
        W,
        OW,
        STRIDE,
        PADDING,
        SIZE,
        D,
        BLOCK_D,
        BLOCK_P,
        BLOCK_K,
        PRECISION,
    )
    unit, _rstd = _normalise(u, m_d, eps, D)
    norm_weight = tl.load(norm_weight_ptr + o_d, mask=m_d, other=0.0)
    norm_bias = tl.load(norm_bias_ptr + o_d, mask=m_d, other=0.0)
    y = unit * norm_weight[:, None] + norm_bias[:, None]
    tl.store(
        y_ptr + i_b * pixels * D + o_p[None, :] * D + o_d[:, None],
        y.to(y_ptr.dtype.element_ty),
        mask=m_d[:, None] & (o_p < pixels)[None, :],
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
    C,
    H,
    W,
    OH,
    OW,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_F: tl.constexpr,
    INPUT_GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Recompute the convolution, undo the layer norm, and sum the parameters' gradients.

    Program (i, j) owns the i-th run of the batch's ``tiles`` of BLOCK_P tokens, and of the filters'
    gradient BLOCK_F weights of all channels::

        patches -> u -> LN -> du = LN'(dy)        [D, BLOCK_P]
        patches of weights j ---------^ du patches^T -> dfilters  [D, BLOCK_F]

    j has one value up to BLOCK_F weights, so ``x`` is read once, or twice from L1; beyond, every j
    recomputes ``du``. j = 0 writes ``du`` (for the input's gradient) and the vectors' sums.
    ``parts`` is ``[runs, D C SIZE^2 + 3 D]``: dfilters, dbias, dnorm_weight, dnorm_bias. Bytes: the
    image once, D numbers per token, and D more for ``du``; 0.023 to 0.033 ms at batch 128, 10 x 121
    x 121 to 32 x 61 x 61. Accumulates in fp32, tiles in order.
    """
    i_p = tl.program_id(0).to(tl.int64)
    begin = i_p * tiles // tl.num_programs(0)
    end = (i_p + 1) * tiles // tl.num_programs(0)
    pixels = OH * OW
    image_tiles = tl.cdiv(pixels, BLOCK_P)
    taps = C * SIZE * SIZE
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    norm_weight = tl.load(norm_weight_ptr + o_d, mask=m_d, other=0.0)

    dfilters = tl.zeros([BLOCK_D, BLOCK_F], tl.float32)
    dbias = tl.zeros([BLOCK_D], tl.float32)
    dnorm_weight = tl.zeros([BLOCK_D], tl.float32)
    dnorm_bias = tl.zeros([BLOCK_D], tl.float32)
    for tile in tl.range(begin, end, num_stages=1, disable_licm=True):
        image = tile // image_tiles
        o_p = (tile % image_tiles * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int32)
        x_image = x_ptr + image * C * H * W
        u = _convolve(
            x_image,
            filters_ptr,
            bias_ptr,
            o_p,
            pixels,
            C,
            H,
            W,
            OW,
            STRIDE,
            PADDING,
            SIZE,
            D,
            BLOCK_D,
            BLOCK_P,
            BLOCK_K,
            PRECISION,
        )
        unit, rstd = _normalise(u, m_d, eps, D)
        mask = m_d[:, None] & (o_p < pixels)[None, :]
        offsets = o_p[None, :] * D + o_d[:, None]
        dy = tl.load(dy_ptr + image * pixels * D + offsets, mask=mask, other=0.0).to(tl.float32)
        dunit = dy * norm_weight[:, None]
        along = tl.sum(dunit * unit, 0) / D
        level = tl.sum(dunit, 0) / D
        du = (dunit - level[None, :] - unit * along[None, :]) * rstd[None, :]
        du = tl.where(mask, du, 0.0)
        dbias += tl.sum(du, 1)
        dnorm_weight += tl.sum(dy * unit, 1)
        dnorm_bias += tl.sum(dy, 1)
        x = _patches(x_image, o_f, o_p, pixels, C, H, W, OW, STRIDE, PADDING, SIZE)
        du = du.to(x.dtype)
        if INPUT_GRADIENT:
            store = mask & (tl.program_id(1) == 0)
            tl.store(du_ptr + image * pixels * D + offsets, du, mask=store)
        dfilters = tl.dot(du, tl.trans(x), dfilters, input_precision=PRECISION)

    parts_ptr += i_p * (D * taps + 3 * D)
    tl.store(
        parts_ptr + o_d[:, None] * taps + o_f[None, :],
        dfilters,
        mask=m_d[:, None] & (o_f < taps)[None, :],
    )
    parts_ptr += D * taps
    m_first = m_d & (tl.program_id(1) == 0)
    tl.store(parts_ptr + o_d, dbias, mask=m_first)
    tl.store(parts_ptr + D + o_d, dnorm_weight, mask=m_first)
    tl.store(parts_ptr + 2 * D + o_d, dnorm_bias, mask=m_first)


@triton.jit
def _token_embed_bwd_input_kernel(
    du_ptr,
    filters_ptr,
    dx_ptr,
    tiles,
    C,
    H,
    W,
    OH,
    OW,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the gradient of BLOCK_C channels at BLOCK_P pixels of one image.

    One program owns pixels of one residue (y mod STRIDE, x mod STRIDE): they all meet the same taps
    of the filters, about SIZE^2 / STRIDE^2 of them, and no product is with zeros::

        STRIDE = 2     0 1 0 1      residue 0 meets taps (0, 0), (0, 2), (2, 0), (2, 2) of a 3x3
                       2 3 2 3      filter with padding 2, residue 3 tap (1, 1) alone

    Bytes: D numbers per token, read once per tap from L2 at the worst, and C per pixel, 0.023 ms at
    batch 128, 10 x 121 x 121 to 32 x 61 x 61. Accumulates in fp32, taps in order.
    """
    residue = tl.program_id(0) % (STRIDE * STRIDE)
    i_b = (tl.program_id(0) // (STRIDE * STRIDE) // tiles).to(tl.int64)
    tile = tl.program_id(0) // (STRIDE * STRIDE) % tiles
    top = residue // STRIDE
    left = residue % STRIDE
    columns = tl.cdiv(W - left, STRIDE)
    o_p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    o_d = tl.arange(0, BLOCK_D)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    # An image narrower than the stride leaves some residues without pixels.
    row = o_p // tl.maximum(columns, 1)
    column = o_p % tl.maximum(columns, 1)
    y = row * STRIDE + top
    x = column * STRIDE + left
    du_ptr += i_b * OH * OW * D

    dx = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for i in range((top + PADDING) % STRIDE, SIZE, STRIDE):
        for j in range((left + PADDING) % STRIDE, SIZE, STRIDE):
            # Both are whole numbers of strides.
            o_row = (y + PADDING - i) // STRIDE
            o_column = (x + PADDING - j) // STRIDE
            inside = (y + PADDING >= i) & (o_row < OH) & (x + PADDING >= j) & (o_column < OW)
            du = tl.load(
                du_ptr + (o_row * OW + o_column)[None, :] * D + o_d[:, None],
                mask=inside[None, :] & (o_d < D)[:, None],
                other=0.0,
            )  # [BLOCK_D, BLOCK_P]
            w = tl.load(
                filters_ptr + ((o_d[None, :] * C + o_c[:, None]) * SIZE + i) * SIZE + j,
                mask=(o_d < D)[None, :] & (o_c < C)[:, None],
                other=0.0,
            )
            dx = tl.dot(w.to(du.dtype), du, dx, input_precision=PRECISION)
    tl.store(
        dx_ptr + i_b * C * H * W + o_c[:, None] * (H * W) + (y * W + x)[None, :],
        dx.to(dx_ptr.dtype.element_ty),
        mask=(o_c < C)[:, None] & ((y < H) & (x < W) & (columns > 0))[None, :],
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
    launch = launches.find("token_embed_fwd", x, launches.width_class(width))
    _token_embed_fwd_kernel[(x.shape[0] * triton.cdiv(rows * columns, launch["BLOCK_P"]),)](
        x,
        filters,
        bias,
        norm_weight,
        norm_bias,
        y,
        eps,
        channels,
        *x.shape[2:],
        rows,
        columns,
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
    launch = launches.find("token_embed_bwd", x, shape)
    taps = filters[0].numel()
    launch["BLOCK_F"] = min(launch["BLOCK_F"], padded(taps))
    common = {
        "STRIDE": stride,
        "PADDING": padding,
        "SIZE": size,
        "D": width,
        "BLOCK_D": padded(width),
        "PRECISION": precision(convolution=True),
    }
    tiles = batch * triton.cdiv(rows * columns, launch["BLOCK_P"])
    count = programs(x, launch.pop("RESIDENT"), tiles)
    parts = filters.new_empty(count, filters.numel() + 3 * width)
    du = torch.empty_like(dy) if input_gradient else dx
    _token_embed_bwd_kernel[(count, triton.cdiv(taps, launch["BLOCK_F"]))](
        dy,
        x,
        filters,
        bias,
        norm_weight,
        du,
        parts,
        eps,
        tiles,
        channels,
        height,
        breadth,
        rows,
        columns,
        INPUT_GRADIENT=input_gradient,
        **common,
        **launch,
    )
    if input_gradient:
        launch = launches.find("token_embed_bwd_input", x, shape)
        launch["BLOCK_C"] = min(launch["BLOCK_C"], padded(channels))
        residue = triton.cdiv(height, stride) * triton.cdiv(breadth, stride)
        tiles = triton.cdiv(residue, launch["BLOCK_P"])
        grid = batch * tiles * stride * stride, triton.cdiv(channels, launch["BLOCK_C"])
        _token_embed_bwd_input_kernel[grid](
            du, filters, dx, tiles, channels, height, breadth, rows, columns, **common, **launch
        )
    sums = tuple(torch.empty_like(p) for p in parameters)
    sum_rows(parts, sums)
    return dx, *sums
