"""The convolution of the steerable block with what follows it pixel by pixel, and its transpose."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launches
from .common import cdiv, power_of_2, precision, tf32_factor
from .lift_tile import (
    Factors,
    Sizes,
    first_tile,
    next_tile,
    patches,
    programs_of,
    transposed_bank,
    unrolled,
)

RELU, AFFINE, GRADIENT, RAW = (tl.constexpr(i) for i in range(4))


@triton.jit
def _store_values(
    b_u,
    b_scale,
    b_shift,
    dv_ptr,
    out_ptr,
    i_b,
    y,
    m_y,
    o_ch,
    o_x,
    H1,
    W1,
    pitch,
    MODE: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Write what MODE makes of u [row, x]."""
    m = m_y[:, None]
    planar = ((i_b * ROWS + o_ch) * H1 + y)[:, None] * pitch + o_x[None, :]
    m_planar = m & (o_x < pitch)[None, :]
    pixels = ((i_b * H1 + y) * W1)[:, None] + o_x[None, :]
    p_pixels = out_ptr + pixels * SLOTS + o_ch[:, None]
    m_pixels = m & (o_x < W1)[None, :]
    b_z = b_u * b_scale[:, None] + b_shift[:, None]
    if MODE == RELU:
        b_z = tl.where(b_z <= 0.0, 0.0, b_z)
        tl.store(out_ptr + planar, b_z.to(out_ptr.dtype.element_ty), mask=m_planar)
    elif MODE == GRADIENT:
        b_dv = tl.load(dv_ptr + planar, mask=m_planar, other=0.0)
        b_dv = tl.where(b_z <= 0.0, 0.0, b_dv)
        tl.store(p_pixels, b_dv.to(out_ptr.dtype.element_ty), mask=m_pixels)
    else:
        tl.store(p_pixels, b_z.to(out_ptr.dtype.element_ty), mask=m_pixels)


