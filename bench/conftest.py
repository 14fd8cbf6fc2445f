"""Measures a case and merges the numbers into bench/results/<device>.csv."""

from __future__ import annotations

import csv
import ctypes
import datetime
import gc
import os
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import eqcvt
from bench.floor import Work, floor_ms
from eqcvt._files import replacing
from tests import escnn_stub

ROOT = Path(__file__).resolve().parents[1]
KEY = ("case", "op", "implementation", "shape", "dtype", "threads")
COLUMNS = (
    *KEY,
    "median_ms",
    "iqr_ms",
    "images_per_s",
    "peak_mib",
    "floor_share",
    "rounds",
    "device",
    "versions",
    "commit",
    "date",
)
ROWS = pytest.StashKey[list[dict[str, str]]]()


class Measure(Protocol):
    """The type of the fixture ``measure``."""

    def __call__(
        self,
        function: Callable[[], object],
        *,
        case: str,
        op: str,
        implementation: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        rounds: int,
        work: Work | None = None,
    ) -> None: ...


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compile", action="store_true", help="time torch.compile too (minutes more)")
    parser.addoption("--device", default="cpu", help="cpu or cuda")
    parser.addoption("--quick", action="store_true", help="one round of the smallest size")
    parser.addoption("--results", default=str(ROOT / "bench" / "results"), help="folder of the CSV")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_report_header(config: pytest.Config) -> str:
    device = config.getoption("--device")
    return (
        f"bench: {device_name(device)}, {versions()}, {threads(device) or 'no'} threads, {commit()}"
    )


def device_name(device: str) -> str:
    """Return the name of the GPU or of the processor."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def threads(device: str) -> str:
    """Return the number of threads of the CPU's work; nothing on a GPU."""
    return str(torch.get_num_threads()) if device == "cpu" else ""


def versions() -> str:
    """Return the versions that the numbers depend on."""
    parts = f"eqcvt {eqcvt.__version__}; torch {torch.__version__}; numpy {np.__version__}"
    return f"{parts}; Python {platform.python_version()}"


def commit() -> str:
    """Return the checkout's commit, marked where sources differ from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return "unknown commit"
    watched = [*git, "status", "--porcelain", "--", "eqcvt", "kernels", "csrc", "bench/*.py"]
    changed = subprocess.run(watched, capture_output=True, text=True).stdout
    return head.stdout.strip() + ("+changes" if changed else "")


@pytest.fixture(scope="session", autouse=True)
def _escnn() -> None:
    if why := escnn_stub.install():
        pytest.exit(f"the benchmarks check every number against escnn first: {why}", returncode=1)


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    """Where the cases run."""
    name: str = pytestconfig.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.exit("--device cuda, but torch sees no CUDA device", returncode=1)
    return name


def _resident(field: str) -> float:
    """Return a field of the process's memory in MiB, as Linux counts it."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s*(\d+) kB$", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def peak_mib(function: Callable[[], object], device: str) -> float | None:
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


@pytest.fixture
def measure(benchmark: BenchmarkFixture, pytestconfig: pytest.Config, device: str) -> Measure:
    """Time a function, after one call that does not count, and keep a row for the CSV."""

    def timed(
        function: Callable[[], object],
        *,
        rounds: int,
        shape: Any,
        dtype: Any,
        work: Work | None = None,
        **name: str,
    ) -> None:
        def synchronised() -> None:
            function()
            if device == "cuda":
                torch.cuda.synchronize()

        synchronised()
        peak = peak_mib(function, device)
        benchmark.group = f"{name['op']} {name['case']} {'x'.join(map(str, shape))}"
        # One more call unmeasured: to measure memory, what the allocator kept was given back.
        benchmark.pedantic(synchronised, rounds=rounds, iterations=1, warmup_rounds=1)
        if benchmark.stats is None:
            return
        stats = benchmark.stats.stats
        share = None if work is None else floor_ms(work, device, dtype) / (stats.median * 1e3)
        row = name | {
            "shape": "x".join(map(str, shape)),
            "dtype": str(dtype).removeprefix("torch."),
            "threads": threads(device),
            "median_ms": f"{stats.median * 1e3:.3f}",
            "iqr_ms": f"{stats.iqr * 1e3:.3f}",
            "images_per_s": f"{shape[0] / stats.median:.3f}",
            "peak_mib": "" if peak is None else f"{peak:.1f}",
            "floor_share": "" if share is None else f"{share:.3f}",
            "rounds": str(stats.rounds),
            "device": device_name(device),
            "versions": versions(),
            "commit": commit(),
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        }
        pytestconfig.stash[ROWS].append(row)

    return timed


def merged(old: list[dict[str, str]], new: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return all rows, sorted, a new one in the place of an old one of the same key."""
    table = {tuple(row[column] for column in KEY): row for row in [*old, *new]}
    return [table[key] for key in sorted(table)]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Merge the rows of this run into the device's CSV."""
    rows = session.config.stash[ROWS]
    if not rows or session.config.getoption("--quick"):
        return
    name = re.sub(r"[^a-z0-9]+", "-", rows[0]["device"].lower()).strip("-")
    path = Path(session.config.getoption("--results")) / f"{name}.csv"
    old: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            old = list(csv.DictReader(file))
    with replacing(path) as new, new.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator=os.linesep)
        writer.writeheader()
        writer.writerows(merged(old, rows))
