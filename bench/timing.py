"""Durations and memory of a function, on the device it runs on."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

Function = Callable[[], object]
WARM_UP_S, MEASURED_S = 0.1, 0.5


def synchronise(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def once(function: Function, device: str) -> float:
    """Return the seconds of one call, from when the device is idle until it is again."""
    synchronise(device)
    start = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - start


@cache
def _larger_than_the_cache() -> Tensor:
    return torch.empty(2**28, dtype=torch.uint8, device="cuda")


def cuda_seconds(function: Function, *, rounds: int | None = None) -> list[float]:
    """Return the seconds that the GPU spends between two events around each call.

    The function has been called before, so that nothing is compiled or tuned here; it is called
    until the clocks are up. Before each call the second-level cache is overwritten: inputs that are
    smaller than it would otherwise lie there from the call before, and no rotation of inputs is
    needed. The host does not wait between calls, it prepares one while the GPU works on another.

    Args:
        function: what to time, on the current stream.
        rounds: calls; by default as many as half a second takes, from 15 to 200.
    """
    pace = once(function, "cuda")
    for _ in range(min(100, max(3, int(WARM_UP_S / pace)))):
        function()
    pace = once(function, "cuda")
    if rounds is None:
        rounds = min(200, max(15, int(MEASURED_S / pace)))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in events:
        _larger_than_the_cache().zero_()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def captured(function: Function) -> Function:
    """Return the replay of a CUDA graph of one call.

    It keeps ``function``: the graph reads the memory of its tensors, wherever they are by then.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()

    def replay(_kept: Function = function) -> None:
        graph.replay()

    return replay


def reserved_mib() -> float:
    """Return the GPU memory that torch cannot give back: tensors in use and pools of graphs."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved() / 2**20


def peak_mib(function: Function, device: str) -> float | None:
    """Return the memory one call adds at its height, or None where the system does not tell."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.malloc_trim(0)  # what was freed before must not serve this call for nothing
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    except OSError:
        return None
    before = _resident("VmRSS")
    function()
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    """Return a field of the process's memory in MiB, as Linux counts it."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s*(\d+) kB$", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024
