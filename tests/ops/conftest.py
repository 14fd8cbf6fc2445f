"""The tests of an op run with the reference and with what the automatic choice takes here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from eqcvt import use_backend


@pytest.fixture(params=["reference", pytest.param("auto", marks=pytest.mark.needs("native"))])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Choose the backend of a test's ops."""
    with use_backend(request.param):
        yield request.param
