"""The models on a CUDA device: numbers as on the CPU, autocast, and no hidden syncs."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import eqcvt
from eqcvt.predict import predict
from tests.tolerance import assert_as_good

pytestmark = pytest.mark.gpu
MODELS = ["eqcvt_c4", "eqcvt_c4_exact", "eqcvt_d4", "cvt"]
SIZE = 65


@pytest.fixture
def _no_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def batch(channels: int) -> tuple[Tensor, Tensor]:
    return torch.rand(4, channels, SIZE, SIZE), torch.arange(4) % 2


def logits_and_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    """Return the logits and all gradients as one vector, in evaluation mode (without dropout)."""
    weight = next(model.parameters())
    logits = model.eval()(images.to(weight))
    cross_entropy(logits, labels.to(weight.device)).backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return [logits.detach().cpu(), torch.cat(gradients).cpu()]


@pytest.mark.usefixtures("_no_tf32")
@pytest.mark.parametrize("name", MODELS)
def test_same_numbers_as_on_the_cpu(name: str) -> None:
    model = eqcvt.create_model(name, in_channels=3, image_size=SIZE)
    images, labels = batch(3)
    exact = logits_and_gradients(copy.deepcopy(model).double(), images, labels)
    measure = logits_and_gradients(copy.deepcopy(model), images, labels)
    actual = logits_and_gradients(copy.deepcopy(model).cuda(), images, labels)
    assert_as_good(actual[0], exact[0], measure[0])
    assert_as_good(actual[1], exact[1], measure[1], backward=True)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_step_under_autocast(name: str, dtype: torch.dtype) -> None:
    model = eqcvt.create_model(name, in_channels=3, image_size=SIZE).cuda().train()
    images, labels = (t.cuda() for t in batch(3))
    with torch.autocast("cuda", dtype=dtype):
        loss = cross_entropy(model(images), labels)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", MODELS)
def test_training_step_never_waits_for_the_device(name: str) -> None:
    model = eqcvt.create_model(name, in_channels=3, image_size=SIZE).cuda().train()
    images, labels = (t.cuda() for t in batch(3))
    cross_entropy(model(images), labels).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cross_entropy(model(images), labels).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_predictions_are_those_of_the_cpu(tmp_path: Path) -> None:
    """In order, each batch's own, though it is fetched while the next one is computed."""
    for i, pixels in enumerate(torch.rand(70, SIZE, SIZE)):
        Image.fromarray((255 * pixels).byte().numpy()).save(tmp_path / f"{i:02d}.png")
    model = eqcvt.create_model("eqcvt_c4", in_channels=1, image_size=SIZE).eval()
    expected = list(predict(model, [tmp_path], batch_size=8))
    found = list(predict(model.cuda(), [tmp_path], batch_size=8))
    assert [p.name for p in found] == [p.name for p in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.probabilities == pytest.approx(theirs.probabilities, abs=1e-3)


def test_exact_variant_is_invariant_on_the_device() -> None:
    model = eqcvt.create_model("eqcvt_c4_exact", in_channels=1, image_size=SIZE)
    model = model.double().cuda().eval()
    images = batch(1)[0].double().cuda()
    with torch.no_grad():
        upright = model(images)
        for turns in (1, 2, 3):
            turned = model(images.rot90(turns, (2, 3)))
            torch.testing.assert_close(turned, upright, rtol=0, atol=1e-11)
