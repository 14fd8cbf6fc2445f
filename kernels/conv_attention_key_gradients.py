"""The gradients of attention's keys and values, and of the norms in front of them."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launches
from .common import add_product, cdiv, padded, power_of_2, precision, programs, sum_rows
from .conv_attention_attend import LN2, same_for_all

# Marks of an image's tiles that are read at a time.
FLAGS = 1024
# Programs that share the queries of a tile of keys.
LARGEST_WAYS = 4


@triton.jit
def _key_gradients(
    k,
    v,
    q_ptr,
    do_ptr,
    lse2_ptr,
    delta_ptr,
    first,
    last,
    ROWS,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    ONE_SUM: tl.constexpr,
    BOUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Walk over queries ``first`` to ``last``; return the gradients of keys and of values.

    BLOCK_N queries are fetched at a time, and multiplied in tiles of STEP, as keys are elsewhere:
    tiles of 32 leave room for a third more programs, those of 64 take fewer instructions a score.
    ONE_SUM: the first is that of both. BOUNDED: exponentials are what they are, since ``do`` and
    ``delta`` are divided by their sum.
    """
    o_n = tl.arange(0, STEP)
    o_d = tl.arange(0, BLOCK_D)
    m_d = (o_d < D)[None, :]
    o_q = o_n[:, None] * D + o_d[None, :]
    dk = tl.zeros([k.shape[0], BLOCK_D], tl.float32)
    dv = tl.zeros([k.shape[0], BLOCK_D], tl.float32)
    tl.assume(first < last)
    for begin in tl.range(first, last, BLOCK_N):
        for inner in tl.static_range(0, BLOCK_N, STEP):
            row = begin + inner
            q = tl.load(q_ptr + row * D + o_q, mask=m_d, other=0.0)  # [STEP, BLOCK_D]
            do = tl.load(do_ptr + row * D + o_q, mask=m_d, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_M, STEP]
            if not BOUNDED:
                s -= tl.load(lse2_ptr + row + o_n)[None, :]
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            p = tl.exp2(s)
            delta = tl.load(delta_ptr + row + o_n)[None, :]
            ds = p * (dp * LN2 - delta)
            if ONE_SUM:
                dk = add_product(dk, p.to(do.dtype), do, ROWS, PRECISION)
            else:
                dv = add_product(dv, p.to(do.dtype), do, ROWS, PRECISION)
            dk = add_product(dk, ds.to(q.dtype), q, ROWS, PRECISION)
    return dk, dv


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


