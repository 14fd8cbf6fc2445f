"""The CUDA kernels of lift, run on the host, against float64 and the same-dtype primitives."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from eqcvt.native import lift
from tests.native.cuda_emulator import DTYPES, Emulated, fixture, new
from tests.native.lift_case import Case
from tests.ops import primitives
from tests.tolerance import assert_as_good, double

native = fixture("lift*.cu")


SMALL = Case(2, 3, 17, 13)
CASES = {
    "as published": SMALL._replace(fields=5, kernel=7),
    "smallest": Case(1, 1, 9, 9, 1, 1, 3, padding=0, masked=False, blur=0),
    "strided": Case(1, 2, 19, 23, 13, 4, 5, 2, 2, True, 3, 2, False),
    "many tiles": Case(1, 1, 41, 37, 5, 8, 3),
    "fields in groups": Case(1, 1, 11, 9, 4, 16, 3, blur=7, padding=2),
    "stacked": Case(1, 10, 12, 12, 2, 4, 5, masked=False),
    "widest filter": Case(1, 1, 14, 12, 2, 2, 11, blur=0, padding=3, pool=False),
    "more padding than filter": Case(2, 2, 8, 7, 2, 3, 3, 3, 4, blur=0),
    "stride beyond the filter": Case(1, 1, 17, 14, 2, 2, 3, 4, 0, blur=0),
    "pixels without a tap": Case(1, 1, 3, 3, 2, 2, 1, 2, 0, blur=0),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def _inputs(case: Case, dtype: torch.dtype) -> list[Tensor | None]:
    """x, bank, mask, scale, shift, blur."""
    batch, channels, height, width, fields, group, kernel = case.sizes
    x = torch.randn(batch, channels, height, width).to(dtype)
    bank = torch.randn(fields, group, channels, kernel, kernel) / (channels * kernel**2) ** 0.5
    mask = torch.rand(height, width) if case.masked else None
    scale, shift = torch.rand(fields) + 0.5, torch.randn(fields) / 2
    line = torch.rand(max(case.blur, 1))
    return [x, bank, mask, scale, shift, line / line.sum() if case.blur else None]


def _exact_inputs(case: Case, dtype: torch.dtype) -> list[Tensor | None]:
    """The same, few bits each: every dtype agrees on u and on the sign before the ReLU."""
    x, bank, mask, scale, shift, blur = _inputs(case, torch.float32)
    x, bank = (x * 1.5).round().clamp(-2, 2) / 2, (bank * bank[0, 0].numel() ** 0.5).round() / 4
    mask = None if mask is None else (2 * mask).round() / 2
    return [
        x.to(dtype),
        bank,
        mask,
        2.0 ** (2 * scale - 2).round(),
        (16 * shift).round() / 32 + 1 / 64,
        blur,
    ]


def _moments(native: Emulated, case: Case, x: Tensor, *rest: Tensor | None) -> list[Tensor]:
    fields, group, channels, kernel = *case.sizes[4:6], case.channels, case.kernel
    taps = (channels, kernel, kernel)
    shapes = [(fields,), (fields,), (fields, group, *taps), taps]
    found = [new(shape, torch.float32) for shape in shapes]
    conv = [case.stride, case.padding]
    native.launch("lift_moments", x, *rest, *case.sizes, *conv, True, *found, like=x)
    return found


def _apply(native: Emulated, case: Case, *args: Tensor | None) -> tuple[Tensor, Tensor]:
    x = args[0]
    assert x is not None
    shape = primitives.lift_apply(*args, **case.options)[0].shape
    y, arg = new(shape, x.dtype), torch.full(shape if case.pool else (0,), 77, dtype=torch.uint8)
    native.launch("lift_apply", *args, *case.blurred_sizes, y, arg if case.pool else None, like=x)
    return y, arg


def _backward(
    native: Emulated, case: Case, dy: Tensor, arg: Tensor | None, *args: Tensor | None, dx: bool
) -> list[Tensor]:
    x, bank, _, scale, shift, _ = args
    like = [bank, scale, shift, *([x] if dx else [])]
    found = [new(t.shape, t.dtype) for t in like if t is not None]
    sizes = [*case.blurred_sizes, dx]
    outputs = [*found, *([] if dx else [None])]
    native.launch("lift_apply_backward", dy, arg, *args, *sizes, *outputs, like=dy)
    return found


@cases
@dtypes
def test_apply(native: Emulated, case: Case, dtype: torch.dtype) -> None:
    args = _inputs(case, dtype)
    y, arg = _apply(native, case, *args)
    exact = primitives.lift_apply(*double(args), **case.options)[0]
    reference = primitives.lift_apply(*args, **case.options)[0]
    assert_as_good(y, exact, reference)
    if case.pool:
        every = primitives.lift_apply(*double(args), **{**case.options, "pool": False})[0]
        chosen = every.gather(2, arg.long().unsqueeze(2)).squeeze(2)
        assert_as_good(chosen.to(dtype), exact, reference)
        assert (arg[every.amax(2) == 0] == 0).all(), "the first of equals wins"


@cases
@dtypes
def test_moments(native: Emulated, case: Case, dtype: torch.dtype) -> None:
    args = _exact_inputs(case, dtype)[:3]
    found = _moments(native, case, *args)
    exact = primitives.lift_moments(*double(args), **case.conv, correlate=True)
    reference = primitives.lift_moments(*args, **case.conv, correlate=True)
    for a, e, r in zip(found, exact, reference, strict=True):
        assert_as_good(a, e, r.float())


@cases
@dtypes
def test_moments_input(native: Emulated, case: Case, dtype: torch.dtype) -> None:
    x, bank, mask = _inputs(case, dtype)[:3]
    assert x is not None
    c = torch.randn(2, case.fields).unbind()
    dx = new(x.shape, dtype)
    conv = [case.stride, case.padding]
    native.launch("lift_moments_input", x, bank, mask, *c, *case.sizes, *conv, dx, like=x)
    exact = primitives.lift_moments_input(*double([x, bank, mask, *c]), **case.conv)
    reference = primitives.lift_moments_input(x, bank, mask, *c, **case.conv)
    assert_as_good(dx, exact, reference, backward=True)


def _by_fields(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Put dscale and dshift together: the largest error of a few sums says little."""
    dbank, dscale, dshift, *dx = gradients
    return [dbank, torch.cat([dscale, dshift]), *dx]


