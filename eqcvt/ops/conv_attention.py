r"""Attention with convolutional projections, the core of the Convolutional vision Transformer.

.. math::
    a &= \mathrm{norm}(W^{dw}_q \star z), \quad b_k = \mathrm{norm}(W^{dw}_k \star z), \quad
    b_v = \mathrm{norm}(W^{dw}_v \star z) \\
    y &= x_0 + W_o \, \mathrm{concat}_h \; \mathrm{softmax}\!\left(
        \frac{(W_{q,h} a)^T (W_{k,h} b_k)}{\sqrt{d}} \right) W_{v,h} b_v + c

where ``z`` is ``x`` or its layer normalisation, with depthwise filters, strided for keys and
values, and batch normalisation before the pointwise weights. EqCvT and vit-pytorch share one
depthwise filter between keys and values (``k`` is ``v``); the original CvT has one each. There is
no position code, so permuting tokens permutes the result: with depthwise filters that are symmetric
under a group of the pixel grid, the op commutes with that group.

Source: Wu et al., "CvT: Introducing Convolutions to Vision Transformers", ICCV 2021,
    arXiv:2103.15808.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from eqcvt._check import probability, shapes
from eqcvt.ops import _backend
from eqcvt.ops._conv_attention_fused import conv_attention_fused, split, supports
from eqcvt.ops._register import as_autocast
from eqcvt.ops.norm import batch_norm, layer_norm


class Depthwise(NamedTuple):
    """One depthwise projection: its filters and the batch normalisation behind them.

    ``filters`` is ``[D, 1, k, k]``, ``weight`` and ``bias`` are ``[D]``, ``running`` is the mean
    and variance ``[D]`` to normalise with, or None for those of the batch.
    """

    filters: Tensor
    weight: Tensor
    bias: Tensor
    running: tuple[Tensor, Tensor] | None


class Norm(NamedTuple):
    """The layer normalisation in front: its ``weight`` and ``bias`` ``[D]``."""

    weight: Tensor
    bias: Tensor
    eps: float = 1e-5


class Pointwise(NamedTuple):
    """The products over channels: ``q, k, v`` ``[heads * d, D]`` and ``out`` ``[D, heads * d]``.

    Biases are of the length of their product's output, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    out_bias: Tensor | None = None


Statistics = tuple[Tensor, Tensor]


def _depthwise(
    x: Tensor, p: Depthwise, stride: int, eps: float, process_group: dist.ProcessGroup | None
) -> tuple[Tensor, Statistics | None]:
    """Return the normalised depthwise convolution ``[B, D, H', W']`` and its batch statistics."""
    padding = p.filters.shape[-1] // 2
    a = F.conv2d(x, p.filters, stride=stride, padding=padding, groups=x.shape[1])
    if p.running is not None:
        return F.batch_norm(a, p.running[0], p.running[1], p.weight, p.bias, eps=eps), None
    a, mean, variance = batch_norm(a, p.weight, p.bias, eps=eps, process_group=process_group)
    return a, (mean, variance)


def _heads(a: Tensor, weight: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """Project ``[B, D, H, W]`` to ``[B, heads, H * W, d]``."""
    return split(F.linear(a.flatten(2).transpose(1, 2), weight, bias), heads)


def _project(
    x: Tensor,
    q: Depthwise,
    k: Depthwise,
    v: Depthwise | None,
    w: Pointwise,
    heads: int,
    kv_stride: int,
    eps: float,
    process_group: dist.ProcessGroup | None,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Statistics | None, ...]]:
    """Return queries, keys and values ``[B, heads, tokens, d]`` and the statistics of each norm."""
    a, q_statistics = _depthwise(x, q, 1, eps, process_group)
    b, k_statistics = _depthwise(x, k, kv_stride, eps, process_group)
    statistics = [q_statistics, k_statistics]
    c = b
    if v is not None:
        c, v_statistics = _depthwise(x, v, kv_stride, eps, process_group)
        statistics.append(v_statistics)
    qkv = (
        _heads(a, w.q, w.q_bias, heads),
        _heads(b, w.k, w.k_bias, heads),
        _heads(c, w.v, w.v_bias, heads),
    )
    return qkv, tuple(statistics)


def conv_attention_reference(
    x: Tensor,
    residual: Tensor,
    q: Depthwise,
    k: Depthwise,
    v: Depthwise | None,
    w: Pointwise,
    *,
    norm: Norm | None,
    heads: int,
    kv_stride: int,
    dropout: float,
    eps: float,
    process_group: dist.ProcessGroup | None,
) -> tuple[Tensor, tuple[Statistics | None, ...]]:
    """The definition of :func:`conv_attention` in plain PyTorch."""
    if norm is not None:
        x = layer_norm(x, norm.weight, norm.bias, eps=norm.eps)
    qkv, statistics = _project(x, q, k, v, w, heads, kv_stride, eps, process_group)
    core = F.scaled_dot_product_attention(*qkv)
    y = F.linear(core.transpose(1, 2).flatten(2), w.out, w.out_bias)
    if dropout > 0:
        y = F.dropout(y, dropout)
    return residual + y.transpose(1, 2).reshape(residual.shape), statistics


