"""The one tolerance rule of the project, :mod:`eqcvt.ops._tolerance`, as an assertion."""

from __future__ import annotations

import torch
from torch import Tensor

from eqcvt.ops._tolerance import compare


def assert_as_good(
    actual: Tensor, exact: Tensor, reference: Tensor, *, backward: bool = False
) -> None:
    """Check a result against float64, with the same-dtype PyTorch reference as the measure."""
    assert actual.shape == exact.shape, f"shape {list(actual.shape)} is not {list(exact.shape)}"
    assert actual.dtype == reference.dtype, f"dtype {actual.dtype} is not {reference.dtype}"
    found = compare(actual, exact, reference, backward=backward)
    assert found.as_good, f"error {found.error:.3g} exceeds {found.allowed:.3g}"


def of_other_strides(t: Tensor) -> float:
    """Return by how much a result may differ: on a GPU kernels are compiled for their strides."""
    return 0.0 if t.device.type == "cpu" else float(16 * torch.finfo(t.dtype).eps * t.abs().max())
