"""Triton kernels of the steerable block: convolution, statistics, ReLU, blur and group maximum.

.. math::
    u[f, g] = \\sum_c \\mathrm{bank}[f, g, c] \\star (m \\, x)[c], \\quad
    y[f] = \\max_g \\; K * \\mathrm{ReLU}(\\mathrm{scale}[f] \\, u[f, g] + \\mathrm{shift}[f])

**The convolution is a matrix product made to fill its tile.** The image is first copied, times the
mask and with its zeros around it, to ``[B, HP, WP, E]``: ``E`` is ``C`` rounded up, so the taps of
one filter row are ``k E`` neighbours in memory, loaded 8 bytes at a time at ``C = 3``, and no later
load asks where the image ends. 40 filters would fill 63 % of a tile of 64 rows; a tile therefore
holds ``TY`` image rows as well::

    rows (ty, f, g)         taps (i, j, c), i < k + (TY - 1) stride      columns x
    [ bank shifted by ty ]  .  [ patches of rows y0 .. y0 + k + TY - 2 ]  ->  u[f, g, y0 + ty, x]

At the model's sizes (F G = 40, k = 7) ``TY`` is 3: 120 or 123 of 128 rows are used, 252 of 256 taps
(C = 3) or 63 of 64 (C = 1), and a patch is loaded once for three image rows. The zeros in the
shifted bank cost 2/9 of the product; with them a pass does 45 GFLOP at batch 128 and C = 3, where
64 rows and 196 taps padded to 256 would do 67. ``plan`` picks ``TY`` by that count. Zero times NaN
is NaN, so tiles with something not finite under them, which the copy marks, are made a second time,
one image row after the other.

**The statistics need no u** where there are few taps and a mask: see ``lift_gram``.

**What goes through memory.** ``u`` is never kept. The blur needs neighbours, which a matrix tile
cannot give cheaply: its rectified values are written once (160 MB in 16 bits at batch 128), and a
second kernel blurs down columns, then along rows between the lanes of a warp, and takes the
maximum. As two banded matrix products inside the tile the blur would add 33 to 55 GFLOP, more time
than those bytes take, and the same NaN question. The gradient goes the other way round: one kernel
sends ``dy`` to the winning element and blurs it, the next one recomputes ``u`` beside it. At most
``WORKSPACE`` bytes of the batch are in flight at a time.

Sums are float32 within a program and are combined by a second kernel in a fixed order: no atomics,
no host synchronisation, two runs are bit-equal for the same device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import launches
from .common import DTYPES, refusal
from .lift_blur import blur_and_pool, unblur
from .lift_conv import AFFINE, GRADIENT, RAW, RELU, input_gradient_of, values
from .lift_gram import gram_moments, gram_of
from .lift_norm import moments_backward, norm, norm_backward, scale_gradient
from .lift_sums import Sums
from .lift_tile import factors, parts, plan, sizes

__all__ = [
    "apply",
    "apply_backward",
    "moments",
    "moments_backward",
    "moments_input",
    "norm",
    "norm_backward",
    "supports",
]


def supports(
    x: Tensor,
    bank: Tensor,
    blur: Tensor | None,
    *,
    stride: int,
    padding: int,
    blur_stride: int,
    pool: bool,
) -> str | None:
    """Return why these kernels cannot serve the call, or None if they can.

    Args:
        x: ``[B, C, H, W]``.
        bank: ``[F, G, C, k, k]``.
        blur: ``[kb]``, the line whose outer product with itself blurs, or None.
        stride: step of the convolution.
        padding: zeros on each side of ``x``.
        blur_stride: step of the blur.
        pool: whether the maximum over the group is taken.
    """
    if (reason := refusal(x)) is not None:
        return reason
    if bank.dtype not in DTYPES:
        return f"takes no filters of {str(bank.dtype).removeprefix('torch.')}"
    order, size = bank.shape[1], bank.shape[-1]
    if order > 16:
        return f"takes groups of up to 16 elements, not {order}"
    if size % 2 == 0 or size > 11:
        return f"takes filters of odd size up to 11, not {size}"
    if blur is not None and (blur.numel() % 2 == 0 or blur.numel() > 9):
        return f"takes a blur of odd size up to 9, not {blur.numel()}"
    # Offsets are 64-bit from image to image and 32-bit within one, whose rows end with a tile.
    pixels = (x.shape[2] + 2 * padding) * (x.shape[3] + 2 * padding + max(launches.TILE) * stride)
    if pixels * max(x.shape[1] + 8, bank.shape[0] * order + 8) >= 2**31:
        return f"images of {x.shape[2]}x{x.shape[3]} pixels are too large for 32-bit offsets"
    return None


def moments(
    x: Tensor, bank: Tensor, mask: Tensor | None, *, stride: int, padding: int, correlate: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the mean and biased variance of u per field, and its correlation with the patches.

    Args:
        x: ``[B, C, H, W]``, any strides.
        bank: ``[F, G, C, k, k]`` float32.
        mask: ``[H, W]`` float32 or None.
        stride: step of the convolution.
        padding: zeros on each side of ``x``.
        correlate: whether the last two results are wanted.

    Returns:
        ``mean`` and ``variance`` ``[F]``; ``ux`` as ``bank``, the sum of u times the patch under
        it; ``ones_x`` ``[C, k, k]``, the sum of the patches. The last two are ``[0]`` without
        ``correlate``. All float32, from float32 accumulators (of u's stored values where the taps
        do not fit one tile, or of products of the image with itself: ``lift_gram``).
    """
    s = sizes(x, bank, stride, padding)
    p = plan(x, s, s.fields * s.order + correlate)
    mean, variance = bank.new_empty(s.fields), bank.new_empty(s.fields)
    ux, ones = bank.new_empty(bank.shape if correlate else 0), bank.new_empty(0)
    if correlate:
        ones = bank.new_empty(bank.shape[2:])
    if s.batch == 0:
        return mean.zero_(), variance.zero_(), ux.zero_(), ones.zero_()
    if (g := gram_of(x, mask, s, p)) is not None:
        wanted = (ux, ones) if correlate else (None, None)
        gram_moments(x, bank, mask, s, g, mean, variance, *wanted)
        return mean, variance, ux, ones
    sums = Sums(x, s, p, correlate)
    for part in parts(x, s):
        f = factors(part, mask, bank, s, p if p.single else plan(x, s, s.fields * s.order))
        u = None if p.single else values(RAW, f, None, None, None, s)
        sums.add(f, u, None, moments=True)
    sums.finish(mean, variance, ux, ones if correlate else None)
    return mean, variance, ux, ones


