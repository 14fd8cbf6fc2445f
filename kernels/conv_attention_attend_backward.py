r"""Fused attention in the latent of the weight-folded form: the gradients.

With ``p = exp(s - lse)`` recomputed from the saved log-sum-exp, ``t`` the gradient before the
dropout, ``do_h = t (W^o_h)^T`` and ``delta_h = sum(do_h * o_h)``:

.. math::
    ds = p \, (do_h c'^T - \delta_h), \quad dq_h = ds \, b', \quad
    db' = \sum_h ds^T q_h, \quad dc' = \sum_h p^T do_h

One kernel keeps queries and walks over keys (``dq``); it hands ``q``, ``do`` and ``delta`` on to
one that keeps keys and walks over the queries of all heads (``db``, ``dc``). Each score's
exponential is computed in both; one pass would need atomics, or all keys of an image in one
program, and was slower either way. A third kernel is the products with the weights (``da`` and the
weights' own gradients): inside the first they would cost half of its programs' registers.

Source: Dao et al., arXiv:2205.14135, appendix B.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dropout as dropout_mask
from . import launches
from .common import cdiv, padded, precision, sum_rows
from .conv_attention_attend import (
    LN2,
    LOG2E,
    head_weight,
    latent_queries,
    normalised_keys,
    tail,
)
from .conv_attention_weights import weight_gradients


@triton.jit
def _query_gradient(
    dq,
    q,
    do,
    lse2,
    delta,
    total,
    k_ptr,
    v_ptr,
    first,
    M,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SHARED: tl.constexpr,
    MASKED: tl.constexpr,
    ALONE: tl.constexpr,
    SUMMED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what one tile of keys gives to the gradient of one tile of queries.

    A tile that is ALONE has all keys and makes ``delta`` itself: of few keys each has a large
    probability, and the rounding of the saved ``o`` would be seen. SUMMED: ``total`` grows by the
    probabilities. Per score: three products of D, one exponential and four operations.
    """
    o_m = first + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_d = (o_d < D)[None, :]
    mask = (o_m < M)[:, None] & m_d if MASKED else m_d
    offsets = o_m[:, None] * D + o_d[None, :]
    k = tl.load(k_ptr + offsets, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_D]
    v = k if SHARED else tl.load(v_ptr + offsets, mask=mask, other=0.0)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    p = tl.exp2(s - lse2[:, None])
    if MASKED:
        p = tl.where((o_m < M)[None, :], p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    if SUMMED:
        total += tl.sum(p, 1)
    if ALONE:
        p /= tl.where(total > 0, total, 1.0)[:, None]  # none in rows beyond the last
        delta = tl.sum(p * dp, 1)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION), delta, total


