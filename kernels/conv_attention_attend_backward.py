r"""Fused attention in the latent of the weight-folded form: the gradients.

With ``p = exp(s - lse)`` recomputed from the saved log-sum-exp, ``t`` the gradient before the
dropout, ``do_h = t (W^o_h)^T`` and ``delta_h = sum(do_h * o_h)``:

.. math::
    ds = p \, (do_h c'^T - \delta_h), \quad dq_h = ds \, b', \quad
    db' = \sum_h ds^T q_h, \quad dc' = \sum_h p^T do_h

One kernel keeps queries and walks over keys (``dq``); it hands ``q``, ``do`` and ``delta`` on to
one that keeps keys and walks over the queries of all heads (``db``, ``dc``). Each score's
exponential is computed in both: one kernel that kept eight, six or four tiles of keys and added up
``dq`` in memory left a scheduler two warps, and took 1.6 ms or more on an H100 where these two took
1.45. A third kernel is the products with the weights (``da`` and the weights' own gradients):
inside the first they would cost half of its programs' registers.

Source: Dao et al., arXiv:2205.14135, appendix B.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dropout as dropout_mask
from . import launches
from .common import add_product, cdiv, padded, power_of_2, precision
from .conv_attention_attend import (
    LN2,
    LOG2E,
    bounded,
    coarse,
    head_weight,
    largest_norm,
    latent_queries,
    load_keys,
    step,
)
from .conv_attention_key_gradients import key_gradients
from .conv_attention_keys import normalised_keys, tail
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
    BOUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what one tile of keys gives to the gradient of one tile of queries.

    A tile that is ALONE has all keys and makes ``delta`` itself: of few keys each has a large
    probability, and the rounding of the saved ``o`` would be seen. SUMMED: ``total`` grows by the
    probabilities. BOUNDED: ``do`` and ``delta`` are divided by the exponentials' sum, which these
    then need not be. Per score: three products of D, one exponential and three or four operations.
    """
    k = load_keys(k_ptr, first, M, D, BLOCK_D, BLOCK_M, MASKED)
    v = k if SHARED else load_keys(v_ptr, first, M, D, BLOCK_D, BLOCK_M, MASKED)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    p = tl.exp2(s if BOUNDED else s - lse2[:, None])
    if MASKED:
        p = tl.where((first + tl.arange(0, BLOCK_M) < M)[None, :], p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    if SUMMED:
        total += tl.sum(p, 1)
    if ALONE:
        p /= tl.where(total > 0, total, 1.0)[:, None]  # none in rows beyond the last
        delta = tl.sum(p * dp, 1)
    ds = p * (dp - delta[:, None])
    return add_product(dq, ds.to(k.dtype), k, M, PRECISION), delta, total


@triton.jit
def _query_gradients(
    q,
    do,
    lse2,
    delta,
    k_ptr,
    v_ptr,
    M,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL_M: tl.constexpr,
    WHOLE: tl.constexpr,
    SHARED: tl.constexpr,
    EXACT: tl.constexpr,
    BOUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Walk over all keys of an image; return ``dq``, ``delta`` and the sum of the probabilities."""
    dq = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    whole = M // BLOCK_M * BLOCK_M
    STEP: tl.constexpr = step(BLOCK_M, BLOCK_D)
    if WHOLE:
        tl.assume(whole > 0)
        for first in tl.range(0, whole, BLOCK_M):
            for inner in tl.static_range(0, BLOCK_M, STEP):
                dq, delta, total = _query_gradient(
                    dq, q, do, lse2, delta, total, k_ptr, v_ptr, first + inner, M, D, BLOCK_D,
                    STEP, SHARED, False, False, EXACT, BOUNDED, PRECISION,
                )  # fmt: skip
    if TAIL_M > 0:
        dq, delta, total = _query_gradient(
            dq, q, do, lse2, delta, total, k_ptr, v_ptr, whole, M, D, BLOCK_D, TAIL_M, SHARED,
            True, not WHOLE, EXACT or not WHOLE, BOUNDED, PRECISION,
        )  # fmt: skip
    return dq, delta, total


@triton.jit
def _conv_attention_attend_bwd_queries_kernel(
    dy_ptr,
    a_ptr,
    k_ptr,
    v_ptr,
    reach_ptr,
    scale_ptr,
    shift_ptr,
    wq_ptr,
    bq_ptr,
    wo_ptr,
    seed_ptr,
    o_ptr,
    lse_ptr,
    bound_ptr,
    t_ptr,
    q_ptr,
    do_ptr,
    lse2_ptr,
    delta_ptr,
    loose_ptr,
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
    RELOADED: tl.constexpr,
    TAIL_M: tl.constexpr,
    WHOLE: tl.constexpr,
    REACHES: tl.constexpr,
    BLOCK_REACHES: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    MAY_BOUND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write ``dq``, and what the next kernels need: ``t``; ``q``, ``do``, ``lse2`` and ``delta``.

    One program owns BLOCK_N queries of one image; heads follow one another, so that ``dy`` and
    ``a`` are read, dropped and normalised once::

                                 keys, BLOCK_M at a time ->
        queries       [ head 0:  scores -> exp2 -> ds -> dq += ds b' ]
        BLOCK_N       [ head 1:  ...                                 ]

    ``t`` is ``dy`` with the dropout of the forward pass, and not written where there is none. The
    last four have ROWS queries, whole tiles of both kernels; those beyond N count for nothing.
    ``q`` and ``lse2`` are in units of log 2, and ``delta`` is times ln 2, so that the next kernel
    makes of them, in no more operations, the gradient for this ``q``. Where no score can be large,
    as in the forward pass, ``do`` and ``delta`` are divided by the sum of the exponentials, in
    place of all of these, and ``lse2`` is 0; ``loose`` is 1 where not, for each tile and head.

    Per score: 6 D operations on the tensor cores and one exponential; 0.33 ms and 0.38 ms for
    1.37e9 scores at D = 32 (batch 128, H100). Bytes: 3 D numbers per query (dy, a, t) and 4 D
    per query and head (o; q, do, dq). Accumulates in fp32, keys in order.
    """
    tiles = ROWS // BLOCK_N
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    o_n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_n = o_n < N
    m_d = o_d < D
    mask = m_n[:, None] & m_d[None, :]
    offsets = o_n[:, None] * D + o_d[None, :]
    dtype = q_ptr.dtype.element_ty
    k_ptr += i_b * M * D
    v_ptr += i_b * M * D

    scale = tl.load(scale_ptr + o_d, mask=m_d, other=0.0)
    shift = tl.load(shift_ptr + o_d, mask=m_d, other=0.0)
    a = tl.load(a_ptr + i_b * N * D + offsets, mask=mask, other=0.0).to(tl.float32)
    a = (a * scale[None, :] + shift[None, :]).to(dtype)  # [BLOCK_N, BLOCK_D]
    t = tl.load(dy_ptr + i_b * N * D + offsets, mask=mask, other=0.0)
    if HAS_DROPOUT:
        keep = dropout_mask.keep_factor(
            tl.load(seed_ptr), i_b * N + o_n, threshold, factor, 0, D, BLOCK_D, 0
        )
        t = (t.to(tl.float32) * keep).to(dtype)
        tl.store(t_ptr + i_b * N * D + offsets, t, mask=mask)
    reach = largest_norm(reach_ptr, i_b, REACHES, BLOCK_REACHES)
    bound_ptr += tl.program_id(0) * HEADS
    loose_ptr += tl.program_id(0) * HEADS
    # The log-sum-exp is rounded, and probabilities add up to one but for that. In fp32 it is seen,
    # so they are added up once more, and what the next kernel multiplies them with is divided.
    EXACT: tl.constexpr = dtype == tl.float32

    for h in tl.range(0, HEADS, num_stages=1, disable_licm=True):
        head_offsets = (o_n[:, None] * HEADS + h) * D + o_d[None, :]
        rows = (i_b * HEADS + h) * ROWS
        if WHOLE and BLOCK_D <= 64:
            # Memory answers while the products are made; wide tiles have no registers for that.
            o = tl.load(o_ptr + i_b * N * HEADS * D + head_offsets, mask=mask, other=0.0)
        q = latent_queries(a, wq_ptr, bq_ptr, h, D, BLOCK_D, PRECISION)
        tl.store(q_ptr + rows * D + offsets, q, mask=m_d[None, :])
        # Rows beyond the last: exp2(-inf) is 0 whatever their scores.
        lse = tl.load(lse_ptr + (i_b * HEADS + h) * N + o_n, mask=m_n, other=float("inf"))
        lse2 = lse * LOG2E
        wo = head_weight(wo_ptr, h, D, BLOCK_D).to(dtype)
        wide_do = tl.dot(t, tl.trans(wo), input_precision=PRECISION)
        small = False
        if MAY_BOUND:
            small = bounded(q, reach, bound_ptr + h)
            tl.store(loose_ptr + h, tl.where(small, 0.0, 1.0))
            wide_do *= tl.where(small, tl.exp2(-lse2), 1.0)[:, None]
            tl.store(lse2_ptr + rows + o_n, tl.where(small, 0.0, lse2))
        else:
            tl.store(lse2_ptr + rows + o_n, lse2)
        do = wide_do.to(dtype)
        if not EXACT:
            tl.store(do_ptr + rows * D + offsets, do, mask=m_d[None, :])
        delta = tl.zeros([BLOCK_N], tl.float32)
        if WHOLE:
            if BLOCK_D > 64:
                o = tl.load(o_ptr + i_b * N * HEADS * D + head_offsets, mask=mask, other=0.0)
            delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
        if RELOADED and not EXACT:
            # From memory a product's left factor goes to shared memory, not to registers.
            tl.debug_barrier()
            q = tl.load(q_ptr + rows * D + offsets, mask=m_d[None, :], other=0.0)
            do = tl.load(do_ptr + rows * D + offsets, mask=m_d[None, :], other=0.0)
        if small:
            dq, delta, total = _query_gradients(
                q, do, lse2, delta, k_ptr, v_ptr, M, D, BLOCK_D, BLOCK_N, BLOCK_M, TAIL_M,
                WHOLE, SHARED, EXACT, True, PRECISION,
            )  # fmt: skip
        else:
            dq, delta, total = _query_gradients(
                q, do, lse2, delta, k_ptr, v_ptr, M, D, BLOCK_D, BLOCK_N, BLOCK_M, TAIL_M,
                WHOLE, SHARED, EXACT, False, PRECISION,
            )  # fmt: skip
        if EXACT:
            share = 1.0 / tl.where(total > 0, total, 1.0)
            if WHOLE:
                dq *= share[:, None]
            delta *= share
            tl.store(do_ptr + rows * D + offsets, do * share[:, None], mask=m_d[None, :])
        tl.store(delta_ptr + rows + o_n, delta * LN2)
        tl.store(dq_ptr + i_b * N * HEADS * D + head_offsets, dq.to(dtype), mask=mask)


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
    if batch == 0:
        return (
            torch.empty_like(a),
            torch.empty_like(b),
            a.new_empty(0) if c is None else torch.empty_like(c),
            *(torch.zeros_like(t) for t in (scale, shift, wq, bq, wo, bo)),
        )
    c = None if c is None else c.contiguous()
    k, reach = normalised_keys(b, scale[1], shift[1])
    v = k if c is None else normalised_keys(c, scale[2], shift[2])[0]
    shape = launches.width_class(width)
    own = launches.find("conv_attention_attend_bwd_queries", a, shape)
    following = launches.find("conv_attention_attend_bwd_keys", a, shape)
    tile = max(own["BLOCK_N"], following["BLOCK_N"])
    rows = cdiv(queries, tile) * tile
    q, do = a.new_empty(2, batch, heads, rows, width)
    lse2, delta = lse.new_empty(2, batch, heads, rows)
    dq = torch.empty_like(o)
    t = torch.empty_like(dy) if dropout > 0 else dy
    programs = batch * rows // own["BLOCK_N"]
    bound, loose = scale.new_empty(2, programs, heads)
    # A tile that is alone divides its probabilities itself.
    whole = keys >= own["BLOCK_M"]
    may = coarse(a.dtype) and whole and width <= 64
    _conv_attention_attend_bwd_queries_kernel[(programs,)](
        dy,
        a,
        k,
        v,
        reach,
        scale,
        shift,
        wq,
        bq,
        wo,
        seed,
        o,
        lse,
        bound,
        t,
        q,
        do,
        lse2,
        delta,
        loose,
        dq,
        *dropout_mask.arguments(dropout),
        queries,
        rows,
        keys,
        heads,
        TAIL_M=tail(keys, own["BLOCK_M"], a.dtype),
        D=width,
        BLOCK_D=padded(width),
        SHARED=c is None,
        WHOLE=whole,
        REACHES=reach.shape[1],
        BLOCK_REACHES=power_of_2(reach.shape[1]),
        HAS_DROPOUT=dropout > 0,
        MAY_BOUND=may,
        PRECISION=precision(),
        **own,
    )
    dscale, dshift = torch.empty_like(scale), torch.empty_like(shift)
    loose = loose.view(batch, -1) if may else None
    db, dc = key_gradients(b, c, k, v, scale, q, do, lse2, delta, loose, dscale, dshift)
    da, dwq, dbq, dwo, dbo = weight_gradients(
        t, a, scale, shift, wq, bo, o, dq, dscale[0], dshift[0]
    )
    return da, db, dc, dscale, dshift, dwq, dbq, dwo, dbo