def moments_input(
    x: Tensor,
    bank: Tensor,
    mask: Tensor | None,
    c1: Tensor,
    c2: Tensor,
    *,
    stride: int,
    padding: int,
) -> Tensor:
    """Return the gradient of the image under sum(c1 u + c2 u^2 / 2), as ``x``.

    Args:
        x: ``[B, C, H, W]``, any strides.
        bank: ``[F, G, C, k, k]`` float32.
        mask: ``[H, W]`` float32 or None.
        c1: ``[F]`` float32.
        c2: ``[F]`` float32.
        stride: step of the convolution.
        padding: zeros on each side of ``x``.
    """
    s = sizes(x, bank, stride, padding)
    p = plan(x, s, s.fields * s.order)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for part, out in zip(parts(x, s), parts(dx, s), strict=True):
        value = values(AFFINE, factors(part, mask, bank, s, p), c2, c1, None, s)
        input_gradient_of(value, bank, None, mask, out, s)
    return dx


def apply(
    x: Tensor,
    bank: Tensor,
    mask: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    blur: Tensor | None,
    *,
    stride: int,
    padding: int,
    blur_stride: int,
    pool: bool,
) -> tuple[Tensor, Tensor]:
    """Return the block's output, and which group element gave it.

    Args:
        x: ``[B, C, H, W]``, any strides.
        bank: ``[F, G, C, k, k]`` float32.
        mask: ``[H, W]`` float32 or None.
        scale: ``[F]`` float32.
        shift: ``[F]`` float32.
        blur: ``[kb]`` float32 or None.
        stride: step of the convolution.
        padding: zeros on each side of ``x``.
        blur_stride: step of the blur.
        pool: whether to take the maximum over the group.

    Returns:
        ``y`` ``[B, F, H3, W3]`` and ``arg`` uint8 of that shape with ``pool``, else ``y``
        ``[B, F, G, H3, W3]`` and an empty ``arg``.
    """
    s = sizes(x, bank, stride, padding)
    p = plan(x, s, s.fields * s.order)
    taps = 1 if blur is None else blur.numel()
    h3, w3 = ((n - taps) // blur_stride + 1 for n in (s.h1, s.w1))
    shape = (s.batch, s.fields) if pool else (s.batch, s.fields, s.order)
    y = torch.empty(*shape, h3, w3, dtype=x.dtype, device=x.device)
    arg = torch.empty(y.shape if pool else 0, dtype=torch.uint8, device=x.device)
    args = parts(arg, s) if pool else [arg] * s.batch
    for part, out, winner in zip(parts(x, s), parts(y, s), args, strict=False):
        v = values(RELU, factors(part, mask, bank, s, p), scale, shift, None, s)
        blur_and_pool(v, blur, out, winner, stride=blur_stride, pool=pool, s=s)
    return y, arg


def apply_backward(
    dy: Tensor,
    arg: Tensor,
    x: Tensor,
    bank: Tensor,
    mask: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    blur: Tensor | None,
    *,
    stride: int,
    padding: int,
    blur_stride: int,
    pool: bool,
    input_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of :func:`apply`; u is computed again.

    With du the gradient after the ReLU: d bank = scale (du * x), d shift = sum du, and d scale =
    sum du u, which is the bank's inner product with du * x, so no pixel is summed for it. Of a NaN
    or Inf in ``x``, d bank can be NaN at more taps than have met it.

    Args:
        dy: gradient of ``y``.
        arg: from :func:`apply`.
        x: ``[B, C, H, W]``, any strides.
        bank: ``[F, G, C, k, k]`` float32.
        mask: ``[H, W]`` float32 or None.
        scale: ``[F]`` float32.
        shift: ``[F]`` float32.
        blur: ``[kb]`` float32 or None.
        stride: step of the convolution.
        padding: zeros on each side of ``x``.
        blur_stride: step of the blur.
        pool: whether the maximum over the group was taken.
        input_gradient: whether the last result is wanted.

    Returns:
        ``dbank``, ``dscale``, ``dshift`` float32 and ``dx`` as ``x``, or empty.
    """
    s = sizes(x, bank, stride, padding)
    p = plan(x, s, s.fields * s.order)
    dbank, dshift = torch.empty_like(bank), torch.empty_like(shift)
    dx = torch.empty(x.shape if input_gradient else 0, dtype=x.dtype, device=x.device)
    if s.batch == 0:
        return dbank.zero_(), torch.zeros_like(scale), dshift.zero_(), dx
    sums = Sums(x, s, p, True)
    outs = parts(dx, s) if input_gradient else None
    args = parts(arg, s) if pool else None
    for i, (part, gradient) in enumerate(zip(parts(x, s), parts(dy.contiguous(), s), strict=True)):
        f = factors(part, mask, bank, s, p)
        winner = args[i] if args is not None else arg
        dv = unblur(gradient, winner, blur, stride=blur_stride, pool=pool, s=s)
        if p.single and outs is None:
            sums.add(f, dv, (scale, shift), moments=False)
            continue
        du = values(GRADIENT, f, scale, shift, dv, s)
        sums.add(f, du, None, moments=False)
        if outs is not None:
            input_gradient_of(du, bank, scale, mask, outs[i], s)
    sums.finish(dshift, None, dbank, None)
    return *scale_gradient(dbank, bank, scale, x.dtype), dshift, dx
