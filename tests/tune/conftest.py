"""A GPU that is not here, the shipped table of launches, and no proof."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import tests.kernels.conftest  # noqa: F401  kernels run in the interpreter here as well
from eqcvt.kernels import launches
from eqcvt.ops import _backend, _proof, _prove

H100 = _proof.Device("NVIDIA H100 80GB HBM3", "9.0")
KEY = "sm90 mlp_block_fwd 16 D32"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Start with the shipped table, no proof, and an empty cache folder."""
    monkeypatch.delenv(_proof.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_backend, "_warned", set())
    monkeypatch.setattr(_prove, "_tried", {})
    caches = (_proof.found, _prove.why_not, _proof.sources)
    for cached in caches:
        cached.cache_clear()
    yield
    launches.install({})
    for cached in caches:
        cached.cache_clear()
