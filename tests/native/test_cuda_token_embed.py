"""The CUDA kernels of token_embed, run on the host, against float64, beside the primitives."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.native.cuda_emulator import DTYPES, Emulated, fixture, new
from tests.ops import primitives
from tests.tolerance import assert_as_good, double

EPS = 1e-5
native = fixture("token_embed.cu")


class Case(NamedTuple):
    """Sizes and options of a call."""

    batch: int = 2
    channels: int = 10
    height: int = 17
    width: int = 13
    width_out: int = 32
    kernel: int = 3
    stride: int = 2
    padding: int = 1

    @property
    def options(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "eps": EPS}


CASES = {
    "as published": Case(),
    "smallest": Case(1, 1, 5, 5, 2, 3, 1, 0),
    "first stage of CvT": Case(1, 3, 29, 31, 64, 7, 4, 2),
    "many channels": Case(1, 26, 9, 11, 40, 5, 1, 2),
    "many tiles": Case(1, 1, 37, 41, 8, 3, 1, 1),
    "even filter, wide stride": Case(1, 2, 9, 11, 20, 2, 3, 0),
    "widest filter": Case(1, 1, 15, 16, 5, 13, 1, 3),
    "pixels without a tap": Case(1, 1, 3, 3, 2, 1, 2, 0),
    "a wide image with them": Case(1, 2, 2, 520, 2, 1, 2, 0),
    "empty": Case(batch=0),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def _inputs(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """x, filters, bias, norm_weight, norm_bias."""
    batch, channels, height, width, out, kernel, _, _ = case
    filters = torch.randn(out, channels, kernel, kernel) / (channels * kernel**2) ** 0.5
    return [
        torch.randn(batch, channels, height, width).to(dtype),
        filters,
        *torch.randn(3, out).unbind(),
    ]


def _forward(native: Emulated, case: Case, *args: Tensor) -> Tensor:
    y = new(primitives.token_embed_forward(*args, **case.options).shape, args[0].dtype)
    native.launch("token_embed_forward", *args, *case, EPS, y, like=y)
    return y


def _backward(
    native: Emulated, case: Case, dy: Tensor, *args: Tensor, input_gradient: bool = True
) -> list[Tensor | None]:
    found: list[Tensor | None] = [new(t.shape, t.dtype) for t in args]
    if not input_gradient:
        found[0] = None
    native.launch("token_embed_backward", dy, *args, *case, EPS, *found, like=dy)
    return found


@cases
@dtypes
def test_forward(native: Emulated, case: Case, dtype: torch.dtype) -> None:
    args = _inputs(case, dtype)
    y = _forward(native, case, *args)
    exact = primitives.token_embed_forward(*double(args), **case.options)
    reference = primitives.token_embed_forward(*args, **case.options)
    if case.batch:
        assert_as_good(y, exact, reference)


@cases
@dtypes
@pytest.mark.parametrize("input_gradient", [True, False])
def test_backward(native: Emulated, case: Case, dtype: torch.dtype, input_gradient: bool) -> None:
    args = _inputs(case, dtype)
    dy = torch.randn_like(primitives.token_embed_forward(*args, **case.options))
    found = _backward(native, case, dy, *args, input_gradient=input_gradient)
    if not case.batch:
        assert all((t == 0).all() for t in found if t is not None)
        return
    options = {**case.options, "input_gradient": True}
    exact = primitives.token_embed_backward(dy.double(), *double(args), **options)
    reference = primitives.token_embed_backward(dy, *args, **options)
    for a, e, r in zip(found, exact, reference, strict=True):
        if a is not None:
            assert_as_good(a, e, r.to(a.dtype), backward=True)


@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_go_where_they_should(
    native: Emulated, dtype: torch.dtype, value: float
) -> None:
    case = Case(batch=1, channels=2, width_out=5)
    args = _inputs(case, dtype)
    args[0][0, 1, 16, 0] = value
    # The primitives' own bf16 convolution of the CPU spreads a NaN beyond its filter.
    wide = [t.float() for t in args]
    expected = primitives.token_embed_forward(*wide, **case.options)
    y = _forward(native, case, *args)
    assert torch.equal(y.isnan(), expected.isnan())
    dy = torch.randn_like(expected)
    options = {**case.options, "input_gradient": True}
    gradients = primitives.token_embed_backward(dy, *wide, **options)
    for f, e in zip(_backward(native, case, dy.to(dtype), *args), gradients, strict=True):
        assert f is not None
        assert torch.equal(f.isfinite(), e.isfinite())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_order_of_threads_and_blocks_matters(native: Emulated, dtype: torch.dtype) -> None:
    case = CASES["many tiles"]
    args = _inputs(case, dtype)

    def run() -> list[Tensor]:
        y = _forward(native, case, *args)
        return [y, *_backward(native, case, y, *args)]

    native.in_any_order(run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_little_shared_memory_means_smaller_tiles(
    native: Emulated, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EQCVT_EMULATE_SHARED", str(24 * 1024))
    test_forward(native, Case(), dtype)
    test_backward(native, Case(), dtype, True)
