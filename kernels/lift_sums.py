"""Sums of the steerable block over all pixels: statistics, products with the image's patches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launches
from .common import cdiv, interpreted, power_of_2, precision, tf32_factor
from .lift_tile import (
    Factors,
    Plan,
    Sizes,
    first_tile,
    next_tile,
    parts,
    patches,
    programs_of,
)

CONV, MASKED, STORED = (tl.constexpr(i) for i in range(3))
# Where there is no matrix unit the halves are what they are, in a type that multiplies rightly.
HALF = tl.constexpr(tl.float32 if interpreted() else tl.bfloat16)


@triton.jit
def _halves(x):
    """Split float32 numbers in two of 8 bits each: exact for those of TF32, else to 2 ** -17."""
    bits = x.to(tl.int32, bitcast=True) & -0x10000
    high = bits.to(tl.float32, bitcast=True)
    return high.to(HALF), (x - high).to(HALF)


@triton.jit
def add_products(total, b_v, b_p, PRECISION: tl.constexpr, HALVES: tl.constexpr):
    """Return ``total + b_v b_p``, for values [row, x] and patches [x, tap].

    A patch lies in memory tap by tap, and this product walks over x. Hopper's matrix unit takes
    16-bit factors either way, but 32-bit ones only along the product, so Triton copies the patch
    transposed: a tile of 32 columns took 9,000 cycles on an H100, where its products want 2,000.
    HALVES makes the TF32 product of three in bfloat16: 1.5 times the work, no copy, and an error of
    2 ** -16, where TF32's own is 2 ** -11. An infinite factor gives NaN there.
    """
    if HALVES and (PRECISION == "tf32") and (b_p.dtype == tl.float32):
        v_high, v_low = _halves(b_v)
        p_high, p_low = _halves(b_p)
        total = tl.dot(v_low, p_high, total, input_precision="ieee")
        total = tl.dot(v_high, p_low, total, input_precision="ieee")
        return tl.dot(v_high, p_high, total, input_precision="ieee")
    b_v = tf32_factor(b_v.to(b_p.dtype), PRECISION)
    return tl.dot(b_v, b_p, total, input_precision=PRECISION)


@triton.jit(do_not_specialize=["tiles", "per_program"])
def _lift_sums_kernel(
    xp_ptr,
    w_ptr,
    scale_ptr,
    shift_ptr,
    v_ptr,
    sums_ptr,
    products_ptr,
    tiles,
    per_program,
    row_tiles,
    col_tiles,
    H1,
    W1,
    HP,
    WP,
    pitch,
    SOURCE: tl.constexpr,
    MOMENTS: tl.constexpr,
    CORRELATE: tl.constexpr,
    FG: tl.constexpr,
    ROWS: tl.constexpr,
    TY: tl.constexpr,
    STRIDE: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    KERNEL: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    SLOTS: tl.constexpr,
    PRECISION: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """Sum a value over all pixels, and its product with every tap of the patch around them.

    The value is u (CONV), dv where scale u + shift > 0 (MASKED, dv planar), or read pixel by pixel
    (STORED, where the taps do not fit one block: axis 2 of the grid goes over the blocks). Row
    ch = F G of MOMENTS, where there is one, is 1: its products are the sums of the taps.

    One program owns per_program tiles of BLOCK_M rows by BLOCK_X columns and one block of taps.
    The patch serves both products from shared memory: 4 K operations per output; at batch 128 and
    C = 3 90 GFLOP and, MASKED, 160 MB read. Accumulators: float32; the products in registers over
    all tiles in order. MOMENTS: mean and centred square of each tile, combined as they come (Chan),
    since E[u^2] - mean^2 would lose the variance of a large mean.
    """
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_ty = o_m // ROWS
    o_ch = o_m % ROWS
    m_m = o_ty < TY
    o_k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    if SOURCE != STORED:
        b_w = tl.load(w_ptr + (o_m * KP)[:, None] + o_k[None, :])  # [BLOCK_M, BLOCK_K]
    if SOURCE == MASKED:
        b_scale = tl.load(scale_ptr + o_ch // G, mask=m_m, other=0.0)[:, None]
        b_shift = tl.load(shift_ptr + o_ch // G, mask=m_m, other=0.0)[:, None]
    count = tl.zeros([BLOCK_M], tl.float32)
    mean = tl.zeros([BLOCK_M], tl.float32)  # or, without MOMENTS, the sum
    square = tl.zeros([BLOCK_M], tl.float32)
    if CORRELATE:
        products = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    start = tl.program_id(0) * per_program
    tile, col, row = first_tile(start, row_tiles, col_tiles)
    for _ in tl.range(start, tl.minimum(start + per_program, tiles)):
        i_b = tile.to(tl.int64)
        o_x = col * BLOCK_X + tl.arange(0, BLOCK_X)
        y = row * TY + o_ty
        m_y = m_m & (y < H1)
        if (SOURCE != STORED) or CORRELATE:
            image = xp_ptr + i_b * HP * WP * E
            b_p = patches(
                image, row * TY, col * BLOCK_X, o_k, 0, HP, HP, WP, STRIDE, KERNEL, E, K, BLOCK_X
            )
        if SOURCE == STORED:
            pixels = ((i_b * H1 + y) * W1)[:, None] + o_x[None, :]
            m_v = (m_y & (o_ch < FG))[:, None] & (o_x < W1)[None, :]
            b_v = tl.load(v_ptr + pixels * SLOTS + o_ch[:, None], mask=m_v, other=0.0)
            # A factor made in registers: Triton would fetch the next tile to where Hopper's matrix
            # unit reads this one, for it is summed besides.
            b_v = tl.where((o_x < W1)[None, :], b_v.to(tl.float32), 0.0)
        else:
            b_v = tl.dot(b_w, tl.trans(b_p), input_precision=PRECISION)  # [BLOCK_M, BLOCK_X]
        if SOURCE == MASKED:
            planar = ((i_b * ROWS + o_ch) * H1 + y)[:, None] * pitch + o_x[None, :]
            m_v = m_y[:, None] & (o_x < pitch)[None, :]
            b_dv = tl.load(v_ptr + planar, mask=m_v, other=0.0).to(tl.float32)
            b_v = tl.where(b_v * b_scale + b_shift <= 0.0, 0.0, b_dv)
        if MOMENTS:
            # As factors the columns cost less than as predicates, which are few.
            inside = (o_x < W1).to(tl.float32)[None, :]
            b_v *= inside
            columns = tl.minimum(BLOCK_X, W1 - col * BLOCK_X)
            more = tl.where(m_y, columns.to(tl.float32), 0.0)
            there = tl.where(m_y, tl.sum(b_v, 1), 0.0) / tl.maximum(more, 1.0)
            centred = b_v - there[:, None]
            squares = tl.sum(centred * (centred * inside), 1)
            share = more / tl.maximum(count + more, 1.0)
            delta = there - mean
            square += tl.where(m_y, squares, 0.0) + delta * delta * count * share
            mean += delta * share
            count += more
            if CORRELATE:
                ones = (m_y & (o_ch == FG)).to(tl.float32)[:, None] * inside
                b_v = tl.where((m_y & (o_ch < FG))[:, None], b_v, ones)
        else:
            mean += tl.sum(b_v, 1)
        if CORRELATE:
            products = add_products(products, b_v, b_p, PRECISION, HALVES)
        tile, col, row = next_tile(tile, col, row, row_tiles, col_tiles)
    i_p = tl.program_id(0).to(tl.int64)
    height = tl.num_programs(1) * BLOCK_M
    if CORRELATE:
        p_products = products_ptr + ((i_p * height + o_m) * KP)[:, None] + o_k[None, :]
        tl.store(p_products, products)
    if tl.program_id(2) == 0:
        p_sums = sums_ptr + i_p * 3 * height + o_m
        tl.store(p_sums, count)
        tl.store(p_sums + height, mean)
        tl.store(p_sums + 2 * height, square)


@triton.jit
def _row_sum(
    sums_ptr,
    o,
    field,
    programs,
    height,
    which,
    ROWS: tl.constexpr,
    TY: tl.constexpr,
    G: tl.constexpr,
):
    """Load entry ``which`` of the partial sums of one field: o counts programs, ty and g."""
    i_p = (o // (TY * G)).to(tl.int64)
    row = o // G % TY * ROWS + field * G + o % G
    p = sums_ptr + (i_p * 3 + which) * height + row
    return tl.load(p, mask=i_p < programs, other=0.0).to(tl.float64)


@triton.jit
def _combine(
    field,
    sums_ptr,
    mean_ptr,
    variance_ptr,
    programs,
    height,
    MOMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    TY: tl.constexpr,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Combine the sums of all programs: mean and variance of a field, or (mean_ptr) the total.

    Two passes in float64: the mean of the means, then the squares about it, in the order of the
    programs.
    """
    length = programs * TY * G
    count = tl.zeros([BLOCK], tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    for start in tl.range(0, length, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b_sum = _row_sum(sums_ptr, o, field, programs, height, 1, ROWS, TY, G)
        if MOMENTS:
            b_count = _row_sum(sums_ptr, o, field, programs, height, 0, ROWS, TY, G)
            b_sum *= b_count
            count += b_count
        total += b_sum
    if MOMENTS:
        n = tl.sum(count, 0)
        mean = tl.sum(total, 0) / n
        squares = tl.zeros([BLOCK], tl.float64)
        for start in tl.range(0, length, BLOCK):
            o = start + tl.arange(0, BLOCK)
            b_count = _row_sum(sums_ptr, o, field, programs, height, 0, ROWS, TY, G)
            b_mean = _row_sum(sums_ptr, o, field, programs, height, 1, ROWS, TY, G)
            b_square = _row_sum(sums_ptr, o, field, programs, height, 2, ROWS, TY, G)
            delta = tl.where(b_count > 0, b_mean - mean, 0.0)
            squares += b_square + b_count * delta * delta
        tl.store(mean_ptr + field, mean.to(tl.float32))
        tl.store(variance_ptr + field, (tl.sum(squares, 0) / n).to(tl.float32))
    else:
        tl.store(mean_ptr + field, tl.sum(total, 0).to(tl.float32))


@triton.jit
def _fold(
    o_ch,
    o_t,
    products_ptr,
    out_ptr,
    ones_ptr,
    programs,
    height,
    C,
    FG,
    ROWS: tl.constexpr,
    TY: tl.constexpr,
    STRIDE: tl.constexpr,
    E: tl.constexpr,
    KERNEL: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Add the products of all programs and of the TY shifted copies: [F G (+ 1), C, k, k].

    For taps o_t of one filter, BLOCK_N programs at a time.
    """
    taps = C * KERNEL * KERNEL
    i = o_t // KERNEL % KERNEL
    tap = i * (KERNEL * E) + o_t % KERNEL * E + o_t // (KERNEL * KERNEL)
    total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for start in tl.range(0, programs, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m = (o_n < programs)[:, None] & (o_t < taps)[None, :]
        for s in tl.static_range(TY):
            p = (o_n.to(tl.int64) * height + s * ROWS + o_ch)[:, None] * KP + tap[None, :]
            total += tl.load(products_ptr + p + s * (STRIDE * KERNEL * E), mask=m, other=0.0)
    b_sum = tl.sum(total, 0)
    tl.store(out_ptr + o_ch * taps + o_t, b_sum, mask=(o_t < taps) & (o_ch < FG))
    if ones_ptr is not None:
        tl.store(ones_ptr + o_t, b_sum, mask=(o_t < taps) & (o_ch == FG))


@triton.jit(do_not_specialize=["programs"])
def _lift_finish_kernel(
    sums_ptr,
    products_ptr,
    mean_ptr,
    variance_ptr,
    out_ptr,
    ones_ptr,
    programs,
    height,
    fields,
    C,
    FG,
    blocks,
    MOMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    TY: tl.constexpr,
    STRIDE: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    KERNEL: tl.constexpr,
    KP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Finish the sums: the first programs own a field each, the others BLOCK_T taps of a filter."""
    program = tl.program_id(0)
    if program < fields:
        _combine(
            program, sums_ptr, mean_ptr, variance_ptr, programs, height, MOMENTS, ROWS, TY, G, BLOCK
        )
    else:
        program -= fields
        o_t = program % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
        _fold(
            program // blocks, o_t, products_ptr, out_ptr, ones_ptr, programs, height, C, FG,
            ROWS, TY, STRIDE, E, KERNEL, KP, BLOCK_N, BLOCK_T,
        )  # fmt: skip


class Sums:
    """The partial sums of one call: filled part by part of the batch, then combined."""

    def __init__(self, x: Tensor, s: Sizes, p: Plan, correlate: bool) -> None:
        self.s, self.p, self.correlate = s, p, correlate
        self.launch = launches.find("lift_sums", x, p.shape)
        most = self.launch.pop("BLOCK_M")
        self.block_m = p.share(most)
        if self.block_m < most:  # half the rows, half the warps: see launches.too_few_rows
            self.launch["num_warps"] = min(self.launch["num_warps"], 4)
        self.block_x = min(self.launch.pop("BLOCK_X"), max(16, power_of_2(s.w1)))
        self.row_tiles, self.col_tiles = cdiv(s.h1, p.ty), cdiv(s.w1, self.block_x)
        resident = self.launch.pop("RESIDENT")
        self.blocks = p.padded // p.block_k if correlate else 1
        # A program's sums are of all taps: with hundreds of blocks of them, programs are few.
        shares = 1 if p.single else self.blocks * p.height // self.block_m
        self.done = 0
        self.grids = [
            programs_of(x, n * self.row_tiles * self.col_tiles, resident, shares)
            for n in (part.shape[0] for part in parts(x, s))
        ]
        programs = sum(programs for programs, _ in self.grids)
        like = {"dtype": torch.float32, "device": x.device}
        self.sums = torch.empty(programs, 3, p.height, **like)
        self.products = torch.empty((programs, p.height, p.padded) if correlate else 0, **like)

    def add(
        self,
        f: Factors,
        values: Tensor | None,
        affine: tuple[Tensor, Tensor] | None,
        *,
        moments: bool,
    ) -> None:
        """Sum one part: u itself, ``values`` where the ReLU is open (affine), or ``values``."""
        s, p = self.s, self.p
        source = CONV if values is None else STORED if affine is None else MASKED
        programs, each = self.grids[self.done]
        first = sum(n for n, _ in self.grids[: self.done])
        self.done += 1
        tiles = f.image.shape[0] * self.row_tiles * self.col_tiles
        scale, shift = affine or (None, None)
        _lift_sums_kernel[(programs, p.height // self.block_m, self.blocks)](
            f.image, f.bank, scale, shift, values, self.sums[first:],
            self.products[first:] if self.correlate else None,
            tiles, each, self.row_tiles, self.col_tiles, s.h1, s.w1, s.hp, s.wp, s.pitch,
            SOURCE=source.value, MOMENTS=moments, CORRELATE=self.correlate,
            FG=s.fields * s.order, ROWS=p.rows, TY=p.ty, STRIDE=s.stride, G=s.order, E=s.slots,
            KERNEL=s.kernel, K=p.taps, KP=p.padded, SLOTS=-(-s.fields * s.order // 8) * 8,
            PRECISION=precision(convolution=True), BLOCK_M=self.block_m, BLOCK_K=p.block_k,
            BLOCK_X=self.block_x, **self.launch,
        )  # fmt: skip

    def finish(
        self, mean: Tensor, variance: Tensor | None, out: Tensor, ones: Tensor | None
    ) -> None:
        """Write what was summed.

        ``mean`` and ``variance`` per field, or without ``variance`` the sum; with ``correlate``
        the products of the filters ``out`` [F, G, C, k, k] and of the row of ones [C, k, k].
        """
        s, p = self.s, self.p
        launch = launches.find("lift_finish", self.sums)
        blocks = cdiv(s.channels * s.kernel**2, launch["BLOCK_T"])
        _lift_finish_kernel[(s.fields + (p.rows * blocks if self.correlate else 0),)](
            self.sums, self.products, mean, variance, out, ones, self.sums.shape[0], p.height,
            s.fields, s.channels, s.fields * s.order, blocks, MOMENTS=variance is not None,
            ROWS=p.rows, TY=p.ty, STRIDE=s.stride, G=s.order, E=s.slots, KERNEL=s.kernel,
            KP=p.padded, **launch,
        )  # fmt: skip
