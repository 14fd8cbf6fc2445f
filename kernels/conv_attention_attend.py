r"""Fused attention in the latent of the weight-folded form: the forward pass.

.. math::
    q_h = a' W^q_h + c^q_h, \quad o_h = \mathrm{softmax}(q_h b'^T) \, c', \quad
    y = x_0 + \mathrm{drop}\Big(\sum_h o_h W^o_h + c^o\Big)

with ``a', b', c'`` the raw tokens times ``scale`` plus ``shift``. Keys and values are shared by all
heads, and are one tensor where no ``c`` is given. No scores are ever stored.

Source: Wu et al., arXiv:2103.15808; online softmax: Milakov and Gimelshein, arXiv:1805.02867;
Dao et al., arXiv:2205.14135.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dropout as dropout_mask
from . import launches
from .common import add_product, cdiv, padded, power_of_2, precision
from .conv_attention_keys import normalised_keys, tail

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)
# Within 2 ** +-60 neither the exponentials nor the sum of 2 ** 60 of them leave fp32's range.
SAFE_EXPONENT = tl.constexpr(60.0)
# 1.5 * 2 ** 23: what is added to it is rounded to an integer, which stands in its low bits.
ROUNDER = tl.constexpr(12582912.0)


@triton.constexpr_function
def step(block, width):
    """Return how many of a block of keys are multiplied at a time: more want too many registers."""
    return 32 if block > 32 and width <= 64 else block


@triton.jit
def _exp2_by_products(x):
    """Return 2 ** x for numbers within +-126 by the units that multiply and add.

    The integer next to x becomes the exponent, a cubic in what is left the mantissa; the cubic is
    the one of the smallest largest relative error on [-1/2, 1/2], 7.5e-5 (Remez's exchange).
    """
    rounded = x + ROUNDER
    rest = x - (rounded - ROUNDER)
    mantissa = 0.2426111251 + rest * 0.0551716685
    mantissa = 0.6932609677 + rest * mantissa
    mantissa = 0.9999280572 + rest * mantissa
    exponent = rounded.to(tl.int32, bitcast=True) << 23
    return (mantissa.to(tl.int32, bitcast=True) + exponent).to(tl.float32, bitcast=True)


@triton.jit
def _bounded_exp2(x, PRODUCTS: tl.constexpr):
    """Return 2 ** x of bounded scores; with PRODUCTS in part within 7.5e-5, which bf16 hides.

    Exponentials have one unit to eight of those that multiply, and it decides how long a tile
    takes: of so many times 8 columns, 8 leave it alone. A matrix unit's results lie 8 columns
    apart, so which of a thread's numbers those are is known when it is compiled.
    """
    if PRODUCTS > 0:
        column = tl.arange(0, x.shape[1]) // 8 % PRODUCTS
        y = tl.where((column == PRODUCTS - 1)[None, :], _exp2_by_products(x), tl.exp2(x))
    else:
        y = tl.exp2(x)
    return y


@triton.jit
def head_weight(weight_ptr, h, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return matrix ``h`` of ``[heads, D, D]``, padded with zeros."""
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    offsets = h * D * D + o_d[:, None] * D + o_d[None, :]
    return tl.load(weight_ptr + offsets, mask=m_d[:, None] & m_d[None, :], other=0.0)


@triton.jit
def latent_queries(
    a,
    wq_ptr,
    bq_ptr,
    h,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return a head's queries times log2(e), so that exp2 of a score is what exp was.

    They are rounded once, by this function alone: the log-sum-exp fits the scores of both passes.
    """
    o_d = tl.arange(0, BLOCK_D)
    wq = head_weight(wq_ptr, h, D, BLOCK_D).to(a.dtype)
    bq = tl.load(bq_ptr + h * D + o_d, mask=o_d < D, other=0.0)
    return ((tl.dot(a, wq, input_precision=PRECISION) + bq[None, :]) * LOG2E).to(a.dtype)


@triton.jit
def same_for_all(value, scratch_ptr):
    """Return the one number of ``value`` [1] after a way to memory and back.

    The assembler then knows that all threads branch alike on it: else it keeps the counters of the
    loops of both branches in each thread.
    """
    tl.store(scratch_ptr + tl.arange(0, 1), value)
    tl.debug_barrier()
    return tl.load(scratch_ptr)


@triton.jit
def bounded(q, reach, bound_ptr):
    """Whether all scores of queries times log2(e) with keys of norms up to ``reach`` are small.

    False where their bound is infinite, or NaN.
    """
    wide = q.to(tl.float32)
    square = tl.sum(wide * wide, 1)
    square = tl.where(square == square, square, float("inf"))
    most = tl.max(square[:, None], 0)
    return same_for_all(tl.sqrt(most) * reach, bound_ptr) < SAFE_EXPONENT


@triton.jit
def largest_norm(reach_ptr, i_b, REACHES: tl.constexpr, BLOCK_REACHES: tl.constexpr):
    """Return the largest norm of an image's keys."""
    o_r = tl.arange(0, BLOCK_REACHES)
    return tl.max(tl.load(reach_ptr + i_b * REACHES + o_r, mask=o_r < REACHES, other=0.0), 0)


@triton.jit
def load_keys(
    k_ptr,
    first,
    M,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Load a tile of keys or values [BLOCK_M, BLOCK_D]; MASKED: it may reach beyond the last."""
    o_m = first + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_d = (o_d < D)[None, :]
    mask = (o_m < M)[:, None] & m_d if MASKED else m_d
    return tl.load(k_ptr + (o_m[:, None] * D + o_d[None, :]), mask=mask, other=0.0)


@triton.jit
def _attend_keys(
    acc,
    total,
    top,
    q,
    k_ptr,
    v_ptr,
    first,
    M,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SHARED: tl.constexpr,
    MASKED: tl.constexpr,
    BOUNDED: tl.constexpr,
    PRODUCTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add one tile of keys to the running sums of one tile of queries.

    Per score: two products of D, one exponential and one addition; if not BOUNDED also one for the
    running maximum and one to subtract it, and a product per channel and tile. ``total`` has the
    columns that a matrix unit gives to different threads: they exchange their sums at the end. In
    16 bits it is a product too, with ones, of what is multiplied with the values: the matrix unit
    has time for it, where 32 of a tile's 194 instructions were additions.
    """
    k = load_keys(k_ptr, first, M, D, BLOCK_D, BLOCK_M, MASKED)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    if MASKED:
        s = tl.where((first + tl.arange(0, BLOCK_M) < M)[None, :], s, float("-inf"))
    if BOUNDED:
        p = _bounded_exp2(s, 0 if MASKED else PRODUCTS)
    else:
        above = tl.maximum(top, tl.max(s, 1))
        fade = tl.exp2(top - above)
        p = tl.exp2(s - above[:, None])
        total = total * fade[:, None]
        acc = acc * fade[:, None]
        top = above
    COLUMNS: tl.constexpr = total.shape[1]
    v = k if SHARED else load_keys(v_ptr, first, M, D, BLOCK_D, BLOCK_M, MASKED)
    factor = p.to(v.dtype)
    if v.dtype.primitive_bitwidth == 16:
        ones = tl.full([BLOCK_M, COLUMNS], 1.0 / COLUMNS, tl.float32).to(v.dtype)
        total = tl.dot(factor, ones, total)
    else:
        total += tl.sum(tl.reshape(p, [total.shape[0], BLOCK_M // COLUMNS, COLUMNS]), 1)
    return add_product(acc, factor, v, M, PRECISION), total, top


@triton.jit
def _attend_row(
    q,
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
    BOUNDED: tl.constexpr,
    NARROW: tl.constexpr,
    PRODUCTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Walk over all keys of an image; return the attended values and the log-sum-exp.

    BLOCK_M keys are fetched at a time, and multiplied in tiles of STEP: what a fetch costs beside
    its bytes (two barriers, a fence, some 40 instructions of a thread) is then shared by the tiles.
    NARROW: those tiles are of 16 keys, and want fewer registers.
    """
    # A matrix unit's results lie 8 columns apart; products of float32 itself lie otherwise.
    COLUMNS: tl.constexpr = 1 if q.dtype == tl.float32 and PRECISION == "ieee" else 8
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_N, COLUMNS], tl.float32)
    # Not -inf: a row of -inf only must not subtract it from itself, later tiles may hold numbers.
    top = tl.full([BLOCK_N], LOWEST, tl.float32)
    whole = M // BLOCK_M * BLOCK_M
    STEP: tl.constexpr = 16 if NARROW else step(BLOCK_M, BLOCK_D)
    if WHOLE:
        # A loop that may be left out has the assembler wait for each product before the next.
        tl.assume(whole > 0)
        for first in tl.range(0, whole, BLOCK_M):
            for inner in tl.static_range(0, BLOCK_M, STEP):
                acc, total, top = _attend_keys(
                    acc, total, top, q, k_ptr, v_ptr, first + inner, M, D, BLOCK_D, STEP,
                    SHARED, False, BOUNDED, PRODUCTS, PRECISION,
                )  # fmt: skip
    if TAIL_M > 0:
        acc, total, top = _attend_keys(
            acc, total, top, q, k_ptr, v_ptr, whole, M, D, BLOCK_D, TAIL_M, SHARED, True,
            BOUNDED, PRODUCTS, PRECISION,
        )  # fmt: skip
    total = tl.sum(total, 1)
    lse = tl.log(total)
    if not BOUNDED:
        lse += top * LN2
    return acc / total[:, None], lse


@triton.jit
def _conv_attention_attend_fwd_kernel(
    a_ptr,
    k_ptr,
    v_ptr,
    reach_ptr,
    residual_ptr,
    scale_ptr,
    shift_ptr,
    wq_ptr,
    bq_ptr,
    wo_ptr,
    bo_ptr,
    seed_ptr,
    bound_ptr,
    y_ptr,
    o_ptr,
    lse_ptr,
    threshold,
    factor,
    N,
    M,
    HEADS,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRODUCTS: tl.constexpr,
    TAIL_M: tl.constexpr,
    WHOLE: tl.constexpr,
    REACHES: tl.constexpr,
    BLOCK_REACHES: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    SAVE: tl.constexpr,
    MAY_BOUND: tl.constexpr,
    NARROW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend from BLOCK_N queries of one image to all its keys, for all heads, and finish ``y``.

    One program owns BLOCK_N queries; heads follow one another, so that queries are read and ``y``
    is written once::

                     keys, BLOCK_M at a time ->
        queries  [ head 0: scores -> exp2 -> o_0 W_0 ]
        BLOCK_N  [ head 1: ...              + o_1 W_1 ]  + bias, dropout, residual -> y

    Per score: 4 D operations on the tensor cores and one exponential; at D = 32 and 3 heads that is
    0.22 ms and 0.38 ms for 1.37e9 scores (batch 128, H100). Bytes: 3 to 6 D numbers per query (a,
    residual, y and, saved, one o per head); the keys, 61 kB per image, come from L2.

    The running maximum is left out where ``|q| max|b'|`` shows that no score can leave +-60 in
    powers of two: exponentials and their sum then stay in fp32's range as they are. fp16 keeps the
    maximum, its probabilities would not fit. Statistics and accumulators are fp32, summed in the
    order of the keys. ``bound`` is ``[programs, h]``, see :func:`bounded`.
    """
    tiles = tl.cdiv(N, BLOCK_N)
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    o_n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_n = o_n < N
    m_d = o_d < D
    mask = m_n[:, None] & m_d[None, :]
    # 64-bit offsets for the image, 32-bit ones inside it.
    a_ptr += i_b * N * D
    k_ptr += i_b * M * D
    v_ptr += i_b * M * D
    dtype = y_ptr.dtype.element_ty
    offsets = o_n[:, None] * D + o_d[None, :]

    scale = tl.load(scale_ptr + o_d, mask=m_d, other=0.0)
    shift = tl.load(shift_ptr + o_d, mask=m_d, other=0.0)
    a = tl.load(a_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    a = (a * scale[None, :] + shift[None, :]).to(dtype)  # [BLOCK_N, BLOCK_D]
    reach = largest_norm(reach_ptr, i_b, REACHES, BLOCK_REACHES)
    bound_ptr += tl.program_id(0) * HEADS

    t = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # Hoisting what does not depend on the head out of this loop would cost 70 registers a thread,
    # and with them half the programs of a multiprocessor.
    for h in tl.range(0, HEADS, num_stages=1, disable_licm=True):
        q = latent_queries(a, wq_ptr, bq_ptr, h, D, BLOCK_D, PRECISION)
        small = False
        if MAY_BOUND:
            small = bounded(q, reach, bound_ptr + h)
        if small:
            o, lse = _attend_row(
                q, k_ptr, v_ptr, M, D, BLOCK_D, BLOCK_N, BLOCK_M, TAIL_M, WHOLE, SHARED, True,
                False, PRODUCTS, PRECISION,
            )  # fmt: skip
        else:
            o, lse = _attend_row(
                q, k_ptr, v_ptr, M, D, BLOCK_D, BLOCK_N, BLOCK_M, TAIL_M, WHOLE, SHARED, False,
                NARROW, PRODUCTS, PRECISION,
            )  # fmt: skip
        o = o.to(dtype)
        if SAVE:
            o_offsets = o_n[:, None] * (HEADS * D) + o_d[None, :]
            tl.store(o_ptr + (i_b * N * HEADS + h) * D + o_offsets, o, mask=mask)
            tl.store(lse_ptr + (i_b * HEADS + h) * N + o_n, lse, mask=m_n)
        wo = head_weight(wo_ptr, h, D, BLOCK_D).to(dtype)
        t = tl.dot(o, wo, t, input_precision=PRECISION)

    t += tl.load(bo_ptr + o_d, mask=m_d, other=0.0)[None, :]
    if HAS_DROPOUT:
        t *= dropout_mask.keep_factor(
            tl.load(seed_ptr), i_b * N + o_n, threshold, factor, 0, D, BLOCK_D, 0
        )
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + i_b * N * D + offsets, mask=mask, other=0.0)
        t += residual.to(tl.float32)
    tl.store(y_ptr + i_b * N * D + offsets, t.to(dtype), mask=mask)


def may_bound(dtype: torch.dtype) -> bool:
    """Return whether exponentials may do without the running maximum; those of fp16 may not."""
    return dtype != torch.float16


def coarse(dtype: torch.dtype) -> bool:
    """Return whether a dtype hides relative errors of 1e-4 and has the range of fp32."""
    return dtype == torch.bfloat16


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
    """Attend from the queries ``a`` to the keys ``b`` (values ``c``, or the keys).

    Args:
        a: ``[B, N, D]``, raw queries.
        b: ``[B, M, D]``, raw keys.
        c: ``[B, M, D]``, raw values; None where they are the keys.
        residual: ``[B, N, D]``, added to the result; None for none.
        scale: ``[2 or 3, D]``, for queries, keys and values.
        shift: as ``scale``.
        wq: ``[h, D, D]``, queries to each head's latent, with the softmax scale in it.
        bq: ``[h, D]``.
        wo: ``[h, D, D]``, each head's values to the result.
        bo: ``[D]``.
        seed: int64 ``[1]``, of the dropout mask.
        dropout: probability that an entry of the projected output is dropped.
        save: whether to return what :func:`attend_backward` needs.

    Returns:
        ``y`` ``[B, N, D]``; ``o`` ``[B, N, h, D]`` and the scores' log-sum-exp ``[B, h, N]``, both
        empty without ``save``.
    """
    a, b = a.contiguous(), b.contiguous()
    (batch, queries, width), keys, heads = a.shape, b.shape[1], wq.shape[0]
    y = torch.empty_like(a)
    o = a.new_empty((batch, queries, heads, width) if save else 0)
    lse = wq.new_empty((batch, heads, queries) if save else 0)
    if batch == 0:
        return y, o, lse
    k, reach = normalised_keys(b, scale[1], shift[1])
    v = k if c is None else normalised_keys(c.contiguous(), scale[2], shift[2])[0]
    residual = residual if residual is None else residual.contiguous()
    block = padded(width)
    launch = launches.find("conv_attention_attend_fwd", a, launches.width_class(width))
    launch["PRODUCTS"] *= coarse(a.dtype)
    programs = batch * cdiv(queries, launch["BLOCK_N"])
    _conv_attention_attend_fwd_kernel[(programs,)](
        a,
        k,
        v,
        reach,
        y if residual is None else residual,
        scale,
        shift,
        wq,
        bq,
        wo,
        bo,
        seed,
        scale.new_empty(programs, heads),
        y,
        o,
        lse,
        *dropout_mask.arguments(dropout),
        queries,
        keys,
        heads,
        D=width,
        BLOCK_D=block,
        TAIL_M=tail(keys, launch["BLOCK_M"], a.dtype),
        WHOLE=keys >= launch["BLOCK_M"],
        REACHES=reach.shape[1],
        BLOCK_REACHES=power_of_2(reach.shape[1]),
        SHARED=c is None,
        HAS_RESIDUAL=residual is not None,
        HAS_DROPOUT=dropout > 0,
        SAVE=save,
        MAY_BOUND=may_bound(a.dtype),
        # A thread has the registers of the hungrier way, so the rarer one does with fewer.
        NARROW=may_bound(a.dtype) and launch.get("maxnreg", 255) <= 96,
        PRECISION=precision(),
        **launch,
    )
    return y, o, lse
