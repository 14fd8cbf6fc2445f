"""The picture of what is to be found."""

from __future__ import annotations

import numpy as np
import pytest

from bench.twins import SETS, twins


@pytest.mark.needs("caustics")
def test_twins_differ_on_the_ring_and_less_where_mass_is_conserved() -> None:
    axes = np.array(twins(1, (2, 4)).axes[: 3 * 2 * len(SETS)]).reshape(3, -1)
    pictures = [[np.asarray(axis.get_images()[0].get_array()) for axis in row] for row in axes]
    for smooth, clumpy, difference in zip(*pictures, strict=True):
        assert smooth.shape == clumpy.shape == difference.shape == (129, 129)
        assert np.abs(difference[:3]).max() < 1 < 2 < np.abs(difference).max()
    spread = [float(np.square(difference).sum()) for difference in pictures[2]]
    assert min(spread[:2]) > max(spread[2:])
