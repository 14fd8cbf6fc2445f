"""The Triton kernels of the steerable block against PyTorch in float64, in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from eqcvt import ops
from tests.ops import primitives
from tests.tolerance import assert_all_as_good, assert_as_good

pytest.importorskip("triton")
from eqcvt.kernels import launches, lift, lift_tile
from tests.kernels.memory import filled_memory

pytestmark = pytest.mark.needs("interpreter")
DTYPES = (torch.float32, torch.float16)


class Case:
    """Tensors and settings of one call, in float64, whose values float16 holds exactly."""

    def __init__(
        self,
        batch: int = 2,
        channels: int = 3,
        height: int = 11,
        width: int = 12,
        fields: int = 2,
        order: int = 4,
        kernel: int = 3,
        stride: int = 1,
        padding: int = 1,
        taps: int | None = 3,
        blur_stride: int = 1,
        pool: bool = True,
        masked: bool = True,
    ) -> None:
        self.x = _coarse(batch, channels, height, width)
        self.bank = _coarse(fields, order, channels, kernel, kernel) / 4
        self.mask = torch.randint(0, 5, (height, width)).double() / 4 if masked else None
        self.scale = torch.rand(fields, dtype=torch.float64) + 0.5
        self.shift = torch.randn(fields, dtype=torch.float64)
        self.blur = None if taps is None else torch.randn(taps).double().softmax(0)
        self.conv = {"stride": stride, "padding": padding}
        self.block = self.conv | {"blur_stride": blur_stride, "pool": pool}

    def moments(
        self, module: Any, dtype: torch.dtype, correlate: bool = True
    ) -> tuple[Tensor, ...]:
        x, bank, mask = self._in(dtype)
        name = module.moments if module is not primitives else primitives.lift_moments
        return name(x, bank, mask, correlate=correlate, **self.conv)

    def moments_input(self, module: Any, dtype: torch.dtype) -> Tensor:
        name = module.moments_input if module is not primitives else primitives.lift_moments_input
        c1, c2 = (_parameter(t, dtype) for t in (self.shift, self.scale))
        return name(*self._in(dtype), c1, c2, **self.conv)

    def apply(self, module: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        name = module.apply if module is not primitives else primitives.lift_apply
        return name(*self._in(dtype), *self._affine(dtype), **self.block)

    def backward(
        self, module: Any, dtype: torch.dtype, dy: Tensor, arg: Tensor, input_gradient: bool
    ) -> tuple[Tensor, ...]:
        name = module.apply_backward if module is not primitives else primitives.lift_apply_backward
        return name(
            dy.to(dtype),
            arg,
            *self._in(dtype),
            *self._affine(dtype),
            input_gradient=input_gradient,
            **self.block,
        )

    def _in(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        mask = None if self.mask is None else _parameter(self.mask, dtype)
        return self.x.to(dtype), _parameter(self.bank, dtype), mask

    def _affine(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        blur = None if self.blur is None else _parameter(self.blur, dtype)
        return _parameter(self.scale, dtype), _parameter(self.shift, dtype), blur


def _coarse(*shape: int) -> Tensor:
    return torch.randint(-4, 5, shape).double() / 4


def _parameter(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if dtype == torch.float64 else t.float()


CASES: dict[str, dict[str, Any]] = {
    "model": {"channels": 1, "kernel": 7, "height": 12, "width": 11, "taps": 5, "batch": 1},
    "three channels": {"fields": 10, "height": 6, "width": 9, "batch": 1},
    "stacked": {"channels": 8, "kernel": 5, "padding": 2, "height": 5, "width": 7, "batch": 1},
    "strided": {"stride": 2, "padding": 0, "blur_stride": 2, "height": 16, "width": 13},
    "wide filters": {
        "channels": 1,
        "kernel": 11,
        "padding": 3,
        "order": 1,
        "height": 7,
        "width": 8,
    },
    "no blur, no mask": {"taps": None, "masked": False, "order": 8, "fields": 3, "height": 5},
    "no pool": {"pool": False, "order": 3, "batch": 1, "channels": 2, "padding": 3},
    "many filters": {"fields": 5, "order": 16, "channels": 1, "height": 5, "width": 5, "batch": 1},
    "one pixel": {"height": 3, "width": 3, "batch": 1},
    "columns": {"channels": 1, "height": 3, "width": 71, "order": 2, "fields": 1, "taps": None},
}


@pytest.fixture
def tile(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run with all taps in one tile, or with the taps in blocks."""
    limits = {"TAPS": 512 if request.param == "one tile" else 16, "CHUNK": 32}
    plans = {k: v | limits for k, v in launches.table().items() if "lift_plan" in k}
    with launches.installed(plans):
        yield request.param


