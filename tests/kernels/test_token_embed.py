"""The Triton kernels of the token embedding against plain PyTorch in float64."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import primitives
from tests.tolerance import assert_all_as_good, assert_as_good

pytest.importorskip("triton")
from eqcvt.kernels import common, token_embed
from tests.kernels import aot
from tests.kernels.memory import filled_memory

pytestmark = pytest.mark.needs("interpreter")


class Case:
    """Arguments of the embedding."""

    def __init__(
        self,
        batch: int = 2,
        channels: int = 3,
        height: int = 7,
        breadth: int = 6,
        width: int = 16,
        size: int = 3,
        stride: int = 2,
        padding: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.x = torch.randn(batch, channels, height, breadth).to(dtype)
        self.parameters = [
            torch.randn(width, channels, size, size) / (channels * size * size) ** 0.5,
            0.1 * torch.randn(width),
            1 + 0.2 * torch.randn(width),
            0.1 * torch.randn(width),
        ]
        self.settings: dict[str, Any] = {"stride": stride, "padding": padding, "eps": 1e-5}
        rows, columns = ((n + 2 * padding - size) // stride + 1 for n in (height, breadth))
        self.dy = torch.randn(batch, rows, columns, width).to(dtype)

    def forward(self, wide: bool = False) -> list[Tensor]:
        return [t.double() if wide else t for t in (self.x, *self.parameters)]

    def run(self, input_gradient: bool = True) -> list[Tensor]:
        settings = self.settings | {"input_gradient": input_gradient}
        y = token_embed.forward(*self.forward(), **self.settings)
        return [y, *token_embed.backward(self.dy, *self.forward(), **settings)]

    def check(self) -> None:
        y, *gradients = self.run()
        exact = primitives.token_embed_forward(*self.forward(wide=True), **self.settings)
        assert_as_good(y, exact, primitives.token_embed_forward(*self.forward(), **self.settings))
        settings = self.settings | {"input_gradient": True}
        wanted = (
            primitives.token_embed_backward(self.dy.to(x[0].dtype), *x, **settings)
            for x in (self.forward(wide=True), self.forward())
        )
        assert_all_as_good(gradients, *wanted, backward=True)


CASES: dict[str, dict[str, Any]] = {
    "model": {"channels": 10, "height": 9, "breadth": 11, "width": 32, "batch": 1},
    "weights in blocks": {"channels": 1, "size": 9, "stride": 4, "padding": 2, "width": 24},
    "padded channels": {"channels": 17, "width": 40, "stride": 1, "height": 4, "batch": 1},
    "narrow image": {"height": 3, "breadth": 2, "stride": 3, "size": 2, "batch": 3},
    "gaps": {"stride": 3, "size": 2, "padding": 0, "height": 8, "width": 18},
    "one pixel": {"height": 1, "breadth": 1, "channels": 1, "size": 1, "padding": 0},
}


@pytest.mark.parametrize("name", CASES)
def test_every_result_is_as_good_as_pytorch_s(name: str) -> None:
    Case(**CASES[name]).check()


def test_without_an_eps_rows_that_are_no_tokens_spoil_no_gradient() -> None:
    case = Case()
    case.settings["eps"] = 0.0
    case.parameters[1].zero_()
    case.check()


def test_half_precision_is_as_good_as_pytorch_s() -> None:
    Case(**CASES["model"], dtype=torch.float16).check()


def test_the_input_s_gradient_is_made_only_if_asked_for() -> None:
    case = Case()
    _, dx, *others = case.run(input_gradient=False)
    assert dx.shape == (0,)
    assert all(torch.equal(a, b) for a, b in zip(others, case.run()[2:], strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_the_tokens_that_see_it(value: float) -> None:
    case = Case(height=12, breadth=12, padding=0)
    case.x[1, 0, 4, 7] = value
    y, dx, *_ = case.run()
    seen = torch.zeros(2, 5, 5, dtype=torch.bool)
    seen[1, 1:3, 3] = True
    assert torch.equal(y.isnan().all(-1), seen)
    assert torch.equal(y.isnan().any(-1), seen)
    wanted = primitives.token_embed_backward(
        case.dy, *case.forward(), **case.settings, input_gradient=True
    )
    assert torch.equal(dx.isnan(), wanted[0].isnan())


def test_any_strides_second_runs_and_filled_memory_give_the_same_bits() -> None:
    case = Case(channels=5)
    expected = case.run()
    case.x = case.x.contiguous(memory_format=torch.channels_last)
    case.dy = torch.stack([case.dy, case.dy], -1)[..., 0]
    assert not case.x.is_contiguous()
    assert not case.dy.is_contiguous()
    with filled_memory():
        assert all(torch.equal(a, b) for a, b in zip(case.run(), expected, strict=True))


def test_runs_of_tiles_sum_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(batch=5, channels=1)
    monkeypatch.setattr(common, "INTERPRETED_PROGRAMS", 1)
    one = case.run()
    monkeypatch.setattr(common, "INTERPRETED_PROGRAMS", 4)
    for a, b in zip(case.run(), one, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_an_empty_batch_gives_empty_results() -> None:
    case = Case(batch=0)
    y, dx, *gradients = case.run()
    assert y.shape == (0, 4, 3, 16)
    assert dx.shape == (0, 3, 7, 6)
    for t, p in zip(gradients, case.parameters, strict=True):
        assert t.shape == p.shape
        assert not t.any()


@pytest.mark.parametrize(
    ("shape", "width", "dtype", "reason"),
    [
        ((1, 3, 9, 9), 32, torch.float64, "takes float32, float16 and bfloat16, not float64"),
        ((1, 3, 9, 9), 8, torch.float32, "takes 16 to 128 output channels, not 8"),
        ((1, 3, 9, 9), 192, torch.float32, "takes 16 to 128 output channels, not 192"),
        ((1, 3, 9999, 9999), 32, torch.float32, "takes fewer than 2 ** 31 values per image"),
    ],
)
def test_refusals_say_why(
    shape: tuple[int, ...], width: int, dtype: torch.dtype, reason: str
) -> None:
    x = torch.zeros(1, dtype=dtype).expand(shape)
    why = token_embed.supports(x, torch.zeros(width, shape[1], 3, 3), padding=1)
    assert why is not None
    assert reason in why


def test_filters_that_are_not_square_and_grids_beyond_the_image_are_refused() -> None:
    x = torch.zeros(1, 1, 1, 1).expand(1, 1, 4096, 4096)
    assert token_embed.supports(x, torch.zeros(127, 1, 1, 1), padding=0) is None
    why = token_embed.supports(x, torch.zeros(127, 1, 1, 1), padding=16)
    assert why == "takes fewer than 2 ** 31 values per image, not [1, 4096, 4096]"
    for size in ((5, 3), (3, 5)):
        why = token_embed.supports(x, torch.zeros(16, 1, *size), padding=1)
        assert why == f"takes square filters, not {size[0]}x{size[1]}"


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """The calls whose kernels are assembled: the model's sizes, and with EQCVT_AOT_WIDE wider."""
    cases = ((10, 121, 32, 3, 2, 1),)
    if "EQCVT_AOT_WIDE" in os.environ:
        cases = ((3, 129, 64, 7, 4, 2), (64, 33, 128, 3, 2, 1))
    for name in os.environ.get("EQCVT_AOT", "bfloat16 float16 float32").split():
        for case in cases:

            def run(name: str = name, case: tuple[int, ...] = case) -> None:
                channels, pixels, width, size, stride, padding = case
                shapes = (width, channels, size, size), (width,), (width,), (width,)
                parameters = [torch.empty(s, device="meta") for s in shapes]
                dtype = getattr(torch, name)
                x = torch.empty(128, channels, pixels, pixels, dtype=dtype, device="meta")
                settings: dict[str, Any] = {"stride": stride, "padding": padding, "eps": 1e-5}
                y = token_embed.forward(x, *parameters, **settings)
                token_embed.backward(y, x, *parameters, **settings, input_gradient=True)

            yield f"{name} {case}", run


def test_kernels_assemble_for_the_gpus_we_aim_at() -> None:
    reports = aot.in_process(f"{__name__}:calls", 80, 90, EQCVT_AOT="bfloat16")
    assert {r.kernel for r in reports} >= {
        "_token_embed_fwd_kernel",
        "_token_embed_bwd_kernel",
        "_token_embed_bwd_input_kernel",
    }
    for r in reports:
        # Where all weights of a filter are one tile: of all launches the fewest instructions.
        whole = r.capability == 90 and r.kernel == "_token_embed_bwd_kernel"
        assert r.spilled <= (216 if whole else 0), r
