"""EqCvT as a whole, training and inference, beside escnn's model: equal first, then timed."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import eqcvt
from bench.conftest import Measure
from eqcvt.convert import to_escnn

pytestmark = pytest.mark.timeout(900)

BATCH = 4
CASES = [(129, 3), (129, 1), (65, 3), (65, 1)]
IMPLEMENTATIONS = ["escnn", "eager", "compile"]


@lru_cache(maxsize=1)
def pair(size: int, channels: int, device: str) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Return our model, escnn's of the same weights, images and labels; the two were compared."""
    torch.manual_seed(0)
    ours = eqcvt.EqCvT(in_channels=channels, image_size=size)
    theirs = to_escnn(ours)
    ours, theirs = ours.to(device), theirs.to(device)
    images = torch.rand(BATCH, channels, size, size, device=device)
    labels = torch.arange(BATCH, device=device) % 2
    agree(ours, theirs, images[:2], labels[:2])
    return ours, theirs, images, labels


def agree(one: nn.Module, other: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Compare the logits and the gradient of the images in evaluation mode."""
    results = []
    for model in (one, other):
        leaf = images.clone().requires_grad_()
        logits = model.eval()(leaf)
        cross_entropy(logits, labels).backward()
        model.zero_grad(set_to_none=True)
        results.append((logits.detach(), leaf.grad))
    for ours, theirs in zip(*results, strict=True):
        assert ours is not None
        assert theirs is not None
        error = (ours - theirs).abs().max() / theirs.abs().max()
        assert error < 1e-3, f"relative difference {error:.1e}: nothing is timed"


def chosen(
    implementation: str, size: int, channels: int, device: str
) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the implementation's model with images and labels."""
    ours, theirs, images, labels = pair(size, channels, device)
    if implementation == "escnn":
        return theirs, images, labels
    if implementation == "eager":
        return ours, images, labels
    torch._dynamo.reset()
    compiled = torch.compile(ours)
    agree(compiled, ours, images[:2], labels[:2])
    return compiled, images, labels


@pytest.fixture(autouse=True)
def _asked_for(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> None:
    """Leave out what the options do not ask for."""
    values = request.node.callspec.params
    if values["implementation"] == "compile" and not pytestconfig.getoption("--compile"):
        pytest.skip("--compile times torch.compile too")
    if pytestconfig.getoption("--quick") and values["size"] != min(CASES)[0]:
        pytest.skip("--quick keeps to the smallest size")


def training_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """Return a function that runs the model forward and backward in training mode."""
    model.train()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        cross_entropy(model(images), labels).backward()

    return step


def inference(model: nn.Module, images: Tensor) -> Callable[[], None]:
    """Return a function that runs the model forward in evaluation mode."""
    model.eval()

    def forward() -> None:
        with torch.inference_mode():
            model(images)

    return forward


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", ["training", "inference"])
@pytest.mark.parametrize(("size", "channels"), CASES)
def test_bench_model(
    case: str,
    size: int,
    channels: int,
    implementation: str,
    measure: Measure,
    device: str,
    pytestconfig: pytest.Config,
) -> None:
    model, images, labels = chosen(implementation, size, channels, device)
    run = training_step(model, images, labels) if case == "training" else inference(model, images)
    measure(
        run,
        case=case,
        op="EqCvT",
        implementation=implementation,
        shape=tuple(images.shape),
        dtype=images.dtype,
        rounds=1 if pytestconfig.getoption("--quick") else 5 if size > 100 else 11,
    )