tiles = pytest.mark.parametrize("tile", ["one tile", "blocks of taps"], indirect=True)
one_tile = pytest.mark.parametrize("tile", ["one tile"], indirect=True)


def _check(case: Case, dtype: torch.dtype, input_gradient: bool) -> None:
    exact, reference, actual = (
        case.moments(module, d)
        for module, d in ((primitives, torch.float64), (primitives, dtype), (lift, dtype))
    )
    assert_all_as_good(actual, exact, reference)
    y, arg = case.apply(lift, dtype)
    exact_y, exact_arg = case.apply(primitives, torch.float64)
    reference_y, _ = case.apply(primitives, dtype)
    assert_as_good(y, exact_y, reference_y)
    if dtype == torch.float32:
        assert torch.equal(arg, exact_arg)
    elif case.block["pool"]:  # near ties may fall either way
        case.block["pool"] = False
        taken = case.apply(primitives, torch.float64)[0].gather(2, arg.long().unsqueeze(2))
        case.block["pool"] = True
        assert_as_good(taken.squeeze(2).to(dtype), exact_y, reference_y)
    dy = torch.randn(y.shape, dtype=torch.float64).to(dtype).double()
    actual, exact, reference = (
        case.backward(module, d, dy, arg, input_gradient)
        for module, d in ((lift, dtype), (primitives, torch.float64), (primitives, dtype))
    )
    for triple in list(zip(actual, exact, reference, strict=True))[: 3 + input_gradient]:
        assert_as_good(*triple, backward=True)
    assert actual[3].shape == (case.x.shape if input_gradient else (0,))


@tiles
@pytest.mark.parametrize("name", CASES)
def test_every_result_is_as_good_as_pytorch_s(name: str, tile: str) -> None:
    _check(Case(**CASES[name]), torch.float32, input_gradient=tile == "blocks of taps")


@one_tile
@pytest.mark.parametrize("name", ["three channels", "strided"])
def test_half_precision_is_as_good_as_pytorch_s(name: str, tile: str) -> None:
    _check(Case(**CASES[name]), torch.float16, input_gradient=name == "strided")


@one_tile
@pytest.mark.parametrize("name", ["stacked", "strided", "no blur, no mask"])
def test_gradient_of_the_statistics_is_as_good_as_pytorch_s(name: str, tile: str) -> None:
    case = Case(**CASES[name])
    exact = case.moments_input(primitives, torch.float64)
    reference = case.moments_input(primitives, torch.float32)
    assert_as_good(case.moments_input(lift, torch.float32), exact, reference, backward=True)


def test_factors_of_tf32_products_are_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix unit cuts them instead, which makes every product smaller."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    case = Case(taps=None)
    case.x, case.bank = torch.rand(case.x.shape).double(), torch.rand(case.bank.shape).double()
    found = lift.moments(*case._in(torch.float32), correlate=True, **case.conv)
    x, bank, mask = case._in(torch.float32)
    near = [_tf32(t) for t in (x * mask, bank)]
    expected = primitives.lift_moments(near[0], near[1], None, correlate=True, **case.conv)
    for mine, same in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(mine, same, rtol=2e-6, atol=0)
    affine = case._affine(torch.float32)
    y, _ = lift.apply(*case._in(torch.float32), *affine, **case.block)
    same, _ = primitives.lift_apply(near[0], near[1], None, *affine, **case.block)
    torch.testing.assert_close(y, same, rtol=2e-5, atol=2e-6)
    case.x[0, 0, 3, 3] = float("nan")
    assert lift.moments(*case._in(torch.float32), correlate=True, **case.conv)[0].isnan().all()


