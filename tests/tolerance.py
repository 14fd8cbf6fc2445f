"""The one tolerance rule of the project."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_good(
    actual: Tensor, exact: Tensor, reference: Tensor, *, backward: bool = False
) -> None:
    """Check a result against float64, with the same-dtype PyTorch reference as the measure.

    The largest error may be at most twice (for gradients three times) that of ``reference``, plus a
    floor of 8 ulp of the largest value.
    """
    assert actual.shape == exact.shape, f"shape {list(actual.shape)} is not {list(exact.shape)}"
    assert actual.dtype == reference.dtype, f"dtype {actual.dtype} is not {reference.dtype}"
    exact = exact.double()
    floor = 8 * torch.finfo(actual.dtype).eps * exact.abs().amax().item()
    allowed = (3 if backward else 2) * (reference.double() - exact).abs().amax().item() + floor
    error = (actual.double() - exact).abs().amax().item()
    assert error <= allowed, f"error {error:.3g} exceeds {allowed:.3g}"
