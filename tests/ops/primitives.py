"""What every backend module computes, in plain PyTorch: the judge of the kernels.

The functions are those of ``eqcvt.kernels.<op>`` and ``eqcvt.native.<op>``, with the same arguments
and results; gradients come from autograd. They run in the dtype they are given, so a kernel is
measured against float64 here, beside the same call in its own dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROUNDS = 10
LOW, MULTIPLIERS, WEYL = 0xFFFFFFFF, (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)


def philox(seed: int, index: Tensor, stream: int) -> Tensor:
    """The 16-bit numbers (as int64) of Philox4x32-10 for linear indices, eight indices a block."""
    block = index >> 3
    c = [block & LOW, block >> 32, torch.full_like(block, stream), torch.zeros_like(block)]
    key = [seed & LOW, (seed >> 32) & LOW]
    for _ in range(ROUNDS):
        # Products of two 32-bit words, in halves so that int64 holds them.
        halves = [_wide_product(MULTIPLIERS[i], c[2 * i]) for i in range(2)]
        (high0, low0), (high1, low1) = halves
        c = [high1 ^ c[1] ^ key[0], low1, high0 ^ c[3] ^ key[1], low0]
        key = [(k + w) & LOW for k, w in zip(key, WEYL, strict=True)]
    numbers = torch.stack([part for word in c for part in (word & 0xFFFF, word >> 16)])
    return numbers.gather(0, (index & 7).unsqueeze(0)).squeeze(0)


def _wide_product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    total = low + ((high & 0xFFFF) << 16)
    return ((high >> 16) + (total >> 32)) & LOW, total & LOW


def keep(seed: Tensor, shape: torch.Size, dropout: float, stream: int) -> Tensor | float:
    """The factor of each entry under dropout: 0, or one over what is kept of 65536 numbers."""
    dropped = round(dropout * 2**16)
    if dropped == 0:
        return 1.0
    index = torch.arange(shape.numel(), dtype=torch.int64).reshape(shape)
    number = philox(int(seed.item()), index, stream)
    return (number >= dropped).double() * (2**16 / max(2**16 - dropped, 1))


def _grads(y: Tensor, dy: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [g.detach() for g in torch.autograd.grad(y, inputs, dy.to(y.dtype))]


def _leaf(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


# lift


def _conv(x: Tensor, bank: Tensor, mask: Tensor | None, stride: int, padding: int) -> Tensor:
    if mask is not None:
        x = x * mask.to(x.dtype)
    u = F.conv2d(x, bank.to(x.dtype).flatten(0, 1), stride=stride, padding=padding)
    return u.unflatten(1, bank.shape[:2])


def lift_moments(
    x: Tensor, bank: Tensor, mask: Tensor | None, *, stride: int, padding: int, correlate: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    u = _conv(x, bank, mask, stride, padding).to(bank.dtype)
    mean, variance = u.mean((0, 2, 3, 4)), u.var((0, 2, 3, 4), correction=0)
    if not correlate:
        return mean, variance, bank.new_empty(0), bank.new_empty(0)
    (leaf,) = _leaf(bank)
    v = _conv(x, leaf, mask, stride, padding)
    (ux,) = _grads(v, u, [leaf])
    (ones,) = _grads(_conv(x, leaf, mask, stride, padding), torch.ones_like(v), [leaf])
    return mean, variance, ux, ones[0, 0]


def lift_moments_input(
    x: Tensor,
    bank: Tensor,
    mask: Tensor | None,
    c1: Tensor,
    c2: Tensor,
    *,
    stride: int,
    padding: int,
) -> Tensor:
    (leaf,) = _leaf(x)
    u = _conv(leaf, bank, mask, stride, padding)
    view = (-1, 1, 1, 1)
    return _grads(u, c1.view(view) + c2.view(view) * u.detach(), [leaf])[0]


def lift_apply(
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
    u = _conv(x, bank, mask, stride, padding)
    view = (-1, 1, 1, 1)
    v = F.relu(u * scale.view(view).to(u.dtype) + shift.view(view).to(u.dtype))
    if blur is not None:
        flat = v.flatten(1, 2)
        weight = torch.outer(blur, blur).to(v.dtype).expand(flat.shape[1], 1, -1, -1)
        flat = F.conv2d(flat, weight, stride=blur_stride, groups=flat.shape[1])
        v = flat.unflatten(1, v.shape[1:3])
    if not pool:
        return v, torch.empty(0, dtype=torch.uint8)
    y, arg = v.max(2)
    return y, arg.to(torch.uint8)


def lift_apply_backward(
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
    x_, bank_, scale_, shift_ = _leaf(x, bank, scale, shift)
    y, _ = lift_apply(
        x_,
        bank_,
        mask,
        scale_,
        shift_,
        blur,
        stride=stride,
        padding=padding,
        blur_stride=blur_stride,
        pool=False,
    )
    if pool:
        y = y.gather(2, arg.long().unsqueeze(2)).squeeze(2)
    dbank, dscale, dshift, dx = _grads(y, dy, [bank_, scale_, shift_, x_])
    return dbank, dscale, dshift, dx if input_gradient else x.new_empty(0)


# conv_attention


def _depthwise(x: Tensor, filters: Tensor, stride: int) -> Tensor:
    padding = filters.shape[-1] // 2
    a = F.conv2d(x, filters.to(x.dtype), stride=stride, padding=padding, groups=x.shape[1])
    return a.flatten(2).transpose(1, 2)


def conv_attention_project(
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
    if norm_weight is not None and norm_bias is not None:
        params = norm_weight.to(x.dtype), norm_bias.to(x.dtype)
        x = F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), *params, eps).permute(0, 3, 1, 2)
    raw = [_depthwise(x, q, 1), _depthwise(x, k, kv_stride)]
    if v is not None:
        raw.append(_depthwise(x, v, kv_stride))
    mean = variance = q.new_empty(0)
    if moments:
        wide = [t.to(q.dtype) for t in raw]
        mean = torch.stack([t.mean((0, 1)) for t in wide])
        variance = torch.stack([t.var((0, 1), correction=0) for t in wide])
    return raw[0], raw[1], raw[2] if v is not None else x.new_empty(0), mean, variance


def conv_attention_project_backward(
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
    inputs = (x, q, k, v, norm_weight, norm_bias)
    leaves = [None if t is None else _leaf(t)[0] for t in inputs]
    there = [t for t in leaves if t is not None]
    raw = conv_attention_project(*leaves, kv_stride=kv_stride, moments=False, eps=eps)
    raw = raw[: 2 if v is None else 3]
    gradients = []
    for i, (g, t) in enumerate(zip([da, db, dc], [a, b, c], strict=True)):
        if t is None or g is None:
            continue
        g = g.to(q.dtype)
        if dmean is not None and dvariance is not None and mean is not None:
            count = t.shape[0] * t.shape[1]
            g = g + (dmean[i] + 2 * dvariance[i] * (t.to(q.dtype) - mean[i])) / count
        gradients.append(g.to(x.dtype))
    found = iter(torch.autograd.grad(raw, there, gradients))
    return tuple(q.new_empty(0) if t is None else next(found).detach() for t in leaves)


def conv_attention_fold(
    mean: Tensor,
    variance: Tensor,
    weight_a: Tensor,
    bias_a: Tensor,
    weight_b: Tensor,
    bias_b: Tensor,
    weight_c: Tensor | None,
    bias_c: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    v_bias: Tensor | None,
    out_bias: Tensor | None,
    *,
    heads: int,
    eps: float,
) -> tuple[Tensor, ...]:
    dtype = mean.dtype
    weight = torch.stack([t.to(dtype) for t in (weight_a, weight_b, weight_c) if t is not None])
    bias = torch.stack([t.to(dtype) for t in (bias_a, bias_b, bias_c) if t is not None])
    scale = weight / (variance + eps).sqrt()
    shift = bias - mean * scale
    q, k, v, out = (t.to(dtype) for t in (q, k, v, out.T))
    q, k, v, out = (t.unflatten(0, (heads, -1)) for t in (q, k, v, out))
    zeros = [q.new_zeros(n) for n in (*[heads * q.shape[1]] * 2, q.shape[2])]
    given = [z if t is None else t.to(dtype) for t, z in zip((q_bias, v_bias, out_bias), zeros)]  # noqa: B905
    bq, bv = (t.unflatten(0, (heads, -1)) for t in given[:2])
    factor = q.shape[1] ** -0.5
    wq = torch.einsum("hei,hej->hij", q, k) * factor
    wo = torch.einsum("hei,hej->hij", v, out)
    cq = torch.einsum("he,hej->hj", bq, k) * factor
    if k_bias is not None:
        cq = cq + 0 * k_bias.to(dtype).sum()
    return scale, shift, wq, cq, wo, given[2] + torch.einsum("he,hej->j", bv, out)


def conv_attention_fold_backward(*inputs: Any, heads: int, eps: float) -> tuple[Tensor, ...]:
    gradients, leaves = inputs[:6], [None if t is None else _leaf(t)[0] for t in inputs[6:]]
    outputs = conv_attention_fold(*leaves, heads=heads, eps=eps)
    there = [t for t in leaves if t is not None]
    found = iter(
        torch.autograd.grad(
            outputs, there, [g.to(o.dtype) for g, o in zip(gradients, outputs, strict=True)]
        )
    )
    mean, variance, wa, ba, wb, bb, wc, bc, *rest = (
        None if t is None else next(found) for t in leaves
    )
    dtype = mean.dtype
    dweight = torch.stack([t.to(dtype) for t in (wa, wb, wc) if t is not None])
    dbias = torch.stack([t.to(dtype) for t in (ba, bb, bc) if t is not None])
    empty = mean.new_empty(0)
    return mean, variance, dweight, dbias, *(empty if t is None else t for t in rest)


def conv_attention_attend(
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
    def affine(t: Tensor, i: int) -> Tensor:
        return t * scale[i].to(t.dtype) + shift[i].to(t.dtype)

    keys = affine(b, 1)
    values = keys if c is None else affine(c, 2)
    queries = torch.einsum("bnd,hde->bhne", affine(a, 0), wq.to(a.dtype))
    queries = queries + bq.to(a.dtype).unsqueeze(1)
    scores = queries @ keys.unsqueeze(1).transpose(-1, -2)
    o = (torch.softmax(scores, -1) @ values.unsqueeze(1)).transpose(1, 2)
    y = torch.einsum("bnhd,hde->bne", o, wo.to(a.dtype)) + bo.to(a.dtype)
    factor = keep(seed, y.shape, dropout, 0)
    y = y * (factor.to(y.dtype) if isinstance(factor, Tensor) else factor)
    if residual is not None:
        y = residual + y
    if not save:
        return y, a.new_empty(0), wq.new_empty(0)
    return y, o.contiguous(), torch.logsumexp(scores.to(wq.dtype), -1)


def conv_attention_attend_backward(
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
    a_, b_, *params = _leaf(a, b, scale, shift, wq, bq, wo, bo)
    c_ = None if c is None else _leaf(c)[0]
    y = conv_attention_attend(a_, b_, c_, None, *params, seed, dropout=dropout, save=False)[0]
    inputs = [a_, b_, *([c_] if c_ is not None else []), *params]
    found = _grads(y, dy, inputs)
    if c_ is None:
        found.insert(2, a.new_empty(0))
    return tuple(found)


# mlp_block


def mlp_block_forward(
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
    dtype = x.dtype
    t = F.layer_norm(x, (x.shape[-1],), norm_weight.to(dtype), norm_bias.to(dtype), eps)
    hidden = F.gelu(F.linear(t, w1.to(dtype), b1.to(dtype)))
    factor = keep(seed, hidden.shape, dropout, 1)
    hidden = hidden * (factor.to(dtype) if isinstance(factor, Tensor) else factor)
    y = F.linear(hidden, w2.to(dtype), b2.to(dtype))
    factor = keep(seed, y.shape, dropout, 2)
    return x + y * (factor.to(dtype) if isinstance(factor, Tensor) else factor)


def mlp_block_backward(
    dy: Tensor, x: Tensor, *params_and_seed: Tensor, dropout: float, eps: float
) -> tuple[Tensor, ...]:
    *params, seed = params_and_seed
    leaves = _leaf(x, *params)
    y = mlp_block_forward(*leaves, seed, dropout=dropout, eps=eps)
    return tuple(_grads(y, dy, leaves))


# token_embed


def token_embed_forward(
    x: Tensor,
    filters: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    stride: int,
    padding: int,
    eps: float,
) -> Tensor:
    dtype = x.dtype
    y = F.conv2d(x, filters.to(dtype), bias.to(dtype), stride=stride, padding=padding)
    y = y.permute(0, 2, 3, 1).contiguous()
    return F.layer_norm(y, (y.shape[-1],), norm_weight.to(dtype), norm_bias.to(dtype), eps)


def token_embed_backward(
    dy: Tensor,
    x: Tensor,
    *params: Tensor,
    stride: int,
    padding: int,
    eps: float,
    input_gradient: bool,
) -> tuple[Tensor, ...]:
    leaves = _leaf(x, *params)
    y = token_embed_forward(*leaves, stride=stride, padding=padding, eps=eps)
    dx, *rest = _grads(y, dy, leaves)
    return (dx if input_gradient else x.new_empty(0), *rest)
