"""Blur and group maximum of the steerable block, and their transpose."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .lift_tile import Sizes, config_of


@triton.jit
def _lift_blur_kernel(
    v_ptr,
    line_ptr,
    y_ptr,
    arg_ptr,
    H1,
    H3,
    W3,
    pitch,
    per_program,
    segments,
    G: tl.constexpr,
    BLOCK_G: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """Blur the rectified values and take the maximum over the group.

    One program owns per_program rows of BLOCK_X columns of one field, all G elements, and walks
    down them: each row is blurred along x from TAPS shifted loads, and the last TAPS - 1 blurred
    rows stay in registers for the blur along y. Per value 2 TAPS multiply-adds and 2 bytes from
    memory (TAPS from the first-level cache); per output 3 bytes written.
    """
    i_f = (tl.program_id(0) // segments).to(tl.int64)
    first = tl.program_id(0) % segments * per_program
    o_g = tl.arange(0, BLOCK_G)[:, None]
    o_x = (tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X))[None, :]
    m = (o_g < G) & (o_x < W3)
    p_v = v_ptr + (i_f * G + o_g) * H1 * pitch + o_x * STRIDE
    rows = (tl.zeros([BLOCK_G, BLOCK_X], tl.float32),) * (TAPS - 1)  # oldest first
    last = tl.minimum(first + per_program, H3) - 1
    for y in tl.range(first * STRIDE, last * STRIDE + TAPS):
        b_w = tl.load(p_v + y * pitch, mask=m, other=0.0).to(tl.float32)
        if TAPS > 1:
            b_h = b_w * tl.load(line_ptr)
            for j in tl.static_range(1, TAPS):
                b_v = tl.load(p_v + y * pitch + j, mask=m, other=0.0).to(tl.float32)
                b_h += b_v * tl.load(line_ptr + j)
            b_w = b_h * tl.load(line_ptr + TAPS - 1)
            for i in tl.static_range(TAPS - 1):
                b_w += rows[i] * tl.load(line_ptr + i)
            rows = rows[1:] + (b_h,)  # noqa: RUF005
        o_y = (y - (TAPS - 1)) // STRIDE
        m_y = (y >= first * STRIDE + TAPS - 1) & ((y - (TAPS - 1)) % STRIDE == 0)
        if POOL:
            nan = (b_w != b_w) & m
            # The first NaN wins, else the first of the largest.
            any_nan = tl.max(nan.to(tl.int32), 0)[None, :] > 0
            best = tl.max(tl.where(m & (b_w == b_w), b_w, float("-inf")), 0)[None, :]
            hit = tl.where(any_nan, nan, b_w == best) & m
            b_arg = tl.min(tl.where(hit, o_g, G - 1), 0)[None, :]
            b_y = tl.where(any_nan, float("nan"), best)
            o = (i_f * H3 + o_y) * W3 + o_x
            m_o = m_y & (o_x < W3)
            tl.store(y_ptr + o, b_y.to(y_ptr.dtype.element_ty), mask=m_o)
            tl.store(arg_ptr + o, b_arg.to(tl.uint8), mask=m_o)
        else:
            o = ((i_f * G + o_g) * H3 + o_y) * W3 + o_x
            tl.store(y_ptr + o, b_w.to(y_ptr.dtype.element_ty), mask=m & m_y)


@triton.jit
def _lift_unblur_kernel(
    dy_ptr,
    arg_ptr,
    line_ptr,
    dv_ptr,
    H1,
    H3,
    W3,
    pitch,
    per_program,
    segments,
    G: tl.constexpr,
    BLOCK_G: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """Send dy to the winning elements and through the transposed blur: planar [B, F G, H1, pitch].

    Mirrors the blur: one program owns per_program rows of BLOCK_X columns of one field. Per value
    2 TAPS multiply-adds and 2 bytes written; dy and arg are read once from memory.
    """
    i_f = (tl.program_id(0) // segments).to(tl.int64)
    first = tl.program_id(0) % segments * per_program
    o_g = tl.arange(0, BLOCK_G)[:, None]
    o_x = (tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X))[None, :]
    m_out = (o_g < G) & (o_x < pitch)
    rows = (tl.zeros([BLOCK_G, BLOCK_X], tl.float32),) * (TAPS - 1)  # newest first
    for y in tl.range(first - (TAPS - 1), tl.minimum(first + per_program, H1)):
        o_y = y // STRIDE
        m_y = (y >= 0) & (y % STRIDE == 0) & (o_y < H3)
        b_w = tl.zeros([BLOCK_G, BLOCK_X], tl.float32)
        for j in tl.static_range(TAPS):
            x = o_x - j
            m = m_y & (x >= 0) & (x % STRIDE == 0) & (x // STRIDE < W3)
            if POOL:
                o = (i_f * H3 + o_y) * W3 + x // STRIDE
                b_dy = tl.load(dy_ptr + o, mask=m, other=0.0).to(tl.float32)
                b_arg = tl.load(arg_ptr + o, mask=m, other=255).to(tl.int32)
                b_dy = tl.where(b_arg == o_g, b_dy, 0.0)
            else:
                o = ((i_f * G + o_g) * H3 + o_y) * W3 + x // STRIDE
                b_dy = tl.load(dy_ptr + o, mask=m & (o_g < G), other=0.0).to(tl.float32)
            if TAPS > 1:
                b_dy *= tl.load(line_ptr + j)
            b_w += b_dy
        if TAPS > 1:
            b_h = b_w
            b_w = b_h * tl.load(line_ptr)
            for i in tl.static_range(TAPS - 1):
                b_w += rows[i] * tl.load(line_ptr + i + 1)
            rows = (b_h,) + rows[:-1]  # noqa: RUF005
        o = ((i_f * G + o_g) * H1 + y) * pitch + o_x
        tl.store(dv_ptr + o, b_w.to(dv_ptr.dtype.element_ty), mask=m_out & (y >= first))


def blur_and_pool(
    v: Tensor, line: Tensor | None, y: Tensor, arg: Tensor, *, stride: int, pool: bool, s: Sizes
) -> None:
    """Write the blurred values ``y``, or their maximum over the group and its ``arg``."""
    _launch(_lift_blur_kernel, (v, line, y, arg), line, y, y.shape[-2:], stride, pool, s)


def unblur(
    dy: Tensor, arg: Tensor, line: Tensor | None, *, stride: int, pool: bool, s: Sizes
) -> Tensor:
    """Return the gradient of the values that ``blur_and_pool`` blurred, planar."""
    dv = dy.new_empty(dy.shape[0], s.fields * s.order, s.h1, s.pitch)
    _launch(_lift_unblur_kernel, (dy, arg, line, dv), line, dy, (s.h1, s.w1), stride, pool, s)
    return dv


def _launch(
    kernel: triton.JITFunction,
    tensors: tuple[Tensor | None, ...],
    line: Tensor | None,
    y: Tensor,
    walked: tuple[int, ...],
    stride: int,
    pool: bool,
    s: Sizes,
) -> None:
    """Walk down images of ``walked`` rows and columns, in segments of at least 8 rows."""
    config = config_of("walk", s)
    block_x = min(config.x, max(16, triton.next_power_of_2(walked[1])))
    each = max(8, triton.cdiv(walked[0], 4))
    segments = triton.cdiv(walked[0], each)
    kernel[(y.shape[0] * s.fields * segments, triton.cdiv(walked[1], block_x))](
        *tensors, s.h1, *y.shape[-2:], s.pitch, each, segments, G=s.order,
        BLOCK_G=triton.next_power_of_2(s.order), TAPS=1 if line is None else line.numel(),
        STRIDE=stride, POOL=pool, BLOCK_X=block_x, num_warps=config.warps,
    )  # fmt: skip
