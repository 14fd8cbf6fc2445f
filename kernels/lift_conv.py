"""The convolution of the steerable block with what follows it pixel by pixel, and its transpose."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import precision
from .lift_tile import (
    CHUNK,
    Sizes,
    config_of,
    packed_bank,
    patches,
    plan,
    programs_of,
    transposed_bank,
)

RELU, AFFINE, GRADIENT, RAW = (tl.constexpr(i) for i in range(4))


@triton.jit
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
    blocks,
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

    One program owns per_program tiles of BLOCK_M rows (ty, f, g) by BLOCK_X columns, neighbours in
    an image, and keeps the bank in shared memory where it fits one block of taps. Per output
    2 K operations and, from memory, 2 bytes written; patches come from the first-level cache.
    Accumulator: float32, taps in blocks of BLOCK_K.
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
    p_w = w_ptr + (o_m * KP)[:, None] + o_k[None, :]
    b_w = tl.load(p_w)  # [BLOCK_M, BLOCK_K]
    start = tl.program_id(0) * per_program
    for t in tl.range(start, tl.minimum(start + per_program, tiles)):
        i_b = (t // (row_tiles * col_tiles)).to(tl.int64)
        y0 = t % row_tiles * TY
        o_x = t // row_tiles % col_tiles * BLOCK_X + tl.arange(0, BLOCK_X)
        image = xp_ptr + i_b * HP * WP * E
        b_p = patches(image, y0, o_x, o_k, 0, HP, W1, HP, WP, STRIDE, KERNEL, E, K)
        b_u = tl.dot(b_w, tl.trans(b_p), input_precision=PRECISION)  # [BLOCK_M, BLOCK_X]
        if KP > BLOCK_K:
            for q in range(BLOCK_K, KP, BLOCK_K):
                b_q = tl.load(p_w + q)
                b_p = patches(image, y0, o_x, q + o_k, 0, HP, W1, HP, WP, STRIDE, KERNEL, E, K)
                b_u = tl.dot(b_q, tl.trans(b_p), b_u, input_precision=PRECISION)
        if TY > 1:
            o_bad = y0 * STRIDE * WP // BLOCK_P + tl.arange(0, BLOCK_BAD)
            b_bad = tl.load(bad_ptr + i_b * blocks + o_bad, mask=o_bad < blocks, other=0)
            if tl.max(b_bad, 0) > 0:
                # Row by row, with the taps of the others taken away instead of multiplied by zero.
                for s in range(TY):
                    b_s = tl.zeros([BLOCK_M, BLOCK_X], tl.float32)
                    for q in range(0, KP, CHUNK):
                        o_q = q + tl.arange(0, CHUNK)
                        b_q = tl.load(w_ptr + (o_m * KP)[:, None] + o_q[None, :])
                        low = s * STRIDE
                        b_own = patches(
                            image, y0, o_x, o_q, low, low + KERNEL,
                            W1, HP, WP, STRIDE, KERNEL, E, K,
                        )  # fmt: skip
                        b_s = tl.dot(b_q, tl.trans(b_own), b_s, input_precision=PRECISION)
                    b_u = tl.where((o_ty == s)[:, None], b_s, b_u)
        y = y0 + o_ty
        m = (m_m & (y < H1))[:, None]
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


def values(
    mode: tl.constexpr,
    image: Tensor,
    bad: Tensor,
    bank: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    dv: Tensor | None,
    s: Sizes,
) -> Tensor:
    """Run the convolution kernel: planar values for RELU, else [B, H1, W1, slots of F G]."""
    p = plan(s, s.fields * s.order)
    config = config_of("conv", s)
    block_x = min(config.x, max(16, triton.next_power_of_2(s.w1)))
    slots = -(-p.rows // 8) * 8
    batch = image.shape[0]
    shape = (
        (batch, p.rows, s.h1, s.pitch) if mode.value == RELU.value else (batch, s.h1, s.w1, slots)
    )
    out = torch.empty(shape, dtype=image.dtype, device=image.device)
    row_tiles, col_tiles = -(-s.h1 // p.ty), -(-s.w1 // block_x)
    tiles = batch * row_tiles * col_tiles
    span = (s.kernel + (p.ty - 1) * s.stride) * s.wp  # pixels under one tile
    programs, each = programs_of(image, tiles, config.resident)
    _lift_conv_kernel[(programs, p.blocks)](
        image, bad, packed_bank(bank, image.dtype, s, p), scale, shift, dv, out,
        tiles, each, row_tiles, col_tiles, s.h1, s.w1, s.hp, s.wp, s.pitch, bad.shape[1],
        MODE=mode.value, ROWS=p.rows, TY=p.ty, STRIDE=s.stride, G=s.order, E=s.slots,
        KERNEL=s.kernel, K=p.taps, KP=p.padded, SLOTS=slots, PRECISION=precision(convolution=True),
        BLOCK_M=p.block_m, BLOCK_K=p.block_k, BLOCK_X=block_x,
        BLOCK_P=s.block_p, BLOCK_BAD=triton.next_power_of_2(span // s.block_p + 2),
        CHUNK=min(CHUNK[s.bytes], p.padded),
        num_warps=config.warps, num_stages=config.stages,
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
    config = config_of("input", s)
    filters, slots = s.fields * s.order, d.shape[-1]
    weight = transposed_bank(bank, scale, d.dtype, slots, s)
    block_c = min(64, max(16, triton.next_power_of_2(s.channels)))
    blocks = triton.cdiv(s.height * s.width, config.x)
    _lift_input_kernel[(dx.shape[0] * blocks, triton.cdiv(s.channels, block_c))](
        d, weight, mask, dx, s.channels, s.height, s.width, s.h1, s.w1, s.padding, blocks, filters,
        SLOTS=slots, KERNEL=s.kernel, STRIDE=s.stride, PRECISION=precision(convolution=True),
        BLOCK_P=config.x, BLOCK_C=block_c, BLOCK_K=min(64, max(16, triton.next_power_of_2(slots))),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
