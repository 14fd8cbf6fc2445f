"""The dropout mask that every backend draws, for use inside kernels."""

from __future__ import annotations

import triton
import triton.language as tl

VALUES = 2**16


def arguments(dropout: float) -> tuple[int, float]:
    """Return the threshold of the random numbers and the factor of what is kept.

    A probability is rounded to 1 / 65536; with it the factor is one over what is kept.
    """
    threshold = round(dropout * VALUES)
    factor = VALUES / (VALUES - threshold) if threshold < VALUES else 0.0
    return min(threshold, VALUES - 1), factor


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

    Entry i of a contiguous tensor ``[rows, WIDTH]`` is kept iff number ``i & 7`` of the eight of 16
    bits, lowest first, in the four words of Philox4x32-10 with counter ``(i >> 3 low, i >> 3 high,
    STREAM, 0)`` and the seed as key is at least the threshold. Where rows are whole blocks of eight
    numbers, each block is run once for its eight entries (about 8 operations an entry); else once
    for every entry.

    Args:
        seed: the 64-bit key.
        o_row: ``[ROWS]``, rows of the tensor.
        threshold, factor: what :func:`arguments` returns.
        FIRST: first channel, a multiple of 8.
        WIDTH: channels of the tensor.
        BLOCK: channels of the tile, a power of two of 8 or more.
        STREAM: which of the masks that share a seed.
    """
    o_row = o_row.to(tl.int64)
    if WIDTH % 8 == 0:
        o_block = FIRST // 8 + tl.arange(0, BLOCK // 8)
        index = o_row[:, None] * (WIDTH // 8) + o_block[None, :]  # [ROWS, BLOCK // 8]
        w0, w1, w2, w3 = _words(seed, index, STREAM)
        # The last three axes of the joined tile are the three bits of the number's place. Numbers
        # stand in the upper halves of words, so that those which do already need no operation.
        word = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        number = tl.reshape(tl.join(word << 16, word), [o_row.shape[0], BLOCK])
    else:
        o_channel = FIRST + tl.arange(0, BLOCK)
        entry = o_row[:, None] * WIDTH + o_channel[None, :]  # [ROWS, BLOCK]
        w0, w1, w2, w3 = _words(seed, entry >> 3, STREAM)
        low = tl.where((entry & 2) == 0, w0, w1)
        high = tl.where((entry & 2) == 0, w2, w3)
        word = tl.where((entry & 4) == 0, low, high)
        number = tl.where((entry & 1) == 0, word << 16, word)
    return tl.where(number >= tl.cast(threshold, tl.uint32) << 16, factor, 0.0)


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
