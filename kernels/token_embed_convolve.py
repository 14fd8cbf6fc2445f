"""The convolution of the token embedding: patches gathered on load, times the filters."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import cdiv, padded

# Where no axis of a tile is contiguous in memory, Triton spreads the threads along the first, and
# from 3.7 on along the last.
LANES_LAST = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7))


def lines_of(x: Tensor, size: int, stride: int, padding: int) -> tuple[int, int]:
    """Return the rows and columns of tokens."""
    rows, columns = ((n + 2 * padding - size) // stride + 1 for n in x.shape[2:])
    return rows, columns


def blocks_of(launch: dict[str, int], filters: Tensor) -> dict[str, int]:
    """Return how many of a filter's weights one block has, of how many taps, and how many blocks.

    A block is TAPS taps of BLOCK_K // TAPS channels: all channels where they are few, else one tap.
    """
    channels, taps = filters.shape[1], filters[0, 0].numel()
    block = min(launch["BLOCK_K"], padded(channels * taps))
    together = min(taps, max(1, block // channels))
    blocks = cdiv(taps, together) * cdiv(channels, block // together)
    return launch | {"BLOCK_K": block, "TAPS": together, "BLOCKS": blocks}


@triton.jit
def weights_of(
    block, C: tl.constexpr, SIZE: tl.constexpr, BLOCK_K: tl.constexpr, TAPS: tl.constexpr
):
    """Return channels and taps (i SIZE + j) of the weights of a block, and which of them exist."""
    o_k = tl.arange(0, BLOCK_K)
    chunks: tl.constexpr = (C + BLOCK_K // TAPS - 1) // (BLOCK_K // TAPS)
    c = block % chunks * (BLOCK_K // TAPS) + o_k // TAPS
    tap = block // chunks * TAPS + o_k % TAPS
    return c, tap, (c < C) & (tap < SIZE * SIZE)


@triton.jit
def lanes(values):
    """Lay values along the axis of a tile that threads are spread along."""
    return values[None, :] if LANES_LAST else values[:, None]


@triton.jit
def others(values):
    """Lay values along the other axis of the tile."""
    return values[:, None] if LANES_LAST else values[None, :]


@triton.jit
def lanes_first(tile):
    """Turn a tile of threads along their axis into rows of that axis, or back."""
    return tl.trans(tile) if LANES_LAST else tile


@triton.jit
def patches(
    x_ptr,
    block,
    o_p,
    H,
    W,
    OH,
    OW,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAPS: tl.constexpr,
):
    """Gather ``[p, k]``: weight k of a block of the filters meets this value at output pixel p.

    Threads are spread along pixels. From BLOCK_P = 32 num_warps on, every thread has all weights of
    one pixel: what depends on k is a constant of its code, what depends on p is found once, and a
    value costs an address, a load and a store to shared memory.
    """
    c, tap, m_k = weights_of(block, C, SIZE, BLOCK_K, TAPS)
    i = tap // SIZE
    j = tap % SIZE
    top = o_p // OW * STRIDE - PADDING
    left = o_p % OW * STRIDE - PADDING
    row = lanes(top) + others(i)
    column = lanes(left) + others(j)
    mask = (row >= 0) & (row < H) & (column >= 0) & (column < W)
    mask &= lanes(o_p < OH * OW) & others(m_k)
    corner_ptr = x_ptr + (top * W + left)
    x = tl.load(lanes(corner_ptr) + others(c * (H * W) + i * W + j), mask=mask, other=0.0)
    return lanes_first(x)


@triton.jit
def _add_block(
    u,
    x_ptr,
    filters_ptr,
    block,
    o_p,
    H,
    W,
    OH,
    OW,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add one block of the filters' weights to the convolution; return also the patches."""
    x = patches(
        x_ptr, block, o_p, H, W, OH, OW, C, STRIDE, PADDING, SIZE, BLOCK_K, TAPS
    )  # [BLOCK_P, BLOCK_K]
    c, tap, m_k = weights_of(block, C, SIZE, BLOCK_K, TAPS)
    o_d = tl.arange(0, BLOCK_D)
    w = tl.load(
        filters_ptr + lanes(c * (SIZE * SIZE) + tap) + others(o_d * (C * SIZE * SIZE)),
        mask=lanes(m_k) & others(o_d < D),
        other=0.0,
    )
    w = lanes_first(w.to(x.dtype))  # [BLOCK_K, BLOCK_D]
    u = tl.dot(x, w, u, input_precision=PRECISION)
    return u, x


@triton.jit
def convolve(
    x_ptr,
    filters_ptr,
    bias_ptr,
    o_p,
    H,
    W,
    OH,
    OW,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return convolution plus bias at one tile ``[BLOCK_P, BLOCK_D]``, and block 0's patches."""
    o_d = tl.arange(0, BLOCK_D)
    u = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    u, x = _add_block(
        u,
        x_ptr,
        filters_ptr,
        0,
        o_p,
        H,
        W,
        OH,
        OW,
        C,
        STRIDE,
        PADDING,
        SIZE,
        D,
        BLOCK_D,
        BLOCK_K,
        TAPS,
        PRECISION,
    )
    for block in tl.range(1, BLOCKS, num_stages=1):
        u, _x = _add_block(
            u,
            x_ptr,
            filters_ptr,
            block,
            o_p,
            H,
            W,
            OH,
            OW,
            C,
            STRIDE,
            PADDING,
            SIZE,
            D,
            BLOCK_D,
            BLOCK_K,
            TAPS,
            PRECISION,
        )
    return u + tl.load(bias_ptr + o_d, mask=o_d < D, other=0.0)[None, :], x
