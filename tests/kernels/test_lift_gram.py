"""The steerable block's statistics from the Gram matrix of its patches, in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import primitives
from tests.tolerance import assert_all_as_good

pytest.importorskip("triton")
from eqcvt.kernels import launches, lift, lift_gram, lift_tile
from tests.kernels.test_lift import Case

pytestmark = pytest.mark.needs("interpreter")

CASES: dict[str, dict[str, Any]] = {
    "model": {"fields": 10, "kernel": 7, "height": 13, "width": 12},
    "one channel": {"channels": 1, "fields": 10, "kernel": 7, "height": 12, "width": 15},
    "strided": {"stride": 2, "padding": 0, "height": 16, "width": 13, "fields": 4},
    "two tiles of columns": {"channels": 2, "fields": 8, "height": 4, "width": 70},
    "four channels": {"channels": 4, "kernel": 5, "fields": 6, "padding": 3, "height": 5},
    "large group": {"channels": 1, "order": 16, "fields": 5, "height": 5, "width": 6},
    "one pixel": {"fields": 10, "height": 3, "width": 3, "padding": 0, "batch": 1},
}


@pytest.fixture(autouse=True)
def grams(monkeypatch: pytest.MonkeyPatch) -> list[lift_gram.Gram]:
    """The tiles of the calls that took this way."""
    made = []

    def note(x: Tensor, bank: Tensor, mask: Tensor, s: Any, g: lift_gram.Gram, *out: Any) -> None:
        made.append(g)
        lift_gram.gram_moments(x, bank, mask, s, g, *out)

    monkeypatch.setattr(lift, "gram_moments", note)
    return made


@pytest.mark.parametrize("name", CASES)
def test_moments_are_as_good_as_pytorch_s(name: str, grams: list[lift_gram.Gram]) -> None:
    case = Case(**CASES[name])
    actual = case.moments(lift, torch.float16)
    exact, reference = (case.moments(primitives, d) for d in (torch.float64, torch.float16))
    assert_all_as_good(actual, exact, reference)
    assert len(grams) == 1
    again = case.moments(lift, torch.float16)
    alone = case.moments(lift, torch.float16, correlate=False)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(actual[:2], alone[:2], strict=True))
    assert [t.numel() for t in alone[2:]] == [0, 0]


@pytest.mark.parametrize("halves", [0, 1])
def test_tf32_is_nearer_than_its_factors(
    halves: int, monkeypatch: pytest.MonkeyPatch, grams: list[lift_gram.Gram]
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    case = Case(**CASES["model"])
    case.x, case.bank = torch.rand(case.x.shape).double(), torch.randn(case.bank.shape).double()
    entries = {
        key: launch | {"HALVES": halves}
        for key, launch in launches.table().items()
        if " lift_gram 32 " in key
    }
    with launches.installed(entries):
        found = case.moments(lift, torch.float32)
    for mine, right in zip(found, case.moments(primitives, torch.float64), strict=True):
        assert (mine - right).abs().max() < 2**-11 * right.abs().max()
    assert len(grams) == 1


def test_batches_in_parts_give_the_same(
    monkeypatch: pytest.MonkeyPatch, grams: list[lift_gram.Gram]
) -> None:
    case = Case(**CASES["model"], batch=5)
    whole = case.moments(lift, torch.float16)
    monkeypatch.setattr(lift_tile, "WORKSPACE", 1)
    for part, all_at_once in zip(case.moments(lift, torch.float16), whole, strict=True):
        torch.testing.assert_close(part, all_at_once, rtol=1e-6, atol=1e-6)
    assert len(grams) == 2


def test_a_constant_image_has_no_negative_variance(grams: list[lift_gram.Gram]) -> None:
    case = Case(**CASES["model"] | {"padding": 0})
    case.x, case.mask = torch.full_like(case.x, 1.0 / 3), torch.ones_like(case.mask)
    case.bank[:] = case.bank[:, :1]
    mean, variance, _, _ = case.moments(lift, torch.float16)
    assert (variance >= 0).all()
    assert (variance <= 1e-5 * mean.square().max()).all()
    assert len(grams) == 1


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen_where_it_counts(
    value: float, grams: list[lift_gram.Gram]
) -> None:
    case = Case(**CASES["strided"] | {"height": 12, "width": 12})
    case.mask = torch.ones_like(case.mask)
    used = case.moments(lift, torch.float16)
    case.x[..., 11, :] = case.x[..., 11] = value  # what the stride leaves over
    for a, b in zip(case.moments(lift, torch.float16), used, strict=True):
        assert torch.equal(a, b)
    case.x[1, 0, 6, 4] = value
    mean, variance, _, _ = case.moments(lift, torch.float16)
    assert not mean.isfinite().any()
    assert variance.isnan().all()
    assert len(grams) == 3


@pytest.mark.parametrize(
    "other",
    [
        {"masked": False},
        {"channels": 4, "kernel": 11, "height": 13, "width": 13},
        {"channels": 16, "kernel": 5},
        {"channels": 1, "kernel": 11, "order": 1, "fields": 1, "height": 25, "width": 12},
    ],
    ids=["no mask", "wide filters", "many channels", "few filters"],
)
def test_calls_it_is_not_for(other: dict[str, Any], grams: list[lift_gram.Gram]) -> None:
    """Sums of large means lose a variance, and where there are few filters they cost more."""
    Case(**CASES["model"] | other).moments(lift, torch.float16)
    Case(**CASES["model"]).moments(lift, torch.float32)  # products of float32 itself
    assert grams == []