@cases
@dtypes
@pytest.mark.parametrize("input_gradient", [True, False])
def test_apply_backward(
    native: Emulated, case: Case, dtype: torch.dtype, input_gradient: bool
) -> None:
    args = _exact_inputs(case, dtype)
    y, arg = primitives.lift_apply(*double(args), **case.options)
    dy = torch.randn(y.shape).to(dtype)
    options = {**case.options, "input_gradient": True}
    exact = primitives.lift_apply_backward(dy.double(), arg, *double(args), **options)
    reference = primitives.lift_apply_backward(dy, arg, *args, **options)
    given = arg if case.pool else None
    found = _backward(native, case, dy, given, *args, dx=input_gradient)
    for a, e, r in zip(*map(_by_fields, [found, exact, reference]), strict=False):
        assert_as_good(a, e, r.to(a.dtype), backward=True)


def test_statistics_hold_far_from_zero(native: Emulated) -> None:
    case = SMALL._replace(height=33, width=30, masked=False)
    x, bank, mask = _inputs(case, torch.float32)[:3]
    assert x is not None
    assert bank is not None
    bank = bank.abs()
    mean, variance, _, _ = _moments(native, case, x + 1000, bank, mask)
    exact = primitives.lift_moments(*double([x + 1000, bank, mask]), **case.conv, correlate=False)
    torch.testing.assert_close(mean.double(), exact[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), exact[1], rtol=1e-5, atol=0)


@dtypes
def test_empty_batch(native: Emulated, dtype: torch.dtype) -> None:
    case = SMALL._replace(batch=0)
    args = _inputs(case, dtype)
    mean, variance, ux, ones = _moments(native, case, *args[:3])
    assert torch.stack([mean, variance]).isnan().all()
    assert not ux.any()
    assert not ones.any()
    y, arg = _apply(native, case, *args)
    dbank, dscale, dshift, dx = _backward(native, case, y, arg, *args, dx=True)
    assert not dbank.any()
    assert not torch.stack([dscale, dshift]).any()
    assert len(dx) == 0


def _same_kind(found: Tensor, expected: Tensor) -> None:
    """Check that NaN and infinities are where they should be."""
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())


