"""The steerable block's statistics from the Gram matrix of its patches, without a convolution.

With p the patch under a pixel, u = bank p, so sums over all pixels need no u::

    sum u = bank sum p        sum u p^T = bank sum p p^T        sum u^2 = bank (sum p p^T) bank^T

A patch is ``k`` pieces of image rows, and the product of two pieces is the same whichever filter
rows they lie under, but for the first and the last image rows. So one pass over the image sums, for
each of its rows, the products of the pieces in it with those in the ``k - 1`` rows below::

    pieces of TY rows       columns x       pieces of TY + k - 1 rows
    [ (ty, j, c), x ]          .            [ x, (t, j', c') ]

At the model's 3 channels that is 35 GFLOP at batch 128, where u and its products with the patches
are 90, and no filter is asked for: 40 or 400, it is the same. A second kernel adds up the rows that
a pair of filter rows has seen, a third multiplies with the filters.

Sum u^2 / n - mean^2 is as wrong as the sums are, times the share of u that cancels. Of masked
images, which zeros surround, that has been up to 1,000 times the variance, for an error of 1e-5 in
float32 sums; others can cancel wholly, and go to ``lift_sums``, as do products of float32 itself.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launches
from .common import TL_DTYPES, cdiv, padded, precision, tf32_factor
from .lift_sums import add_products
from .lift_tile import Plan, Sizes, padded_image, parts, patches, programs_of, unrolled

# Rows of a product, as many as Hopper's matrix unit takes; the last is one of ones.
ROWS = 64


class Gram(NamedTuple):
    """How pieces fill a tile: those of ``ty`` image rows by those of ``ty + k - 1``."""

    ty: int
    columns: int

    @property
    def shape(self) -> str:
        """The shape class of launches."""
        return "K128" if self.columns <= 128 else "K256"


def gram_of(x: Tensor, mask: Tensor | None, s: Sizes, p: Plan) -> Gram | None:
    """Return the tile with the fewest multiplications, or None where ``p`` has fewer or must be."""
    if mask is None or unrolled(x):
        return None
    g = _gram(s.kernel, s.slots)
    if g is None or ROWS * g.columns / g.ty >= 2 * p.height * p.padded / p.ty:
        return None
    return g


@functools.lru_cache(maxsize=256)
def _gram(kernel: int, slots: int) -> Gram | None:
    piece = kernel * slots
    found = [
        Gram(ty, padded((ty + kernel - 1) * piece)) for ty in range(1, (ROWS - 1) // piece + 1)
    ]
    found = [g for g in found if g.columns <= 256]
    return min(found, key=lambda g: g.columns / g.ty, default=None)


@triton.jit(do_not_specialize=["images", "each"])
def _lift_gram_kernel(
    xp_ptr,
    products_ptr,
    images,
    each,
    W1,
    HP,
    WP,
    STRIDE: tl.constexpr,
    E: tl.constexpr,
    KERNEL: tl.constexpr,
    TY: tl.constexpr,
    PRECISION: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """Sum the products of the pieces of TY image rows with those of these and KERNEL - 1 rows more.

    The last row of the left factor is 1: its products are the sums of the pieces. One program owns
    the image rows from ``program_id(0) TY`` on of ``each`` images, and walks along them BLOCK_X
    columns at a time; a column's pieces begin at STRIDE times it. 2 BLOCK_M BLOCK_N operations a
    column; but for the first time the image comes from the caches. Accumulator: float32, in
    registers.
    """
    row = tl.program_id(0) * TY
    start = tl.program_id(1) * each
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    tiles = tl.cdiv(W1, BLOCK_X)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for t in tl.range(start * tiles, tl.minimum(start + each, images) * tiles):
        col = t % tiles * BLOCK_X
        image = xp_ptr + ((t // tiles).to(tl.int64) * HP + row) * WP * E
        b_m = patches(image, 0, col, o_m, 0, TY, HP - row, WP, STRIDE, KERNEL, E, BLOCK_M, BLOCK_X)
        b_n = patches(
            image, 0, col, o_n, 0, TY + KERNEL - 1, HP - row, WP, STRIDE, KERNEL, E, BLOCK_N,
            BLOCK_X,
        )  # fmt: skip
        inside = (col + tl.arange(0, BLOCK_X) < W1)[:, None]
        ones = inside & (o_m == BLOCK_M - 1)[None, :]
        # Not the loaded tile itself: a sum of it beside its product in the shared memory, and
        # Triton 3.6 fetches the next one while Hopper's matrix unit still reads it.
        b_m = tl.where(ones, 1.0, tl.where(inside, b_m.to(tl.float32), 0.0))
        total = add_products(total, tl.trans(b_m), b_n, PRECISION, HALVES)
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    p_products = products_ptr + (program * BLOCK_M + o_m)[:, None] * BLOCK_N + o_n[None, :]
    tl.store(p_products, total)


@triton.jit
def _rows(
    start,
    groups,
    row_tiles,
    H1,
    i,
    STRIDE: tl.constexpr,
    TY: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Return the tiles with the image rows under filter row i, and the rows' places in them."""
    o_r = start + tl.arange(0, BLOCK_R)
    row = o_r % H1 * STRIDE + i
    return (o_r // H1 * row_tiles + row // TY).to(tl.int64), row % TY, o_r < groups * H1


@triton.jit(do_not_specialize=["groups"])
def _lift_gram_fold_kernel(
    products_ptr,
    gram_ptr,
    ones_ptr,
    groups,
    row_tiles,
    H1,
    C,
    STRIDE: tl.constexpr,
    E: tl.constexpr,
    KERNEL: tl.constexpr,
    TY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Add up the image rows under two filter rows: the Gram matrix, as the filters are laid out.

    The grid is (i, i', block of BLOCK_T pairs of (c, j) and (c', j')), for filter rows i <= i',
    whose products are written on both sides of the diagonal; i' = KERNEL stands for the sums of the
    pieces. What all ``groups`` of programs found of H1 rows comes BLOCK_R at a time, 4 bytes and
    one addition for each, in float32 and in one order.
    """
    i = tl.program_id(0)
    below = tl.program_id(1)
    side = C * KERNEL
    area = KERNEL * KERNEL
    o_t = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    right = o_t % side
    o_n = right % KERNEL * E + right // KERNEL
    tap = right // KERNEL * area + right % KERNEL
    if below == KERNEL:
        m_t = o_t < side
        total = tl.zeros([BLOCK_T], tl.float32)
        for start in tl.range(0, groups * H1, BLOCK_R):
            tile, o_ty, m_r = _rows(start, groups, row_tiles, H1, i, STRIDE, TY, BLOCK_R)
            o_r = (tile * BLOCK_M + BLOCK_M - 1) * BLOCK_N + o_ty * (KERNEL * E)
            p = products_ptr + o_r[:, None] + o_n[None, :]
            total += tl.sum(tl.load(p, mask=m_r[:, None] & m_t[None, :], other=0.0), 0)
        tl.store(ones_ptr + tap + i * KERNEL, total, mask=m_t)
    elif below >= i:
        left = o_t // side
        m_t = left < side
        o_m = left % KERNEL * E + left // KERNEL
        o_mn = o_m * BLOCK_N + o_n + (below - i) * (KERNEL * E)
        total = tl.zeros([BLOCK_T], tl.float32)
        for start in tl.range(0, groups * H1, BLOCK_R):
            tile, o_ty, m_r = _rows(start, groups, row_tiles, H1, i, STRIDE, TY, BLOCK_R)
            o_r = tile * (BLOCK_M * BLOCK_N) + o_ty * (KERNEL * E * (BLOCK_N + 1))
            p = products_ptr + o_r[:, None] + o_mn[None, :]
            total += tl.sum(tl.load(p, mask=m_r[:, None] & m_t[None, :], other=0.0), 0)
        tap += below * KERNEL
        other = left // KERNEL * area + i * KERNEL + left % KERNEL
        tl.store(gram_ptr + other * (C * area) + tap, total, mask=m_t)
        tl.store(gram_ptr + tap * (C * area) + other, total, mask=m_t & (below > i))


@triton.jit(do_not_specialize=["count"])
def _lift_gram_finish_kernel(
    gram_ptr,
    ones_ptr,
    bank_ptr,
    mean_ptr,
    variance_ptr,
    ux_ptr,
    count,
    taps,
    G,
    ROUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Multiply a field's filters, one program for each, with the Gram matrix: its statistics.

    The bank is rounded to ROUNDED and PRECISION, as the convolution takes it. 2 taps^2 operations a
    filter in float32, ``count`` values behind each moment; the last sums are in float64.
    """
    field = tl.program_id(0)
    o_g = tl.arange(0, BLOCK_G)
    m_g = o_g < G
    filters = ((field * G + o_g) * taps)[:, None]
    total = tl.zeros([BLOCK_G], tl.float64)
    square = tl.zeros([BLOCK_G], tl.float64)
    for first in tl.range(0, taps, BLOCK_T):
        o_t = first + tl.arange(0, BLOCK_T)
        m_t = o_t < taps
        m = m_g[:, None] & m_t[None, :]
        b_ux = tl.zeros([BLOCK_G, BLOCK_T], tl.float32)
        for start in tl.range(0, taps, BLOCK_R):
            o_r = start + tl.arange(0, BLOCK_R)
            m_r = o_r < taps
            m_bank = m_g[:, None] & m_r[None, :]
            b_bank = tl.load(bank_ptr + filters + o_r[None, :], mask=m_bank, other=0.0)
            b_bank = tf32_factor(b_bank.to(ROUNDED), PRECISION).to(tl.float32)
            p_gram = gram_ptr + (o_r * taps)[:, None] + o_t[None, :]
            b_gram = tl.load(p_gram, mask=m_r[:, None] & m_t[None, :], other=0.0)
            b_ux = tl.dot(b_bank, b_gram, b_ux, input_precision="ieee")
        if ux_ptr is not None:
            tl.store(ux_ptr + filters + o_t[None, :], b_ux, mask=m)
        b_bank = tl.load(bank_ptr + filters + o_t[None, :], mask=m, other=0.0)
        b_bank = tf32_factor(b_bank.to(ROUNDED), PRECISION).to(tl.float64)
        b_ones = tl.load(ones_ptr + o_t, mask=m_t, other=0.0).to(tl.float64)
        total += tl.sum(b_bank * b_ones[None, :], 1)
        square += tl.sum(b_bank * b_ux.to(tl.float64), 1)
    mean = tl.sum(total, 0) / count
    variance = tl.sum(square, 0) / count - mean * mean
    tl.store(mean_ptr + field, mean.to(tl.float32))
    variance = tl.where(variance < 0.0, 0.0, variance)  # of rounding; what is NaN stays
    tl.store(variance_ptr + field, variance.to(tl.float32))


def gram_moments(
    x: Tensor,
    bank: Tensor,
    mask: Tensor | None,
    s: Sizes,
    g: Gram,
    mean: Tensor,
    variance: Tensor,
    ux: Tensor | None,
    ones: Tensor | None,
) -> None:
    """Write the moments of u, and its sums with the patches, as ``lift.moments`` returns them.

    Args:
        x: ``[B, C, H, W]``, at least one image.
        bank: ``[F, G, C, k, k]`` float32.
        mask: ``[H, W]`` float32 or None.
        s: sizes of the call.
        g: the tile.
        mean: ``[F]`` float32, as is ``variance``.
        variance: the biased one.
        ux: as ``bank``, or None if not wanted.
        ones: ``[C, k, k]`` float32, or None if not wanted.
    """
    launch = launches.find("lift_gram", x, g.shape)
    block_x = min(launch.pop("BLOCK_X"), padded(s.w1))
    resident = launch.pop("RESIDENT")
    row_tiles = cdiv(s.hp, g.ty)
    grids = [programs_of(x, len(part), resident, row_tiles) for part in parts(x, s)]
    groups = sum(n for n, _ in grids)
    like = {"dtype": torch.float32, "device": x.device}
    products = torch.empty(groups, row_tiles, ROWS, g.columns, **like)
    done = 0
    for part, (n, each) in zip(parts(x, s), grids, strict=True):
        _lift_gram_kernel[(row_tiles, n)](
            padded_image(part, mask, s), products[done:], len(part), each, s.w1, s.hp, s.wp,
            STRIDE=s.stride, E=s.slots, KERNEL=s.kernel, TY=g.ty,
            PRECISION=precision(convolution=True), BLOCK_M=ROWS, BLOCK_N=g.columns,
            BLOCK_X=block_x, **launch,
        )  # fmt: skip
        done += n
    taps = s.channels * s.kernel**2
    gram = torch.empty(taps, taps, **like)
    ones = torch.empty(taps, **like) if ones is None else ones
    launch = launches.find("lift_gram_fold", gram)
    blocks = cdiv((s.channels * s.kernel) ** 2, launch["BLOCK_T"])
    _lift_gram_fold_kernel[(s.kernel, s.kernel + 1, blocks)](
        products, gram, ones, groups, row_tiles, s.h1, s.channels, STRIDE=s.stride, E=s.slots,
        KERNEL=s.kernel, TY=g.ty, BLOCK_M=ROWS, BLOCK_N=g.columns, **launch,
    )  # fmt: skip
    launch = launches.find("lift_gram_finish", gram)
    _lift_gram_finish_kernel[(s.fields,)](
        gram, ones, bank, mean, variance, ux, float(s.batch * s.order * s.h1 * s.w1), taps,
        s.order, ROUNDED=TL_DTYPES[x.dtype], PRECISION=precision(convolution=True),
        BLOCK_G=padded(s.order), **launch,
    )  # fmt: skip
