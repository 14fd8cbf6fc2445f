r"""The MLP block: layer normalisation, two linear maps with a GELU between them, and the residual.

.. math:: y = x + W_2 \, \mathrm{GELU}(W_1 \, \mathrm{LN}(x) + c_1) + c_2

Every token is treated alone, so the block commutes with any permutation of tokens.

Source: Vaswani et al., arXiv:1706.03762, section 3.3; Wu et al., arXiv:2103.15808, section 3.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from eqcvt._check import probability, shapes
from eqcvt.ops import _backend
from eqcvt.ops._register import as_autocast, autocast, define, parameter, parameter_dtype, seed_of
from eqcvt.ops.norm import layer_norm


def mlp_block_reference(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    dropout: float,
    eps: float,
) -> Tensor:
    """The definition of :func:`mlp_block` in plain PyTorch."""
    tokens = layer_norm(x, norm_weight, norm_bias, eps=eps).permute(0, 2, 3, 1)
    hidden = F.gelu(F.linear(tokens, w1, b1))
    if dropout > 0:
        hidden = F.dropout(hidden, dropout)
    y = F.linear(hidden, w2, b2)
    if dropout > 0:
        y = F.dropout(y, dropout)
    return x + y.permute(0, 3, 1, 2)


def mlp_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    dropout: float = 0.0,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """Apply the pre-norm MLP block with its residual.

    Args:
        x: tokens ``[B, D, H, W]``.
        norm_weight: ``[D]``, scale of the layer norm.
        norm_bias: ``[D]``, its shift.
        w1: ``[E, D]`` and ``b1``: ``[E]``, the first linear map.
        b1: see ``w1``.
        w2: ``[D, E]`` and ``b2``: ``[D]``, the second.
        b2: see ``w2``.
        dropout: probability of dropping an entry after the GELU and after the second map, 0 in
            evaluation; kernels round it to 1 / 65536.
        eps: added to the variance.
        backend: a backend's name; None for the one in force.

    Returns:
        Tokens of the shape of ``x``.

    Raises:
        ValueError: if shapes do not fit together, or ``dropout`` is not in [0, 1).
        CannotServe: if the backend asked for by name cannot serve the call.
    """
    if x.dim() != 4 or w1.dim() != 2 or x.shape[1] != w1.shape[1]:
        raise ValueError(
            f"mlp_block needs x [B, D, H, W] and w1 [E, D], "
            f"got {list(x.shape)} and {list(w1.shape)}"
        )
    probability("dropout", dropout)
    hidden, dim = w1.shape
    shapes(
        "mlp_block",
        {
            "norm_weight": (norm_weight, (dim,)),
            "norm_bias": (norm_bias, (dim,)),
            "b1": (b1, (hidden,)),
            "w2": (w2, (dim, hidden)),
            "b2": (b2, (dim,)),
        },
    )
    chosen = _backend.choose(
        "mlp_block",
        x.device,
        as_autocast(x).dtype,
        backend,
        lambda module: module.supports(as_autocast(x), w1),
    )
    implementation = (
        mlp_block_reference if chosen == "reference" else partial(_mlp_block_fused, chosen)
    )
    return implementation(x, norm_weight, norm_bias, w1, b1, w2, b2, dropout=dropout, eps=eps)


_mlp_block_backward = define(
    "mlp_block",
    "backward",
    "(Tensor dy, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor w1, Tensor b1, Tensor w2,"
    " Tensor b2, Tensor seed, *, float dropout, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda dy, *inputs, **_: tuple(t.new_empty(t.shape) for t in inputs[:-1]),
)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    if dy.stride(1) == 0:  # behind a mean over tokens, all of an image have the same
        dy = dy[:, :1]
    return *_mlp_block_backward(dy.contiguous(), *ctx.saved_tensors, **ctx.options), None


_mlp_block_forward = define(
    "mlp_block",
    "forward",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor w1, Tensor b1, Tensor w2, Tensor b2,"
    " Tensor seed, *, float dropout, float eps) -> Tensor",
    lambda x, *_, **__: x.new_empty(x.shape),
    backward=_backward,
)


def _mlp_block_fused(
    backend: str, x: Tensor, *parameters: Tensor, dropout: float, eps: float
) -> Tensor:
    """:func:`mlp_block` by the kernels of ``backend``."""
    x = autocast(x)
    batch, dim, height, width = x.shape
    tokens = x.permute(0, 2, 3, 1).reshape(batch, height * width, dim).contiguous()
    y: Tensor = _mlp_block_forward(
        tokens,
        *(parameter(t, parameter_dtype(x)) for t in parameters),
        seed_of(x, dropout),
        dropout=dropout,
        eps=eps,
        backend=backend,
    )
    return y.reshape(batch, height, width, dim).permute(0, 3, 1, 2)
