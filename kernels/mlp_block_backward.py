"""The MLP block's gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dropout as dropout_mask
from . import launches
from .common import cdiv, padded, precision, programs, sum_rows, tf32_factor
from .layer_norm import normalise, normalise_backward
from .mlp_block_hidden import affine_weights, hidden_backward, launch_of, weights_of


@triton.jit
def _gradient(
    dy_ptr,
    alike,
    row,
    N,
    o_n,
    offsets,
    mask,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIKE: tl.constexpr,
):
    """Load the gradient of a tile's results; with ALIKE that of ``alike`` tokens is one row."""
    if ALIKE:  # at least as many as a tile has: it meets two rows, or one and then no more tokens
        first = row // alike
        left = (first + 1) * alike - row
        o_d = tl.arange(0, BLOCK_D)
        dy_ptr += first * D + o_d
        one = tl.load(dy_ptr, mask=o_d < D, other=0.0).to(tl.float32)
        two = tl.load(dy_ptr + D, mask=(o_d < D) & (row + left < N), other=0.0).to(tl.float32)
        return tl.where((o_n < left)[:, None], one[None, :], two[None, :])
    return tl.load(dy_ptr + row * D + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _input(
    dy_ptr,
    alike,
    x_ptr,
    seed_ptr,
    row,
    N,
    o_n,
    offsets,
    mask,
    m_d,
    threshold,
    factor,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIKE: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    """Return a tile's normalised tokens, 1 / deviation, and the gradient before the last mask."""
    x = tl.load(x_ptr + row * D + offsets, mask=mask, other=0.0).to(tl.float32)
    unit, rstd = normalise(x, m_d, eps, D)
    g = _gradient(dy_ptr, alike, row, N, o_n, offsets, mask, D, BLOCK_D, ALIKE)
    if HAS_DROPOUT:
        g *= dropout_mask.keep_factor(
            tl.load(seed_ptr), row + o_n, threshold, factor, 0, D, BLOCK_D, 2
        )
    return unit, rstd, g


@triton.jit
def _halved(t, APART: tl.constexpr):
    """Add row r + APART of every 2 APART to row r: cheap where one thread has both."""
    t = tl.reshape(t, [t.shape[0] // (2 * APART), 2, APART, t.shape[1]])
    return tl.sum(t, 1)


@triton.jit
def _column_sums(t):
    """Sum the first two of three axes."""
    return tl.sum(tl.reshape(t, [t.shape[0] * t.shape[1], t.shape[2]]), 0)


@triton.jit(do_not_specialize=["tiles", "N"])
def _mlp_block_bwd_kernel(
    dy_ptr,
    alike,
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    w1_ptr,
    b1_ptr,
    w2_ptr,
    seed_ptr,
    dx_ptr,
    parts_ptr,
    threshold,
    factor,
    eps,
    tiles,
    N,
    E: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ALIKE: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write ``dx`` and this program's share of the parameters' gradients.

    One program owns BLOCK_E hidden channels, their weights in reach, and a run of the ``tiles`` of
    BLOCK_N of all N tokens of the batch::

        tokens    x -> LN -> [ W1, GELU'        ]
        BLOCK_N   dy ------> [ W2^T -> W1^T     ]  -> LN' -> dx
                             [ dw1, dw2, db1 += ]

    Where BLOCK_E are not all hidden channels, ``x`` and ``dy`` are what the tokens' kernel wrote
    with ``dx``: normalised, and before the last mask. The norm's affine map is taken into ``w1``:
    with ``P = du^T unit`` all parameters before the GELU follow from P and db1, at the end::

        dw1 = norm_weight P + norm_bias db1
        dnorm_weight = sum over e of w1 P, dnorm_bias = sum over e of w1 db1

    ``parts`` is ``[runs, 2 E D + E + 2 D blocks]``: dw1, dw2, db1, then dnorm_weight, dnorm_bias of
    each block of hidden channels; and db2 if that is one. All are summed in registers: no tile adds
    anything up across threads. Bytes: 3 D numbers per token (0.03 ms at batch 128, 3,721 tokens and
    D = 32); 10 D E operations on the tensor cores per token, E times about 45 others. Accumulates
    in fp32, tiles in order.
    """
    i_p = tl.program_id(0).to(tl.int64)
    begin = i_p * tiles // tl.num_programs(0)
    end = (i_p + 1) * tiles // tl.num_programs(0)
    ALL: tl.constexpr = E <= BLOCK_E
    first = tl.program_id(1) * BLOCK_E
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    o_e = first + tl.arange(0, BLOCK_E)
    m_d = o_d < D
    m_e = o_e < E
    m_ed = m_e[:, None] & m_d[None, :]
    offsets = o_n[:, None] * D + o_d[None, :]
    dtype = x_ptr.dtype.element_ty

    w1, b1, w2 = affine_weights(
        norm_weight_ptr, norm_bias_ptr, w1_ptr, b1_ptr, w2_ptr, first, dtype, E, D, BLOCK_D, BLOCK_E
    )
    # The second weight's gradient is kept transposed, so that both products have E rows.
    p = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    dw2 = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    db1 = tl.zeros([BLOCK_N // 16, 8, BLOCK_E], tl.float32)
    db2 = tl.zeros([1, BLOCK_N // 2, BLOCK_D], tl.float32)
    for tile in tl.range(begin, end):
        row = tile * BLOCK_N
        mask = (row + o_n < N)[:, None] & m_d[None, :]
        if ALL:
            unit, rstd, g = _input(
                dy_ptr,
                alike,
                x_ptr,
                seed_ptr,
                row,
                N,
                o_n,
                offsets,
                mask,
                m_d,
                threshold,
                factor,
                eps,
                D,
                BLOCK_D,
                ALIKE,
                HAS_DROPOUT,
            )
        else:
            unit = tl.load(x_ptr + row * D + offsets, mask=mask, other=0.0)
            g = tl.load(dy_ptr + row * D + offsets, mask=mask, other=0.0)
        if ALL:
            db2 += _halved(g, BLOCK_N // 2)
        unit = tf32_factor(unit.to(dtype), PRECISION)
        g = g.to(dtype)
        kept, du = hidden_backward(
            unit,
            g,
            w1,
            b1,
            w2,
            seed_ptr,
            row,
            o_n,
            first,
            threshold,
            factor,
            E,
            BLOCK_E,
            HAS_DROPOUT,
            PRECISION,
        )
        db1 += _halved(du, 8)
        du = tf32_factor(du.to(dtype), PRECISION)
        p = tl.dot(tl.trans(du), unit, p, input_precision=PRECISION)
        dw2 = tl.dot(tl.trans(kept.to(dtype)), g, dw2, input_precision=PRECISION)
        if ALL:
            dunit = tl.dot(du, w1, input_precision=PRECISION)
            # Read again rather than kept, which would cost registers through all hidden channels.
            dy = _gradient(dy_ptr, alike, row, N, o_n, offsets, mask, D, BLOCK_D, ALIKE)
            dx = dy + normalise_backward(dunit, unit.to(tl.float32), rstd, D)
            tl.store(dx_ptr + row * D + offsets, dx.to(dtype), mask=mask)

    parts_ptr += i_p * (2 * E * D + E + (2 * tl.num_programs(1) + ALL) * D)
    tl.store(parts_ptr + E * D + o_d[None, :] * E + o_e[:, None], dw2, mask=m_ed)
    sums = _column_sums(db1)
    tl.store(parts_ptr + 2 * E * D + o_e, sums, mask=m_e)
    norm_weight = tl.load(norm_weight_ptr + o_d, mask=m_d, other=0.0)
    norm_bias = tl.load(norm_bias_ptr + o_d, mask=m_d, other=0.0)
    o_ed = o_e[:, None] * D + o_d[None, :]
    dw1 = p * norm_weight[None, :] + sums[:, None] * norm_bias[None, :]
    tl.store(parts_ptr + o_ed, dw1, mask=m_ed)
    parts_ptr += 2 * E * D + E + 2 * D * tl.program_id(1) + o_d
    w1 = tl.load(w1_ptr + o_ed, mask=m_ed, other=0.0)
    tl.store(parts_ptr, tl.sum(w1 * p, 0), mask=m_d)
    tl.store(parts_ptr + D, tl.sum(w1 * sums[:, None], 0), mask=m_d)
    if ALL:
        tl.store(parts_ptr + 2 * D, _column_sums(db2), mask=m_d)


@triton.jit(do_not_specialize=["N"])
def _mlp_block_bwd_tokens_kernel(
    dy_ptr,
    alike,
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    w1_ptr,
    b1_ptr,
    w2_ptr,
    seed_ptr,
    dx_ptr,
    unit_ptr,
    g_ptr,
    threshold,
    factor,
    eps,
    N,
    E: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ALIKE: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write ``dx`` where the hidden channels are several tiles, and what the weights' kernel reads.

    One program owns BLOCK_N of all N tokens of the batch::

        x -> LN -> [ W1, GELU'    ]  BLOCK_E hidden channels at a time, summed -> LN' -> dx
        dy ------> [ W2^T -> W1^T ]

    5 D numbers per token; 6 D E operations on the tensor cores, and E times about 45 others. The
    weights' gradients would be too many sums for one program: each owns some hidden channels there
    and makes them again, which costs less than to send the sums of every tile through the L2 cache.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_N
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    mask = (row + o_n < N)[:, None] & m_d[None, :]
    offsets = o_n[:, None] * D + o_d[None, :]
    dtype = dx_ptr.dtype.element_ty
    norm_weight = tl.load(norm_weight_ptr + o_d, mask=m_d, other=0.0)
    norm_bias = tl.load(norm_bias_ptr + o_d, mask=m_d, other=0.0)
    unit, _rstd, g = _input(
        dy_ptr,
        alike,
        x_ptr,
        seed_ptr,
        row,
        N,
        o_n,
        offsets,
        mask,
        m_d,
        threshold,
        factor,
        eps,
        D,
        BLOCK_D,
        ALIKE,
        HAS_DROPOUT,
    )
    tl.store(unit_ptr + row * D + offsets, unit.to(dtype), mask=mask)
    g = g.to(dtype)
    tl.store(g_ptr + row * D + offsets, g, mask=mask)
    t = (unit * norm_weight[None, :] + norm_bias[None, :]).to(dtype)
    dt = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in tl.range(0, E, BLOCK_E, num_stages=1):
        w1, b1, w2 = weights_of(w1_ptr, b1_ptr, w2_ptr, first, dtype, E, D, BLOCK_D, BLOCK_E)
        _kept, du = hidden_backward(
            t,
            g,
            w1,
            b1,
            w2,
            seed_ptr,
            row,
            o_n,
            first,
            threshold,
            factor,
            E,
            BLOCK_E,
            HAS_DROPOUT,
            PRECISION,
        )
        dt = tl.dot(du.to(dtype), w1, dt, input_precision=PRECISION)
    # Read again rather than kept, which would cost registers through all hidden channels.
    x = tl.load(x_ptr + row * D + offsets, mask=mask, other=0.0).to(tl.float32)
    unit, rstd = normalise(x, m_d, eps, D)
    dy = _gradient(dy_ptr, alike, row, N, o_n, offsets, mask, D, BLOCK_D, ALIKE)
    dx = dy + normalise_backward(dt * norm_weight[None, :], unit, rstd, D)
    tl.store(dx_ptr + row * D + offsets, dx.to(dtype), mask=mask)


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
    """Return the gradients of :func:`forward` for ``dy`` ``[B, N, D]``, in its inputs' order.

    ``dy`` may be ``[B, 1, D]``, alike for all tokens of an image.
    """
    alike = x.shape[1]
    shared = dy.shape[1] == 1 and alike >= max(launches.TILE)
    dy, x = (dy if shared else dy.expand(x.shape)).contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    parameters = norm_weight, norm_bias, w1, b1, w2, b2
    if x.numel() == 0:
        return dx, *(torch.zeros_like(p) for p in parameters)
    (hidden, width), tokens = w1.shape, x.shape[0] * x.shape[1]
    sizes = {
        "E": hidden,
        "D": width,
        "BLOCK_D": padded(width),
        "HAS_DROPOUT": dropout > 0,
        "PRECISION": precision(),
    }
    mask = dropout_mask.arguments(dropout)
    launch = launch_of("mlp_block_bwd", x, hidden)
    blocks = cdiv(hidden, launch["BLOCK_E"])
    if blocks > 1:
        unit, g = torch.empty_like(x), torch.empty_like(x)
        share = launch_of("mlp_block_bwd_tokens", x, hidden)
        _mlp_block_bwd_tokens_kernel[(cdiv(tokens, share["BLOCK_N"]),)](
            dy,
            alike,
            x,
            norm_weight,
            norm_bias,
            w1,
            b1,
            w2,
            seed,
            dx,
            unit,
            g,
            *mask,
            eps,
            tokens,
            ALIKE=shared,
            **sizes,
            **share,
        )
        dy, shared, x = g, False, unit
    tiles = cdiv(tokens, launch["BLOCK_N"])
    count = cdiv(programs(x, launch.pop("RESIDENT"), tiles * blocks), blocks)
    columns = 2 * hidden * width + hidden + (2 * blocks + (blocks == 1)) * width
    parts = w1.new_empty(count, columns)
    _mlp_block_bwd_kernel[(count, blocks)](
        dy,
        alike,
        x,
        norm_weight,
        norm_bias,
        w1,
        b1,
        w2,
        seed,
        dx,
        parts,
        *mask,
        eps,
        tiles,
        tokens,
        ALIKE=shared,
        **sizes,
        **launch,
    )
    dnorm_weight, dnorm_bias, dw1, db1, dw2, db2 = (torch.empty_like(p) for p in parameters)
    if blocks == 1:
        sum_rows(parts, (dw1, dw2, db1, dnorm_weight, dnorm_bias, db2))
    else:
        shares = parts.new_empty(blocks, 2 * width)
        sum_rows(parts, (dw1, dw2, db1, shares))
        sum_rows(shares, (dnorm_weight, dnorm_bias))
        torch.sum(dy, (0, 1), dtype=torch.float32, out=db2)
    return dx, dnorm_weight, dnorm_bias, dw1, db1, dw2, db2
