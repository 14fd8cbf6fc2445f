r"""Token embedding: a strided convolution, then layer normalisation over the channels.

.. math:: \mathrm{embed}(x) = \mathrm{LN}(W \star x + c)

With filters that are symmetric under a group of the pixel grid, and a stride that divides what it
walks over, the tokens turn with the image.

Source: Wu et al., arXiv:2103.15808, section 3.1.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from eqcvt.ops import _backend
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


_backend.register("token_embed", "reference", token_embed_reference)


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
        ValueError: if the channels do not fit.
        RuntimeError: if the backend asked for by name cannot serve the call.
    """
    if x.dim() != 4 or x.shape[1] != filters.shape[1]:
        raise ValueError(
            f"token_embed needs x [B, {filters.shape[1]}, H, W] for these filters, "
            f"got {list(x.shape)}"
        )
    implementation = _backend.dispatch("token_embed", x, backend)
    y: Tensor = implementation(
        x, filters, bias, norm_weight, norm_bias, stride=stride, padding=padding, eps=eps
    )
    return y
