r"""Fused Triton kernels of the token embedding: a strided convolution and its layer norm.

.. math:: y[p] = \mathrm{LN}(u[p]), \quad u[p, d] = c[d]
    + \sum_{cij} w[d, cij] \, x[c, p s + (i, j) - \mathrm{padding}]

The convolution is a product of patches, gathered on load and never stored, with the filters. The
gradient recomputes it from ``x``. Rows of tiles are tokens: all channels of one lie in one warp,
where the norm sums them.
"""

from __future__ import annotations

from torch import Tensor

from .common import refusal
from .token_embed_backward import backward
from .token_embed_forward import forward

__all__ = ["backward", "forward", "supports"]

LARGEST_WIDTH = 128


def supports(x: Tensor, filters: Tensor, *, padding: int) -> str | None:
    """Return why these kernels cannot take images ``x`` ``[B, C, H, W]``, or None if they can."""
    if reason := refusal(x):
        return reason
    if not 16 <= filters.shape[0] <= LARGEST_WIDTH:
        return f"takes 16 to {LARGEST_WIDTH} output channels, not {filters.shape[0]}"
    if filters.shape[2] != filters.shape[3]:
        return f"takes square filters, not {filters.shape[2]}x{filters.shape[3]}"
    # Offsets inside an image are 32-bit numbers; a token has one pixel of the padded image.
    height, width = (size + 2 * padding for size in x.shape[2:])
    if max(x[:1].numel(), filters.shape[0] * height * width) >= 2**31:
        return f"takes fewer than 2 ** 31 values per image, not {list(x.shape[1:])}"
    return None
