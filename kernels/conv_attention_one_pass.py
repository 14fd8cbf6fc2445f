r"""Attention's gradients from one pass over the scores, where values are the keys and narrow.

With what :mod:`conv_attention_attend_backward` hands on, per score ``p = exp(s - lse)`` and ``ds =
p (do b'^T - delta)``, the keys' gradient is ``p^T do + ds^T q`` and the queries' ``ds b'``. Two
kernels that keep one side each compute all of this twice but for the sums. Here a program keeps the
sums of several tiles of keys in registers, walks over queries, and adds up each query's gradient
over those tiles; what the next tiles of keys give is added to it in memory.

Each ``q`` lies beside its ``do``. One product makes scores and ``do b'^T`` of both, and one adds
``ds^T q + p^T do`` to the sums, ``[ds, p]`` being the factor that the threads have in registers: a
tile waits for the matrix unit twice, where four products apart would have it wait four times.

No GPU has timed this: ``launches.json`` asks for it nowhere, ``eqcvt tune`` tries it.

Source: Dao, arXiv:2307.08691, section 3.1, with the loops in that order and no atomics.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launches
from .common import cdiv, padded, programs, sum_rows
from .conv_attention_attend import LN2, LOG2E, load_keys
from .conv_attention_key_gradients import all_small, flags_at_once, store_key_gradient

# A tile of queries, and one of keys: what one matrix unit of Hopper takes.
TILE = 64
# Programs of a multiprocessor: their sums take half of its registers each.
RESIDENT = 2
LARGEST_WIDTH = 32
# Of queries, in the kernel before this one.
LARGEST_TILE = 128


def launch(a: Tensor, c: Tensor | None, keys: int, heads: int) -> launches.Launch | None:
    """Return how one pass over the scores of queries ``a`` is launched; None: by two kernels."""
    queries, width = a.shape[1:]
    if c is not None or width > LARGEST_WIDTH or a.dtype.itemsize > 2 or keys < TILE:
        return None
    # Offsets inside an image's queries, each with its gradient, are 32-bit numbers.
    if 2 * heads * width * (queries + LARGEST_TILE) >= 2**31:
        return None
    found = launches.find("conv_attention_attend_bwd", a, launches.width_class(width))
    return found if found["HELD"] else None


@triton.jit
def _halves(x):
    """Return the left and the right half of columns; a matrix unit's threads have both."""
    x = tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2])
    return tl.split(tl.permute(x, (0, 2, 1)))


@triton.jit
def _together(left, right):
    """Return ``[left, right]``, side by side."""
    x = tl.permute(tl.join(left, right), (0, 2, 1))
    return tl.reshape(x, [left.shape[0], 2 * left.shape[1]])


