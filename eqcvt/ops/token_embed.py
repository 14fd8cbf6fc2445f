r"""Token embedding: a strided convolution, then layer normalisation over the channels.

.. math:: \mathrm{embed}(x) = \mathrm{LN}(W \star x + c)

With filters that are symmetric under a group of the pixel grid, and a stride that divides what it
walks over, the tokens turn with the image.

Source: Wu et al., arXiv:2103.15808, section 3.1.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from eqcvt._check import shapes
from eqcvt.ops import _backend
from eqcvt.ops._register import as_autocast, autocast, define, parameter, parameter_dtype
from eqcvt.ops._sizes import conv_size
from eqcvt.ops.norm import layer_norm


def token_embed_reference(
    x: Tensor,
    filters: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    stride: int,
    padding: int,
    eps: float,
) -> Tensor:
    """The definition of :func:`token_embed` in plain PyTorch."""
    y = F.conv2d(x, filters, bias, stride=stride, padding=padding)
    return layer_norm(y, norm_weight, norm_bias, eps=eps)


def token_embed(
    x: Tensor,
    filters: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    stride: int,
    padding: int,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """Turn feature maps into normalised tokens by a strided convolution.

    Args:
        x: ``[B, C, H, W]``.
        filters: ``[D, C, k, k]``.
        bias: ``[D]`` or None.
        norm_weight: ``[D]``, scale of the layer norm.
        norm_bias: ``[D]``, its shift.
        stride: step in pixels.
        padding: zeros added on each side.
        eps: added to the variance of the layer norm.
        backend: a backend's name; None for the one in force.

    Returns:
        Tokens ``[B, D, H', W']``.

    Raises:
        ValueError: if shapes do not fit together.
        CannotServe: if the backend asked for by name cannot serve the call.
    """
    if filters.dim() != 4 or filters.shape[2] != filters.shape[3]:
        raise ValueError(f"token_embed needs filters [D, C, k, k], got {list(filters.shape)}")
    if x.dim() != 4 or x.shape[1] != filters.shape[1]:
        raise ValueError(
            f"token_embed needs x [B, {filters.shape[1]}, H, W] for these filters, "
            f"got {list(x.shape)}"
        )
    if stride < 1 or padding < 0:
        raise ValueError(
            f"stride must be at least 1 and padding at least 0, got {stride} and {padding}"
        )
    if conv_size(min(x.shape[-2:]), filters.shape[-1], stride, padding) < 1:
        raise ValueError(
            f"maps of {x.shape[-2]}x{x.shape[-1]} pixels are too small for "
            f"{filters.shape[-1]}x{filters.shape[-1]} filters with padding {padding}"
        )
    line = filters.shape[:1]
    shapes(
        "token_embed",
        {"bias": (bias, line), "norm_weight": (norm_weight, line), "norm_bias": (norm_bias, line)},
    )
    chosen = _backend.choose(
        "token_embed",
        x.device,
        as_autocast(x).dtype,
        backend,
        lambda module: module.supports(as_autocast(x), filters, padding=padding),
    )
    implementation = (
        token_embed_reference if chosen == "reference" else partial(_token_embed_fused, chosen)
    )
    return implementation(
        x, filters, bias, norm_weight, norm_bias, stride=stride, padding=padding, eps=eps
    )


def _forward_fake(
    x: Tensor, filters: Tensor, *_: Tensor, stride: int, padding: int, eps: float
) -> Tensor:
    height, width = (conv_size(n, filters.shape[-1], stride, padding) for n in x.shape[-2:])
    return x.new_empty(x.shape[0], height, width, filters.shape[0])


def _backward_fake(dy: Tensor, *inputs: Tensor, input_gradient: bool, **_: Any) -> Any:
    x, *parameters = inputs
    return x.new_empty(x.shape if input_gradient else 0), *(
        t.new_empty(t.shape) for t in parameters
    )


_token_embed_backward = define(
    "token_embed",
    "backward",
    "(Tensor dy, Tensor x, Tensor filters, Tensor bias, Tensor norm_weight, Tensor norm_bias, *,"
    " int stride, int padding, float eps, bool input_gradient)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[0]
    dx, *parameters = _token_embed_backward(
        dy.contiguous(), *ctx.saved_tensors, **ctx.options, input_gradient=needed
    )
    return dx if needed else None, *parameters


_token_embed_forward = define(
    "token_embed",
    "forward",
    "(Tensor x, Tensor filters, Tensor bias, Tensor norm_weight, Tensor norm_bias, *,"
    " int stride, int padding, float eps) -> Tensor",
    _forward_fake,
    backward=_backward,
)


def _token_embed_fused(
    backend: str,
    x: Tensor,
    filters: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    stride: int,
    padding: int,
    eps: float,
) -> Tensor:
    """:func:`token_embed` by the kernels of ``backend``."""
    x = autocast(x)
    if bias is None:
        bias = filters.new_zeros(filters.shape[0])
    given = (filters, bias, norm_weight, norm_bias)
    parameters = (parameter(t, parameter_dtype(x)) for t in given)
    y: Tensor = _token_embed_forward(
        x.contiguous(), *parameters, stride=stride, padding=padding, eps=eps, backend=backend
    )
    return y.permute(0, 3, 1, 2)