@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [(0, 12), (8, 6), (16, 0)])
def test_nan_and_infinity_go_where_they_should(
    native: Emulated, dtype: torch.dtype, value: float, at: tuple[int, int]
) -> None:
    case = SMALL._replace(batch=1, channels=1, kernel=3, blur=3, padding=0, masked=False)
    args = _inputs(case, dtype)
    x = args[0]
    assert x is not None
    x[0, 0, at[0], at[1]] = value
    # The primitives' own bf16 convolution of the CPU spreads a NaN beyond its filter.
    wide = [None if t is None else t.float() for t in args]
    y, arg = primitives.lift_apply(*wide, **case.options)
    _same_kind(_apply(native, case, *args)[0], y)
    expected = primitives.lift_moments(*wide[:3], **case.conv, correlate=True)
    for f, e in zip(_moments(native, case, *args[:3]), expected, strict=True):
        assert torch.equal(f.isfinite(), e.isfinite())
    dy = torch.randn(y.shape)
    options = {**case.options, "input_gradient": True}
    expected = primitives.lift_apply_backward(dy, arg, *wide, **options)
    found = _backward(native, case, dy.to(dtype), arg, *args, dx=True)
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f.isfinite(), e.isfinite())


@dtypes
def test_the_first_nan_of_a_group_wins(native: Emulated, dtype: torch.dtype) -> None:
    case = SMALL
    args = _inputs(case, dtype)
    bank = args[1]
    assert bank is not None
    bank[1, [1, 3]] = float("nan")
    y, arg = _apply(native, case, *args)
    assert y[:, 1].isnan().all()
    assert (arg[:, 1] == 1).all()
    assert y[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["many tiles", "stacked"])
def test_no_order_of_threads_and_blocks_matters(
    native: Emulated, name: str, dtype: torch.dtype
) -> None:
    case = CASES[name]
    args = _inputs(case, dtype)

    def run() -> list[Tensor]:
        y, arg = _apply(native, case, *args)
        moments = _moments(native, case, *args[:3])
        return [y, *moments, *_backward(native, case, y, arg, *args, dx=True)]

    native.in_any_order(run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kilobytes", [48, 26])
def test_little_shared_memory_means_smaller_tiles(
    native: Emulated, dtype: torch.dtype, kilobytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EQCVT_EMULATE_SHARED", str(kilobytes * 1024))
    case = SMALL._replace(channels=5, kernel=3)
    test_apply(native, case, dtype)
    test_moments(native, case, dtype)
    test_moments_input(native, case, dtype)
    test_apply_backward(native, case, dtype, True)


def test_what_does_not_fit_is_refused(native: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    case = SMALL
    args = _inputs(case, torch.float32)
    monkeypatch.setenv("EQCVT_EMULATE_SHARED", "4096")
    with pytest.raises(AssertionError, match="status -3"):
        _apply(native, case, *args)
    with pytest.raises(AssertionError, match="status -3"):
        _moments(native, case, *args[:3])


@pytest.mark.parametrize(
    ("kernel", "blur", "stride", "taken"),
    [
        *((7, 13, 1, True), (9, 13, 3, True), (13, 9, 1, True)),
        *((11, 13, 1, False), (7, 15, 1, False), (7, 13, 4, False), (3, 9, 8, False)),
    ],
)
def test_blurs_that_no_tile_takes_are_refused(
    native: Emulated,
    monkeypatch: pytest.MonkeyPatch,
    kernel: int,
    blur: int,
    stride: int,
    taken: bool,
) -> None:
    """What is taken fits into the smallest shared memory, with as many filters as a block has."""
    with FakeTensorMode():
        x, bank = torch.empty(1, 1, 40, 40, device="cuda"), torch.empty(3, 16, 1, kernel, kernel)
        options = {"stride": 1, "padding": 1, "blur_stride": stride, "pool": True}
        reason = lift.supports(x, bank, torch.empty(blur), **options)
    assert (reason is None) == taken
    if taken:
        monkeypatch.setenv("EQCVT_EMULATE_SHARED", str(99 * 1024))
        case = Case(1, 1, 30, 27, 3, 16, kernel, 1, 1, True, blur, stride)
        test_apply(native, case, torch.float32)


def test_images_beyond_32_bit_offsets_are_refused() -> None:
    with FakeTensorMode():
        bank = torch.empty(10, 4, 3, 7, 7)
        reasons = [
            lift.supports(
                torch.empty(1, 3, size, size, device="cuda"),
                bank,
                None,
                stride=1,
                padding=1,
                blur_stride=1,
                pool=True,
            )
            for size in (129, 7300, 7400)
        ]
    assert reasons[:2] == [None, None]
    assert reasons[2] == "images of 7400x7400 pixels are too large for 32-bit offsets"