@triton.jit
def _walk(
    keys,
    both_ptr,
    lse2_ptr,
    delta_ptr,
    dq_ptr,
    first,
    last,
    begins,
    left,
    N,
    ROWS,
    HEADS,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    HELD: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """Walk over tiles ``first`` to ``last`` of queries; add to ``dq``, return the keys' sums.

    ``left`` keys there are; tiles may reach beyond. BOUNDED: exponentials are what they are, and
    those beyond are 1, which then does nothing: neither the key nor ``do b'`` is anything but 0.
    ``begins``: ``dq`` has nothing yet.
    """
    o_n = tl.arange(0, TILE)
    o_d = tl.arange(0, BLOCK_D)
    m_d = (o_d < D)[None, :]
    o_both = tl.arange(0, 2 * TILE)[:, None] * D + o_d[None, :]
    sums = ()
    for _ in tl.static_range(HELD):
        sums = sums + (tl.zeros([TILE, BLOCK_D], tl.float32),)
    tl.assume(first < last)
    for tile in tl.range(first, last):
        row = tile * TILE
        both = tl.load(both_ptr + 2 * row * D + o_both, mask=m_d, other=0.0)  # [2 TILE, BLOCK_D]
        delta = tl.load(delta_ptr + row + o_n)[None, :]
        head = row // ROWS
        n = row - head * ROWS + o_n
        o_dq = (n[:, None] * HEADS + head) * D + o_d[None, :]
        m_dq = (n < N)[:, None] & m_d
        dq = tl.zeros([TILE, BLOCK_D], tl.float32)
        sums_before = sums
        sums = ()
        for t in tl.static_range(HELD):
            products = tl.dot(keys[t], tl.trans(both))  # [TILE keys, 2 TILE queries]
            s, dp = _halves(products)
            if not BOUNDED:
                lse2 = tl.load(lse2_ptr + row + o_n)[None, :]
                s = tl.where((t * TILE + o_n < left)[:, None], s - lse2, float("-inf"))
            p = tl.exp2(s)
            ds = (p * (dp * LN2 - delta)).to(both.dtype)
            sums = sums + (tl.dot(_together(ds, p.to(both.dtype)), both, sums_before[t]),)
            dq = tl.dot(tl.trans(ds), keys[t], dq)
        before = tl.load(dq_ptr + o_dq, mask=m_dq & (begins == 0), other=0.0)
        dq = before.to(tl.float32) + dq * LOG2E
        tl.store(dq_ptr + o_dq, dq.to(both.dtype), mask=m_dq)
    return sums


@triton.jit(do_not_specialize=["PARTS"])
def _conv_attention_attend_bwd_kernel(
    k_ptr,
    both_ptr,
    lse2_ptr,
    delta_ptr,
    loose_ptr,
    largest_ptr,
    dq_ptr,
    sums_ptr,
    N,
    ROWS,
    M,
    HEADS,
    PARTS,
    RANGES,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    HELD: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    MAY_BOUND: tl.constexpr,
):
    """Write ``dq``, and this program's share of the gradient of the normalised keys.

    One program owns one of PARTS parts of an image's queries of all heads, as one list, and holds
    HELD tiles of keys at a time, with their sums, of which it needs RANGES::

                      queries of its part: TILE at a time ->
        keys       [  scores^T -> exp2 -> sums += p^T do + ds^T q  ]
        HELD tiles [  ...         and dq += ds b', over the tiles  ]  dq -> memory

    Per score: 10 D operations on the tensor cores and one exponential; 0.55 ms and 0.38 ms for
    1.37e9 scores at D = 32 (batch 128, H100). Bytes: 4 D numbers per query, head and range (q, do;
    dq is read again and written). Accumulates in fp32, queries and keys in order; between ranges
    ``dq`` is rounded to its dtype. ``sums`` is ``[programs, RANGES HELD TILE, D]``.
    """
    i_b = (tl.program_id(0) // PARTS).to(tl.int64)
    part = tl.program_id(0) % PARTS
    tiles = ROWS * HEADS // TILE
    first = part * tiles // PARTS
    last = (part + 1) * tiles // PARTS
    o_m = tl.arange(0, TILE)
    o_d = tl.arange(0, BLOCK_D)
    m_d = (o_d < D)[None, :]
    k_ptr += i_b * M * D
    both_ptr += i_b * HEADS * ROWS * 2 * D
    lse2_ptr += i_b * HEADS * ROWS
    delta_ptr += i_b * HEADS * ROWS
    dq_ptr += i_b * N * HEADS * D
    sums_ptr += tl.program_id(0).to(tl.int64) * RANGES * HELD * TILE * D
    small = False
    if MAY_BOUND:
        small = all_small(
            loose_ptr + i_b * TILES, largest_ptr + tl.program_id(0), TILES, BLOCK_TILES
        )

    for r in tl.range(0, RANGES, num_stages=1):
        begin = r * HELD * TILE
        keys = ()
        for t in tl.static_range(HELD):
            keys = keys + (load_keys(k_ptr, begin + t * TILE, M, D, BLOCK_D, TILE, True),)
        # What a thread wrote of dq for the last tiles of keys, another reads.
        tl.debug_barrier()
        if small:
            sums = _walk(
                keys, both_ptr, lse2_ptr, delta_ptr, dq_ptr, first, last, r == 0, M - begin, N,
                ROWS, HEADS, D, BLOCK_D, TILE, HELD, True,
            )  # fmt: skip
        else:
            sums = _walk(
                keys, both_ptr, lse2_ptr, delta_ptr, dq_ptr, first, last, r == 0, M - begin, N,
                ROWS, HEADS, D, BLOCK_D, TILE, HELD, False,
            )  # fmt: skip
        for t in tl.static_range(HELD):
            o_s = (begin + t * TILE + o_m)[:, None] * D + o_d[None, :]
            tl.store(sums_ptr + o_s, sums[t], mask=m_d)


@triton.jit(do_not_specialize=["PARTS"])
def _conv_attention_attend_bwd_finish_kernel(
    b_ptr,
    sums_ptr,
    scale_ptr,
    db_ptr,
    parts_ptr,
    M,
    ROWS,
    PARTS,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Write ``db`` from the sums of an image's PARTS, and its share of dscale and dshift.

    One program owns BLOCK_M keys of one image. ``sums`` is ``[B, PARTS, ROWS, D]``, keys beyond M
    in it count for nothing; ``parts`` ``[programs, 2, D]``. 4 bytes per part, key and channel, each
    added in fp32, parts in order.
    """
    blocks = tl.cdiv(M, BLOCK_M)
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    mask = (o_m < M)[:, None] & (o_d < D)[None, :]
    offsets = o_m[:, None] * D + o_d[None, :]
    sums_ptr += i_b * PARTS * ROWS * D
    dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for _ in tl.range(0, PARTS):
        dk += tl.load(sums_ptr + offsets, mask=mask, other=0.0)
        sums_ptr += ROWS * D
    parts_ptr += tl.program_id(0).to(tl.int64) * 2 * D
    offsets += i_b * M * D
    store_key_gradient(dk, b_ptr, offsets, mask, scale_ptr + D, db_ptr, parts_ptr, o_d, D)


@functools.cache
def _parts(batch: int, tiles: int, slots: int) -> int:
    """Return how many programs share an image's tiles, of which ``slots`` run at once."""
    return min(
        range(1, min(tiles, slots) + 1),
        key=lambda parts: cdiv(batch * parts, slots) * (cdiv(tiles, parts) + 1),
    )


def gradients(
    b: Tensor,
    k: Tensor,
    scale: Tensor,
    both: Tensor,
    lse2: Tensor,
    delta: Tensor,
    loose: Tensor | None,
    dq: Tensor,
    dscale: Tensor,
    dshift: Tensor,
    held: launches.Launch,
) -> Tensor:
    """Return ``db`` and write ``dq`` ``[B, N, h, D]``, and the keys' ``dscale`` and ``dshift``.

    Args:
        b: raw keys ``[B, M, D]``, and ``k``, the keys normalised.
        scale: ``[2, D]``, of queries and keys, as ``dscale`` and ``dshift``, of which the keys'
            are written.
        both: ``[B, h, rows / TILE, 2, TILE, D]``, tiles of ``q``, each with its ``do``; ``lse2``
            and ``delta`` are ``[B, h, rows]``.
        loose: ``[B, tiles]``, not 0 where ``lse2`` is to be subtracted; None where always.
        dq: written.
        held: from :func:`launch`.
    """
    batch, keys, width = b.shape
    queries, heads, rows = dq.shape[1], lse2.shape[1], lse2.shape[2]
    tiles = cdiv(keys, TILE)
    ranges = cdiv(tiles, held.pop("HELD"))
    tiles = cdiv(tiles, ranges)
    each = heads * rows // TILE
    parts = _parts(batch, each, programs(b, RESIDENT, batch * each))
    sums = scale.new_empty(batch, parts, ranges * tiles * TILE, width)
    flags = 1 if loose is None else loose.shape[1]
    _conv_attention_attend_bwd_kernel[(batch * parts,)](
        k,
        both,
        lse2,
        delta,
        delta if loose is None else loose,
        scale.new_empty(batch * parts),
        dq,
        sums,
        queries,
        rows,
        keys,
        heads,
        parts,
        ranges,
        D=width,
        BLOCK_D=padded(width),
        TILE=TILE,
        HELD=tiles,
        TILES=flags,
        BLOCK_TILES=flags_at_once(flags),
        MAY_BOUND=loose is not None,
        **held,
    )
    finish = launches.find("conv_attention_attend_bwd_finish", b)
    count = batch * cdiv(keys, finish["BLOCK_M"])
    shares = scale.new_empty(count, 2 * width)
    db = torch.empty_like(b)
    _conv_attention_attend_bwd_finish_kernel[(count,)](
        b,
        sums,
        scale,
        db,
        shares,
        keys,
        ranges * tiles * TILE,
        parts,
        D=width,
        BLOCK_D=padded(width),
        **finish,
    )
    sum_rows(shares, [dscale[1], dshift[1]])
    return db