@pytest.mark.parametrize("allowed", [True, False])
def test_halves_come_nearer_than_tf32_and_leave_float32_alone(
    allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    case = Case(height=9, width=20, taps=None, masked=False, padding=0)
    case.x, case.bank = (_tf32(torch.rand(t.shape).float()).double() for t in (case.x, case.bank))
    dy = torch.randn(2, 2, 7, 18, dtype=torch.float64)
    arg = torch.zeros(dy.shape, dtype=torch.uint8)

    def gradient(module: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return case.backward(module, dtype, dy, arg, False)[0]

    products, exact = (
        [],
        (case.moments(primitives, torch.float64)[2], gradient(primitives, torch.float64)),
    )
    for halves in (0, 1):
        entries = {
            key: launch | {"HALVES": halves}
            for key, launch in launches.table().items()
            if " lift_sums 32 " in key
        }
        with launches.installed(entries):
            products.append((case.moments(lift, torch.float32)[2], gradient(lift)))
    for whole, made, right in zip(*products, exact, strict=True):
        if allowed:
            errors = [(t - right).abs().max() / right.abs().max() for t in (whole, made)]
            assert errors[1] < min(errors[0] / 2, 2**-15)
        else:
            assert torch.equal(made, whole)


def _tf32(t: Tensor) -> Tensor:
    """Return the nearest numbers of 10 bits behind the leading one."""
    mantissa, exponent = torch.frexp(t)
    return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


def test_statistics_keep_a_small_variance_beside_a_large_mean() -> None:
    case = Case(masked=False, padding=0)
    case.x = case.x / 1024 + 4
    case.bank = case.bank.abs()[:, :1].expand(-1, 4, -1, -1, -1).contiguous()
    exact = case.moments(primitives, torch.float64, correlate=False)
    mean, variance, *empty = case.moments(lift, torch.float32, correlate=False)
    assert [t.numel() for t in empty] == [0, 0]
    assert_as_good(mean, exact[0], exact[0].float())
    assert exact[1].max() < 1e-5 * exact[0].square().min()
    torch.testing.assert_close(variance.double(), exact[1], rtol=1e-3, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value")
@tiles
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_reaches_what_it_reaches_in_pytorch(value: float, tile: str) -> None:
    case = Case(height=12, width=9, fields=1, channels=1, taps=3)
    case.x[0, 0, 6, 4] = value
    y, arg = case.apply(lift, torch.float32)
    expected, expected_arg = case.apply(primitives, torch.float64)
    assert not expected.isfinite().all()
    assert expected[1].isfinite().all()
    torch.testing.assert_close(y, expected.float(), equal_nan=True, atol=1e-5, rtol=1e-5)
    assert torch.equal(arg, expected_arg)
    mean, variance, _, _ = case.moments(lift, torch.float32)
    assert not mean.isfinite().any()
    assert variance.isnan().all()


def test_what_a_stride_leaves_over_is_not_seen() -> None:
    case = Case(stride=2, padding=0, height=12, width=12, fields=1, channels=1, batch=1)
    used = case.moments(lift, torch.float32) + case.apply(lift, torch.float32)
    case.x[..., 11, :] = case.x[..., 11] = float("nan")
    found = case.moments(lift, torch.float32) + case.apply(lift, torch.float32)
    for a, b in zip(found, used, strict=True):
        assert torch.equal(a, b)


def test_a_blur_of_one_pixel_weighs_it() -> None:
    case = Case(taps=1, height=5, width=5, channels=1, batch=1)
    y, arg = case.apply(lift, torch.float32)
    dy = torch.ones(y.shape, dtype=torch.float64)
    whole = case.backward(lift, torch.float32, dy, arg, False)[0]
    case.blur = torch.tensor([0.5], dtype=torch.float64)
    assert torch.equal(case.apply(lift, torch.float32)[0], y / 4)
    gradient = case.backward(lift, torch.float32, dy, arg, False)[0]
    torch.testing.assert_close(gradient, whole / 4)


def test_the_default_dtype_changes_nothing() -> None:
    case = Case(height=4, width=5, channels=1, batch=1)
    expected = case.moments(lift, torch.float32)
    torch.set_default_dtype(torch.float64)
    try:
        found = case.moments(lift, torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_any_strides_give_the_same() -> None:
    case = Case(height=6, width=7, batch=2)
    y, _ = case.apply(lift, torch.float32)
    wide = torch.zeros(2, 5, 6, 20, dtype=torch.float64)
    wide[:, 1:4, :, 9:16] = case.x
    x = case.x
    for other in (
        x.to(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        wide[:, 1:4, :, 9:16],
    ):
        assert not other.is_contiguous()
        case.x = other
        assert torch.equal(case.apply(lift, torch.float32)[0], y)
    dy = torch.ones(1, dtype=torch.float64).expand(y.shape)
    arg = torch.zeros(y.shape, dtype=torch.uint8)
    gradients = [case.backward(lift, torch.float32, t, arg, False) for t in (dy, dy.clone())]
    assert torch.equal(gradients[0][0], gradients[1][0])


def test_batches_in_parts_and_second_runs_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case(batch=3, height=4, width=5, channels=1)
    dy = torch.randn(3, 2, 2, 3, dtype=torch.float64)

    def run() -> list[Tensor]:
        y, arg = case.apply(lift, torch.float32)
        moments = case.moments(lift, torch.float32)
        gradients = case.backward(lift, torch.float32, dy, arg, True)
        return [y, arg, *moments, *gradients]

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    monkeypatch.setattr(lift_tile, "WORKSPACE", 1)
    for whole, parts in zip(first, run(), strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


def test_every_element_is_written() -> None:
    case = Case(height=5, width=6, channels=1)
    dy = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    expected = [*case.moments(lift, torch.float32), *case.apply(lift, torch.float32)]
    expected += case.backward(lift, torch.float32, dy, expected[-1], True)
    with filled_memory():
        found = [*case.moments(lift, torch.float32), *case.apply(lift, torch.float32)]
        found += case.backward(lift, torch.float32, dy, expected[5], True)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_an_empty_batch_gives_empty_results() -> None:
    case = Case(batch=0)
    mean, variance, ux, ones = case.moments(lift, torch.float32)
    assert not any(t.any() for t in (mean, variance, ux, ones))
    assert (ux.shape, ones.shape) == (case.bank.shape, (3, 3, 3))
    y, arg = case.apply(lift, torch.float32)
    assert y.shape == arg.shape == (0, 2, 9, 10)
    assert case.moments_input(lift, torch.float32).shape == case.x.shape
    dbank, dscale, dshift, dx = case.backward(lift, torch.float32, y.double(), arg, True)
    assert not any(t.any() for t in (dbank, dscale, dshift))
    assert dx.shape == case.x.shape


def test_parameters_of_half_precision_are_taken() -> None:
    case = Case()
    x, bank, field = case.x.half(), case.bank.half(), torch.rand(2).half()
    results = []
    for wide in (bank.float(), bank):
        weights = [t.clone().requires_grad_() for t in (wide, field.to(wide), field.to(wide))]
        y, mean, _ = ops.lift(x, *weights, None, None, None, **case.block, backend="triton")
        assert mean is not None
        y.float().square().sum().backward()
        results.append([y.detach(), mean, *(w.grad for w in weights)])
    for of_wide, of_half in zip(*results, strict=True):
        assert torch.equal(of_wide.half(), of_half.half())


@pytest.mark.parametrize(
    ("settings", "dtype", "reason"),
    [
        ({}, torch.float64, "takes float32, float16 and bfloat16, not float64"),
        ({"order": 17}, torch.float32, "takes groups of up to 16 elements, not 17"),
        ({"kernel": 4}, torch.float32, "takes filters of odd size up to 11, not 4"),
        ({"kernel": 13, "height": 16, "width": 16}, torch.float32, "up to 11, not 13"),
        ({"taps": 4}, torch.float32, "takes a blur of odd size up to 9, not 4"),
        ({"taps": 11}, torch.float32, "takes a blur of odd size up to 9, not 11"),
    ],
)
def test_refusals_say_why(settings: dict[str, int], dtype: torch.dtype, reason: str) -> None:
    case = Case(**settings)
    why = lift.supports(case.x.to(dtype), case.bank.float(), case.blur, **case.block)
    assert why is not None
    assert reason in why


def test_what_the_tests_run_is_supported() -> None:
    for settings in CASES.values():
        case = Case(**settings)
        assert lift.supports(case.x.float(), case.bank.float(), case.blur, **case.block) is None
    why = lift.supports(case.x.float(), case.bank, case.blur, **case.block)
    assert why == "takes no filters of float64"
    x = torch.empty(1, 40, 1, 1).expand(1, 40, 10000, 10000)
    why = lift.supports(x, torch.empty(1, 4, 40, 3, 3), None, **Case().block)
    assert why == "images of 10000x10000 pixels are too large for 32-bit offsets"
    # A row that a tile's end makes twice as long.
    x = torch.empty(1, 64, 1, 1).expand(1, 64, 196_000, 134)
    why = lift.supports(x, torch.empty(2, 4, 64, 3, 3), None, **Case().block)
    assert why == "images of 196000x134 pixels are too large for 32-bit offsets"
