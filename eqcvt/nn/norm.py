"""Normalisation layers on :func:`eqcvt.ops.batch_norm` and :func:`eqcvt.ops.layer_norm`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from eqcvt import ops


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over all axes but the second, for any number of axes.

    On a regular field ``[B, F, G, H, W]`` it is the inner batch norm: one mean and variance per
    field, shared by the group axis. Parameters and buffers are those of ``torch.nn.BatchNorm2d``.

    Args:
        num_features: channels or fields ``F``.
        eps: added to the variance.
        momentum: weight of the newest batch in the running statistics; None averages all batches.
    """

    process_group: dist.ProcessGroup | None = None
    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        super().__init__(num_features, eps, momentum)

    def __getstate__(self) -> dict[str, object]:
        # A process group cannot be copied or pickled; a copy has statistics of its own.
        return {key: value for key, value in self.__dict__.items() if key != "process_group"}

    @property
    def running(self) -> tuple[Tensor, Tensor] | None:
        """The running mean and variance in evaluation, None in training."""
        return None if self.training else (self.running_mean, self.running_var)

    def track(self, mean: Tensor, variance: Tensor) -> None:
        """Update the running statistics with a batch's mean and unbiased variance ``[F]``."""
        track([self], [(mean, variance)])

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` ``[B, F, ...]``."""
        if not self.training:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        y, mean, variance = ops.batch_norm(
            x, self.weight, self.bias, eps=self.eps, process_group=self.process_group
        )
        self.track(mean, variance)
        return y


def track(norms: Sequence[BatchNorm], statistics: Sequence[tuple[Tensor, Tensor] | None]) -> None:
    """Update the running statistics of norms with their batches' means and unbiased variances.

    Those of all norms at once, on a GPU by one kernel; None leaves a norm as it is.
    """
    pairs = [(n, s) for n, s in zip(norms, statistics, strict=True) if s is not None]
    if not pairs:
        return
    torch._foreach_add_([norm.num_batches_tracked for norm, _ in pairs], 1)
    running = [t for norm, _ in pairs for t in (norm.running_mean, norm.running_var)]
    batches = [t.to(norm.running_mean.dtype) for norm, batch in pairs for t in batch]
    first = pairs[0][0].momentum
    if first is not None and all(norm.momentum == first for norm, _ in pairs):
        torch._foreach_lerp_(running, batches, first)
        return
    shares = [
        1 / norm.num_batches_tracked.to(norm.running_mean.dtype)
        if norm.momentum is None
        else norm.momentum
        for norm, _ in pairs
        for _ in range(2)
    ]
    for old, new, share in zip(running, batches, shares, strict=True):
        old.lerp_(new, share)


class LayerNorm(nn.Module):
    """Layer normalisation of tokens ``[B, D, H, W]`` over their channels.

    Args:
        dim: channels ``D``.
        eps: added to the variance.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` ``[B, D, H, W]``."""
        return ops.layer_norm(x, self.weight, self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


def set_sync_batch_norm(model: nn.Module, process_group: dist.ProcessGroup | None) -> None:
    """Make every batch norm of ``model`` share its statistics over a process group.

    Works with any collective backend, on CPU too, and gives the gradients of one process that sees
    the whole batch.

    Args:
        model: a model built of this package's modules.
        process_group: the group, or None to return to statistics per process.

    Raises:
        ValueError: if ``model`` has no batch norm of this package.
    """
    norms = [m for m in model.modules() if isinstance(m, BatchNorm)]
    if not norms:
        raise ValueError(f"{type(model).__name__} has no eqcvt batch norm to synchronise")
    for norm in norms:
        norm.process_group = process_group
