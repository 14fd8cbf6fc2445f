"""The dropout mask that every backend draws, for use inside kernels."""

from __future__ import annotations

import triton
import triton.language as tl


def arguments(dropout: float) -> tuple[int, float]:
    """Return the threshold of the random words and the factor of what is kept."""
    factor = 0.0 if dropout >= 1 else 1 / (1 - dropout)
    return min(int(dropout * 2**32), 2**32 - 1), factor


@triton.jit
def keep_factor(
    seed,
    o_row,
    threshold,
    factor,
    FIRST,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STREAM: tl.constexpr,
):
    """Return 0 or ``factor`` for channels ``FIRST + [0, BLOCK)`` of the rows ``o_row``, in fp32.

    Entry i of a contiguous tensor ``[rows, WIDTH]`` is kept iff word ``i & 3`` of Philox4x32-10
    with counter ``(i >> 2 low, i >> 2 high, STREAM, 0)`` and the seed as key is at least the
    threshold. Where rows are whole blocks of four words, each block is run once for its four
    entries (about 15 operations an entry); else once for every entry.

    Args:
        seed: the 64-bit key.
        o_row: ``[ROWS]``, rows of the tensor.
        threshold, factor: what :func:`arguments` returns.
        FIRST: first channel, a multiple of 4.
        WIDTH: channels of the tensor.
        BLOCK: channels of the tile, a power of two of 4 or more.
        STREAM: which of the masks that share a seed.
    """
    o_row = o_row.to(tl.int64)
    if WIDTH % 4 == 0:
        o_block = FIRST // 4 + tl.arange(0, BLOCK // 4)
        index = o_row[:, None] * (WIDTH // 4) + o_block[None, :]  # [ROWS, BLOCK // 4]
        w0, w1, w2, w3 = _words(seed, index, STREAM)
        # The last two axes of the joined tile are the two bits of the word's number.
        word = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        word = tl.reshape(word, [o_row.shape[0], BLOCK])
    else:
        o_channel = FIRST + tl.arange(0, BLOCK)
        entry = o_row[:, None] * WIDTH + o_channel[None, :]  # [ROWS, BLOCK]
        w0, w1, w2, w3 = _words(seed, entry >> 2, STREAM)
        low = tl.where((entry & 1) == 0, w0, w1)
        high = tl.where((entry & 1) == 0, w2, w3)
        word = tl.where((entry & 2) == 0, low, high)
    return tl.where(word >= tl.cast(threshold, tl.uint32), factor, 0.0)


@triton.jit
def _words(seed, index, STREAM: tl.constexpr):
    """Return the four words of Philox4x32-10 for counter ``index``, those of ``tl.philox``.

    One wide multiplication gives both halves of a product, where ``tl.philox`` makes two.

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.
    """
    key = seed.to(tl.uint64)
    k0 = (key & 0xFFFFFFFF).to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    c0 = (index & 0xFFFFFFFF).to(tl.uint32)
    c1 = (index >> 32).to(tl.uint32)
    c3 = tl.zeros_like(c0)
    c2 = c3 + STREAM
    for _ in tl.static_range(10):
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = (b & 0xFFFFFFFF).to(tl.uint32)
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = (a & 0xFFFFFFFF).to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3
