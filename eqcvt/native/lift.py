"""The steerable block by the native extension; the functions of ``tests/ops/primitives.py``.

Kernels recompute ``u = bank * x`` rather than store it. They add up in the dtype of parameters,
float32 beside half-precision activations; sums over the batch are finished in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eqcvt.native import launch, refuses_dtype

LARGEST_GROUP = 16
# On a GPU a tile with its halo has to fit into shared memory, 99 KiB of it on the smallest: filters
# of so many pixels, and a blur that wide beside those of up to 9 pixels and a stride of up to 3.
LARGEST_FILTER, LARGEST_BLUR, LARGEST_BLUR_BESIDE_MORE = 13, 13, 9
TILE = 448


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
    """Return why the extension cannot serve a call, or None if it can."""
    reason = refuses_dtype(x)
    if reason is not None:
        return reason
    if bank.shape[1] > LARGEST_GROUP:
        return f"a group of {bank.shape[1]} elements is larger than {LARGEST_GROUP}"
    if x.device.type == "cuda":
        if bank.shape[-1] > LARGEST_FILTER:
            return f"filters of {bank.shape[-1]} pixels are wider than {LARGEST_FILTER}"
        if blur is not None:
            small = bank.shape[-1] <= 9 and blur_stride <= 3
            largest = LARGEST_BLUR if small else LARGEST_BLUR_BESIDE_MORE
            size = blur.shape[-1]
            # Four rows and two columns of results are the least that a tile makes.
            tile = (3 * blur_stride + size) * 2 * ((blur_stride + size + 1) // 2)
            if size > largest or tile > TILE:
                return (
                    f"a blur of {size} pixels with stride {blur_stride}, beside filters of "
                    f"{bank.shape[-1]}, is wider than a tile takes"
                )
        # Offsets are 64-bit from image to image and 32-bit within one.
        height, width = x.shape[2] + 2 * padding, x.shape[3] + 2 * padding
        if height * width * max(x.shape[1], bank.shape[0] * bank.shape[1]) >= 2**31:
            return f"images of {x.shape[2]}x{x.shape[3]} pixels are too large for 32-bit offsets"
    return None


def moments(
    x: Tensor, bank: Tensor, mask: Tensor | None, *, stride: int, padding: int, correlate: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return mean and biased variance of ``u`` per field, and ``u * x``, ``1 * x`` for gradients.

    Args:
        x: ``[B, C, H, W]``.
        bank: ``[F, G, C, k, k]``, dtype of parameters.
        mask: ``[H, W]``, multiplied onto ``x``, of the dtype of ``bank``, or None.
        stride: step of the convolution.
        padding: zeros added on each side.
        correlate: whether to return the last two; else they are empty.

    Returns:
        ``mean`` and ``variance`` ``[F]``, ``ux`` ``[F, G, C, k, k]`` and ``ones_x`` ``[C, k, k]``.
        An empty batch has zeros.
    """
    fields = bank.shape[0]
    mean, variance = bank.new_empty(fields), bank.new_empty(fields)
    ux = torch.empty_like(bank) if correlate else bank.new_empty(0)
    ones_x = bank.new_empty(bank.shape[2:] if correlate else 0)
    x = x.contiguous()
    sizes = _sizes(x, bank)
    launch(
        "lift_moments",
        *(x, bank, mask, *sizes, stride, padding, correlate),
        *(mean, variance, ux, ones_x),
        like=x,
    )
    return mean, variance, ux, ones_x


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
    """Return the gradient by ``x`` of the sum of ``c1[f] u + c2[f] u^2 / 2``."""
    x = x.contiguous()
    dx = torch.empty_like(x)
    sizes = _sizes(x, bank)
    launch("lift_moments_input", x, bank, mask, c1, c2, *sizes, stride, padding, dx, like=x)
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
    """Return ``y``, the blurred ``relu(scale u + shift)``, and the winners of its group pooling.

    Args:
        x: ``[B, C, H, W]``.
        bank: ``[F, G, C, k, k]``, dtype of parameters.
        mask: ``[H, W]``, multiplied onto ``x``, of the dtype of ``bank``, or None.
        scale: ``[F]``.
        shift: ``[F]``.
        blur: ``[kb]``, the weights along each axis, of that dtype too, or None.
        stride: step of the convolution.
        padding: zeros added on each side.
        blur_stride: step of the blur.
        pool: whether to take the maximum over the group.

    Returns:
        ``y`` and uint8 ``arg``, both ``[B, F, H3, W3]``; without ``pool``, ``[B, F, G, H3, W3]``
        and an empty tensor.
    """
    x = x.contiguous()
    batch, fields, group = x.shape[0], bank.shape[0], bank.shape[1]
    kernel, blur_size = bank.shape[-1], 1 if blur is None else blur.shape[0]
    size = [(n + 2 * padding - kernel) // stride + 1 for n in x.shape[-2:]]
    if blur is not None:
        size = [(n - blur_size) // blur_stride + 1 for n in size]
    y = x.new_empty((batch, fields, *([] if pool else [group]), *size))
    arg = torch.empty(y.shape if pool else 0, dtype=torch.uint8, device=x.device)
    launch(
        "lift_apply",
        *(x, bank, mask, scale, shift, blur, *_sizes(x, bank), blur_size),
        *(stride, padding, blur_stride, pool, y, arg),
        like=x,
    )
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
    """Return the gradients of :func:`apply` by ``bank``, ``scale``, ``shift`` and ``x``.

    Args:
        dy: gradient of ``y``.
        arg: winners that :func:`apply` returned.
        x: as in :func:`apply`, like all that follow.
        input_gradient: whether to return the last one; else it is empty.
    """
    x, dy = x.contiguous(), dy.contiguous()
    dbank, dscale, dshift = torch.empty_like(bank), torch.empty_like(scale), torch.empty_like(shift)
    dx = torch.empty_like(x) if input_gradient else x.new_empty(0)
    launch(
        "lift_apply_backward",
        *(dy, arg, x, bank, mask, scale, shift, blur, *_sizes(x, bank)),
        *(1 if blur is None else blur.shape[0], stride, padding, blur_stride, pool, input_gradient),
        *(dbank, dscale, dshift, dx),
        like=x,
    )
    return dbank, dscale, dshift, dx


def _sizes(x: Tensor, bank: Tensor) -> tuple[int, ...]:
    return (*x.shape, bank.shape[0], bank.shape[1], bank.shape[-1])
