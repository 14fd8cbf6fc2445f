r"""The steerable block: convolution with a rotated filter bank, norm, ReLU, blur, group pooling.

.. math::
    u[f, g] = \sum_c \mathrm{bank}[f, g, c] \star (m \, x)[c], \quad
    y[f] = \max_g \; K_\sigma * \mathrm{ReLU}(\mathrm{norm}(u)[f, g])

``bank[f, g, c] = sum_b weight[f, c, b] basis[b, g]`` holds the turned copies of each filter, so
that turning the image turns ``u`` and permutes its group axis; normalisation per field, a pointwise
non-linearity and an isotropic blur keep that, and the maximum over the group axis leaves maps that
only turn. A circular mask ``m`` removes the corners, which a rotation would move out of the
picture.

Sources: Weiler and Cesa, arXiv:1911.08251 (steerable convolutions); Zhang, arXiv:1904.11486 (blur).
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from eqcvt._check import shapes
from eqcvt.ops import _backend
from eqcvt.ops._lift import apply, grid, moments, norm
from eqcvt.ops._register import as_autocast, autocast, parameter, parameter_dtype
from eqcvt.ops._sizes import conv_size
from eqcvt.ops.norm import affine, batch_moments, batch_norm


def filter_bank(weight: Tensor, basis: Tensor) -> Tensor:
    """Expand basis coefficients into the bank of turned filters, one matrix product.

    Args:
        weight: ``[F, C, b]`` coefficients (``C`` input channels, or input fields).
        basis: ``[b, G, k, k]`` (lifting) or ``[b, G, G, k, k]`` (regular to regular).

    Returns:
        ``[F, G, C, k, k]``, where for regular fields the last ``C`` counts fields times group
        elements.
    """
    fields, channels, count = weight.shape
    if basis.dim() == 4:
        basis = basis.unsqueeze(2)
    _, order, inner, size, _ = basis.shape
    flat = weight.reshape(-1, count) @ basis.reshape(count, -1)
    bank = flat.reshape(fields, channels, order, inner, size, size).transpose(1, 2)
    return bank.reshape(fields, order, channels * inner, size, size)


def circular_mask(size: int, *, margin: float = 1.0, sigma: float = 2.0) -> Tensor:
    """Return a soft circular mask that is 1 within the circle and falls off as a Gaussian outside.

    Args:
        size: image size in pixels.
        margin: by how many percent of half the image size the circle is smaller than the inscribed
            one.
        sigma: width of the fall-off in pixels.

    Returns:
        float64 tensor ``[size, size]``: the values of escnn's ``MaskModule``, and zero for those
        below 1e-30, whose float32 products are subnormal, slow and of no effect.
    """
    centre = (size - 1) / 2
    line = (torch.arange(size, dtype=torch.float64) - centre).square()
    distance = line[:, None] + line[None, :]
    edge = (centre * (1 - margin / 100)) ** 2
    mask = torch.exp((edge - distance) / sigma**2).clamp(max=1.0)
    return torch.where(mask < 1e-30, 0.0, mask)


def blur_line(sigma: float) -> Tensor:
    """Return one axis of the Gaussian low-pass filter of three standard deviations.

    The filter is the outer product of the line with itself.

    Args:
        sigma: standard deviation in pixels; 0.66 gives 5 pixels.

    Returns:
        float64 tensor ``[k]`` with sum 1.
    """
    size = 2 * round(3 * sigma) + 1
    line = (torch.arange(size, dtype=torch.float64) - size // 2).square()
    line = torch.exp(-line / (2 * sigma**2))
    return line / line.sum()


def blur_kernel(sigma: float) -> Tensor:
    """Return the whole Gaussian low-pass filter ``[k, k]``, see :func:`blur_line`."""
    line = blur_line(sigma)
    return torch.outer(line, line)


def lift_conv2d(x: Tensor, bank: Tensor, *, stride: int = 1, padding: int = 0) -> Tensor:
    """Correlate images with every turned copy of every filter.

    Equivariance: turning ``x`` by ``g`` turns the result and moves the entry at ``h`` to ``g h``.

    Args:
        x: ``[B, C, H, W]``.
        bank: ``[F, G, C, k, k]``.
        stride: step in pixels.
        padding: zeros added on each side.

    Returns:
        ``[B, F, G, H', W']``.
    """
    u = F.conv2d(x, bank.flatten(0, 1), stride=stride, padding=padding)
    return u.reshape(u.shape[0], *bank.shape[:2], *u.shape[2:])


def blur_pool2d(u: Tensor, line: Tensor, *, stride: int = 1) -> Tensor:
    """Antialiased average pooling of each channel: a Gaussian blur, then every ``stride``-th pixel.

    Args:
        u: ``[B, F, G, H, W]``.
        line: ``[k]``, the filter is its outer product with itself; no padding, so each side loses
            ``k // 2`` pixels.
        stride: step in pixels.
    """
    flat = u.flatten(1, 2)
    weight = torch.outer(line, line).to(flat.dtype).expand(flat.shape[1], 1, -1, -1)
    y = F.conv2d(flat, weight, stride=stride, groups=flat.shape[1])
    return y.reshape(*u.shape[:3], *y.shape[2:])


def group_pool(u: Tensor) -> Tensor:
    """Return the maximum over the group axis, ``[B, F, G, H, W]`` to ``[B, F, H, W]``.

    NaN propagates; the gradient goes to one of the equal maxima.
    """
    return u.max(2).values


def lift_reference(
    x: Tensor,
    bank: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    running: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    blur: Tensor | None,
    *,
    stride: int,
    padding: int,
    blur_stride: int,
    pool: bool,
    eps: float,
    process_group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The definition of :func:`lift` in plain PyTorch."""
    if mask is not None:
        x = x * mask.to(x.dtype)
    u = lift_conv2d(x, bank, stride=stride, padding=padding)
    mean = variance = None
    if running is None:
        u, mean, variance = batch_norm(
            u, norm_weight, norm_bias, eps=eps, process_group=process_group
        )
    else:
        u = F.batch_norm(u, running[0], running[1], norm_weight, norm_bias, eps=eps)
    u = F.relu(u)
    if blur is not None:
        u = blur_pool2d(u, blur, stride=blur_stride)
    return group_pool(u) if pool else u, mean, variance


