"""The MLP block by the native extension; the functions of ``tests/ops/primitives.py``.

Between forward and backward nothing is kept but the tokens: kernels make the hidden layer again, a
tile at a time. Parameters and their gradients are float32 beside half-precision tokens; sums over
tokens are finished in float64.
"""

from __future__ import annotations

from torch import Tensor

from eqcvt.native import launch, refuses_dtype

WIDEST = 128


def supports(x: Tensor, w1: Tensor) -> str | None:
    """Return why the extension cannot serve a call, or None if it can.

    Args:
        x: tokens, of any shape.
        w1: ``[E, D]``.
    """
    reason = refuses_dtype(x)
    if reason is not None:
        return reason
    if x.device.type == "cuda" and w1.shape[1] > WIDEST:
        return f"{w1.shape[1]} channels are more than the {WIDEST} of the CUDA kernels"
    return None


def forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    seed: Tensor,
    *,
    dropout: float,
    eps: float,
) -> Tensor:
    """Return ``x + drop(W2 drop(GELU(W1 LN(x) + b1)) + b2)``.

    Args:
        x: ``[B, N, D]``.
        norm_weight: ``[D]``, dtype of parameters like all that follow.
        norm_bias: ``[D]``.
        w1: ``[E, D]``.
        b1: ``[E]``.
        w2: ``[D, E]``.
        b2: ``[D]``.
        seed: int64 ``[1]``, of the dropout masks.
        dropout: probability of dropping an entry.
        eps: added to the variance of the norm.
    """
    x = x.contiguous()
    y = x.new_empty(x.shape)
    launch(
        "mlp_block_forward",
        *(x, norm_weight, norm_bias, w1, b1, w2, b2, seed),
        *(*x.shape, w1.shape[0], dropout, eps, y),
        like=x,
    )
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    seed: Tensor,
    *,
    dropout: float,
    eps: float,
) -> tuple[Tensor, ...]:
    """Return the gradients of ``x`` and of the parameters in their order, from that of ``y``.

    Arguments are those of :func:`forward`; ``dy`` may be ``[B, 1, D]``, alike for all tokens.
    """
    x, dy = x.contiguous(), dy.expand(x.shape).contiguous()
    parameters = (norm_weight, norm_bias, w1, b1, w2, b2)
    gradients = (x.new_empty(x.shape), *(p.new_empty(p.shape) for p in parameters))
    launch(
        "mlp_block_backward",
        *(dy, x, *parameters, seed),
        *(*x.shape, w1.shape[0], dropout, eps, *gradients),
        like=x,
    )
    return gradients
