"""Attention with convolutional projections in C++ and CUDA C++.

The functions are those of ``conv_attention_*`` in ``tests/ops/primitives.py``. Statistics of the
projections are those of the values as stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eqcvt.native import launch, refuses_dtype

WIDTHS = range(16, 129)
MAX_FILTER = {"cpu": 31, "cuda": 7}


def supports(x: Tensor, filters: Tensor, *, heads: int, kv_stride: int) -> str | None:
    """Return why the kernels cannot serve a call, or None if they can.

    Args:
        x: ``[B, D, H, W]``.
        filters: depthwise filters ``[D, 1, k, k]`` of the queries.
        heads: number of heads.
        kv_stride: stride of the key and value projections.
    """
    reason = refuses_dtype(x)
    if reason is not None:
        return reason
    if not WIDTHS[0] <= x.shape[1] <= WIDTHS[-1]:
        return f"{x.shape[1]} channels are not between {WIDTHS[0]} and {WIDTHS[-1]}"
    widest = MAX_FILTER[x.device.type]
    if filters.shape[-1] > widest:
        return f"filters of {filters.shape[-1]} pixels are wider than {widest}"
    if min(heads, kv_stride, *x.shape[2:]) < 1:
        return f"{heads} heads, stride {kv_stride} and image {list(x.shape[2:])} must be positive"
    return None


def _channels_last(x: Tensor) -> Tensor:
    """Return ``[B, H, W, D]``, contiguous; a view of a tensor in that memory format."""
    return x.permute(0, 2, 3, 1).contiguous()


def project(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    kv_stride: int,
    moments: bool,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the raw depthwise projections as tokens, and their batch statistics.

    With ``norm_weight`` and ``norm_bias`` ``[D]``, those of the layer norm of ``x``.
    """
    B, D, H, W = x.shape
    keys = ((H - 1) // kv_stride + 1) * ((W - 1) // kv_stride + 1)
    statistics = (3 if v is not None else 2, D) if moments else (0,)
    a = x.new_empty(B, H * W, D)
    b = x.new_empty(B, keys, D)
    c = x.new_empty(b.shape if v is not None else (0,))
    mean = x.new_empty(statistics, dtype=torch.promote_types(x.dtype, torch.float32))
    variance = torch.empty_like(mean)
    launch(
        "conv_attention_project",
        *(_channels_last(x), q, k, v, norm_weight, norm_bias),
        *(B, D, H, W, q.shape[-1], kv_stride, moments, eps),
        *(a, b, c if v is not None else None),
        *((mean, variance) if moments else (None, None)),
        like=x,
    )
    return a, b, c, mean, variance


def project_backward(
    da: Tensor,
    db: Tensor,
    dc: Tensor | None,
    dmean: Tensor | None,
    dvariance: Tensor | None,
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    mean: Tensor | None,
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    kv_stride: int,
    eps: float = 1e-5,
) -> tuple[Tensor, ...]:
    """Return the gradients of ``x`` (channels last in memory), of the filters and the norm."""
    B, D, H, W = x.shape
    dx = x.new_empty(B, H, W, D)
    parameters = (q, k, v, norm_weight, norm_bias)
    gradients = [None if t is None else torch.empty_like(t) for t in parameters]
    launch(
        "conv_attention_project_backward",
        *(da, db, dc if v is not None else None, dmean, dvariance),
        *(a, b, c if v is not None else None, mean if dmean is not None else None),
        *(_channels_last(x), *parameters),
        *(B, D, H, W, q.shape[-1], kv_stride, eps),
        *(dx, *gradients),
        like=x,
    )
    return dx.permute(0, 3, 1, 2), *(q.new_empty(0) if t is None else t for t in gradients)


def attend(
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    residual: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    wq: Tensor,
    bq: Tensor,
    wo: Tensor,
    bo: Tensor,
    seed: Tensor,
    *,
    dropout: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result, and with ``save`` what the backward pass needs: heads, log-sum-exps."""
    B, N, D = a.shape
    heads = wq.shape[0]
    y = torch.empty_like(a)
    o = a.new_empty((B, N, heads, D) if save else (0,))
    lse = wq.new_empty((B, heads, N) if save else (0,))
    launch(
        "conv_attention_attend",
        *(a, b, c, residual, scale, shift, wq, bq, wo, bo, seed),
        *(B, N, b.shape[1], D, heads, save, dropout),
        *(y, *((o, lse) if save else (None, None))),
        like=a,
    )
    return y, o, lse


def attend_backward(
    dy: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    wq: Tensor,
    bq: Tensor,
    wo: Tensor,
    bo: Tensor,
    seed: Tensor,
    o: Tensor,
    lse: Tensor,
    *,
    dropout: float,
) -> tuple[Tensor, ...]:
    """Return the gradients of ``a, b, c`` (or empty), ``scale, shift, wq, bq, wo`` and ``bo``."""
    B, N, D = a.shape
    da, db = torch.empty_like(a), torch.empty_like(b)
    dc = torch.empty_like(c) if c is not None else a.new_empty(0)
    parameters = [torch.empty_like(t) for t in (scale, shift, wq, bq, wo, bo)]
    if B == 0:  # an empty c would be a null pointer, which stands for no c
        return da, db, dc, *(t.zero_() for t in parameters)
    launch(
        "conv_attention_attend_backward",
        *(dy, a, b, c, scale, shift, wq, bq, wo, bo, seed, o, lse),
        *(B, N, b.shape[1], D, wq.shape[0], dropout),
        *(da, db, dc if c is not None else None, *parameters),
        like=a,
    )
    return da, db, dc, *parameters