@triton.jit
def _query_gradient_of_pair(
    dq,
    dq1,
    q,
    do,
    lse2,
    delta,
    k_ptr,
    v_ptr,
    first,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HALF: tl.constexpr,
    SHARED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what two tiles of keys give, each to a sum of its own.

    One tile's products run while the other's exponentials do: a product is waited for with all that
    began before it, so they begin before what does not need them.
    """
    o_d = tl.arange(0, BLOCK_D)
    m_d = (o_d < D)[None, :]
    offsets = (first + tl.arange(0, HALF))[:, None] * D + o_d[None, :]
    offsets1 = offsets + HALF * D
    k = tl.load(k_ptr + offsets, mask=m_d, other=0.0)  # [HALF, BLOCK_D]
    k1 = tl.load(k_ptr + offsets1, mask=m_d, other=0.0)
    v = k if SHARED else tl.load(v_ptr + offsets, mask=m_d, other=0.0)
    v1 = k1 if SHARED else tl.load(v_ptr + offsets1, mask=m_d, other=0.0)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_N, HALF]
    s1 = tl.dot(q, tl.trans(k1), input_precision=PRECISION)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    ds = tl.exp2(s - lse2[:, None]) * (dp - delta[:, None])
    dp1 = tl.dot(do, tl.trans(v1), input_precision=PRECISION)
    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    ds1 = tl.exp2(s1 - lse2[:, None]) * (dp1 - delta[:, None])
    return dq, tl.dot(ds1.to(k.dtype), k1, dq1, input_precision=PRECISION)


@triton.jit
def _conv_attention_attend_bwd_queries_kernel(
    dy_ptr,
    a_ptr,
    k_ptr,
    v_ptr,
    scale_ptr,
    shift_ptr,
    wq_ptr,
    bq_ptr,
    wo_ptr,
    seed_ptr,
    o_ptr,
    lse_ptr,
    q_ptr,
    do_ptr,
    lse2_ptr,
    delta_ptr,
    dq_ptr,
    threshold,
    factor,
    N,
    ROWS,
    M,
    HEADS,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL_M: tl.constexpr,
    WHOLE: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write ``dq``, and what the next kernel needs: ``q``, ``do``, ``lse2`` and ``delta``.

    One program owns BLOCK_N queries of one head of one image::

                      keys, BLOCK_M at a time ->
        queries       scores -> exp2 -> ds -> dq += ds b'
        BLOCK_N

    The last four have ROWS queries, whole tiles of both kernels; those beyond N count for nothing.
    ``q`` and ``lse2`` are in units of log 2, and ``delta`` is times ln 2, so that the next kernel
    makes of them, in no more operations, the gradient for this ``q``. Per score: 6 D operations on
    the tensor cores and one exponential; 0.33 ms and 0.38 ms for 1.37e9 scores at D = 32 (batch
    128, H100). Bytes: 6 D numbers per query and head (dy and a, from L2 for all but one head, o; q,
    do, dq). Accumulates in fp32, keys in order.
    """
    tiles = ROWS // BLOCK_N
    i_h = tl.program_id(0) // tiles % HEADS
    i_b = (tl.program_id(0) // tiles // HEADS).to(tl.int64)
    o_n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_n = o_n < N
    m_d = o_d < D
    mask = m_n[:, None] & m_d[None, :]
    offsets = o_n[:, None] * D + o_d[None, :]
    head_offsets = (o_n[:, None] * HEADS + i_h) * D + o_d[None, :]
    rows = (i_b * HEADS + i_h) * ROWS
    dtype = q_ptr.dtype.element_ty

    scale = tl.load(scale_ptr + o_d, mask=m_d, other=0.0)
    shift = tl.load(shift_ptr + o_d, mask=m_d, other=0.0)
    a = tl.load(a_ptr + i_b * N * D + offsets, mask=mask, other=0.0).to(tl.float32)
    a = (a * scale[None, :] + shift[None, :]).to(dtype)  # [BLOCK_N, BLOCK_D]
    q = latent_queries(a, wq_ptr, bq_ptr, i_h, D, BLOCK_D, PRECISION)
    tl.store(q_ptr + rows * D + offsets, q, mask=m_d[None, :])
    t = tl.load(dy_ptr + i_b * N * D + offsets, mask=mask, other=0.0)
    if HAS_DROPOUT:
        keep = dropout_mask.keep_factor(
            tl.load(seed_ptr), i_b * N + o_n, threshold, factor, 0, D, BLOCK_D, 0
        )
        t = (t.to(tl.float32) * keep).to(dtype)
    wo = head_weight(wo_ptr, i_h, D, BLOCK_D).to(dtype)
    do = tl.dot(t, tl.trans(wo), input_precision=PRECISION).to(dtype)
    # The log-sum-exp is rounded, and probabilities add up to one but for that. In fp32 it is seen,
    # so they are added up once more, and what the next kernel multiplies them with is divided.
    EXACT: tl.constexpr = dtype == tl.float32
    if not EXACT:
        tl.store(do_ptr + rows * D + offsets, do, mask=m_d[None, :])
    total = tl.zeros([BLOCK_N], tl.float32)
    delta = tl.zeros([BLOCK_N], tl.float32)
    if WHOLE:
        o = tl.load(o_ptr + i_b * N * HEADS * D + head_offsets, mask=mask, other=0.0)
        delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    # Rows beyond the last: exp2(-inf) is 0 whatever their scores.
    lse = tl.load(lse_ptr + (i_b * HEADS + i_h) * N + o_n, mask=m_n, other=float("inf"))
    lse2 = lse * LOG2E
    tl.store(lse2_ptr + rows + o_n, lse2)

    k_ptr += i_b * M * D
    v_ptr += i_b * M * D
    dq = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    whole = M // BLOCK_M * BLOCK_M
    PAIRS: tl.constexpr = BLOCK_M >= 64 and BLOCK_D <= 64 and not EXACT
    if WHOLE:
        dq1 = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        tl.assume(whole > 0)
        for first in tl.range(0, whole, BLOCK_M):
            if PAIRS:
                dq, dq1 = _query_gradient_of_pair(
                    dq,
                    dq1,
                    q,
                    do,
                    lse2,
                    delta,
                    k_ptr,
                    v_ptr,
                    first,
                    D,
                    BLOCK_D,
                    BLOCK_M // 2,
                    SHARED,
                    PRECISION,
                )
            else:
                dq, delta, total = _query_gradient(
                    dq,
                    q,
                    do,
                    lse2,
                    delta,
                    total,
                    k_ptr,
                    v_ptr,
                    first,
                    M,
                    D,
                    BLOCK_D,
                    BLOCK_M,
                    SHARED,
                    False,
                    False,
                    EXACT,
                    PRECISION,
                )
        if PAIRS:
            dq += dq1
    if TAIL_M > 0:
        dq, delta, total = _query_gradient(
            dq,
            q,
            do,
            lse2,
            delta,
            total,
            k_ptr,
            v_ptr,
            whole,
            M,
            D,
            BLOCK_D,
            TAIL_M,
            SHARED,
            True,
            not WHOLE,
            EXACT or not WHOLE,
            PRECISION,
        )
    if EXACT:
        share = 1.0 / tl.where(total > 0, total, 1.0)
        if WHOLE:
            dq *= share[:, None]
        delta *= share
        tl.store(do_ptr + rows * D + offsets, do * share[:, None], mask=m_d[None, :])
    tl.store(delta_ptr + rows + o_n, delta * LN2)
    tl.store(dq_ptr + i_b * N * HEADS * D + head_offsets, dq.to(dtype), mask=mask)


@triton.jit
def _add_key_gradients(dk, dv, p, ds, q, do, ONE_SUM: tl.constexpr, PRECISION: tl.constexpr):
    """Add what one tile of queries gives to the gradients of one tile of keys and of values."""
    if ONE_SUM:
        dk = tl.dot(p.to(do.dtype), do, dk, input_precision=PRECISION)
    else:
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    return tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION), dv


@triton.jit
def _store_key_gradient(
    dk, raw_ptr, offsets, mask, scale_ptr, out_ptr, part_ptr, o_d, D: tl.constexpr
):
    """Write the gradient of raw keys or values, and its sums for their scale and shift."""
    m_d = o_d < D
    scale = tl.load(scale_ptr + o_d, mask=m_d, other=0.0)
    tl.store(out_ptr + offsets, (dk * scale[None, :]).to(out_ptr.dtype.element_ty), mask=mask)
    dk = tl.where(mask, dk, 0.0)
    raw = tl.load(raw_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(part_ptr + o_d, tl.sum(dk * raw, 0), mask=m_d)
    tl.store(part_ptr + D + o_d, tl.sum(dk, 0), mask=m_d)


@triton.jit
def _conv_attention_attend_bwd_keys_kernel(
    b_ptr,
    c_ptr,
    k_ptr,
    v_ptr,
    scale_ptr,
    q_ptr,
    do_ptr,
    lse2_ptr,
    delta_ptr,
    db_ptr,
    dc_ptr,
    parts_ptr,
    ROWS,
    M,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PAIR: tl.constexpr,
    SHARED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write ``db`` and ``dc``, and this program's share of their scales' and shifts' gradients.

    One program owns BLOCK_M keys of one image, and walks over its ROWS queries of all heads, whole
    tiles, as over one list, for keys are the same in all heads::

                  queries of head 0, then head 1, ...: BLOCK_N at a time ->
        keys      scores^T -> exp2 -> dv += p^T do
        BLOCK_M                       dk += ds^T q       (one sum of both if values are the keys)

    Scores are transposed, so that both gradients take their left factor from registers. Of a PAIR,
    the halves of the keys, one half's products run while the other's exponentials do: asynchronous
    products are waited for all at once, so they begin before what does not need them. Values' sums
    are then apart from keys', a product that adds to another's sum would wait for it.

    Per score: 8 D operations on the tensor cores and one exponential; 0.44 ms and 0.38 ms for
    1.37e9 scores at D = 32 (batch 128, H100). Bytes from L2: 4 D + 8 per query and tile of keys.
    Accumulates in fp32, queries in order. ``parts`` is ``[programs and halves, 2 or 4, D]``: dscale
    and dshift of keys, then of values.
    """
    HALVES: tl.constexpr = 2 if PAIR else 1
    HALF: tl.constexpr = BLOCK_M // HALVES
    ONE_SUM: tl.constexpr = SHARED and not PAIR
    blocks = tl.cdiv(M, BLOCK_M)
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, HALF)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_d = (o_d < D)[None, :]
    mask = (o_m < M)[:, None] & m_d
    offsets = i_b * M * D + o_m[:, None] * D + o_d[None, :]
    k = tl.load(k_ptr + offsets, mask=mask, other=0.0)  # [HALF, BLOCK_D]
    v = k if SHARED else tl.load(v_ptr + offsets, mask=mask, other=0.0)
    mask1 = (o_m + HALF < M)[:, None] & m_d
    offsets1 = offsets + HALF * D
    if PAIR:
        k1 = tl.load(k_ptr + offsets1, mask=mask1, other=0.0)
        v1 = k1 if SHARED else tl.load(v_ptr + offsets1, mask=mask1, other=0.0)
    o_q = o_n[:, None] * D + o_d[None, :]
    q_ptr += i_b * ROWS * D
    do_ptr += i_b * ROWS * D
    lse2_ptr += i_b * ROWS
    delta_ptr += i_b * ROWS

    dk = tl.zeros([HALF, BLOCK_D], tl.float32)
    dv = tl.zeros([HALF, BLOCK_D], tl.float32)
    dk1 = tl.zeros([HALF, BLOCK_D], tl.float32)
    dv1 = tl.zeros([HALF, BLOCK_D], tl.float32)
    tl.assume(ROWS > 0)
    for row in tl.range(0, ROWS, BLOCK_N):
        q = tl.load(q_ptr + row * D + o_q, mask=m_d, other=0.0)  # [BLOCK_N, BLOCK_D]
        do = tl.load(do_ptr + row * D + o_q, mask=m_d, other=0.0)
        lse2 = tl.load(lse2_ptr + row + o_n)[None, :]
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) - lse2  # [HALF, BLOCK_N]
        if PAIR:
            s1 = tl.dot(k1, tl.trans(q), input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        p = tl.exp2(s)
        delta = tl.load(delta_ptr + row + o_n)[None, :]
        ds = p * (dp * LN2 - delta)
        dk, dv = _add_key_gradients(dk, dv, p, ds, q, do, ONE_SUM, PRECISION)
        if PAIR:
            dp1 = tl.dot(v1, tl.trans(do), input_precision=PRECISION)
            p1 = tl.exp2(s1 - lse2)
            ds1 = p1 * (dp1 * LN2 - delta)
            dk1, dv1 = _add_key_gradients(dk1, dv1, p1, ds1, q, do, ONE_SUM, PRECISION)

    if SHARED and PAIR:
        dk += dv
        dk1 += dv1
    PARTS: tl.constexpr = 2 if SHARED else 4
    parts_ptr += tl.program_id(0).to(tl.int64) * HALVES * PARTS * D
    parts1_ptr = parts_ptr + PARTS * D
    scale_ptr += D
    _store_key_gradient(dk, b_ptr, offsets, mask, scale_ptr, db_ptr, parts_ptr, o_d, D)
    if PAIR:
        _store_key_gradient(dk1, b_ptr, offsets1, mask1, scale_ptr, db_ptr, parts1_ptr, o_d, D)
    if not SHARED:
        scale_ptr += D
        parts_ptr += 2 * D
        parts1_ptr += 2 * D
        _store_key_gradient(dv, c_ptr, offsets, mask, scale_ptr, dc_ptr, parts_ptr, o_d, D)
        if PAIR:
            _store_key_gradient(dv1, c_ptr, offsets1, mask1, scale_ptr, dc_ptr, parts1_ptr, o_d, D)


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
    """Return the gradients of :func:`attend` for ``dy`` ``[B, N, D]``.

    Args:
        dy: gradient of ``y``.
        o: saved by :func:`attend`, as is ``lse``; the rest are its arguments.

    Returns:
        ``da``, ``db``, ``dc`` (empty without ``c``), ``dscale``, ``dshift``, ``dwq``, ``dbq``,
        ``dwo``, ``dbo``, of the shapes and dtypes of what they are gradients of.
    """
    dy, a, b = dy.contiguous(), a.contiguous(), b.contiguous()
    (batch, queries, width), keys, heads = a.shape, b.shape[1], wq.shape[0]
    db = torch.empty_like(b)
    dc = a.new_empty(0) if c is None else torch.empty_like(db)
    if batch == 0:
        return (
            torch.empty_like(a),
            db,
            dc,
            *(torch.zeros_like(t) for t in (scale, shift, wq, bq, wo, bo)),
        )
    c = b if c is None else c.contiguous()
    shared = dc.numel() == 0
    k, _ = normalised_keys(b, scale[1], shift[1])
    v = k if shared else normalised_keys(c, scale[2], shift[2])[0]
    shape = launches.width_class(width)
    own, following = (
        launches.find(f"conv_attention_attend_bwd_{kernel}", a, shape)
        for kernel in ("queries", "keys")
    )
    tile = max(own["BLOCK_N"], following["BLOCK_N"])
    rows = cdiv(queries, tile) * tile
    q, do = a.new_empty(2, batch, heads, rows, width)
    lse2, delta = lse.new_empty(2, batch, heads, rows)
    dq = torch.empty_like(o)
    common = {
        "D": width,
        "BLOCK_D": padded(width),
        "SHARED": shared,
        "PRECISION": precision(),
    }

    _conv_attention_attend_bwd_queries_kernel[(batch * heads * rows // own["BLOCK_N"],)](
        dy,
        a,
        k,
        v,
        scale,
        shift,
        wq,
        bq,
        wo,
        seed,
        o,
        lse,
        q,
        do,
        lse2,
        delta,
        dq,
        *dropout_mask.arguments(dropout),
        queries,
        rows,
        keys,
        heads,
        TAIL_M=tail(keys, own["BLOCK_M"], a.dtype),
        WHOLE=keys >= own["BLOCK_M"],
        HAS_DROPOUT=dropout > 0,
        **common,
        **own,
    )
    count = batch * cdiv(keys, following["BLOCK_M"])
    # Hopper's matrix unit needs 16 rows for each warp.
    pair = following["BLOCK_M"] >= 32 * following["num_warps"]
    key_parts = wq.new_empty(count * (1 + pair), (2 if shared else 4) * width)
    _conv_attention_attend_bwd_keys_kernel[(count,)](
        b,
        c,
        k,
        v,
        scale,
        q,
        do,
        lse2,
        delta,
        db,
        dc,
        key_parts,
        heads * rows,
        keys,
        PAIR=pair,
        **common,
        **following,
    )
    dscale, dshift = torch.empty_like(scale), torch.empty_like(shift)
    sum_rows(key_parts, [t[i] for i in range(1, scale.shape[0]) for t in (dscale, dshift)])
    da, dwq, dbq, dwo, dbo = weight_gradients(
        dy, a, scale, shift, wq, bo, seed, o, dq, dscale[0], dshift[0], dropout=dropout
    )
    return da, db, dc, dscale, dshift, dwq, dbq, dwo, dbo
