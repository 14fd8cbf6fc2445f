"""What every run shares: threads, seeds, escnn, and a header that names what is missing."""

from __future__ import annotations

import os

# One thread makes sums the same on every machine, and leaves the cores to pytest's workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# On a GPU tests name the kernels they mean; none is to wait for a check of all of them.
os.environ.setdefault("EQCVT_TUNED", "none")

import importlib.util
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from eqcvt.convert import _escnn

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
_no_escnn = _escnn.install()
settings.register_profile("eqcvt", derandomize=True, deadline=None)
settings.load_profile("eqcvt")


def _package(name: str) -> str | None:
    return None if importlib.util.find_spec(name) else f"{name} is not installed"


def _cuda() -> str | None:
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def _backend(name: str) -> str | None:
    """Ask the ops' own table whether any op can take the backend ``name`` here."""
    from eqcvt import ops

    rows = [row for row in ops.explain() if row.backend == name]
    if any(row.available for row in rows):
        return None
    return rows[0].reason if rows else "no op has it on the devices here"


MISSING: dict[str, Callable[[], str | None]] = {
    "cuda": _cuda,
    "triton": lambda: _backend("triton"),
    "interpreter": lambda: "it is for CPUs" if torch.cuda.is_available() else None,
    "triton-package": lambda: _package("triton"),
    "native": lambda: _backend("native"),
    "escnn": lambda: _no_escnn,
    "astropy": lambda: _package("astropy"),
    "caustics": lambda: _package("caustics"),
    "lenstronomy": lambda: _package("lenstronomy"),
    "onnxruntime": lambda: _package("onnxruntime"),
    "tensorboard": lambda: _package("tensorboard"),
}
_reasons: dict[str, str | None] = {}


def missing(name: str) -> str | None:
    """Return why ``name`` is not there in this run, or None if it is."""
    if name not in MISSING:
        raise pytest.UsageError(f"{name!r} is none of {', '.join(map(repr, MISSING))}")
    if name not in _reasons:
        _reasons[name] = MISSING[name]()
    return _reasons[name]


def required() -> list[str]:
    """Return the names that EQCVT_REQUIRE, a comma-separated list, insists on."""
    return [
        name for name in os.environ.get("EQCVT_REQUIRE", "").replace(" ", "").split(",") if name
    ]


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to start where something that EQCVT_REQUIRE names is missing: nothing skips for it."""
    lacking = [f"{name} ({why})" for name in required() if (why := missing(name))]
    if lacking:
        raise pytest.UsageError(f"EQCVT_REQUIRE insists on what is missing: {'; '.join(lacking)}")


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Name versions, and all that is missing here with the reason."""
    threads = torch.get_num_threads()
    lines = [f"eqcvt: torch {torch.__version__}, numpy {np.__version__}, threads {threads}"]
    lines += [f"missing: {name} ({why})" for name in MISSING if (why := missing(name))]
    return lines


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose ``needs`` or ``gpu`` mark names something missing."""
    names = [name for mark in item.iter_markers("needs") for name in mark.args]
    if item.get_closest_marker("gpu"):
        names.append("cuda")
    for name in names:
        if why := missing(name):
            pytest.skip(f"needs {name}: {why}")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write pictures without drawing them, which takes a second each: for tests of other things."""

    def savefig(figure: object, path: Path, **options: object) -> None:
        path.write_bytes(b"undrawn")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)


@pytest.fixture(autouse=True)
def _no_graphs_left() -> Iterator[None]:
    """Forget what a test compiled: dynamo counts how often one function is compiled anew."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Start every test from the same random state."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
