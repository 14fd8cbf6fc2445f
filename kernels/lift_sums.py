"""Sums of the steerable block over all pixels: statistics, products with the image's patches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import precision
from .lift_tile import Plan, Sizes, config_of, parts, patches, programs_of

CONV, MASKED, STORED = (tl.constexpr(i) for i in range(3))


@triton.jit
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
    for t in tl.range(start, tl.minimum(start + per_program, tiles)):
        i_b = (t // (row_tiles * col_tiles)).to(tl.int64)
        y0 = t % row_tiles * TY
        o_x = t // row_tiles % col_tiles * BLOCK_X + tl.arange(0, BLOCK_X)
        y = y0 + o_ty
        m_y = m_m & (y < H1)
        m_x = o_x < W1
        m = m_y[:, None] & m_x[None, :]
        if (SOURCE != STORED) or CORRELATE:
            image = xp_ptr + i_b * HP * WP * E
            b_p = patches(image, y0, o_x, o_k, 0, HP, W1, HP, WP, STRIDE, KERNEL, E, K)
        if SOURCE == STORED:
            pixels = ((i_b * H1 + y) * W1)[:, None] + o_x[None, :]
            m_v = m & (o_ch < FG)[:, None]
            b_v = tl.load(v_ptr + pixels * SLOTS + o_ch[:, None], mask=m_v, other=0.0)
            b_v = b_v.to(tl.float32)
        else:
            b_v = tl.dot(b_w, tl.trans(b_p), input_precision=PRECISION)  # [BLOCK_M, BLOCK_X]
        if SOURCE == MASKED:
            planar = ((i_b * ROWS + o_ch) * H1 + y)[:, None] * pitch + o_x[None, :]
            m_v = m_y[:, None] & (o_x < pitch)[None, :]
            b_dv = tl.load(v_ptr + planar, mask=m_v, other=0.0).to(tl.float32)
            b_v = tl.where(b_v * b_scale + b_shift <= 0.0, 0.0, b_dv)
        if MOMENTS and CORRELATE:
            b_v = tl.where((o_ch == FG)[:, None], 1.0, b_v)
        b_v = tl.where(m, b_v, 0.0)
        if MOMENTS:
            more = tl.where(m_y, tl.sum(m_x.to(tl.float32), 0), 0.0)
            there = tl.sum(b_v, 1) / tl.maximum(more, 1.0)
            centred = tl.where(m, b_v - there[:, None], 0.0)
            share = more / tl.maximum(count + more, 1.0)
            delta = there - mean
            square += tl.sum(centred * centred, 1) + delta * delta * count * share
            mean += delta * share
            count += more
        else:
            mean += tl.sum(b_v, 1)
        if CORRELATE:
            products = tl.dot(b_v.to(b_p.dtype), b_p, products, input_precision=PRECISION)
    i_row = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    if CORRELATE:
        o_row = i_row * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(products_ptr + (o_row * KP)[:, None] + o_k[None, :], products)
    if tl.program_id(2) == 0:
        p_sums = sums_ptr + i_row * 3 * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(p_sums, count)
        tl.store(p_sums + BLOCK_M, mean)
        tl.store(p_sums + 2 * BLOCK_M, square)


@triton.jit
def _row_sum(
    sums_ptr,
    o,
    field,
    programs,
    blocks,
    which,
    ROWS: tl.constexpr,
    TY: tl.constexpr,
    G: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Load entry ``which`` of the partial sums of one field: o counts programs, ty and g."""
    i_p = (o // (TY * G)).to(tl.int64)
    row = o // G % TY * ROWS + field * G + o % G
    p = sums_ptr + ((i_p * blocks + row // BLOCK_M) * 3 + which) * BLOCK_M + row % BLOCK_M
    return tl.load(p, mask=i_p < programs, other=0.0).to(tl.float64)


@triton.jit
def _lift_moments_kernel(
    sums_ptr,
    mean_ptr,
    variance_ptr,
    programs,
    blocks,
    MOMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    TY: tl.constexpr,
    G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Combine the sums of all programs: mean and variance of a field, or (mean_ptr) the total.

    One program owns a field. Two passes in float64: the mean of the means, then the squares about
    it, in the order of the programs.
    """
    field = tl.program_id(0)
    length = programs * TY * G
    count = tl.zeros([BLOCK], tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    for start in tl.range(0, length, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b_sum = _row_sum(sums_ptr, o, field, programs, blocks, 1, ROWS, TY, G, BLOCK_M)
        if MOMENTS:
            b_count = _row_sum(sums_ptr, o, field, programs, blocks, 0, ROWS, TY, G, BLOCK_M)
            b_sum *= b_count
            count += b_count
        total += b_sum
    if MOMENTS:
        n = tl.sum(count, 0)
        mean = tl.sum(total, 0) / n
        squares = tl.zeros([BLOCK], tl.float64)
        for start in tl.range(0, length, BLOCK):
            o = start + tl.arange(0, BLOCK)
            b_count = _row_sum(sums_ptr, o, field, programs, blocks, 0, ROWS, TY, G, BLOCK_M)
            b_mean = _row_sum(sums_ptr, o, field, programs, blocks, 1, ROWS, TY, G, BLOCK_M)
            b_square = _row_sum(sums_ptr, o, field, programs, blocks, 2, ROWS, TY, G, BLOCK_M)
            delta = tl.where(b_count > 0, b_mean - mean, 0.0)
            squares += b_square + b_count * delta * delta
        tl.store(mean_ptr + field, mean.to(tl.float32))
        tl.store(variance_ptr + field, (tl.sum(squares, 0) / n).to(tl.float32))
    else:
        tl.store(mean_ptr + field, tl.sum(total, 0).to(tl.float32))


@triton.jit
def _lift_fold_kernel(
    products_ptr,
    out_ptr,
    ones_ptr,
    programs,
    C,
    FG,
    rows,
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

    One program owns BLOCK_T taps of one filter, and reads BLOCK_N programs at a time.
    """
    o_ch = tl.program_id(0)
    o_t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    taps = C * KERNEL * KERNEL
    i = o_t // KERNEL % KERNEL
    tap = i * (KERNEL * E) + o_t % KERNEL * E + o_t // (KERNEL * KERNEL)
    total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for start in tl.range(0, programs, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m = (o_n < programs)[:, None] & (o_t < taps)[None, :]
        for s in tl.static_range(TY):
            p = (o_n.to(tl.int64) * rows + s * ROWS + o_ch)[:, None] * KP + tap[None, :]
            total += tl.load(products_ptr + p + s * (STRIDE * KERNEL * E), mask=m, other=0.0)
    b_sum = tl.sum(total, 0)
    tl.store(out_ptr + o_ch * taps + o_t, b_sum, mask=(o_t < taps) & (o_ch < FG))
    if ones_ptr is not None:
        tl.store(ones_ptr + o_t, b_sum, mask=(o_t < taps) & (o_ch == FG))


class Sums:
    """The partial sums of one call: filled part by part of the batch, then combined."""

    def __init__(self, x: Tensor, s: Sizes, p: Plan, correlate: bool) -> None:
        self.s, self.p, self.correlate = s, p, correlate
        self.config = config_of("sums", s)
        self.block_x = min(self.config.x, max(16, triton.next_power_of_2(s.w1)))
        self.row_tiles, self.col_tiles = -(-s.h1 // p.ty), -(-s.w1 // self.block_x)
        self.done = 0
        self.grids = [
            programs_of(x, n * self.row_tiles * self.col_tiles, self.config.resident)
            for n in (part.shape[0] for part in parts(x, s))
        ]
        programs = sum(programs for programs, _ in self.grids)
        self.sums = torch.empty(programs, p.blocks, 3, p.block_m, device=x.device)
        self.products = torch.empty(
            (programs, p.blocks * p.block_m, p.padded) if correlate else 0, device=x.device
        )

    def add(
        self,
        image: Tensor,
        filters: Tensor,
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
        tiles = image.shape[0] * self.row_tiles * self.col_tiles
        scale, shift = affine or (None, None)
        _lift_sums_kernel[(programs, p.blocks, p.padded // p.block_k if self.correlate else 1)](
            image, filters, scale, shift, values, self.sums[first:],
            self.products[first:] if self.correlate else None,
            tiles, each, self.row_tiles, self.col_tiles, s.h1, s.w1, s.hp, s.wp, s.pitch,
            SOURCE=source.value, MOMENTS=moments, CORRELATE=self.correlate,
            FG=s.fields * s.order, ROWS=p.rows, TY=p.ty, STRIDE=s.stride, G=s.order, E=s.slots,
            KERNEL=s.kernel, K=p.taps, KP=p.padded, SLOTS=-(-s.fields * s.order // 8) * 8,
            PRECISION=precision(convolution=True), BLOCK_M=p.block_m, BLOCK_K=p.block_k,
            BLOCK_X=self.block_x, num_warps=self.config.warps, num_stages=self.config.stages,
        )  # fmt: skip

    def combine(self, mean: Tensor, variance: Tensor | None) -> None:
        """Write mean and variance per field, or without ``variance`` the sum."""
        s, p = self.s, self.p
        _lift_moments_kernel[(s.fields,)](
            self.sums, mean, variance, self.sums.shape[0], p.blocks, MOMENTS=variance is not None,
            ROWS=p.rows, TY=p.ty, G=s.order, BLOCK_M=p.block_m, BLOCK=512, num_warps=4,
        )  # fmt: skip

    def fold(self, out: Tensor, ones: Tensor | None) -> None:
        """Write the products of the filters [F, G, C, k, k] and of the row of ones [C, k, k]."""
        s, p = self.s, self.p
        taps = s.channels * s.kernel**2
        _lift_fold_kernel[(p.rows, triton.cdiv(taps, 32))](
            self.products, out, ones, self.sums.shape[0], s.channels, s.fields * s.order,
            p.blocks * p.block_m, ROWS=p.rows, TY=p.ty, STRIDE=s.stride, E=s.slots,
            KERNEL=s.kernel, KP=p.padded, BLOCK_N=32, BLOCK_T=32, num_warps=4,
        )  # fmt: skip
