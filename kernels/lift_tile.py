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

from .common import programs


class Config(NamedTuple):
    """How a kernel is launched: tile, warps, software pipelining, programs per multiprocessor."""

    x: int
    warps: int
    stages: int
    resident: int = 1


# By kernel, bytes per value and whether the device is a Hopper or newer.
CONFIGS = {
    ("conv", 2, True): Config(64, 8, 2),
    ("conv", 2, False): Config(64, 8, 2),
    ("conv", 4, True): Config(64, 8, 1),
    ("conv", 4, False): Config(32, 8, 1),
    ("sums", 2, True): Config(64, 8, 2),
    ("sums", 2, False): Config(32, 8, 2),
    ("sums", 4, True): Config(32, 8, 1),
    ("sums", 4, False): Config(16, 8, 1),
    ("walk", 2, True): Config(128, 4, 1),
    ("walk", 2, False): Config(128, 4, 1),
    ("walk", 4, True): Config(128, 4, 1),
    ("walk", 4, False): Config(128, 4, 1),
    ("input", 2, True): Config(128, 4, 3),
    ("input", 2, False): Config(64, 4, 3),
    ("input", 4, True): Config(64, 4, 2),
    ("input", 4, False): Config(64, 4, 2),
}
# Filter rows and taps of the largest tile, and taps of a block where they are more.
ROWS = {(2, True): 128, (2, False): 64, (4, True): 64, (4, False): 64}
TAPS = {2: 256, 4: 64}
CHUNK = {2: 64, 4: 64}
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
    hopper: bool

    @property
    def pitch(self) -> int:
        """Row length of planar values: aligned for 16-byte stores."""
        return -(-self.w1 // 16) * 16

    @property
    def block_p(self) -> int:
        """Pixels of the padded image that one program copies, and one mark is for."""
        return max(16, 2048 // triton.next_power_of_2(self.slots))


class Plan(NamedTuple):
    """How filters and taps fill a tile: ``rows`` filters times ``ty`` image rows, ``taps`` taps."""

    rows: int
    block_m: int
    blocks: int
    ty: int
    taps: int
    padded: int
    block_k: int

    @property
    def single(self) -> bool:
        """Whether all taps fit one block."""
        return self.padded == self.block_k


def sizes(x: Tensor, bank: Tensor, stride: int, padding: int) -> Sizes:
    """Return the sizes of a call."""
    batch, channels, height, width = x.shape
    fields, order, _, kernel, _ = bank.shape
    hp, wp = height + 2 * padding, width + 2 * padding
    h1, w1 = (hp - kernel) // stride + 1, (wp - kernel) // stride + 1
    # The interpreter follows the tiles of the newest device.
    hopper = x.device.type == "cpu" or torch.cuda.get_device_capability(x.device) >= (9, 0)
    slots = triton.next_power_of_2(channels) if channels < 8 else -(-channels // 8) * 8
    return Sizes(
        batch, channels, height, width, fields, order, kernel, stride, padding,
        h1, w1, hp, wp, slots, x.element_size(), hopper,
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def plan(s: Sizes, rows: int) -> Plan:
    """Choose the tile with the fewest multiplications per filter and image row."""
    segment = s.kernel * s.slots
    limit, best = TAPS[s.bytes], None
    for block_m in (64, 128):
        for ty in range(1, max(1, block_m // rows) + 1):
            taps = (s.kernel + (ty - 1) * s.stride) * segment
            padded = max(16, triton.next_power_of_2(taps))
            block_k = padded
            if padded > limit:
                block_k = CHUNK[s.bytes]
                padded = -(-taps // block_k) * block_k
            blocks = -(-rows // block_m)
            plan = Plan(rows, block_m, blocks, ty, taps, padded, block_k)
            if block_m > ROWS[s.bytes, s.hopper] or (ty > 1 and not plan.single):
                continue
            cost = block_m * blocks * padded / ty
            if best is None or cost < best[0]:
                best = (cost, plan)
    assert best is not None
    return best[1]


def config_of(kernel: str, s: Sizes) -> Config:
    """Return how to launch a kernel."""
    return CONFIGS[kernel, s.bytes, s.hopper]


def programs_of(x: Tensor, tiles: int, resident: int) -> tuple[int, int]:
    """Return the number of programs that fill the device once, and the tiles of each."""
    each = triton.cdiv(tiles, max(1, programs(x, resident, tiles)))
    return triton.cdiv(tiles, each), each


def parts(t: Tensor, s: Sizes) -> list[Tensor]:
    """Split a batch so that the values of one part stay within WORKSPACE bytes."""
    image = s.fields * s.order * s.h1 * s.pitch * s.bytes
    return list(t.split(max(1, WORKSPACE // image))) if t.shape[0] else []


@triton.jit
def _lift_image_kernel(
    x_ptr,
    mask_ptr,
    xp_ptr,
    bad_ptr,
    C,
    H,
    W,
    HP,
    WP,
    padding,
    blocks,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Copy mask * x to [B, HP, WP, E], zeros around it, and mark what is not finite.

    One program owns BLOCK_P pixels of one padded image. Bytes: x read once, E / C of it written.
    """
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    i_p = tl.program_id(0) % blocks
    o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
    o_e = tl.arange(0, BLOCK_E)
    y = o_p // WP - padding
    x = o_p % WP - padding
    m_p = (y >= 0) & (y < H) & (x >= 0) & (x < W)
    p_x = x_ptr + i_b * stride_xb + (y * stride_xh + x * stride_xw)[:, None]
    b_x = tl.load(p_x + (o_e * stride_xc)[None, :], mask=m_p[:, None] & (o_e < C)[None, :], other=0)
    if mask_ptr is not None:
        b_m = tl.load(mask_ptr + y * W + x, mask=m_p, other=0)  # [BLOCK_P]
        b_x = (b_x.to(tl.float32) * b_m[:, None]).to(b_x.dtype)
    b_bad = (tl.abs(b_x.to(tl.float32)) < float("inf")).to(tl.int32)
    tl.store(bad_ptr + tl.program_id(0), 1 - tl.min(tl.min(b_bad, 1), 0))
    p_out = xp_ptr + (i_b * HP * WP + o_p)[:, None] * E + o_e[None, :]
    tl.store(p_out, b_x, mask=(o_p < HP * WP)[:, None] & (o_e < E)[None, :])


@triton.jit
def _lift_bank_kernel(
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
):
    """Lay the bank out as the left factor of the product, in the dtype of the image.

    Rows (ty, f, g) and taps (i, j, c) as in the text above; TRANSPOSED: rows c, taps (i, j, f, g)
    with E slots for (f, g), for the gradient of the image. One program owns BLOCK entries.
    """
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
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
    tl.store(out_ptr + o, b.to(out_ptr.dtype.element_ty), mask=o < total)


def padded_image(x: Tensor, mask: Tensor | None, s: Sizes) -> tuple[Tensor, Tensor]:
    """Return the padded image [B, HP, WP, slots] and its marks of what is not finite."""
    blocks = -(-s.hp * s.wp // s.block_p)
    image = torch.empty(x.shape[0], s.hp, s.wp, s.slots, dtype=x.dtype, device=x.device)
    bad = torch.empty(x.shape[0], blocks, dtype=torch.int32, device=x.device)
    _lift_image_kernel[(x.shape[0] * blocks,)](
        x, mask, image, bad, s.channels, s.height, s.width, s.hp, s.wp, s.padding, blocks,
        *x.stride(), E=s.slots, BLOCK_E=triton.next_power_of_2(s.slots), BLOCK_P=s.block_p,
        num_warps=4,
    )  # fmt: skip
    return image, bad


def packed_bank(bank: Tensor, dtype: torch.dtype, s: Sizes, p: Plan) -> Tensor:
    """Return the left factor of the product, [blocks * BLOCK_M, padded]."""
    out = torch.empty(p.blocks * p.block_m, p.padded, dtype=dtype, device=bank.device)
    _lift_bank_kernel[(triton.cdiv(out.numel(), 1024),)](
        bank, None, out, s.channels, s.fields * s.order, out.numel(), ROWS=p.rows, TY=p.ty,
        STRIDE=s.stride, G=s.order, E=s.slots, KERNEL=s.kernel, KP=p.padded, TRANSPOSED=False,
        BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return out


def transposed_bank(
    bank: Tensor, scale: Tensor | None, dtype: torch.dtype, slots: int, s: Sizes
) -> Tensor:
    """Return scale * bank as [C, k k slots]: for each tap all filters, in ``slots`` places."""
    out = torch.empty(s.channels, s.kernel**2 * slots, dtype=dtype, device=bank.device)
    _lift_bank_kernel[(triton.cdiv(out.numel(), 1024),)](
        bank, scale, out, s.channels, s.fields * s.order, out.numel(), ROWS=1, TY=1, STRIDE=1,
        G=s.order, E=slots, KERNEL=s.kernel, KP=out.shape[1], TRANSPOSED=True, BLOCK=1024,
        num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def patches(
    image_ptr,
    y0,
    o_x,
    o_k,
    first,
    last,
    W1,
    HP,
    WP,
    STRIDE: tl.constexpr,
    KERNEL: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
):
    """Return [x, tap] of the windows of outputs (y0, o_x), zero but for rows first <= i < last."""
    i = o_k // (KERNEL * E)
    row = y0 * STRIDE + i
    m_k = (o_k < K) & (row < HP) & (i >= first) & (i < last)
    p = image_ptr + (o_x * (STRIDE * E))[:, None] + (row * WP * E + o_k % (KERNEL * E))[None, :]
    return tl.load(p, mask=(o_x < W1)[:, None] & m_k[None, :], other=0.0)
