"""Batch normalisation as a factor and an addend per channel, and its gradient, inside kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rstd(variance_ptr, offsets, mask, eps):
    variance = tl.load(variance_ptr + offsets, mask=mask, other=1.0)
    return tl.div_rn(1.0, tl.sqrt_rn(variance + eps))


@triton.jit
def store_affine(
    row,
    mean_ptr,
    variance_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    eps,
    o_d,
    m_d,
    D: tl.constexpr,
):
    """Write a norm as ``scale`` and ``shift``, row ``row`` of ``[P, D]``."""
    o_r = row * D + o_d
    weight = tl.load(weight_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    scale = weight * _rstd(variance_ptr, o_r, m_d, eps)
    mean = tl.load(mean_ptr + o_r, mask=m_d, other=0.0)
    tl.store(scale_ptr + o_r, scale, mask=m_d)
    tl.store(shift_ptr + o_r, bias - mean * scale, mask=m_d)


@triton.jit
def store_affine_gradients(
    row,
    dscale_ptr,
    dshift_ptr,
    mean_ptr,
    variance_ptr,
    weight_ptr,
    dmean_ptr,
    dvariance_ptr,
    dweight_ptr,
    dbias_ptr,
    eps,
    o_d,
    m_d,
    D: tl.constexpr,
):
    """Write the gradients of a norm's statistics and parameters, row ``row`` of ``[P, D]``."""
    o_r = row * D + o_d
    dscale = tl.load(dscale_ptr + o_r, mask=m_d, other=0.0)
    dshift = tl.load(dshift_ptr + o_r, mask=m_d, other=0.0)
    rstd = _rstd(variance_ptr, o_r, m_d, eps)
    scale = tl.load(weight_ptr + o_d, mask=m_d, other=0.0).to(tl.float32) * rstd
    dweight = (dscale - tl.load(mean_ptr + o_r, mask=m_d, other=0.0) * dshift) * rstd
    tl.store(dmean_ptr + o_r, -scale * dshift, mask=m_d)
    tl.store(dvariance_ptr + o_r, -0.5 * dweight * scale * rstd, mask=m_d)
    tl.store(dweight_ptr + o_r, dweight, mask=m_d)
    tl.store(dbias_ptr + o_r, dshift, mask=m_d)
