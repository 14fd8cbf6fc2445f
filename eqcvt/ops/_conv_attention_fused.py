"""The fused form of :mod:`eqcvt.ops.conv_attention`.

A backend's projections, then one of two ways. With the pointwise weights folded, scores are
``a^T (W_q^T W_k) b`` and results ``(W_o W_v) b``, so attention runs in the ``D`` channels of the
tokens, where keys (and values) are one tensor for all heads, by a backend's kernel; the folded
matrices are small, and their gradients autograd's. Where tokens are wider than that pays, the norms
go into the pointwise weights, and torch's attention runs in the channels of the heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from eqcvt.ops import _backend
from eqcvt.ops._conv_attention import attend, fold, project
from eqcvt.ops._register import as_autocast, autocast, parameter, parameter_dtype, seed_of
from eqcvt.ops.norm import affine, batch_moments, unbiased

if TYPE_CHECKING:
    from eqcvt.ops.conv_attention import Depthwise, Norm, Pointwise, Statistics

# Folded, a score costs D products where it cost the d of a head; up to D / d of this it pays. On
# the CPU D = d is twice as fast as torch's attention, and D = 2 d a quarter slower.
FOLD_PAYS = {"cpu": 1.5}
# Where it does not, these devices take a backend's projections before torch's attention: on a GPU
# that saves a dozen passes, which was counted and not measured. On the CPU it is no faster than
# plain PyTorch.
UNFOLDED_PAYS = {"cuda"}


def split(tokens: Tensor, heads: int) -> Tensor:
    """Return tokens ``[B, N, heads * d]`` as heads ``[B, heads, N, d]``."""
    batch, count, width = tokens.shape
    return tokens.reshape(batch, count, heads, width // heads).transpose(1, 2)


def supports(
    module: Any,
    x: Tensor,
    q: Depthwise,
    k: Depthwise,
    v: Depthwise | None,
    w: Pointwise,
    heads: int,
    kv_stride: int,
) -> str | None:
    """Return why a backend, by its module, cannot serve a call, or None if it can."""
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


def conv_attention_fused(
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
        return split(F.linear(t, (weight * scale[i]).to(t.dtype), offset.to(t.dtype)), heads)

    core = F.scaled_dot_product_attention(
        product(a, 0, w.q, w.q_bias),
        product(b, 1, w.k, w.k_bias),
        product(b, 1, w.v, w.v_bias) if c is None else product(c, 2, w.v, w.v_bias),
    )
    bias = None if w.out_bias is None else w.out_bias.to(a.dtype)
    y = F.linear(core.transpose(1, 2).flatten(2), w.out.to(a.dtype), bias)
    return tokens + (F.dropout(y, dropout) if dropout > 0 else y)