@triton.jit(do_not_specialize=["WAYS"])
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
    sums_ptr,
    ROWS,
    M,
    WAYS,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STEP: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    SHARED: tl.constexpr,
    MAY_BOUND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write a share of the keys' gradient; or ``db`` and ``dc``, and one of their norms' gradients.

    WAYS programs own BLOCK_M keys of one image, and each walks over its part of the ROWS queries of
    all heads, whole tiles, as over one list, for keys are the same in all heads::

                  queries of head 0, then head 1, ...: BLOCK_N at a time ->
        keys      scores^T -> exp2 -> dv += p^T do
        BLOCK_M                       dk += ds^T q       (one sum of both if values are the keys)

    Scores are transposed, so that both gradients take their left factor from registers. If values
    are the keys (SHARED) a program writes its sum to ``sums``, ``[B, WAYS, tiles of keys, BLOCK_M,
    D]``, for the next kernel; else WAYS is 1 and it makes the rest itself.

    Per score: 8 D operations on the tensor cores and one exponential; 0.44 ms and 0.38 ms for
    1.37e9 scores at D = 32 (batch 128, H100). Bytes from L2: 4 D + 4 per query and tile of keys, 4
    more where an image has scores that may be large. Accumulates in fp32, queries in order.
    ``parts`` is ``[programs, 4, D]``: dscale and dshift of keys, then of values; ``largest``
    ``[programs]`` is of :func:`same_for_all`.
    """
    blocks = tl.cdiv(M, BLOCK_M)
    program, way = tl.program_id(0) // WAYS, tl.program_id(0) % WAYS
    i_b = (program // blocks).to(tl.int64)
    o_m = program % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_d = (o_d < D)[None, :]
    mask = (o_m < M)[:, None] & m_d
    offsets = i_b * M * D + o_m[:, None] * D + o_d[None, :]
    k = tl.load(k_ptr + offsets, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_D]
    v = k if SHARED else tl.load(v_ptr + offsets, mask=mask, other=0.0)
    q_ptr += i_b * ROWS * D
    do_ptr += i_b * ROWS * D
    lse2_ptr += i_b * ROWS
    delta_ptr += i_b * ROWS
    tiles = ROWS // BLOCK_N
    first, last = way * tiles // WAYS * BLOCK_N, (way + 1) * tiles // WAYS * BLOCK_N

    small = False
    if MAY_BOUND:
        small = all_small(
            loose_ptr + i_b * TILES, largest_ptr + tl.program_id(0), TILES, BLOCK_TILES
        )
    if small:
        dk, dv = _key_gradients(
            k, v, q_ptr, do_ptr, lse2_ptr, delta_ptr, first, last, ROWS, D, BLOCK_D, BLOCK_N, STEP,
            SHARED, True, PRECISION,
        )  # fmt: skip
    else:
        dk, dv = _key_gradients(
            k, v, q_ptr, do_ptr, lse2_ptr, delta_ptr, first, last, ROWS, D, BLOCK_D, BLOCK_N, STEP,
            SHARED, False, PRECISION,
        )  # fmt: skip

    if SHARED:
        sums_ptr += (i_b * WAYS + way) * blocks * BLOCK_M * D
        tl.store(sums_ptr + o_m[:, None] * D + o_d[None, :], dk, mask=m_d)
    else:
        parts_ptr += program.to(tl.int64) * 4 * D
        scale_ptr += D
        _store_key_gradient(dk, b_ptr, offsets, mask, scale_ptr, db_ptr, parts_ptr, o_d, D)
        scale_ptr += D
        parts_ptr += 2 * D
        _store_key_gradient(dv, c_ptr, offsets, mask, scale_ptr, dc_ptr, parts_ptr, o_d, D)


@triton.jit(do_not_specialize=["WAYS"])
def _conv_attention_attend_bwd_finish_kernel(
    b_ptr,
    sums_ptr,
    scale_ptr,
    db_ptr,
    parts_ptr,
    M,
    ROWS,
    WAYS,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Write ``db`` from the sums of WAYS programs, and its share of dscale and dshift.

    One program owns BLOCK_M keys of one image. ``sums`` is ``[B, WAYS, ROWS, D]``, those beyond M
    count for nothing; ``parts`` ``[programs, 2, D]``. 4 bytes per way, key and channel, each added
    in fp32, in order.
    """
    blocks = tl.cdiv(M, BLOCK_M)
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    mask = (o_m < M)[:, None] & (o_d < D)[None, :]
    offsets = o_m[:, None] * D + o_d[None, :]
    sums_ptr += i_b * WAYS * ROWS * D
    dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for _ in tl.range(0, WAYS):
        dk += tl.load(sums_ptr + offsets, mask=mask, other=0.0)
        sums_ptr += ROWS * D
    parts_ptr += tl.program_id(0).to(tl.int64) * 2 * D
    offsets += i_b * M * D
    _store_key_gradient(dk, b_ptr, offsets, mask, scale_ptr + D, db_ptr, parts_ptr, o_d, D)


@functools.cache
def _ways(count: int, tiles: int, slots: int) -> int:
    """Return how many programs share the queries of each of ``count`` tiles of keys.

    Of programs, ``slots`` run at once. The last round of them is rarely full: more programs that
    are shorter leave less of it empty, and few images do not fill the first one. A tenth must be
    gained, for each way's sums go through memory.
    """

    def turns(ways: int) -> int:
        return cdiv(count * ways, slots) * cdiv(tiles, ways)

    best = min(range(1, min(LARGEST_WAYS, tiles) + 1), key=turns)
    return best if turns(best) <= 0.9 * turns(1) else 1


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
    rows, blocks = q.shape[1] * q.shape[2], cdiv(keys, launch["BLOCK_M"])
    count, resident = batch * blocks, launch.pop("RESIDENT")
    each, ways, parts, sums = rows // launch["BLOCK_N"], 1, scale, scale
    if c is None:
        ways = _ways(count, each, programs(b, resident, count * each))
        sums = scale.new_empty(batch, ways, blocks * launch["BLOCK_M"], width)
    else:
        parts = scale.new_empty(count, 4 * width)
    tiles = 1 if loose is None else loose.shape[1]
    db = torch.empty_like(b)
    dc = b.new_empty(0) if c is None else torch.empty_like(b)
    _conv_attention_attend_bwd_keys_kernel[(count * ways,)](
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
        scale.new_empty(count * ways),
        db,
        dc,
        parts,
        sums,
        rows,
        keys,
        ways,
        D=width,
        BLOCK_D=padded(width),
        TILES=tiles,
        BLOCK_TILES=flags_at_once(tiles),
        SHARED=c is None,
        MAY_BOUND=loose is not None,
        PRECISION=precision(),
        **launch,
    )
    if c is None:
        finish = launches.find("conv_attention_attend_bwd_finish", b)
        count = batch * cdiv(keys, finish["BLOCK_M"])
        parts = scale.new_empty(count, 2 * width)
        _conv_attention_attend_bwd_finish_kernel[(count,)](
            b,
            sums,
            scale,
            db,
            parts,
            keys,
            sums.shape[2],
            ways,
            D=width,
            BLOCK_D=padded(width),
            **finish,
        )
    sum_rows(parts, [t[i] for i in range(1, scale.shape[0]) for t in (dscale, dshift)])
    return db, dc
