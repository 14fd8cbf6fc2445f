"""How the steerable block fills a tile, and the two copies its product works on.

See ``lift`` for the picture. The names here are shared by the kernels of that op.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launches
from .common import cdiv, power_of_2, precision, programs, tf32_factor

WORKSPACE = 192 * 2**20


class Sizes(NamedTuple):
    """Sizes of one call; hp, wp and slots are those of the padded image."""

    batch: int
    channels: int
    height: int
    width: int
    fields: int
    order: int
    kernel: int
    stride: int
    padding: int
    h1: int
    w1: int
    hp: int
    wp: int
    slots: int
    bytes: int

    @property
    def pitch(self) -> int:
        """Row length of planar values: aligned for 16-byte stores."""
        return -(-self.w1 // 16) * 16

    @property
    def block_p(self) -> int:
        """Pixels of the padded image that one program copies, and one mark is for."""
        return max(16, 2048 // power_of_2(self.slots))


class Plan(NamedTuple):
    """How filters and taps fill a tile: ``rows`` filters times ``ty`` image rows, ``taps`` taps."""

    rows: int
    height: int
    ty: int
    taps: int
    padded: int
    block_k: int
    chunk: int

    @property
    def single(self) -> bool:
        """Whether all taps fit one block."""
        return self.padded == self.block_k

    @property
    def shape(self) -> str:
        """The shape class of launches."""
        return "K64" if self.block_k <= 64 else "K256"

    def share(self, most: int) -> int:
        """Return how many rows of a tile a program owns, ``most`` or as few as one warp group's."""
        return most if self.height % most == 0 else 64


