"""Whole models, training and inference: equal to the plain one and to escnn's first, then timed."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import eqcvt
from bench import implementations
from bench.conftest import Measure
from eqcvt.convert import to_escnn

pytestmark = pytest.mark.timeout(900)

BATCH = 4
CASES = [("EqCvT", 129, 3), ("EqCvT", 129, 1), ("EqCvT", 65, 3), ("EqCvT", 65, 1), ("CvT", 129, 1)]


@lru_cache(maxsize=1)
def plain(name: str, size: int, channels: int, device: str) -> tuple[nn.Module, Tensor]:
    """Return our plain model, which stays untrained, and images."""
    torch.manual_seed(0)
    model = getattr(eqcvt, name)(in_channels=channels, image_size=size)
    return model.to(device), torch.rand(BATCH, channels, size, size, device=device)


def training_step(model: nn.Module, images: Tensor) -> Callable[[], None]:
    """Return a function that runs the model forward and backward in training mode."""
    model.train()
    labels = torch.arange(len(images), device=images.device) % 2

    def step() -> None:
        model.zero_grad(set_to_none=True)
        cross_entropy(model(images), labels).backward()

    return step


@pytest.mark.parametrize("implementation", implementations.IMPLEMENTATIONS)
@pytest.mark.parametrize("case", ["training", "inference"])
@pytest.mark.parametrize(("name", "size", "channels"), CASES)
def test_bench_model(
    name: str,
    size: int,
    channels: int,
    case: str,
    implementation: str,
    measure: Measure,
    device: str,
    pytestconfig: pytest.Config,
) -> None:
    implementations.skip_what_is_not_there(implementation, device, pytestconfig)
    if implementation == "escnn" and name == "CvT":
        pytest.skip("there is nothing of escnn's in a CvT")
    if pytestconfig.getoption("--quick") and size > 65:
        pytest.skip("--quick keeps to the smallest size")
    ours, images = plain(name, size, channels, device)
    if implementation == "escnn":
        model = to_escnn(ours).to(device)
    else:
        model = implementations.variant(ours, implementation)
    implementations.agree(model, ours, images[:2])
    training = case == "training"
    measure(
        training_step(model, images) if training else implementations.inference(model, images),
        case=case,
        op=name,
        implementation=implementation,
        shape=tuple(images.shape),
        dtype=images.dtype,
        rounds=1 if pytestconfig.getoption("--quick") else 7 if size > 100 else 15,
    )
