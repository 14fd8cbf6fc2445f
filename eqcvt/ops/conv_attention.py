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
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from eqcvt._check import probability, shapes
from eqcvt.ops import _backend
from eqcvt.ops._conv_attention import attend, fold, project
from eqcvt.ops._register import as_autocast, autocast, parameter, parameter_dtype, seed_of
from eqcvt.ops.norm import affine, batch_moments, batch_norm, layer_norm, unbiased


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
# Folded, a score costs D products where it cost the d of a head; up to D / d of this it pays. On
# the CPU D = d is twice as fast as torch's attention, and D = 2 d a quarter slower.
FOLD_PAYS = {"cpu": 1.5}
# Where it does not, these devices take a backend's projections before torch's attention: on a GPU
# that saves a dozen passes, which was counted and not measured. On the CPU it is no faster than
# plain PyTorch.
UNFOLDED_PAYS = {"cuda"}


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


def _split(tokens: Tensor, heads: int) -> Tensor:
    """Return tokens ``[B, N, heads * d]`` as heads ``[B, heads, N, d]``."""
    batch, count, width = tokens.shape
    return tokens.reshape(batch, count, heads, width // heads).transpose(1, 2)


def _heads(a: Tensor, weight: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """Project ``[B, D, H, W]`` to ``[B, heads, H * W, d]``."""
    return _split(F.linear(a.flatten(2).transpose(1, 2), weight, bias), heads)


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
        lambda module: _supports(module, x, q, k, v, w, heads, kv_stride),
    )
    implementation = (
        conv_attention_reference
        if chosen == "reference"
        else partial(_conv_attention_fused, chosen)
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


# The fused form: a backend's projections, then one of two ways. With the pointwise weights folded,
# scores are a^T (W_q^T W_k) b and results (W_o W_v) b, so attention runs in the D channels of the
# tokens, where keys (and values) are one tensor for all heads, by a backend's kernel; the folded
# matrices are small, and their gradients autograd's. Where tokens are wider than that pays, the
# norms go into the pointwise weights, and torch's attention runs in the channels of the heads.


def _supports(
    module: Any,
    x: Tensor,
    q: Depthwise,
    k: Depthwise,
    v: Depthwise | None,
    w: Pointwise,
    heads: int,
    kv_stride: int,
) -> str | None:
    if len({tuple(p.filters.shape) for p in (q, k, v) if p is not None}) > 1:
        return "its depthwise filters differ in size"
    if x.device.type not in UNFOLDED_PAYS and not _folds(x, w, heads):
        if w.v.shape != w.q.shape:
            return "its heads of queries and values differ in width"
        head_dim = w.q.shape[0] // heads
        most = int(FOLD_PAYS.get(x.device.type, 1) * head_dim)
        return (
            f"{x.shape[1]} channels are too many to fold heads of {head_dim} into "
            f"(up to {most} pay)"
        )
    reason: str | None = module.supports(
        as_autocast(x), q.filters, heads=heads, kv_stride=kv_stride
    )
    return reason


def _folds(x: Tensor, w: Pointwise, heads: int) -> bool:
    """Return whether the weights are better folded."""
    head_dim = w.q.shape[0] // heads
    same = w.v.shape[0] == w.q.shape[0]
    return same and x.shape[1] <= FOLD_PAYS.get(x.device.type, 1) * head_dim


def _fold(w: Pointwise, heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``wq [h, D, D]``, ``bq [h, D]``, ``wo [h, D, D]`` and ``bo [D]``.

    Queries become ``a wq + bq`` and results ``o wo + bo``. The bias of the keys is left out: it
    adds the same to all scores of a query, which the softmax does not see. Its gradient is zero.
    """
    q, k, v, out = (t.to(dtype) for t in w[:4])
    width, dim = q.shape
    head_dim = width // heads
    scale = head_dim**-0.5
    q, k, v = (t.reshape(heads, head_dim, dim) for t in (q, k, v))
    out = out.reshape(dim, heads, head_dim).permute(1, 2, 0)
    wq = scale * (q.transpose(1, 2) @ k)
    wo = v.transpose(1, 2) @ out
    bq = wq.new_zeros(heads, dim)
    if w.q_bias is not None:
        bias = w.q_bias.to(dtype).reshape(heads, 1, head_dim)
        bq = scale * (bias @ k).squeeze(1)
    if w.k_bias is not None:
        # Zero but there: parallel training waits for a gradient of every parameter.
        bq = bq + 0 * w.k_bias.to(dtype).sum()
    bo = wq.new_zeros(dim) if w.out_bias is None else w.out_bias.to(dtype)
    if w.v_bias is not None:
        bo = bo + (w.v_bias.to(dtype).reshape(heads, 1, head_dim) @ out).sum((0, 1))
    return wq.contiguous(), bq, wo.contiguous(), bo


def _moments(
    projections: Sequence[Depthwise],
    mean: Tensor,
    variance: Tensor,
    counts: Sequence[int],
    dtype: torch.dtype,
    process_group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, tuple[Statistics | None, ...]]:
    """Return the moments ``[P, D]`` that the projections are normalised with, and the batch's."""
    if process_group is None and all(p.running is None for p in projections):
        means, variances = mean.detach(), unbiased(variance.detach(), counts[: len(variance)])
        return mean, variance, tuple(zip(means.unbind(), variances, strict=True))
    moments: list[Statistics] = []
    statistics: list[Statistics | None] = []
    for i, p in enumerate(projections):
        if p.running is not None:
            moments.append((p.running[0].to(dtype), p.running[1].to(dtype)))
            statistics.append(None)
        else:
            own, spread, whole = batch_moments(mean[i], variance[i], counts[i], process_group)
            moments.append((own, spread))
            statistics.append((own.detach(), whole))
    mean, variance = (torch.stack(each) for each in zip(*moments, strict=True))
    return mean, variance, tuple(statistics)


def _affine(
    projections: Sequence[Depthwise], mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the norms of the projections as scale and shift ``[P, D]``."""
    weight = torch.stack([p.weight for p in projections])
    bias = torch.stack([p.bias for p in projections])
    return affine(mean, variance, weight, bias, eps)


def _conv_attention_fused(
    backend: str,
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
    """:func:`conv_attention` by the kernels of ``backend``."""
    shared = residual is x
    x = autocast(x)
    residual = x if shared else autocast(residual)
    batch, dim, height, width = x.shape
    dtype = parameter_dtype(x)
    projections = [p for p in (q, k, v) if p is not None]
    parameters = [
        None if t is None else parameter(t, dtype)
        for t in (
            q.filters,
            k.filters,
            None if v is None else v.filters,
            *((None, None) if norm is None else norm[:2]),
        )
    ]
    a, b, c, mean, variance = project(
        x,
        *parameters,
        kv_stride=kv_stride,
        moments=any(p.running is None for p in projections),
        eps=0.0 if norm is None else norm.eps,
        backend=backend,
    )
    counts = [batch * n for n in (a.shape[1], b.shape[1], b.shape[1])]
    with torch.autocast(x.device.type, enabled=False):
        mean, variance, statistics = _moments(
            projections, mean, variance, counts, dtype, process_group
        )
        tokens = residual.permute(0, 2, 3, 1).reshape(batch, height * width, dim).contiguous()
        raw = (a, b, None if v is None else c)
        if _folds(x, w, heads):
            folded = _parameters(backend, projections, mean, variance, w, heads, eps)
            y = _folded(backend, raw, tokens, folded, dropout)
        else:
            scale, shift = _affine(projections, mean, variance, eps)
            y = _unfolded(raw, tokens, scale, shift, w, heads, dropout)
    return y.reshape(batch, height, width, dim).permute(0, 3, 1, 2), statistics


def _parameters(
    backend: str,
    projections: Sequence[Depthwise],
    mean: Tensor,
    variance: Tensor,
    w: Pointwise,
    heads: int,
    eps: float,
) -> tuple[Tensor, ...]:
    """Return ``scale`` and ``shift`` of the norms, and the weights folded."""
    if not _backend.has("conv_attention", backend, "fold"):
        return *_affine(projections, mean, variance, eps), *_fold(w, heads, mean.dtype)
    norms = [t for p in projections for t in (p.weight, p.bias)]
    absent = [None] * (6 - len(norms))
    found: tuple[Tensor, ...] = fold(
        mean, variance, *norms, *absent, *w, heads=heads, eps=eps, backend=backend
    )
    return found


def _folded(
    backend: str,
    raw: tuple[Tensor, Tensor, Tensor | None],
    tokens: Tensor,
    parameters: tuple[Tensor, ...],
    dropout: float,
) -> Tensor:
    """Return the result ``[B, N, D]`` by the kernels of ``backend``, from raw projections."""
    same = tokens.dtype == raw[0].dtype
    inputs = (*raw, tokens, *parameters)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    y: Tensor = attend(
        *raw,
        tokens if same else None,
        *parameters,
        seed_of(raw[0], dropout),
        dropout=dropout,
        save=save,
        backend=backend,
    )[0]
    return y if same else tokens + y


def _unfolded(
    raw: tuple[Tensor, Tensor, Tensor | None],
    tokens: Tensor,
    scale: Tensor,
    shift: Tensor,
    w: Pointwise,
    heads: int,
    dropout: float,
) -> Tensor:
    """Return the result ``[B, N, D]`` by torch's attention, from raw projections."""
    a, b, c = raw

    def product(t: Tensor, i: int, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the heads ``[B, heads, tokens, d]`` of ``W (scale t + shift) + bias``."""
        weight = weight.to(scale.dtype)
        offset = weight @ shift[i]
        offset = offset if bias is None else offset + bias.to(scale.dtype)
        return _split(F.linear(t, (weight * scale[i]).to(t.dtype), offset.to(t.dtype)), heads)

    core = F.scaled_dot_product_attention(
        product(a, 0, w.q, w.q_bias),
        product(b, 1, w.k, w.k_bias),
        product(b, 1, w.v, w.v_bias) if c is None else product(c, 2, w.v, w.v_bias),
    )
    bias = None if w.out_bias is None else w.out_bias.to(a.dtype)
    y = F.linear(core.transpose(1, 2).flatten(2), w.out.to(a.dtype), bias)
    return tokens + (F.dropout(y, dropout) if dropout > 0 else y)