def conv_attention(
    x: Tensor,
    residual: Tensor,
    q: Depthwise,
    k: Depthwise,
    v: Depthwise | None,
    w: Pointwise,
    *,
    norm: Norm | None = None,
    heads: int,
    kv_stride: int = 2,
    dropout: float = 0.0,
    eps: float = 1e-5,
    process_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Statistics | None, ...]]:
    """Apply attention with convolutional projections to tokens, and add the residual.

    Two runs have the same bits, gradients too, but where folding does not pay (on a GPU ``D > d``):
    there the core is torch's attention, and torch.use_deterministic_algorithms decides.

    Args:
        x: tokens ``[B, D, H, W]``, any memory format.
        residual: ``[B, D, H, W]``, added to the result.
        q: depthwise projection of the queries, stride 1.
        k: depthwise projection of the keys (and of the values, if ``v`` is None).
        v: depthwise projection of the values, or None.
        w: pointwise weights.
        norm: layer normalisation of ``x`` before the projections; None where ``x`` has had it.
        heads: number of heads; the scores are scaled by ``d ** -0.5`` of the head dimension ``d``.
        kv_stride: stride of the key and value projections.
        dropout: probability that an entry of the projected output is dropped, 0 in evaluation;
            kernels round it to 1 / 65536.
        eps: added to the variances.
        process_group: processes that share their batch statistics.
        backend: a backend's name; None for the one in force.

    Returns:
        ``y`` ``[B, D, H, W]``, and for each depthwise projection (q, k and, if given, v) its
        batch's mean and unbiased variance ``[D]``, or None where running statistics were given.

    Raises:
        ValueError: if shapes do not fit together, or ``dropout`` is not in [0, 1).
        CannotServe: if the backend asked for by name cannot serve the call.
    """
    if x.dim() != 4 or x.shape != residual.shape:
        raise ValueError(
            f"conv_attention needs x and residual [B, D, H, W] of one shape, "
            f"got {list(x.shape)} and {list(residual.shape)}"
        )
    probability("dropout", dropout)
    if min(heads, kv_stride) < 1:
        raise ValueError(f"heads and kv_stride must be at least 1, got {heads} and {kv_stride}")
    width = w.q.shape[0]
    if width % heads:
        raise ValueError(f"{width} query channels cannot be split into {heads} heads")
    if w.q.shape != w.k.shape or w.out.shape[1] != w.v.shape[0] or w.v.shape[0] % heads:
        raise ValueError(
            f"pointwise weights do not fit: q {list(w.q.shape)}, k {list(w.k.shape)}, "
            f"v {list(w.v.shape)}, out {list(w.out.shape)}"
        )
    for p in (q, k, v):
        if p is not None and not (
            p.filters.shape == (x.shape[1], 1, *2 * p.filters.shape[-1:])
            and p.filters.shape[-1] % 2
        ):
            raise ValueError(
                f"a depthwise projection of {x.shape[1]} channels needs filters "
                f"[{x.shape[1]}, 1, k, k] with odd k, got {list(p.filters.shape)}"
            )
    _check_parameters(x.shape[1], q, k, v, w, norm)
    chosen = _backend.choose(
        "conv_attention",
        x.device,
        as_autocast(x).dtype,
        backend,
        lambda module: supports(module, x, q, k, v, w, heads, kv_stride),
    )
    implementation = (
        conv_attention_reference if chosen == "reference" else partial(conv_attention_fused, chosen)
    )
    return implementation(
        x,
        residual,
        q,
        k,
        v,
        w,
        norm=norm,
        heads=heads,
        kv_stride=kv_stride,
        dropout=dropout,
        eps=eps,
        process_group=process_group,
    )


def _check_parameters(
    dim: int, q: Depthwise, k: Depthwise, v: Depthwise | None, w: Pointwise, norm: Norm | None
) -> None:
    expected: dict[str, tuple[Tensor | None, Sequence[int]]] = {}
    for name, p in (("q", q), ("k", k), ("v", v), ("norm", norm)):
        if p is not None:
            expected |= {f"{name}.weight": (p.weight, (dim,)), f"{name}.bias": (p.bias, (dim,))}
        if isinstance(p, Depthwise) and p.running is not None:
            expected[f"{name}'s running mean"] = (p.running[0], (dim,))
            expected[f"{name}'s running variance"] = (p.running[1], (dim,))
    for name in ("q", "k", "v"):
        matrix = getattr(w, name)
        expected[f"w.{name}"] = (matrix, (matrix.shape[0], dim))
        expected[f"w.{name}_bias"] = (getattr(w, f"{name}_bias"), matrix.shape[:1])
    expected["w.out"] = (w.out, (dim, w.v.shape[0]))
    expected["w.out_bias"] = (w.out_bias, (dim,))
    shapes("conv_attention", expected)


def attention_weights(
    x: Tensor,
    q: Depthwise,
    k: Depthwise,
    w: Pointwise,
    *,
    norm: Norm | None = None,
    heads: int,
    kv_stride: int = 2,
    eps: float = 1e-5,
) -> Tensor:
    """Return the softmax weights ``[B, heads, N, M]`` of :func:`conv_attention`, for pictures.

    Arguments are those of :func:`conv_attention`; memory grows with queries times keys.
    """
    if norm is not None:
        x = layer_norm(x, norm.weight, norm.bias, eps=norm.eps)
    (queries, keys, _), _ = _project(x, q, k, None, w, heads, kv_stride, eps, None)
    scores = queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
    return torch.softmax(scores, -1)
