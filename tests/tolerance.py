"""The one tolerance rule of the project, :mod:`eqcvt.ops._tolerance`, as an assertion."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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


def double(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Return the arguments of the exact results: what is rounded, in float64."""
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


def assert_all_as_good(
    found: Sequence[Tensor],
    exact: Sequence[Tensor],
    reference: Sequence[Tensor],
    names: Sequence[str] | None = None,
    *,
    backward: bool = False,
) -> None:
    """Check each result by the tolerance rule, beside the reference in its dtype.

    Float64 has no exact value to be measured by: there the reference is that of float32, from the
    same numbers, and its error is scaled down by the ratio of the two precisions.
    """
    names = names or [f"result {i}" for i in range(len(found))]
    for name, f, e, r in zip(names, found, exact, reference, strict=True):
        if e.numel() == 0:
            assert f.shape == e.shape, f"{name}: shape {list(f.shape)} is not {list(e.shape)}"
            continue
        if f.dtype == torch.float64:
            scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
            r = e + (r.double() - e) * scale
        try:
            assert_as_good(f, e, r, backward=backward)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def of_other_strides(t: Tensor) -> float:
    """Return by how much a result may differ: on a GPU kernels are compiled for their strides."""
    return 0.0 if t.device.type == "cpu" else float(16 * torch.finfo(t.dtype).eps * t.abs().max())
