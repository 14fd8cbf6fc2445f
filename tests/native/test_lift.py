"""The native kernels of lift against float64, beside the same-dtype primitives.

EQCVT_ISA picks the instruction set; each has to pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eqcvt.native import lift
from tests.native.lift_case import Case
from tests.ops import primitives
from tests.tolerance import assert_as_good

pytestmark = [pytest.mark.needs("native"), pytest.mark.usefixtures("_nan_in_fresh_memory")]

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def set_threads(patch: pytest.MonkeyPatch, threads: int) -> None:
    """Give the kernels a number of threads, and PyTorch's own, which they stand beside, none."""
    patch.setattr(torch, "get_num_threads", lambda: threads)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def _threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    set_threads(monkeypatch, request.param)


class Inputs(NamedTuple):
    """Tensors of a call."""

    x: Tensor
    bank: Tensor
    mask: Tensor | None
    scale: Tensor
    shift: Tensor
    blur: Tensor | None

    def double(self) -> Inputs:
        return Inputs(*(None if t is None else t.double() for t in self))


CASES = {
    "the model's": Case(2, 1, 31, 31, 10, 4, 7),
    "three channels": Case(1, 3, 19, 37, 10, 4, 7),
    "eight channels": Case(2, 8, 17, 14, 2, 4, 3),
    "a stacked block": Case(2, 12, 15, 15, 3, 4, 5, padding=2, blur=3),
    "a wide stacked block": Case(2, 40, 9, 8, 10, 4, 7, blur=0),
    "the largest group": Case(1, 2, 20, 20, 3, 16, 5, padding=0),
    "the group of order 8": Case(3, 1, 18, 18, 5, 8, 7, padding=3, blur=7),
    "the trivial group": Case(2, 1, 13, 11, 1, 1, 3),
    "group of order 3": Case(2, 1, 13, 11, 7, 3, 3, masked=False),
    "large filters": Case(1, 3, 29, 18, 4, 4, 11, padding=3),
    "filters as large as the image": Case(3, 1, 7, 7, 2, 4, 7, padding=0, blur=0),
    "one pixel of output": Case(3, 1, 7, 7, 2, 4, 5, padding=1, blur=5),
    "more padding than filter": Case(2, 1, 9, 10, 2, 4, 3, padding=3),
    "stride 2": Case(2, 1, 26, 23, 10, 4, 7, stride=2),
    "stride 2, three channels": Case(2, 3, 21, 22, 2, 4, 5, stride=2, padding=0, blur=3),
    "stride 3": Case(2, 1, 31, 29, 2, 2, 7, stride=3, padding=3),
    "a stride beyond the filter": Case(2, 2, 31, 29, 2, 4, 3, stride=5, blur=0),
    "a strided blur": Case(2, 1, 24, 23, 3, 4, 5, blur_stride=2),
    "a blur's stride beyond its size": Case(2, 1, 24, 23, 3, 4, 5, blur=3, blur_stride=5),
    "no blur": Case(2, 3, 17, 17, 2, 4, 5, blur=0),
    "no pooling": Case(2, 1, 17, 17, 3, 4, 5, pool=False),
    "no pooling, all strides": Case(1, 1, 29, 29, 3, 4, 5, stride=2, blur_stride=2, pool=False),
    "one row": Case(2, 1, 1, 40, 3, 4, 3, blur=0),
    "more rows than a band": Case(1, 1, 61, 9, 2, 4, 3, padding=3),
}


def make(case: Case, dtype: torch.dtype = torch.float32) -> Inputs:
    generator = torch.Generator().manual_seed(sum(case))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    parameter = torch.promote_types(dtype, torch.float32)
    c = case
    # Not around zero: sums that cancel are rounding and no more.
    x = (normal(c.batch, c.channels, c.height, c.width) + 0.5).to(dtype)
    bank = normal(c.fields, c.group, c.channels, c.kernel, c.kernel).to(parameter)
    bank /= (c.channels * c.kernel**2) ** 0.5
    mask = normal(c.height, c.width).sigmoid().to(parameter) if c.masked else None
    scale = normal(c.fields).to(parameter)
    # Unlike a Gaussian it has no symmetry that would hide weights taken in the wrong order.
    blur = (torch.arange(c.blur) + 1.0).to(parameter) if c.blur else None
    blur = None if blur is None else blur / blur.sum()
    return Inputs(x, bank, mask, scale, _shift(c, x, bank, mask, scale), blur)


