"""Fused Triton kernels of attention with convolutional projections.

``project`` is the depthwise convolutions with their batch statistics, ``fold`` makes of the norms
and the pointwise weights what ``attend`` takes, which does the rest; each has its backward. Files
of this op: ``conv_attention_*.py``.
"""

from __future__ import annotations

from torch import Tensor

from .common import refusal
from .conv_attention_attend import attend
from .conv_attention_attend_backward import attend_backward
from .conv_attention_fold import fold, fold_backward
from .conv_attention_project import project
from .conv_attention_project_backward import project_backward

__all__ = [
    "attend",
    "attend_backward",
    "fold",
    "fold_backward",
    "project",
    "project_backward",
    "supports",
]

# Larger windows are unrolled all the same, and take the compiler minutes.
KERNEL = 3
LARGEST_WIDTH = 128
LARGEST_TILE = 128


def supports(x: Tensor, filters: Tensor, *, heads: int, kv_stride: int) -> str | None:
    """Return why these kernels cannot take tokens ``x`` ``[B, D, H, W]``, or None if they can."""
    if reason := refusal(x):
        return reason
    width, size = x.shape[1], filters.shape[-1]
    if not 16 <= width <= LARGEST_WIDTH:
        return f"takes 16 to {LARGEST_WIDTH} channels, not {width}"
    if size != KERNEL:
        return f"takes depthwise filters of {KERNEL} pixels, not {size}"
    # Offsets inside an image, its tokens in whole tiles, are 32-bit numbers.
    if heads * width * (x.shape[2] * x.shape[3] + LARGEST_TILE) >= 2**31:
        return f"takes fewer than 2 ** 31 values per image, not {list(x.shape[1:])} x {heads} heads"
    return None