def sizes(x: Tensor, bank: Tensor, stride: int, padding: int) -> Sizes:
    """Return the sizes of a call."""
    batch, channels, height, width = x.shape
    fields, order, _, kernel, _ = bank.shape
    h1, w1 = ((n + 2 * padding - kernel) // stride + 1 for n in (height, width))
    # Zeros to the right, so that the windows of the widest tile stay within their rows.
    width_of_tiles = min(max(launches.TILE), max(16, power_of_2(w1)))
    hp = (h1 - 1) * stride + kernel
    wp = (cdiv(w1, width_of_tiles) * width_of_tiles - 1) * stride + kernel
    slots = power_of_2(channels) if channels < 8 else -(-channels // 8) * 8
    return Sizes(
        batch, channels, height, width, fields, order, kernel, stride, padding,
        h1, w1, hp, wp, slots, x.element_size(),
    )  # fmt: skip


def plan(x: Tensor, s: Sizes, rows: int) -> Plan:
    """Choose the tile with the fewest multiplications per filter and image row."""
    most = launches.find("lift_plan", x)
    taps = most["CHUNK" if unrolled(x) else "TAPS"]
    return _plan(s, rows, most["ROWS"], taps, most["CHUNK"])


def unrolled(x: Tensor) -> bool:
    """Whether products are those of float32 itself: no matrix unit makes them, tiles are small."""
    return x.dtype == torch.float32 and precision(convolution=True) == "ieee"


@functools.lru_cache(maxsize=256)
def _plan(s: Sizes, rows: int, most_rows: int, most_taps: int, chunk: int) -> Plan:
    segment = s.kernel * s.slots
    best = None
    for ty in range(1, max(1, min(most_rows // rows, s.h1)) + 1):
        taps = (s.kernel + (ty - 1) * s.stride) * segment
        padded = max(16, power_of_2(taps))
        block_k = padded
        if padded > most_taps:
            block_k = chunk
            padded = -(-taps // block_k) * block_k
        height = cdiv(rows * ty, 64) * 64
        plan = Plan(rows, height, ty, taps, padded, block_k, min(chunk, padded))
        cost = height * padded / ty
        if (ty == 1 or plan.single) and (best is None or cost < best[0]):
            best = (cost, plan)
    assert best is not None
    return best[1]


def programs_of(x: Tensor, tiles: int, resident: int, shares: int = 1) -> tuple[int, int]:
    """Return the number of programs that fill the device once, and the tiles of each.

    ``shares``: programs that have their part of each tile, of which a multiple fills the device.
    """
    each = cdiv(tiles, max(1, programs(x, resident, tiles * shares) // shares))
    return cdiv(tiles, each), each


def parts(t: Tensor, s: Sizes) -> list[Tensor]:
    """Split a batch so that the values of one part stay within WORKSPACE bytes."""
    most = max(1, WORKSPACE // (s.fields * s.order * s.h1 * s.pitch * s.bytes))
    if 0 < t.shape[0] <= most:
        return [t]
    return list(t.split(most)) if t.shape[0] else []


@triton.jit
def _copy_image(
    program,
    x_ptr,
    mask_ptr,
    xp_ptr,
    bad_ptr,
    C,
    H,
    W,
    HP,
    WP,
    WU,
    padding,
    blocks,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Copy mask * x to [B, HP, WP, E], zeros around it, and mark what is not finite.

    A program owns BLOCK_P pixels of one padded image. Of its columns WU are under a window of the
    convolution; what a stride leaves over beyond them, as beyond HP, is zero, so that no tile meets
    it. Bytes: x read once, E / C of it written.
    """
    i_b = (program // blocks).to(tl.int64)
    o_p = program % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    o_e = tl.arange(0, BLOCK_E)
    y = o_p // WP - padding
    x = o_p % WP - padding
    m_p = (y >= 0) & (y < H) & (x >= 0) & (x < W) & (o_p < HP * WP) & (o_p % WP < WU)
    # A view may stride over more than 32 bits hold.
    o_x = y.to(tl.int64) * stride_xh + x.to(tl.int64) * stride_xw
    p_x = x_ptr + i_b * stride_xb + o_x[:, None] + (o_e.to(tl.int64) * stride_xc)[None, :]
    b_x = tl.load(p_x, mask=m_p[:, None] & (o_e < C)[None, :], other=0)
    if mask_ptr is not None:
        b_m = tl.load(mask_ptr + y * W + x, mask=m_p, other=0)  # [BLOCK_P]
        b_x = (b_x.to(tl.float32) * b_m[:, None]).to(b_x.dtype)
    b_bad = (tl.abs(b_x.to(tl.float32)) < float("inf")).to(tl.int32)
    tl.store(bad_ptr + program, 1 - tl.min(tl.min(b_bad, 1), 0))
    p_out = xp_ptr + (i_b * HP * WP + o_p)[:, None] * E + o_e[None, :]
    tl.store(p_out, tf32_factor(b_x, PRECISION), mask=(o_p < HP * WP)[:, None] & (o_e < E)[None, :])


@triton.jit
def _lay_bank_out(
    program,
    bank_ptr,
    scale_ptr,
    out_ptr,
    C,
    FG,
    total,
    ROWS: tl.constexpr,
    TY: tl.constexpr,
    STRIDE: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    KERNEL: tl.constexpr,
    KP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Lay the bank out as the left factor of the product, in the dtype of the image.

    Rows (ty, f, g) and taps (i, j, c) as in the text above; TRANSPOSED: rows c, taps (i, j, f, g)
    with E slots for (f, g), for the gradient of the image. A program owns BLOCK entries.
    """
    o = program * BLOCK + tl.arange(0, BLOCK)
    row = o // KP
    tap = o % KP
    i = tap // (KERNEL * E)
    j = tap % (KERNEL * E) // E
    if TRANSPOSED:
        c = row
        o_ch = tap % E
        m = (o_ch < FG) & (c < C) & (i < KERNEL)
    else:
        c = tap % E
        o_ch = row % ROWS
        i -= row // ROWS * STRIDE
        m = (row // ROWS < TY) & (o_ch < FG) & (c < C) & (i >= 0) & (i < KERNEL)
    b = tl.load(bank_ptr + ((o_ch * C + c) * KERNEL + i) * KERNEL + j, mask=m, other=0)
    if scale_ptr is not None:
        b *= tl.load(scale_ptr + o_ch // G, mask=m, other=0)
    b = tf32_factor(b.to(out_ptr.dtype.element_ty), PRECISION)
    tl.store(out_ptr + o, b, mask=o < total)


@triton.jit(do_not_specialize=["images"])
def _lift_prepare_kernel(
    x_ptr,
    mask_ptr,
    xp_ptr,
    bad_ptr,
    bank_ptr,
    out_ptr,
    images,
    C,
    H,
    W,
    HP,
    WP,
    WU,
    padding,
    blocks,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    FG,
    total,
    ROWS: tl.constexpr,
    TY: tl.constexpr,
    STRIDE: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    KERNEL: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Make both factors of the product, or (bank_ptr None) the image alone.

    The first ``images`` programs copy it, the rest lay the bank out.
    """
    program = tl.program_id(0)
    if program < images:
        _copy_image(
            program, x_ptr, mask_ptr, xp_ptr, bad_ptr, C, H, W, HP, WP, WU, padding, blocks,
            stride_xb, stride_xc, stride_xh, stride_xw, E, BLOCK_E, BLOCK_P, PRECISION,
        )  # fmt: skip
    elif bank_ptr is not None:
        _lay_bank_out(
            program - images, bank_ptr, None, out_ptr, C, FG, total, ROWS, TY, STRIDE, G, E,
            KERNEL, KP, False, BLOCK, PRECISION,
        )  # fmt: skip


@triton.jit
def _lift_bank_kernel(
    bank_ptr,
    scale_ptr,
    out_ptr,
    C,
    FG,
    total,
    G: tl.constexpr,
    E: tl.constexpr,
    KERNEL: tl.constexpr,
    KP: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Lay the transposed bank out. One program owns BLOCK entries."""
    _lay_bank_out(
        tl.program_id(0), bank_ptr, scale_ptr, out_ptr, C, FG, total, 1, 1, 1, G, E, KERNEL, KP,
        True, BLOCK, PRECISION,
    )  # fmt: skip


class Factors(NamedTuple):
    """What the product is made of.

    ``image``: ``[B, HP, WP, slots]``; ``bad``: marks ``[B, blocks]`` of what is not finite in it;
    ``bank``: ``[height, padded]`` as ``plan`` says.
    """

    image: Tensor
    bad: Tensor
    bank: Tensor
    plan: Plan


def factors(x: Tensor, mask: Tensor | None, bank: Tensor, s: Sizes, p: Plan) -> Factors:
    """Return both factors of the product of a part of the batch."""
    left = torch.empty(p.height, p.padded, dtype=x.dtype, device=x.device)
    image, bad = _prepare(x, mask, bank, left, s, p.rows, p.ty)
    return Factors(image, bad, left, p)


def padded_image(x: Tensor, mask: Tensor | None, s: Sizes) -> Tensor:
    """Return the image as :func:`factors` does, alone."""
    return _prepare(x, mask, None, None, s, 1, 1)[0]


def _prepare(
    x: Tensor,
    mask: Tensor | None,
    bank: Tensor | None,
    left: Tensor | None,
    s: Sizes,
    rows: int,
    ty: int,
) -> tuple[Tensor, Tensor]:
    """Return the padded image and its marks, and fill ``left``."""
    blocks = cdiv(s.hp * s.wp, s.block_p)
    image = torch.empty(x.shape[0], s.hp, s.wp, s.slots, dtype=x.dtype, device=x.device)
    bad = torch.empty(x.shape[0], blocks, dtype=torch.int32, device=x.device)
    launch = launches.find("lift_prepare", x)
    images = x.shape[0] * blocks
    total, taps = (0, 1) if left is None else (left.numel(), left.shape[1])
    _lift_prepare_kernel[(images + cdiv(total, launch["BLOCK"]),)](
        x, mask, image, bad, bank, left, images, s.channels, s.height, s.width, s.hp, s.wp,
        (s.w1 - 1) * s.stride + s.kernel, s.padding, blocks, *x.stride(), s.fields * s.order,
        total, ROWS=rows, TY=ty, STRIDE=s.stride, G=s.order, E=s.slots, KERNEL=s.kernel,
        KP=taps, BLOCK_E=power_of_2(s.slots), BLOCK_P=s.block_p,
        PRECISION=precision(convolution=True), **launch,
    )  # fmt: skip
    return image, bad


def transposed_bank(
    bank: Tensor, scale: Tensor | None, dtype: torch.dtype, slots: int, s: Sizes
) -> Tensor:
    """Return scale * bank as [C, k k slots]: for each tap all filters, in ``slots`` places."""
    out = torch.empty(s.channels, s.kernel**2 * slots, dtype=dtype, device=bank.device)
    launch = launches.find("lift_bank", out)
    _lift_bank_kernel[(cdiv(out.numel(), launch["BLOCK"]),)](
        bank, scale, out, s.channels, s.fields * s.order, out.numel(), G=s.order, E=slots,
        KERNEL=s.kernel, KP=out.shape[1], PRECISION=precision(convolution=True), **launch,
    )  # fmt: skip
    return out


@triton.jit
def patches(
    image_ptr,
    y0,
    x0,
    o_k,
    first,
    last,
    HP,
    WP,
    STRIDE: tl.constexpr,
    KERNEL: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """Return [x, tap]: the windows of BLOCK_X outputs from (y0, x0), filter rows first <= i < last.

    The taps of other rows are zero. Columns beside the last output have windows of their own, which
    reach into the zeros there. Offsets that stay from tile to tile are 64-bit and added last: those
    of a thread then differ by constants.
    """
    i = o_k // (KERNEL * E)
    m_k = (o_k < K) & (y0 * STRIDE + i < HP) & (i >= first) & (i < last)
    o_x = tl.arange(0, BLOCK_X).to(tl.int64) * (STRIDE * E)
    o_tap = (i * WP * E + o_k % (KERNEL * E)).to(tl.int64)
    p = image_ptr + (y0 * WP + x0) * (STRIDE * E)
    return tl.load(p + o_tap[None, :] + o_x[:, None], mask=m_k[None, :], other=0.0)


@triton.jit
def first_tile(t, row_tiles, col_tiles):
    """Return image, column and row of tile ``t``: rows run fastest."""
    i_b = t // (row_tiles * col_tiles)
    return i_b, t // row_tiles % col_tiles, t % row_tiles


@triton.jit
def next_tile(i_b, col, row, row_tiles, col_tiles):
    """Return image, column and row of the tile after one, without dividing."""
    row += 1
    col += (row == row_tiles).to(tl.int32)
    row = tl.where(row == row_tiles, 0, row)
    i_b += (col == col_tiles).to(tl.int32)
    return i_b, tl.where(col == col_tiles, 0, col), row