@triton.jit(do_not_specialize=["tiles", "per_program"])
def _lift_conv_kernel(
    xp_ptr,
    bad_ptr,
    w_ptr,
    scale_ptr,
    shift_ptr,
    dv_ptr,
    out_ptr,
    tiles,
    per_program,
    row_tiles,
    col_tiles,
    H1,
    W1,
    HP,
    WP,
    pitch,
    marks,
    MODE: tl.constexpr,
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
    BLOCK_P: tl.constexpr,
    BLOCK_BAD: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Convolve and write one value per filter and output pixel.

    RELU: relu(scale u + shift); planar [B, F G, H1, pitch], for the blur. AFFINE: shift + scale u,
    RAW: u and GRADIENT: dv where scale u + shift > 0 (dv planar); pixel by pixel,
    [B, H1, W1, SLOTS], for the products that sum over filters or pixels.

    One program owns BLOCK_M rows (ty, f, g) of per_program tiles of BLOCK_X columns, neighbours in
    an image, and keeps the bank in shared memory where it fits one block of taps; the patches of
    the next tile come while it multiplies. Per output 2 K operations and, from memory, 2 bytes
    written; patches come from the first-level cache. Accumulator: float32, taps in blocks of
    BLOCK_K. Tiles with marks are made again at the end, exactly.
    """
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_ty = o_m // ROWS
    o_ch = o_m % ROWS
    m_m = o_ty < TY
    b_scale = tl.full([BLOCK_M], 1.0, tl.float32)
    b_shift = tl.full([BLOCK_M], 0.0, tl.float32)
    if MODE != RAW:
        b_scale = tl.load(scale_ptr + o_ch // G, mask=m_m, other=0.0)
        b_shift = tl.load(shift_ptr + o_ch // G, mask=m_m, other=0.0)
    o_k = tl.arange(0, BLOCK_K)
    p_w = w_ptr + (o_m * KP)[:, None]
    b_w = tl.load(p_w + o_k[None, :])  # [BLOCK_M, BLOCK_K]
    start = tl.program_id(0) * per_program
    end = tl.minimum(start + per_program, tiles)
    tile, col, row = first_tile(start, row_tiles, col_tiles)
    for _ in tl.range(start, end):
        i_b = tile.to(tl.int64)
        y = row * TY + o_ty
        o_x = col * BLOCK_X + tl.arange(0, BLOCK_X)
        image = xp_ptr + i_b * HP * WP * E
        if KP == BLOCK_K:
            b_p = patches(
                image, row * TY, col * BLOCK_X, o_k, 0, HP, HP, WP, STRIDE, KERNEL, E, K, BLOCK_X
            )
            b_u = tl.dot(b_w, tl.trans(b_p), input_precision=PRECISION)  # [BLOCK_M, BLOCK_X]
        else:
            b_u = tl.zeros([BLOCK_M, BLOCK_X], tl.float32)
            for q in range(0, KP, BLOCK_K):
                b_q = tl.load(p_w + (q + o_k)[None, :])
                b_p = patches(
                    image, row, col * BLOCK_X, q + o_k, 0, HP, HP, WP, STRIDE, KERNEL, E, K, BLOCK_X
                )
                b_u = tl.dot(b_q, tl.trans(b_p), b_u, input_precision=PRECISION)
        _store_values(
            b_u, b_scale, b_shift, dv_ptr, out_ptr, i_b, y, m_m & (y < H1), o_ch, o_x, H1, W1,
            pitch, MODE, ROWS, SLOTS,
        )  # fmt: skip
        tile, col, row = next_tile(tile, col, row, row_tiles, col_tiles)
    if TY > 1:
        first, _, _ = first_tile(start, row_tiles, col_tiles)
        last, _, _ = first_tile(end - 1, row_tiles, col_tiles)
        bad = 0
        for o in range(first * marks, (last + 1) * marks, 512):
            o_bad = o + tl.arange(0, 512)
            b_bad = tl.load(bad_ptr + o_bad, mask=o_bad < (last + 1) * marks, other=0)
            bad = tl.maximum(bad, tl.max(b_bad, 0))
        if bad > 0:
            # Any thread may now write what another wrote above.
            tl.debug_barrier()
            for t in range(start, end):
                tile, col, row = first_tile(t, row_tiles, col_tiles)
                i_b = tile.to(tl.int64)
                y = row * TY + o_ty
                o_x = col * BLOCK_X + tl.arange(0, BLOCK_X)
                image = xp_ptr + i_b * HP * WP * E
                o_bad = row * TY * STRIDE * WP // BLOCK_P + tl.arange(0, BLOCK_BAD)
                b_bad = tl.load(bad_ptr + i_b * marks + o_bad, mask=o_bad < marks, other=0)
                if tl.max(b_bad, 0) > 0:
                    # One image row at a time, with the taps of the others taken away instead of
                    # multiplied by zero.
                    for s in range(TY):
                        b_u = tl.zeros([BLOCK_M, BLOCK_X], tl.float32)
                        for q in range(0, KP, CHUNK):
                            o_q = q + tl.arange(0, CHUNK)
                            b_q = tl.load(p_w + o_q[None, :])
                            b_p = patches(
                                image, row * TY, col * BLOCK_X, o_q, s * STRIDE,
                                s * STRIDE + KERNEL, HP, WP, STRIDE, KERNEL, E, K, BLOCK_X,
                            )  # fmt: skip
                            b_u = tl.dot(b_q, tl.trans(b_p), b_u, input_precision=PRECISION)
                        _store_values(
                            b_u, b_scale, b_shift, dv_ptr, out_ptr, i_b, y,
                            m_m & (y < H1) & (o_ty == s), o_ch, o_x, H1, W1, pitch,
                            MODE, ROWS, SLOTS,
                        )  # fmt: skip


def values(
    mode: tl.constexpr,
    f: Factors,
    scale: Tensor | None,
    shift: Tensor | None,
    dv: Tensor | None,
    s: Sizes,
) -> Tensor:
    """Run the convolution kernel: planar values for RELU, else [B, H1, W1, slots of F G]."""
    p, batch = f.plan, f.image.shape[0]
    launch = launches.find("lift_conv", f.image, p.shape)
    block_m = p.share(launch.pop("BLOCK_M"))
    most = launch.pop("BLOCK_X")
    if unrolled(f.image):  # a wider tile, or one for fewer warps, lies in memory, not in registers
        most, launch["num_warps"] = min(most, 32), 8
    block_x = min(most, max(16, power_of_2(s.w1)))
    slots = -(-p.rows // 8) * 8
    planar = mode.value == RELU.value
    shape = (batch, p.rows, s.h1, s.pitch) if planar else (batch, s.h1, s.w1, slots)
    out = torch.empty(shape, dtype=f.image.dtype, device=f.image.device)
    row_tiles, col_tiles = cdiv(s.h1, p.ty), cdiv(s.w1, block_x)
    tiles = batch * row_tiles * col_tiles
    span = (s.kernel + (p.ty - 1) * s.stride) * s.wp  # pixels under one tile
    programs, each = programs_of(f.image, tiles, launch.pop("RESIDENT"))
    _lift_conv_kernel[(programs, p.height // block_m)](
        f.image, f.bad, f.bank, scale, shift, dv, out,
        tiles, each, row_tiles, col_tiles, s.h1, s.w1, s.hp, s.wp, s.pitch, f.bad.shape[1],
        MODE=mode.value, ROWS=p.rows, TY=p.ty, STRIDE=s.stride, G=s.order, E=s.slots,
        KERNEL=s.kernel, K=p.taps, KP=p.padded, SLOTS=slots, PRECISION=precision(convolution=True),
        BLOCK_M=block_m, BLOCK_K=p.block_k, BLOCK_X=block_x,
        BLOCK_P=s.block_p, BLOCK_BAD=power_of_2(span // s.block_p + 2),
        CHUNK=p.chunk, **launch,
    )  # fmt: skip
    return out


@triton.jit
def _lift_input_kernel(
    d_ptr,
    w_ptr,
    mask_ptr,
    dx_ptr,
    C,
    H,
    W,
    H1,
    W1,
    padding,
    blocks,
    FG,
    SLOTS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradient of the image: the transposed convolution of d [B, H1, W1, SLOTS], times the mask.

    One program owns BLOCK_P pixels of an image and BLOCK_C channels; it goes over the taps (i, j)
    and, within one, over the filters in blocks of BLOCK_K. Per output 2 k^2 F G operations; d is
    read from memory once and k^2 times from the caches. Accumulator: float32 in that order.
    """
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    o_p = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    y = o_p // W + padding
    x = o_p % W + padding
    p_d = d_ptr + i_b * H1 * W1 * SLOTS
    b_dx = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    PARTS: tl.constexpr = (SLOTS + BLOCK_K - 1) // BLOCK_K
    for q in range(KERNEL * KERNEL * PARTS):
        tap = q // PARTS
        o_k = q % PARTS * BLOCK_K + tl.arange(0, BLOCK_K)
        top = y - tap // KERNEL
        left = x - tap % KERNEL
        row = top // STRIDE
        col = left // STRIDE
        m = (o_p < H * W) & (top >= 0) & (left >= 0) & (row < H1) & (col < W1)
        m = m & (top % STRIDE == 0) & (left % STRIDE == 0)
        m_k = o_k < FG
        o_d = ((row * W1 + col) * SLOTS)[:, None] + o_k[None, :]
        b_d = tl.load(p_d + o_d, mask=m[:, None] & m_k[None, :], other=0.0)
        o_w = (o_c * (KERNEL * KERNEL * SLOTS) + tap * SLOTS)[:, None] + o_k[None, :]
        b_w = tl.load(w_ptr + o_w, mask=(o_c < C)[:, None] & m_k[None, :], other=0.0)
        b_d = tf32_factor(b_d, PRECISION)
        b_dx = tl.dot(b_d, tl.trans(b_w), b_dx, input_precision=PRECISION)
    if mask_ptr is not None:
        b_dx *= tl.load(mask_ptr + o_p, mask=o_p < H * W, other=0.0)[:, None]
    o = ((i_b * C + o_c) * H * W)[None, :] + o_p[:, None]
    m = (o_p < H * W)[:, None] & (o_c < C)[None, :]
    tl.store(dx_ptr + o, b_dx.to(dx_ptr.dtype.element_ty), mask=m)


def input_gradient_of(
    d: Tensor, bank: Tensor, scale: Tensor | None, mask: Tensor | None, dx: Tensor, s: Sizes
) -> None:
    """Write the gradient of the image from values d [B, H1, W1, slots of F G]."""
    launch = launches.find("lift_input", d)
    filters, slots = s.fields * s.order, d.shape[-1]
    weight = transposed_bank(bank, scale, d.dtype, slots, s)
    block_c = min(64, max(16, power_of_2(s.channels)))
    blocks = cdiv(s.height * s.width, launch["BLOCK_P"])
    _lift_input_kernel[(dx.shape[0] * blocks, cdiv(s.channels, block_c))](
        d, weight, mask, dx, s.channels, s.height, s.width, s.h1, s.w1, s.padding, blocks, filters,
        SLOTS=slots, KERNEL=s.kernel, STRIDE=s.stride, PRECISION=precision(convolution=True),
        BLOCK_C=block_c, BLOCK_K=min(64, max(16, power_of_2(slots))), **launch,
    )  # fmt: skip
