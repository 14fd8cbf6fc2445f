"""The least time a piece of work can take on this device, from rates measured in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch


class Work(NamedTuple):
    """What an op cannot do without.

    ``macs``: multiply-accumulates; ``exps``: exponentials; ``bytes``: what must be read or written
    once.
    """

    macs: float
    exps: float = 0
    bytes: float = 0


def floor_ms(work: Work, device: str, dtype: torch.dtype) -> float:
    """Return the largest of the three times the work takes at the device's own best rates."""
    macs, exps, traffic = rates(device, dtype)
    return 1e3 * max(work.macs / macs, work.exps / exps, work.bytes / traffic)


@cache
def rates(device: str, dtype: torch.dtype) -> tuple[float, float, float]:
    """Return multiply-accumulates, exponentials and bytes a second, each of torch's best op.

    On a CPU that is a 3x3 convolution (its matrix product is slower on some processors), on a GPU
    a matrix product; for bytes a copy larger than the caches.
    """
    if device == "cuda":
        matrix = torch.randn(8192, 8192, device=device, dtype=dtype)
        macs = 8192**3 / _seconds(lambda: matrix @ matrix, device)
        values, copied = matrix[:256], torch.empty(2**28, dtype=torch.uint8, device=device)
    else:
        x, filters = torch.randn(8, 64, 64, 64), torch.randn(64, 64, 3, 3)
        x, filters = x.to(dtype), filters.to(dtype)
        count = 8 * 62 * 62 * 64 * 64 * 9
        macs = count / _seconds(lambda: torch.conv2d(x, filters), device)
        values = torch.randn(2**18).to(dtype)
        copied = torch.empty(2**27, dtype=torch.uint8)
    result = torch.empty_like(values)
    exps = values.numel() / _seconds(lambda: torch.exp(values, out=result), device)
    traffic = 2 * copied.numel() / _seconds(copied.clone, device)
    return macs, exps, traffic


def _seconds(function: Callable[[], object], device: str) -> float:
    """Return the best of several runs."""
    best = float("inf")
    for _ in range(9):
        start = time.perf_counter()
        for _ in range(4):
            function()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / 4)
    return best