def lift(
    x: Tensor,
    bank: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    running: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
    blur: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    blur_stride: int = 1,
    pool: bool = True,
    eps: float = 1e-5,
    process_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Apply the steerable block (see the module's text for the equation).

    Equivariance: with ``pool`` the result turns with ``x``; without, its group axis moves too.

    Args:
        x: ``[B, C, H, W]``; for a block on regular fields ``C`` counts fields times group elements.
        bank: ``[F, G, C, k, k]`` from :func:`filter_bank`.
        norm_weight: ``[F]``, scale of the inner batch norm.
        norm_bias: ``[F]``, its shift.
        running: mean and variance ``[F]`` to normalise with; None uses the batch's (training).
        mask: ``[H, W]``, multiplied onto ``x``.
        blur: ``[k]``, see :func:`blur_line`; None leaves the blur out.
        stride: step of the convolution in pixels.
        padding: zeros added on each side of ``x``.
        blur_stride: step of the blur in pixels.
        pool: whether to take the maximum over the group axis.
        eps: added to the variance.
        process_group: processes that share their batch statistics.
        backend: a backend's name; None for the one in force.

    Returns:
        ``y``: ``[B, F, H', W']`` with ``pool``, else ``[B, F, G, H', W']``; and the batch's mean
        and unbiased variance ``[F]`` in training (None otherwise).

    Raises:
        ValueError: if shapes do not fit together, or nothing would be left of the image.
        CannotServe: if the backend asked for by name cannot serve the call.
    """
    square = bank.dim() == 5 and bank.shape[3] == bank.shape[4]
    if x.dim() != 4 or not square or x.shape[1] != bank.shape[2]:
        raise ValueError(
            f"lift needs x [B, C, H, W] and bank [F, G, C, k, k] with the same C, "
            f"got {list(x.shape)} and {list(bank.shape)}"
        )
    if min(stride, blur_stride) < 1 or padding < 0:
        raise ValueError(
            "stride and blur_stride must be at least 1 and padding at least 0, "
            f"got {stride}, {blur_stride} and {padding}"
        )
    line = bank.shape[:1]
    mean, variance = running or (None, None)
    shapes(
        "lift",
        {
            "norm_weight": (norm_weight, line),
            "norm_bias": (norm_bias, line),
            "the running mean": (mean, line),
            "the running variance": (variance, line),
            "mask": (mask, x.shape[-2:]),
        },
    )
    if blur is not None and (blur.dim() != 1 or blur.shape[0] % 2 == 0):
        raise ValueError(f"blur is a line [k] with odd k, got {list(blur.shape)}")
    size = conv_size(min(x.shape[-2:]), bank.shape[-1], stride, padding)
    if blur is not None:
        size = conv_size(size, blur.shape[0], blur_stride, 0)
    if size < 1:
        raise ValueError(
            f"an image of {x.shape[-2]}x{x.shape[-1]} pixels is too small for "
            f"{bank.shape[-1]}x{bank.shape[-1]} filters with padding {padding}"
            + ("" if blur is None else f" and a blur of {blur.shape[0]} pixels")
        )
    chosen = _backend.choose(
        "lift",
        x.device,
        as_autocast(x).dtype,
        backend,
        lambda module: (
            "its mask and blur are constants, and one of them needs a gradient"
            if any(t is not None and t.requires_grad for t in (mask, blur))
            else module.supports(
                as_autocast(x),
                bank,
                blur,
                stride=stride,
                padding=padding,
                blur_stride=blur_stride,
                pool=pool,
            )
        ),
    )
    implementation = lift_reference if chosen == "reference" else partial(_lift_fused, chosen)
    return implementation(
        x,
        bank,
        norm_weight,
        norm_bias,
        running,
        mask,
        blur,
        stride=stride,
        padding=padding,
        blur_stride=blur_stride,
        pool=pool,
        eps=eps,
        process_group=process_group,
    )


# The fused form: the moments of u, then normalisation as scale * u + shift on a second pass, so
# that nothing of the size of u is kept. The statistics' gradient needs no third pass, because that
# of a moment is linear in u * x and 1 * x, which the first pass sums beside the moments.


def _lift_fused(
    backend: str,
    x: Tensor,
    bank: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    running: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    blur: Tensor | None,
    *,
    stride: int,
    padding: int,
    blur_stride: int,
    pool: bool,
    eps: float,
    process_group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """:func:`lift` by the kernels of ``backend``."""
    x = autocast(x)
    dtype = parameter_dtype(x)
    bank = parameter(bank, dtype)
    mask = None if mask is None else parameter(mask, dtype)
    blur = None if blur is None else parameter(blur, dtype)
    geometry = {"stride": stride, "padding": padding, "backend": backend}
    unbiased = None
    if running is None:
        correlate = torch.is_grad_enabled() and bank.requires_grad
        mean, variance, _, _ = moments(x, bank, mask, correlate=correlate, **geometry)
        height, width = grid(x, bank, stride, padding)
        count = x.shape[0] * bank.shape[1] * height * width
        mean, variance, unbiased = batch_moments(mean, variance, count, process_group)
    else:
        mean, variance = (t.to(dtype) for t in running)
    if _backend.has("lift", backend, "norm"):
        scale, shift = norm(mean, variance, norm_weight, norm_bias, eps=eps, backend=backend)
    else:
        scale, shift = affine(mean, variance, norm_weight, norm_bias, eps)
    y, _ = apply(x, bank, mask, scale, shift, blur, blur_stride=blur_stride, pool=pool, **geometry)
    return y, None if unbiased is None else mean.detach(), unbiased
