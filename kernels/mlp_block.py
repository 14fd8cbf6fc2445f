r"""Fused Triton kernels of the MLP block: nothing of the hidden layer's size is ever stored.

.. math:: y = x + \mathrm{drop}_2(W_2 \, \mathrm{drop}_1(\mathrm{GELU}(W_1 \mathrm{LN}(x) + c_1))
    + c_2)

The gradient recomputes the forward pass from ``x``; every token stands alone, so both passes walk
over tiles of tokens, and over the hidden channels BLOCK_E at a time.

Source: Hendrycks and Gimpel, arXiv:1606.08415 (GELU, the exact one); Ba et al., arXiv:1607.06450.
"""

from __future__ import annotations

from torch import Tensor

from .common import refusal
from .mlp_block_backward import backward
from .mlp_block_forward import forward

__all__ = ["backward", "forward", "supports"]

LARGEST_WIDTH = 128


def supports(x: Tensor, w1: Tensor) -> str | None:
    """Return why these kernels cannot take tokens ``x`` with ``w1`` ``[E, D]``, or None."""
    if reason := refusal(x):
        return reason
    if not 16 <= w1.shape[1] <= LARGEST_WIDTH:
        return f"takes 16 to {LARGEST_WIDTH} channels, not {w1.shape[1]}"
    return None