def _shift(case: Case, x: Tensor, bank: Tensor, mask: Tensor | None, scale: Tensor) -> Tensor:
    """Thresholds in a gap between the values: rounding does not decide what ReLU lets pass."""
    mask = None if mask is None else mask.double()
    u = primitives._conv(x.double(), bank.double(), mask, **case.conv)
    z = (u * scale.double().view(-1, 1, 1, 1)).transpose(0, 1).flatten(1).sort(1).values
    z = z[:, z.shape[1] // 4 : max(3 * z.shape[1] // 4, z.shape[1] // 4 + 2)]
    if z.shape[1] < 2:
        return torch.full_like(scale, 0.25)
    at = z.diff().argmax(1, keepdim=True)
    return -(z.gather(1, at) + z.gather(1, at + 1)).squeeze(1).to(scale.dtype) / 2


def across(t: Tensor | None) -> Tensor | None:
    """Images, filters and maps with rows and columns exchanged."""
    return t if t is None or t.dim() < 2 else t.mT.contiguous()


def measure(function: Callable[..., Any], *args: Tensor | None, **options: Any) -> Any:
    """The primitives in the dtype of the call, by which the kernels' errors are judged.

    In float64 these are the exact results too, and rounding shows in another order of the sums.
    """
    if args[0] is not None and args[0].dtype != torch.float64:
        return function(*args, **options)
    found = function(*map(across, args), **options)
    return across(found) if isinstance(found, Tensor) else tuple(map(across, found))


def compare(
    actual: tuple[Tensor, ...],
    exact: tuple[Tensor, ...],
    reference: tuple[Tensor, ...],
    backward: bool = False,
) -> None:
    for a, e, r in zip(actual, exact, reference, strict=True):
        assert a.is_contiguous()
        if e.numel():
            assert_as_good(a, e, r, backward=backward)
        else:
            assert a.shape == e.shape
            assert a.dtype == r.dtype


def check_moments(case: Case, inputs: Inputs, *, correlate: bool) -> None:
    options = {**case.conv, "correlate": correlate}
    actual = lift.moments(*inputs[:3], **options)
    exact = primitives.lift_moments(*inputs.double()[:3], **options)
    compare(actual, exact, measure(primitives.lift_moments, *inputs[:3], **options))


def check_moments_input(case: Case, inputs: Inputs) -> None:
    def arguments(some: Inputs) -> tuple[Tensor | None, ...]:
        return (*some[:3], some.shift, some.scale)

    actual = lift.moments_input(*arguments(inputs), **case.conv)
    exact = primitives.lift_moments_input(*arguments(inputs.double()), **case.conv)
    reference = measure(primitives.lift_moments_input, *arguments(inputs), **case.conv)
    compare((actual,), (exact,), (reference,), backward=True)


def check_apply(case: Case, inputs: Inputs) -> None:
    exact, winner = primitives.lift_apply(*inputs.double(), **case.options)
    reference, _ = measure(primitives.lift_apply, *inputs, **case.options)
    y, arg = lift.apply(*inputs, **case.options)
    compare((y,), (exact,), (reference,))
    assert arg.dtype == torch.uint8
    assert arg.shape == winner.shape
    if case.pool:
        maps, _ = primitives.lift_apply(*inputs.double(), **{**case.options, "pool": False})
        won = maps.gather(2, arg.long().unsqueeze(2)).squeeze(2)
        assert_as_good(won.to(y.dtype), exact, reference)


def check_apply_backward(case: Case, inputs: Inputs, *, input_gradient: bool) -> None:
    y, arg = primitives.lift_apply(*inputs, **case.options)
    dy = (torch.randn(y.shape, generator=torch.Generator().manual_seed(1)) + 0.5).to(y.dtype)
    options = {**case.options, "input_gradient": input_gradient}
    actual = lift.apply_backward(dy, arg, *inputs, **options)
    exact = primitives.lift_apply_backward(dy.double(), arg, *inputs.double(), **options)
    reference = measure(primitives.lift_apply_backward, dy, arg, *inputs, **options)
    compare(actual, exact, reference, backward=True)


def check_all(case: Case, dtype: torch.dtype) -> None:
    inputs = make(case, dtype)
    check_moments(case, inputs, correlate=False)
    check_moments(case, inputs, correlate=True)
    check_moments_input(case, inputs)
    check_apply(case, inputs)
    check_apply_backward(case, inputs, input_gradient=False)
    check_apply_backward(case, inputs, input_gradient=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.usefixtures("_threads")
def test_all_functions_are_as_good_as_pytorch(case: Case, dtype: torch.dtype) -> None:
    check_all(case, dtype)


@settings(max_examples=60)
@given(
    case=st.builds(
        Case,
        batch=st.integers(1, 3),
        channels=st.sampled_from([1, 2, 3, 5, 8]),
        height=st.integers(3, 34),
        width=st.integers(3, 34),
        fields=st.integers(1, 5),
        group=st.sampled_from([1, 2, 4, 5, 8, 16]),
        kernel=st.sampled_from([3, 5, 7, 11]),
        stride=st.integers(1, 3),
        padding=st.integers(0, 3),
        masked=st.booleans(),
        blur=st.sampled_from([0, 3, 5, 7]),
        blur_stride=st.integers(1, 2),
        pool=st.booleans(),
    ).filter(lambda case: case.fits),
    threads=st.integers(1, 3),
)
def test_all_functions_at_any_size(case: Case, threads: int) -> None:
    """In bfloat16, where the primitives' error leaves no room for luck with a single number."""
    with pytest.MonkeyPatch.context() as patch:
        set_threads(patch, threads)
        check_all(case, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["the model's", "stride 2"])
def test_memory_format_and_slices_do_not_matter(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]._replace(channels=3)
    inputs = make(case, dtype)
    x = inputs.x
    wide = torch.zeros(x.shape[0], 5, x.shape[2], x.shape[3] + 3, dtype=dtype)
    wide[:, 1:4, :, 2:-1] = x
    y, arg = lift.apply(*inputs, **case.options)
    dy = torch.ones((), dtype=dtype).expand_as(y)
    options = {**case.options, "input_gradient": True}

    def results(some: Inputs) -> tuple[Tensor, ...]:
        return (
            *lift.moments(*some[:3], **case.conv, correlate=True),
            lift.moments_input(*some[:3], some.scale, some.shift, **case.conv),
            *lift.apply(*some, **case.options),
            *lift.apply_backward(dy, arg, *some, **options),
        )

    expected = results(inputs)
    for other in (x.contiguous(memory_format=torch.channels_last), wide[:, 1:4, :, 2:-1], x.mT.mT):
        found = results(inputs._replace(x=other))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["the model's", "a stacked block", "stride 2"])
@pytest.mark.usefixtures("_threads")
def test_two_runs_agree_to_the_bit(name: str) -> None:
    case = CASES[name]
    inputs = make(case)
    runs = []
    for _ in range(2):
        y, arg = lift.apply(*inputs, **case.options)
        moments = lift.moments(*inputs[:3], **case.conv, correlate=True)
        gradients = lift.apply_backward(y, arg, *inputs, **case.options, input_gradient=True)
        runs.append((y, arg, *moments, *gradients))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("offset", [1e2, 1e4])
@pytest.mark.parametrize("name", ["the model's", "three channels", "stride 2", "no blur"])
def test_moments_keep_their_digits_far_from_zero(
    name: str, offset: float, dtype: torch.dtype
) -> None:
    case = CASES[name]._replace(padding=0, masked=False)
    inputs = make(case, dtype)
    # Filters of sum one: else it is their sums that make the variance.
    filters = inputs.bank.double()
    filters += 1 / filters[0, 0].numel() - filters.mean((2, 3, 4), keepdim=True)
    inputs = inputs._replace(x=inputs.x + offset, bank=filters.to(inputs.bank.dtype))
    check_moments(case, inputs, correlate=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["the model's", "stride 2", "no pooling"])
def test_an_empty_batch_is_empty_or_zero(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    inputs = make(case._replace(batch=1), dtype)
    inputs = inputs._replace(x=inputs.x[:0])
    for moment in lift.moments(*inputs[:3], **case.conv, correlate=True):
        assert (moment == 0).all()
    dx = lift.moments_input(*inputs[:3], inputs.scale, inputs.shift, **case.conv)
    assert dx.shape == inputs.x.shape
    y, arg = lift.apply(*inputs, **case.options)
    assert y.shape == primitives.lift_apply(*inputs, **case.options)[0].shape
    gradients = lift.apply_backward(y, arg, *inputs, **case.options, input_gradient=True)
    assert gradients[3].shape == inputs.x.shape
    for gradient in gradients[:3]:
        assert (gradient == 0).all()


def same_special(actual: Tensor, expected: Tensor) -> bool:
    """Whether NaN and infinities are in the same places."""
    return torch.equal(
        actual.double().nan_to_num(7, 8, 9) * ~actual.isfinite(),
        expected.double().nan_to_num(7, 8, 9) * ~expected.isfinite(),
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [(0, 0), (5, 9), (-1, -1)])
@pytest.mark.parametrize(
    "name",
    [
        *("the model's", "three channels", "stride 2", "a strided blur", "no pooling", "no blur"),
        "stride 2, three channels",  # no window reaches the last column
    ],
)
def test_nan_and_infinity_are_where_pytorch_has_them(
    name: str, where: tuple[int, int], value: float
) -> None:
    case = CASES[name]
    inputs = make(case)
    inputs.x[(-1, -1, *where)] = value
    double = inputs.double()
    for a, e in zip(
        lift.moments(*inputs[:3], **case.conv, correlate=True),
        primitives.lift_moments(*double[:3], **case.conv, correlate=True),
        strict=True,
    ):
        assert same_special(a, e)
    arguments = (inputs.scale, inputs.shift)
    dx = lift.moments_input(*inputs[:3], *arguments, **case.conv)
    arguments = (double.scale, double.shift)
    assert same_special(dx, primitives.lift_moments_input(*double[:3], *arguments, **case.conv))

    y, arg = lift.apply(*inputs, **case.options)
    expected, winner = primitives.lift_apply(*double, **case.options)
    assert same_special(y, expected)
    if case.pool:
        special = ~expected.isfinite()
        assert torch.equal(arg[special], winner[special])
    dy = torch.ones_like(expected)
    options = {**case.options, "input_gradient": True}
    for a, e in zip(
        lift.apply_backward(dy.float(), winner, *inputs, **options),
        primitives.lift_apply_backward(dy, winner, *double, **options),
        strict=True,
    ):
        assert same_special(a, e)


def test_the_first_of_equal_group_elements_wins() -> None:
    case = CASES["the model's"]
    inputs = make(case)
    bank = inputs.bank[:, [1, 0, 1, 0]].contiguous()
    _, arg = lift.apply(*inputs._replace(bank=bank), **case.options)
    assert arg.max() <= 1
    assert arg.unique().numel() == 2


def test_refusals_name_their_reason() -> None:
    def ask(x: Tensor, bank: Tensor) -> str | None:
        return lift.supports(x, bank, None, stride=1, padding=0, blur_stride=1, pool=True)

    x, bank = torch.zeros(1, 1, 9, 9), torch.zeros(2, 4, 1, 3, 3)
    assert ask(x, bank) is None
    assert "float16" in (ask(x.half(), bank) or "")
    assert "17" in (ask(x, torch.zeros(2, 17, 1, 3, 3)) or "")


def test_a_launch_refuses_sizes_that_leave_nothing() -> None:
    case = Case(1, 1, 5, 5, 1, 4, 7, padding=0)
    x, bank = torch.zeros(1, 1, 5, 5), torch.zeros(1, 4, 1, 7, 7)
    with pytest.raises(RuntimeError, match="size"):
        lift.moments(x, bank, None, **case.conv, correlate=True)
