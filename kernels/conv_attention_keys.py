"""The keys of attention, normalised once for all heads and tiles of queries."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launches
from .common import cdiv, padded, power_of_2


def tail(tokens: int, block: int, dtype: torch.dtype) -> int:
    """Return the smallest tile that holds what whole tiles of ``block`` leave over; 0 if none.

    32 keys at least in fp32. Of a tile of 16, Hopper's TF32 values lie in shared memory in another
    pattern than all other factors, and the assembler read the address of one from a register that
    nothing had written.
    """
    rest = tokens % block
    return max(8 * dtype.itemsize, power_of_2(rest)) if rest else 0


@triton.jit
def _conv_attention_keys_kernel(
    b_ptr,
    scale_ptr,
    shift_ptr,
    keys_ptr,
    reach_ptr,
    M,
    blocks,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Write ``b * scale + shift`` and, for each tile of keys, the largest norm of a key.

    One program owns BLOCK_M keys of one image. 2 numbers and 4 operations per number: a pass over
    one eighth of the tokens' bytes, which spares the attention one multiplication per key, head and
    tile of queries, and rounds keys as the plain ops do. Accumulates in fp32; a NaN counts as inf.
    """
    i_b = (tl.program_id(0) // blocks).to(tl.int64)
    i_m = tl.program_id(0) % blocks
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    mask = (o_m < M)[:, None] & m_d[None, :]
    offsets = i_b * M * D + o_m[:, None] * D + o_d[None, :]
    scale = tl.load(scale_ptr + o_d, mask=m_d, other=0.0)
    shift = tl.load(shift_ptr + o_d, mask=m_d, other=0.0)
    b = tl.load(b_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    keys = (b * scale[None, :] + shift[None, :]).to(keys_ptr.dtype.element_ty)
    tl.store(keys_ptr + offsets, keys, mask=mask)
    wide = tl.where(mask, keys.to(tl.float32), 0.0)
    square = tl.sum(wide * wide, 1)
    square = tl.where(square == square, square, float("inf"))
    tl.store(reach_ptr + tl.program_id(0), tl.sqrt(tl.max(square, 0)))


def normalised_keys(t: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``t * scale + shift`` ``[B, M, D]`` and the largest norms, ``[B, tiles]``."""
    batch, tokens, width = t.shape
    launch = launches.find("conv_attention_keys", t, launches.width_class(width))
    blocks = cdiv(tokens, launch["BLOCK_M"])
    keys, reach = torch.empty_like(t), scale.new_empty(batch, blocks)
    _conv_attention_keys_kernel[(batch * blocks,)](
        t,
        scale,
        shift,
        keys,
        reach,
        tokens,
        blocks,
        D=width,
        BLOCK_D=padded(width),
        **launch,
    )
    return keys, reach
