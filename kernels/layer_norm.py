"""Layer normalisation of the rows of a tile, for the kernels that begin with it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def normalise(x, m_d, eps, D: tl.constexpr):
    """Return the rows of ``x`` (0 beyond D) with mean 0 and variance 1, and 1 / deviation.

    Without an ``eps`` rows that are no tokens, all zero, would be NaN, and with them every sum over
    rows: it is the smallest normal number at least.
    """
    mean = tl.sum(x, 1) / D
    centred = tl.where(m_d[None, :], x - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / D + tl.maximum(eps, 2.0**-126))
    return centred * rstd[:, None], rstd


@triton.jit
def normalise_backward(dunit, unit, rstd, D: tl.constexpr):
    """Return the gradient of ``x`` from that of ``unit``, both of :func:`normalise`."""
    along = tl.sum(dunit * unit, 1) / D
    level = tl.sum(dunit, 1) / D
    return (dunit - level[:, None] - unit * along[:, None]) * rstd[:, None]
