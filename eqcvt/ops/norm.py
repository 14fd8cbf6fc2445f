r"""Batch normalisation with returned and shareable statistics, and layer normalisation.

.. math:: y = \gamma (x - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta

with :math:`\mu, \sigma^2` over all axes but the second: for a regular field ``[B, F, G, H, W]``
that is one mean and variance per field, shared by the group axis, which keeps the group's action
intact. Running statistics are the caller's: the op returns what they are updated with. Layer
normalisation takes them per token, over the second axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce whose gradient is all-reduced too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        y = x.clone()
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


def _all_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    y: Tensor = _SumOverProcesses.apply(x, group)  # type: ignore[no-untyped-call]
    return y


def _synchronised(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    dims = [d for d in range(x.dim()) if d != 1]
    shape = [-1 if d == 1 else 1 for d in range(x.dim())]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # In float64, as batch_moments: processes may differ in their backends, and must not here.
    values = wide.new_full((1,), x.numel() / x.shape[1], dtype=torch.float64)
    local = torch.cat([wide.sum(dims).double(), values])
    total = _all_sum(local, group)
    count = total[-1].detach()
    mean = (total[:-1] / count).to(wide.dtype)
    centred = wide - mean.view(shape)
    variance = _all_sum(centred.square().sum(dims).double(), group) / count
    unbiased = (variance.detach() * count / (count - 1).clamp_min(1)).to(wide.dtype)
    variance = variance.to(wide.dtype)
    scale = (weight * torch.rsqrt(variance + eps)).view(shape)
    y = (centred * scale + bias.view(shape)).to(x.dtype)
    return y, mean.detach(), unbiased


class _Affine(torch.autograd.Function):
    """``scale = weight / sqrt(variance + eps)``, ``shift = bias - mean * scale``.

    Written out because autograd's gradient would take thrice as many kernels, each for a handful of
    numbers: in small batches on a GPU they are a good part of a training step.
    """

    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        rstd = torch.rsqrt(variance + eps)
        scale = weight * rstd
        ctx.save_for_backward(mean, scale, rstd)
        return scale, torch.addcmul(bias, mean, scale, value=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        dscale, dshift = gradients
        mean, scale, rstd = ctx.saved_tensors
        dweight = torch.addcmul(dscale, mean, dshift, value=-1) * rstd
        dvariance = (dweight * scale).mul_(rstd).mul_(-0.5)
        return (scale * dshift).neg_(), dvariance, dweight, dshift, None


def affine(
    mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return normalisation as ``scale * x + shift``, all tensors of one shape."""
    scale, shift = _Affine.apply(  # type: ignore[no-untyped-call]
        mean, variance, weight.to(mean.dtype), bias.to(mean.dtype), eps
    )
    return scale, shift


def batch_moments(
    mean: Tensor, variance: Tensor, count: int, process_group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the moments to normalise with, and the variance for running statistics.

    Args:
        mean: ``[F]`` of this process's batch.
        variance: ``[F]``, biased.
        count: number of values behind each.
        process_group: if given, the moments are made those of all its processes together.

    Returns:
        The mean and biased variance ``[F]``, differentiable, and the unbiased variance ``[F]``.

    Raises:
        ValueError: without ``process_group``, if there is only one value per channel.
    """
    if process_group is None:
        return mean, variance, unbiased(variance.detach().unsqueeze(0), [count])[0]
    dtype = mean.dtype
    wide = mean.double()  # float32 does not count the pixels of a large batch
    summed = _all_sum(torch.cat([wide * count, wide.new_full((1,), count)]), process_group)
    total = summed[-1].detach()
    centre = summed[:-1] / total
    spread = variance.double() + (wide - centre).square()
    wide = _all_sum(spread * count, process_group) / total
    whole = wide.detach() * total / (total - 1).clamp_min(1)
    return centre.to(dtype), wide.to(dtype), whole.to(dtype)


def unbiased(variance: Tensor, counts: Sequence[int]) -> Sequence[Tensor]:
    """Return the rows of biased variances ``[P, F]`` of so many values each, unbiased.

    Raises:
        ValueError: if a row is of only one value per channel.
    """
    if 1 in counts:
        raise ValueError("batch statistics need more than one value per channel")
    factors = [count / max(count - 1, 1) for count in counts]
    return torch._foreach_mul(variance.unbind(), factors)


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise over all axes but the second with the statistics of the batch.

    Args:
        x: ``[B, F, ...]``, floating point.
        weight: ``[F]``, the scale.
        bias: ``[F]``, the shift.
        eps: added to the variance.
        process_group: if given, statistics are those of all its processes' batches together.

    Returns:
        ``y`` of the shape and dtype of ``x``, the mean ``[F]`` and the unbiased variance ``[F]``
        (at least float32, without gradient), with which running statistics are updated.

    Raises:
        ValueError: without ``process_group``, if there is only one value per channel.
    """
    if process_group is not None:
        return _synchronised(x, weight, bias, eps, process_group)
    statistics = torch.promote_types(x.dtype, torch.float32)
    mean = torch.zeros(x.shape[1], dtype=statistics, device=x.device)
    variance = torch.zeros(x.shape[1], dtype=statistics, device=x.device)
    # A momentum of one makes PyTorch's update hand over the statistics of this batch.
    scale, shift = weight.to(statistics), bias.to(statistics)
    y = F.batch_norm(x, mean, variance, scale, shift, training=True, momentum=1.0, eps=eps)
    return y, mean, variance


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Normalise each token over its channels.

    Args:
        x: ``[B, D, H, W]``.
        weight: ``[D]``, the scale.
        bias: ``[D]``, the shift.
        eps: added to the (biased) variance.
    """
    y = F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, eps)
    return y.permute(0, 3, 1, 2)
