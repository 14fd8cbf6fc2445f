"""What the launchers of several ops share: reasons to refuse, precision, and the last sum."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launches

# The dtypes that kernels take, by Triton's names.
TL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
DTYPES = tuple(TL_DTYPES)
CAPABILITY = (8, 0)
# Programs of a loop over tiles where there is no multiprocessor to count: the interpreter.
INTERPRETED_PROGRAMS = 3
# Tensors that one launch sums into.
SUMS = 6


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def refusal(x: Tensor) -> str | None:
    """Return why no kernel can take ``x`` whatever its shape, or None."""
    if x.dtype not in DTYPES:
        return f"takes float32, float16 and bfloat16, not {str(x.dtype).removeprefix('torch.')}"
    if x.device.type == "cpu":
        return None if interpreted() else "runs on CUDA devices, not on the CPU"
    if x.device.type != "cuda":
        return f"runs on CUDA devices, not on {x.device.type}"
    # torch.compile reads this function, and knows torch's own.
    capability = torch.cuda.get_device_capability(x.device)
    if capability < CAPABILITY:
        return f"needs compute capability 8.0, the device has {capability[0]}.{capability[1]}"
    return None


def cdiv(size: int, block: int) -> int:
    """Return how many blocks cover ``size``; triton.cdiv takes microseconds to say it."""
    return -(-size // block)


def power_of_2(size: int) -> int:
    """Return the smallest power of two that is not below ``size``."""
    return 1 << (size - 1).bit_length()


def padded(size: int) -> int:
    """Return the power of two, 16 at least, that a tile of ``size`` channels is padded to."""
    return max(16, power_of_2(size))


def precision(convolution: bool = False) -> str:
    """Return the precision of fp32 products that PyTorch's own switches ask for."""
    switch = torch.backends.cudnn.conv if convolution else torch.backends.cuda.matmul
    return "tf32" if switch.fp32_precision == "tf32" else "ieee"


def programs(x: Tensor, per_multiprocessor: int, tiles: int) -> int:
    """Return how many programs share ``tiles``, so that all of them are resident at once."""
    if x.device.type != "cuda":
        return min(tiles, INTERPRETED_PROGRAMS)
    return min(tiles, launches.properties(x.device).multiprocessors * per_multiprocessor)


@triton.jit
def tf32_factor(x, PRECISION: tl.constexpr):
    """Round a factor of a TF32 product to the nearest TF32 number; other factors stay.

    Matrix units drop the low 13 bits of fp32. That draws every product towards zero, and what does
    not cancel with it: the mean of a convolution by 8e-4 and its variance by 1.4e-3, seen on an
    H100.
    """
    if (PRECISION == "tf32") and (x.dtype == tl.float32):
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x


@triton.jit
def add_product(total, a, b, N, PRECISION: tl.constexpr):
    """Return ``total + a b``, for a sum over many tiles; N is a size, 0 or more.

    Matrix units add up a tile's terms before they add them to a sum. Products of float32 itself are
    made term by term, each added to what it is given, and in a sum of thousands the rounding of
    that is seen: attention's gradient was three times as wrong as PyTorch's. Those are begun at
    zero, one that Triton does not know for one: it would begin with the sum again.
    """
    if PRECISION == "ieee" and a.dtype == tl.float32:
        zero = tl.full(total.shape, tl.minimum(N, 0).to(tl.float32), tl.float32)
        total += tl.dot(a, b, zero, input_precision=PRECISION)
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def add_part(part_ptr, value, mask, is_first):
    """Add ``value`` to a part of this program's own row of parts, or start the sum with it."""
    part = tl.load(part_ptr, mask=mask & (is_first == 0), other=0.0)
    tl.store(part_ptr, part + value, mask=mask)


@triton.jit
def _store_columns(sum_ptr, total, o_c, first, end):
    tl.store(sum_ptr + (o_c - first), total, mask=(o_c >= first) & (o_c < end))


@triton.jit(do_not_specialize=["rows", "each"])
def _sum_rows_kernel(
    parts_ptr,
    sum0_ptr,
    sum1_ptr,
    sum2_ptr,
    sum3_ptr,
    sum4_ptr,
    sum5_ptr,
    end0,
    end1,
    end2,
    end3,
    end4,
    rows,
    each,
    columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Sum ``parts[rows, columns]`` over rows in fp32 and in one order, into up to six tensors.

    One program owns BLOCK_COLUMNS columns of ``each`` rows and walks down them in tiles::

        columns ->  [ program 0, 0 | program 1, 0 | ... ]   tile sums are added one after the
        rows    |   [ program 0, 1 | program 1, 1 | ... ]   other, each tile by a tree
                v

    4 bytes and one addition per part. Tensor i takes the columns before ``end<i>`` that the ones
    before it leave; where several programs share a column, they write a row each of the first.
    """
    o_c = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    o_r = tl.arange(0, BLOCK_ROWS)
    total = tl.zeros([BLOCK_COLUMNS], tl.float32)
    start = tl.program_id(1) * each
    end = tl.minimum(start + each, rows)
    for r in range(start, end, BLOCK_ROWS):
        o_row = (r + o_r).to(tl.int64)
        mask = (o_row < end)[:, None] & (o_c < columns)[None, :]
        part = tl.load(parts_ptr + o_row[:, None] * columns + o_c[None, :], mask=mask, other=0.0)
        total += tl.sum(part, 0)
    sum0_ptr += tl.program_id(1).to(tl.int64) * columns
    _store_columns(sum0_ptr, total, o_c, 0, end0)
    _store_columns(sum1_ptr, total, o_c, end0, end1)
    _store_columns(sum2_ptr, total, o_c, end1, end2)
    _store_columns(sum3_ptr, total, o_c, end2, end3)
    _store_columns(sum4_ptr, total, o_c, end3, end4)
    _store_columns(sum5_ptr, total, o_c, end4, columns)


def sum_rows(parts: Tensor, sums: Sequence[Tensor]) -> None:
    """Sum ``parts[rows, columns]`` over rows into up to six contiguous tensors, side by side.

    Many rows are summed tile by tile first: few columns alone would keep few programs at work.
    """
    rows, columns = parts.shape
    launch = launches.find("sum_rows", parts, "few" if columns < 2048 else "many")
    block = launch["BLOCK_ROWS"]
    while rows > 2 * block:
        tiles = parts.new_empty(cdiv(rows, block), columns)
        _sum_rows(parts, [tiles], block, launch)
        parts, rows = tiles, tiles.shape[0]
    _sum_rows(parts, sums, rows, launch)


def _sum_rows(parts: Tensor, sums: Sequence[Tensor], each: int, launch: launches.Launch) -> None:
    """Sum ``each`` rows at a time."""
    rows, columns = parts.shape
    absent = SUMS - len(sums)
    ends = [*accumulate(t.shape[-1] if each < rows else t.numel() for t in sums)]
    _sum_rows_kernel[(cdiv(columns, launch["BLOCK_COLUMNS"]), cdiv(rows, each))](
        parts,
        *sums,
        *[sums[0]] * absent,
        *[*ends, *[columns] * absent][:-1],
        rows,
        each,
        columns,
        **launch,
    )
