"""The steerable block's norm as scale and shift, and what its gradient asks of the filters.

All of it is small, a few thousand numbers: launches are what it costs, so each step is one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launches
from .batch_norm import store_affine, store_affine_gradients
from .common import TL_DTYPES, cdiv


@triton.jit(do_not_specialize=["fields"])
def _lift_norm_kernel(
    mean_ptr,
    variance_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    eps,
    fields,
    BLOCK: tl.constexpr,
):
    """Write ``scale`` and ``shift``; one program owns BLOCK fields. 6 numbers a field, in fp32."""
    o_f = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    store_affine(
        0, mean_ptr, variance_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, eps, o_f,
        o_f < fields, 0,
    )  # fmt: skip


@triton.jit(do_not_specialize=["fields"])
def _lift_norm_bwd_kernel(
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
    fields,
    BLOCK: tl.constexpr,
):
    """Write the gradients; one program owns BLOCK fields. 9 numbers a field, in fp32."""
    o_f = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    store_affine_gradients(
        0, dscale_ptr, dshift_ptr, mean_ptr, variance_ptr, weight_ptr, dmean_ptr, dvariance_ptr,
        dweight_ptr, dbias_ptr, eps, o_f, o_f < fields, 0,
    )  # fmt: skip


@triton.jit(do_not_specialize=["each"])
def _lift_scale_bwd_kernel(
    products_ptr, bank_ptr, scale_ptr, dscale_ptr, each, ROUNDED: tl.constexpr, BLOCK: tl.constexpr
):
    """Turn a field's products into its filters' gradient, and sum that of its scale.

    One program owns the ``each`` filter entries of a field, BLOCK at a time, in order: 12 bytes and
    3 operations an entry. The bank is rounded to ROUNDED, as the convolution took it.
    """
    field = tl.program_id(0)
    o_n = tl.arange(0, BLOCK)
    scale = tl.load(scale_ptr + field)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, each, BLOCK):
        mask = first + o_n < each
        offsets = field * each + first + o_n
        products = tl.load(products_ptr + offsets, mask=mask, other=0.0)
        bank = tl.load(bank_ptr + offsets, mask=mask, other=0.0)
        total += products * bank.to(ROUNDED).to(tl.float32)
        tl.store(products_ptr + offsets, products * scale, mask=mask)
    tl.store(dscale_ptr + field, tl.sum(total, 0))


@triton.jit(do_not_specialize=["each", "patch"])
def _lift_moments_bwd_kernel(
    dmean_ptr,
    dvariance_ptr,
    mean_ptr,
    ux_ptr,
    ones_ptr,
    dbank_ptr,
    count,
    each,
    patch,
    BLOCK: tl.constexpr,
):
    """Write the filters' gradient under that of their responses' moments.

    One program owns BLOCK of the ``each`` filter entries of a field; the first entry of a group
    element's filter meets the first of the ``patch`` sums of ones. 12 bytes and 4 operations each.
    """
    field = tl.program_id(0)
    o_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = o_n < each
    slope = tl.load(dvariance_ptr + field) * (2 / count)
    constant = tl.load(dmean_ptr + field) / count - slope * tl.load(mean_ptr + field)
    ux = tl.load(ux_ptr + field * each + o_n, mask=mask, other=0.0)
    ones = tl.load(ones_ptr + o_n % patch, mask=mask, other=0.0)
    tl.store(dbank_ptr + field * each + o_n, slope * ux + constant * ones, mask=mask)


def norm(
    mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    """Return ``scale`` and ``shift`` ``[F]`` float32.

    Args:
        mean: ``[F]`` float32, as is ``variance``, the biased one.
        weight: ``[F]``, as is ``bias``, of any dtype.
        eps: added to the variance.
    """
    scale, shift = torch.empty_like(mean), torch.empty_like(mean)
    launch = launches.find("lift_norm", mean)
    _lift_norm_kernel[(cdiv(len(mean), launch["BLOCK"]),)](
        *(t.contiguous() for t in (mean, variance, weight, bias)), scale, shift, eps, len(mean),
        **launch,
    )  # fmt: skip
    return scale, shift


def norm_backward(
    dscale: Tensor,
    dshift: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of :func:`norm`'s first four arguments, ``[F]`` float32."""
    found = [torch.empty_like(mean) for _ in range(4)]
    launch = launches.find("lift_norm_bwd", mean)
    _lift_norm_bwd_kernel[(cdiv(len(mean), launch["BLOCK"]),)](
        *(t.contiguous() for t in (dscale, dshift, mean, variance, weight)), *found, eps, len(mean),
        **launch,
    )  # fmt: skip
    return found[0], found[1], found[2], found[3]


def moments_backward(
    dmean: Tensor, dvariance: Tensor, mean: Tensor, ux: Tensor, ones_x: Tensor, *, count: int
) -> Tensor:
    """Return the gradient of the bank under that of the moments, as ``ux``.

    Args:
        dmean: ``[F]`` float32, as are ``dvariance`` and ``mean``.
        ux: ``[F, G, C, k, k]`` float32, from ``moments`` as is ``ones_x`` ``[C, k, k]``.
        count: number of values behind each moment.
    """
    dbank = torch.empty_like(ux)
    launch = launches.find("lift_moments_bwd", ux)
    fields, each = len(mean), ux[0].numel()
    _lift_moments_bwd_kernel[(fields, cdiv(each, launch["BLOCK"]))](
        *(t.contiguous() for t in (dmean, dvariance, mean)), ux, ones_x, dbank, float(count), each,
        ones_x.numel(), **launch,
    )  # fmt: skip
    return dbank


def scale_gradient(
    products: Tensor, bank: Tensor, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return ``scale products``, made in place, and the gradient of ``scale``.

    Args:
        products: ``[F, G, C, k, k]`` float32, the sums of du times the patch under it.
        bank: as ``products``.
        scale: ``[F]`` float32.
        dtype: that of the convolution's factors.
    """
    dscale = torch.empty_like(scale)
    launch = launches.find("lift_scale_bwd", scale)
    _lift_scale_bwd_kernel[(len(scale),)](
        products, bank, scale, dscale, bank[0].numel(), ROUNDED=TL_DTYPES[dtype], **launch
    )
    return products, dscale
