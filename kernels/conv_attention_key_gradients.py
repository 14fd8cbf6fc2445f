"""The gradients of attention's keys and values, and of the norms in front of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launches
from .common import add_product, cdiv, padded, power_of_2, precision, sum_rows
from .conv_attention_attend import LN2, same_for_all

# Marks of an image's tiles that are read at a time.
FLAGS = 1024


@triton.jit
def _add_key_gradients(dk, dv, p, ds, q, do, ROWS, ONE_SUM: tl.constexpr, PRECISION: tl.constexpr):
    """Add what one tile of queries gives to the gradients of one tile of keys and of values."""
    if ONE_SUM:
        dk = add_product(dk, p.to(do.dtype), do, ROWS, PRECISION)
    else:
        dv = add_product(dv, p.to(do.dtype), do, ROWS, PRECISION)
    return add_product(dk, ds.to(q.dtype), q, ROWS, PRECISION), dv


@triton.jit
def _key_gradients(
    k,
    v,
    k1,
    v1,
    q_ptr,
    do_ptr,
    lse2_ptr,
    delta_ptr,
    ROWS,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    PAIR: tl.constexpr,
    ONE_SUM: tl.constexpr,
    BOUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Walk over all queries; return the gradients of keys and values, and of a pair's second.

    BLOCK_N queries are fetched at a time, and multiplied in tiles of STEP, as keys are elsewhere:
    tiles of 32 leave room for a third more programs, those of 64 take fewer instructions a score.
    BOUNDED: exponentials are what they are, since ``do`` and ``delta`` are divided by their sum.
    """
    o_n = tl.arange(0, STEP)
    o_d = tl.arange(0, BLOCK_D)
    m_d = (o_d < D)[None, :]
    o_q = o_n[:, None] * D + o_d[None, :]
    dk = tl.zeros([k.shape[0], BLOCK_D], tl.float32)
    dv = tl.zeros([k.shape[0], BLOCK_D], tl.float32)
    dk1 = tl.zeros([k.shape[0], BLOCK_D], tl.float32)
    dv1 = tl.zeros([k.shape[0], BLOCK_D], tl.float32)
    tl.assume(ROWS > 0)
    for first in tl.range(0, ROWS, BLOCK_N):
        for inner in tl.static_range(0, BLOCK_N, STEP):
            row = first + inner
            q = tl.load(q_ptr + row * D + o_q, mask=m_d, other=0.0)  # [STEP, BLOCK_D]
            do = tl.load(do_ptr + row * D + o_q, mask=m_d, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [HALF, STEP]
            if not BOUNDED:
                lse2 = tl.load(lse2_ptr + row + o_n)[None, :]
                s -= lse2
            if PAIR:
                s1 = tl.dot(k1, tl.trans(q), input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            p = tl.exp2(s)
            delta = tl.load(delta_ptr + row + o_n)[None, :]
            ds = p * (dp * LN2 - delta)
            dk, dv = _add_key_gradients(dk, dv, p, ds, q, do, ROWS, ONE_SUM, PRECISION)
            if PAIR:
                dp1 = tl.dot(v1, tl.trans(do), input_precision=PRECISION)
                p1 = tl.exp2(s1 if BOUNDED else s1 - lse2)
                ds1 = p1 * (dp1 * LN2 - delta)
                dk1, dv1 = _add_key_gradients(dk1, dv1, p1, ds1, q, do, ROWS, ONE_SUM, PRECISION)
    return dk, dv, dk1, dv1


def flags_at_once(tiles: int) -> int:
    """Return how many of an image's marks :func:`all_small` reads at a time."""
    return min(power_of_2(tiles), FLAGS)


@triton.jit
def all_small(loose_ptr, largest_ptr, TILES: tl.constexpr, BLOCK_TILES: tl.constexpr):
    """Whether none of an image's TILES is marked as one with scores that may be large."""
    largest = tl.zeros([1], tl.float32)
    for first in tl.static_range(0, TILES, BLOCK_TILES):
        o_t = first + tl.arange(0, BLOCK_TILES)
        loose = tl.load(loose_ptr + o_t, mask=o_t < TILES, other=0.0)
        largest = tl.maximum(largest, tl.max(loose[:, None], 0))
    return same_for_all(largest, largest_ptr) == 0


@triton.jit
def store_key_gradient(
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
    loose_ptr,
    largest_ptr,
    db_ptr,
    dc_ptr,
    parts_ptr,
    ROWS,
    M,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STEP: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    PAIR: tl.constexpr,
    SHARED: tl.constexpr,
    MAY_BOUND: tl.constexpr,
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
    1.37e9 scores at D = 32 (batch 128, H100). Bytes from L2: 4 D + 4 per query and tile of keys, 4
    more where an image has scores that may be large. Accumulates in fp32, queries in order.
    ``parts`` is ``[programs and halves, 2 or 4, D]``: dscale and dshift of keys, then of values;
    ``largest`` ``[programs]`` is of :func:`same_for_all`.
    """
    HALVES: tl.constexpr = 2 if PAIR else 1
    HALF: tl.constexpr = BLOCK_M // HALVES
    ONE_SUM: tl.constexpr = SHARED and not PAIR
    blocks = tl.cdiv(M, BLOCK_M)
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, HALF)
    o_d = tl.arange(0, BLOCK_D)
    m_d = (o_d < D)[None, :]
    mask = (o_m < M)[:, None] & m_d
    offsets = i_b * M * D + o_m[:, None] * D + o_d[None, :]
    k = tl.load(k_ptr + offsets, mask=mask, other=0.0)  # [HALF, BLOCK_D]
    v = k if SHARED else tl.load(v_ptr + offsets, mask=mask, other=0.0)
    mask1 = (o_m + HALF < M)[:, None] & m_d
    offsets1 = offsets + HALF * D
    k1, v1 = k, v
    if PAIR:
        k1 = tl.load(k_ptr + offsets1, mask=mask1, other=0.0)
        v1 = k1 if SHARED else tl.load(v_ptr + offsets1, mask=mask1, other=0.0)
    q_ptr += i_b * ROWS * D
    do_ptr += i_b * ROWS * D
    lse2_ptr += i_b * ROWS
    delta_ptr += i_b * ROWS

    small = False
    if MAY_BOUND:
        small = all_small(
            loose_ptr + i_b * TILES, largest_ptr + tl.program_id(0), TILES, BLOCK_TILES
        )
    if small:
        dk, dv, dk1, dv1 = _key_gradients(
            k, v, k1, v1, q_ptr, do_ptr, lse2_ptr, delta_ptr, ROWS, D, BLOCK_D, BLOCK_N, STEP,
            PAIR, ONE_SUM, True, PRECISION,
        )  # fmt: skip
    else:
        dk, dv, dk1, dv1 = _key_gradients(
            k, v, k1, v1, q_ptr, do_ptr, lse2_ptr, delta_ptr, ROWS, D, BLOCK_D, BLOCK_N, STEP,
            PAIR, ONE_SUM, False, PRECISION,
        )  # fmt: skip

    if SHARED and PAIR:
        dk += dv
        dk1 += dv1
    PARTS: tl.constexpr = 2 if SHARED else 4
    parts_ptr += tl.program_id(0).to(tl.int64) * HALVES * PARTS * D
    parts1_ptr = parts_ptr + PARTS * D
    scale_ptr += D
    store_key_gradient(dk, b_ptr, offsets, mask, scale_ptr, db_ptr, parts_ptr, o_d, D)
    if PAIR:
        store_key_gradient(dk1, b_ptr, offsets1, mask1, scale_ptr, db_ptr, parts1_ptr, o_d, D)
    if not SHARED:
        scale_ptr += D
        parts_ptr += 2 * D
        parts1_ptr += 2 * D
        store_key_gradient(dv, c_ptr, offsets, mask, scale_ptr, dc_ptr, parts_ptr, o_d, D)
        if PAIR:
            store_key_gradient(dv1, c_ptr, offsets1, mask1, scale_ptr, dc_ptr, parts1_ptr, o_d, D)


def key_gradients(
    b: Tensor,
    c: Tensor | None,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    q: Tensor,
    do: Tensor,
    lse2: Tensor,
    delta: Tensor,
    loose: Tensor | None,
    dscale: Tensor,
    dshift: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return ``db`` and ``dc`` (empty without ``c``) from what the queries' kernel handed on.

    Args:
        b: raw keys ``[B, M, D]``, and ``c``, raw values, or None where they are the keys.
        k: the keys normalised, as ``v``, the values.
        scale: ``[P, D]``, of queries, keys and, if there are, values.
        q: ``[B, h, rows, D]``, whole tiles of queries, as ``do``; ``lse2`` and ``delta`` are
            ``[B, h, rows]``.
        loose: ``[B, tiles]``, not 0 where ``lse2`` is to be subtracted; None where always.
        dscale, dshift: those of the keys and values, from row 1 on, are written in place.
    """
    batch, keys, width = b.shape
    launch = launches.find("conv_attention_attend_bwd_keys", b, launches.width_class(width))
    launch["STEP"] = min(launch["STEP"], launch["BLOCK_N"])
    count = batch * cdiv(keys, launch["BLOCK_M"])
    # Hopper's matrix unit needs 16 rows for each warp.
    pair = launch["BLOCK_M"] >= 32 * launch["num_warps"]
    parts = scale.new_empty(count * (1 + pair), (2 if c is None else 4) * width)
    tiles = 1 if loose is None else loose.shape[1]
    db = torch.empty_like(b)
    dc = b.new_empty(0) if c is None else torch.empty_like(b)
    _conv_attention_attend_bwd_keys_kernel[(count,)](
        b,
        b if c is None else c,
        k,
        v,
        scale,
        q,
        do,
        lse2,
        delta,
        delta if loose is None else loose,
        scale.new_empty(count),
        db,
        dc,
        parts,
        q.shape[1] * q.shape[2],
        keys,
        D=width,
        BLOCK_D=padded(width),
        TILES=tiles,
        BLOCK_TILES=flags_at_once(tiles),
        PAIR=pair,
        SHARED=c is None,
        MAY_BOUND=loose is not None,
        PRECISION=precision(),
        **launch,
    )
    sum_rows(parts, [t[i] for i in range(1, scale.shape[0]) for t in (dscale, dshift)])
    return db, dc
