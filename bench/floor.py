"""The least time a piece of work can take on this device, from rates measured in the same run."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from bench.cases import DTYPES
from bench.timing import Function, cuda_seconds, once


class Work(NamedTuple):
    """What an op cannot do without.

    ``macs``: multiply-accumulates; ``exps``: exponentials; ``bytes``: what must be read or written
    once.
    """

    macs: float
    exps: float = 0
    bytes: float = 0


def floor_ms(work: Work, device: str, dtype: str) -> float:
    """Return the largest of the three times the work takes at the device's own best rates."""
    macs, exps, traffic = rates(device, dtype)
    return 1e3 * max(work.macs / macs, work.exps / exps, work.bytes / traffic)


@cache
def rates(device: str, dtype: str) -> tuple[float, float, float]:
    """Return multiply-accumulates, exponentials and bytes a second, each of the best there is.

    Products on a CPU are a 3x3 convolution (its matrix product is slower on some processors), on a
    GPU a matrix product under the switches of ``dtype``. Exponentials are torch's on a CPU; on a
    GPU, where memory is slower than they are, those of a kernel that stays in registers. Bytes are
    those of a copy larger than the caches.
    """
    if device == "cuda":
        from bench import exp_rate

        matrix = torch.randn(8192, 8192, device=device, dtype=DTYPES[dtype])
        macs = 8192**3 / _seconds(lambda: matrix @ matrix, device)
        exps = exp_rate.count() / _seconds(exp_rate.run, device)
        copied = torch.empty(2**30, dtype=torch.uint8, device=device)
    else:
        x, filters = torch.randn(8, 64, 64, 64), torch.randn(64, 64, 3, 3)
        x, filters = x.to(DTYPES[dtype]), filters.to(DTYPES[dtype])
        macs = 8 * 62 * 62 * 64 * 64 * 9 / _seconds(lambda: torch.conv2d(x, filters), device)
        values = torch.randn(2**18).to(DTYPES[dtype])
        result = torch.empty_like(values)
        exps = values.numel() / _seconds(lambda: torch.exp(values, out=result), device)
        copied = torch.empty(2**27, dtype=torch.uint8)
    traffic = 2 * copied.numel() / _seconds(copied.clone, device)
    return macs, exps, traffic


def _seconds(function: Function, device: str) -> float:
    """Return the best of several runs."""
    function()
    if device == "cuda":
        return min(cuda_seconds(function, rounds=15))

    def four_times() -> None:
        for _ in range(4):
            function()

    return min(once(four_times, device) for _ in range(9)) / 4
