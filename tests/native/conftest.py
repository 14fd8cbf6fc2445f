"""What the tests of the CPU kernels ask for: fresh memory full of NaN, and numbers of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.native.threads import threads


@pytest.fixture
def _nan_in_fresh_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    with threads(request.param):
        yield
