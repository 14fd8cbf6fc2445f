"""The one tolerance rule of the project."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Comparison(NamedTuple):
    """The largest error of a result against float64, and the one that is allowed."""

    error: float
    allowed: float

    @property
    def as_good(self) -> bool:
        """Whether the result passes; NaN does not."""
        return self.error <= self.allowed


def compare(
    actual: Tensor, exact: Tensor, reference: Tensor, *, backward: bool = False
) -> Comparison:
    """Compare a result with float64, with the same-dtype PyTorch reference as the measure.

    The largest error may be at most twice (for gradients three times) that of ``reference``, plus a
    floor of 8 ulp of the largest value. A result of another shape has no error that is allowed.
    """
    if actual.shape != exact.shape:
        return Comparison(math.inf, 0.0)
    if exact.numel() == 0:
        return Comparison(0.0, 0.0)
    exact = exact.double()
    floor = 8 * torch.finfo(actual.dtype).eps * exact.abs().amax().item()
    allowed = (3 if backward else 2) * (reference.double() - exact).abs().amax().item() + floor
    return Comparison((actual.double() - exact).abs().amax().item(), allowed)
