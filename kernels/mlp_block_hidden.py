"""The hidden layer of the MLP block, a tile at a time: weights, GELU and dropout, and back."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import dropout as dropout_mask
from . import launches
from .common import padded


def launch_of(kernel: str, x: Tensor, hidden: int) -> dict[str, int]:
    """Return how a kernel is launched, its tile no wider than the hidden layer."""
    launch = launches.find(kernel, x, launches.width_class(x.shape[-1]))
    launch["BLOCK_E"] = min(launch["BLOCK_E"], padded(hidden))
    return launch


@triton.jit
def _normal(u, EXACT: tl.constexpr):
    """Return Phi, the standard normal distribution, with which the GELU of ``u`` is ``u Phi(u)``.

    For 16-bit results ``sigmoid(u p(u^2))`` will do, p fitted for the least error of the GELU:
    2.5e-5, and 5e-5 in Phi. It takes 9 operations, the error function about 25. Beyond 8 the
    square is held, for p would fall.
    """
    if EXACT:
        return 0.5 + 0.5 * tl.erf(u * 0.7071067811865476)
    square = tl.minimum(u * u, 64.0)
    # In powers of two: p times -log2(e).
    power = u * ((0.0010142653 * square - 0.1067757585) * square - 2.3011212747)
    root = tl.rsqrt(1 + tl.exp2(power))
    return root * root


@triton.jit
def weights_of(
    w1_ptr,
    b1_ptr,
    w2_ptr,
    first,
    dtype: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Return ``w1`` and ``w2^T`` ``[BLOCK_E, BLOCK_D]`` and ``b1`` of a tile of hidden channels."""
    o_e = first + tl.arange(0, BLOCK_E)
    o_d = tl.arange(0, BLOCK_D)
    m_e = o_e < E
    m_ed = m_e[:, None] & (o_d < D)[None, :]
    w1 = tl.load(w1_ptr + o_e[:, None] * D + o_d[None, :], mask=m_ed, other=0.0)
    w2 = tl.load(w2_ptr + o_d[None, :] * E + o_e[:, None], mask=m_ed, other=0.0)
    return w1.to(dtype), tl.load(b1_ptr + o_e, mask=m_e, other=0.0), w2.to(dtype)


@triton.jit
def affine_weights(
    norm_weight_ptr,
    norm_bias_ptr,
    w1_ptr,
    b1_ptr,
    w2_ptr,
    first,
    dtype: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Return what :func:`weights_of` does, the norm's affine map taken into ``w1`` and ``b1``."""
    w1, b1, w2 = weights_of(w1_ptr, b1_ptr, w2_ptr, first, tl.float32, E, D, BLOCK_D, BLOCK_E)
    o_d = tl.arange(0, BLOCK_D)
    norm_weight = tl.load(norm_weight_ptr + o_d, mask=o_d < D, other=0.0)
    norm_bias = tl.load(norm_bias_ptr + o_d, mask=o_d < D, other=0.0)
    b1 += tl.sum(w1 * norm_bias[None, :], 1)
    return (w1 * norm_weight[None, :]).to(dtype), b1, w2.to(dtype)


@triton.jit
def hidden_layer(t, w1, b1, PRECISION: tl.constexpr):
    """Return a tile of hidden channels before their GELU, and their Phi."""
    u = tl.dot(t, tl.trans(w1), input_precision=PRECISION) + b1[None, :]
    return u, _normal(u, t.dtype == tl.float32)


@triton.jit
def hidden_keep(
    seed_ptr,
    o_row,
    first,
    threshold,
    factor,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    """Return the factors of dropout of a tile of hidden channels."""
    keep = tl.full([1, 1], 1.0, tl.float32)
    if HAS_DROPOUT:
        keep = dropout_mask.keep_factor(
            tl.load(seed_ptr), o_row, threshold, factor, first, E, BLOCK_E, 1
        )
    return keep


@triton.jit
def hidden_backward(
    t,
    g,
    w1,
    b1,
    w2,
    seed_ptr,
    row,
    o_n,
    first,
    threshold,
    factor,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return what the hidden layer passes on, and the gradient of ``u``, both in fp32."""
    u, phi = hidden_layer(t, w1, b1, PRECISION)
    density = tl.exp2(-0.7213475204444817 * (u * u) - 1.3257480647361592)
    # In an order that keeps few tiles: the mask after two of them are one, both before g's product.
    slope = phi + u * density
    u *= phi
    keep = hidden_keep(seed_ptr, row + o_n, first, threshold, factor, E, BLOCK_E, HAS_DROPOUT)
    slope *= keep
    return u * keep, tl.dot(g, tl.trans(w2), input_precision=PRECISION) * slope
