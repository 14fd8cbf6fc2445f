"""The native kernels of token_embed against float64, beside the same-dtype primitives.

EQCVT_ISA picks the instruction set; each has to pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from eqcvt.native import token_embed
from tests.native.threads import threads
from tests.ops import primitives
from tests.tolerance import assert_all_as_good, assert_as_good

pytestmark = [pytest.mark.needs("native"), pytest.mark.usefixtures("_nan_in_fresh_memory")]

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
NAMES = ("dx", "dfilters", "dbias", "dnorm_weight", "dnorm_bias")
EPS = 1e-5


@pytest.fixture(params=[1, 2, 5], ids=["one thread", "two threads", "five threads"])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    with threads(request.param):
        yield


class Case(NamedTuple):
    """Sizes and options of a call."""

    batch: int = 2
    channels: int = 3
    height: int = 13
    width: int = 11
    dim: int = 8
    kernel: int = 3
    stride: int = 1
    padding: int = 1

    @property
    def options(self) -> dict[str, float]:
        return {"stride": self.stride, "padding": self.padding, "eps": EPS}

    @property
    def tokens(self) -> tuple[int, int]:
        height, width = (
            (n + 2 * self.padding - self.kernel) // self.stride + 1
            for n in (self.height, self.width)
        )
        return height, width


class Inputs(NamedTuple):
    """Tensors of a call."""

    dy: Tensor
    x: Tensor
    parameters: list[Tensor]

    def double(self) -> Inputs:
        return Inputs(self.dy.double(), self.x.double(), [p.double() for p in self.parameters])


CASES = {
    "the model's": Case(1, 10, 25, 25, 32, 3, 2, 1),
    "the baseline's": Case(2, 1, 21, 21, 64, 7, 4, 2),
    "one image of few rows": Case(1, 4, 5, 19, 16, 3, 2, 1),
    "stride 1": Case(2, 3, 9, 14, 24, 5, 1, 2),
    "stride 3": Case(2, 2, 16, 13, 40, 5, 3, 2),
    "columns left over": Case(1, 2, 14, 16, 8, 3, 4, 0),
    "pixels that no token sees": Case(2, 3, 14, 11, 8, 1, 4, 0),
    "even filters": Case(2, 5, 10, 8, 9, 2, 2, 0),
    "a stride beyond the filter": Case(1, 2, 13, 17, 5, 2, 3, 1),
    "more padding than filter": Case(1, 2, 5, 6, 4, 1, 1, 3),
    "mostly padding": Case(2, 1, 3, 4, 8, 3, 2, 3),
    "one pixel of output": Case(3, 3, 7, 7, 8, 7, 1, 0),
    "filters larger than the image": Case(2, 2, 4, 3, 13, 7, 2, 3),
    "a row": Case(1, 2, 1, 40, 8, 3, 1, 1),
    "a column": Case(1, 2, 40, 1, 8, 3, 1, 1),
    "a pixel by pixel map": Case(2, 7, 6, 7, 31, 1, 1, 0),
    "many channels": Case(1, 37, 9, 9, 17, 3, 2, 1),
}


def make(case: Case, dtype: torch.dtype = torch.float32) -> Inputs:
    generator = torch.Generator().manual_seed(sum(case))
    parameter = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).double()

    c, d = case, case.dim
    parameters = [
        normal(d, c.channels, c.kernel, c.kernel) / (c.channels * c.kernel**2) ** 0.5,
        normal(d) / 4,
        1 + normal(d) / 4,
        normal(d) / 4,
    ]
    x = normal(c.batch, c.channels, c.height, c.width)
    dy = normal(c.batch, *c.tokens, d)
    # Float32 can hold all of them, so that float64 is given the same numbers.
    parameters = [p.float().to(parameter) for p in parameters]
    return Inputs(dy.to(dtype), x.to(dtype), parameters)


def run(it: Inputs, case: Case) -> list[Tensor]:
    """Return y and all gradients."""
    y = token_embed.forward(it.x, *it.parameters, **case.options)
    options = {**case.options, "input_gradient": True}
    return [y, *token_embed.backward(it.dy, it.x, *it.parameters, **options)]


def check(case: Case, dtype: torch.dtype) -> None:
    it, options = make(case, dtype), case.options
    exact = it.double()
    rough = make(case, torch.float32) if dtype == torch.float64 else it
    assert_all_as_good(
        [token_embed.forward(it.x, *it.parameters, **options)],
        [primitives.token_embed_forward(exact.x, *exact.parameters, **options)],
        [primitives.token_embed_forward(rough.x, *rough.parameters, **options)],
        ("y",),
    )
    options["input_gradient"] = True
    found = token_embed.backward(it.dy, it.x, *it.parameters, **options)
    assert_all_as_good(
        found,
        primitives.token_embed_backward(exact.dy, exact.x, *exact.parameters, **options),
        primitives.token_embed_backward(rough.dy, rough.x, *rough.parameters, **options),
        NAMES,
        backward=True,
    )
    options["input_gradient"] = False
    none, *rest = token_embed.backward(it.dy, it.x, *it.parameters, **options)
    assert none.shape == (0,)
    assert all(torch.equal(r, f) for r, f in zip(rest, found[1:], strict=True))


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_as_good_as_the_primitives(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@settings(max_examples=40)
@given(
    st.integers(1, 3),
    st.integers(1, 10),
    st.tuples(st.integers(5, 25), st.integers(5, 25)),
    st.integers(4, 40),
    st.sampled_from([1, 2, 3, 5, 7]),
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(1, 3),
)
def test_any_sizes(
    batch: int,
    channels: int,
    size: tuple[int, int],
    dim: int,
    kernel: int,
    stride: int,
    padding: int,
    count: int,
) -> None:
    case = Case(batch, channels, *size, dim, kernel, stride, padding)
    assume(min(case.tokens) > 0)
    with threads(count):
        check(case, torch.float32)


def test_sums_over_many_tokens_lose_nothing() -> None:
    """All terms of a sum are equal: it grows far beyond them, and is always rounded one way."""
    case = Case(2, 1, 200, 151, 2, 1, 1, 0)
    it = make(case)
    it = it._replace(dy=torch.full_like(it.dy, 0.1))
    exact = it.double()
    options = {**case.options, "input_gradient": False}
    found = token_embed.backward(it.dy, it.x, *it.parameters, **options)
    wanted = primitives.token_embed_backward(exact.dy, exact.x, *exact.parameters, **options)
    assert_as_good(found[4], wanted[4], wanted[4].float(), backward=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_empty_batch_gives_nothing_and_zeros(dtype: torch.dtype) -> None:
    case = Case(batch=0)
    it = make(case, dtype)
    y, dx, *rest = run(it, case)
    assert y.shape == (0, *case.tokens, case.dim)
    assert dx.shape == it.x.shape
    assert all(torch.equal(g, torch.zeros_like(g)) for g in rest)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_second_run_gives_the_same_bits(dtype: torch.dtype) -> None:
    case = CASES["the model's"]._replace(batch=3)
    it = make(case, dtype)
    assert all(torch.equal(a, b) for a, b in zip(run(it, case), run(it, case), strict=True))


@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_images_do_not_depend_on_the_threads(kernel: int, stride: int) -> None:
    """A thread that begins inside an image makes the rows before its own again."""
    case = Case(1, 3, 33, 20, 8, kernel, stride, kernel // 2)
    it = make(case)
    results = []
    for count in (1, 2, 7):
        with threads(count):
            results.append(run(it, case)[:2])
    for y, dx in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(dx, results[0][1])


def test_inputs_need_not_be_contiguous() -> None:
    case = Case()
    it = make(case)
    x = it.x.contiguous(memory_format=torch.channels_last)
    dy = it.dy.transpose(1, 2).contiguous().transpose(1, 2)
    assert not x.is_contiguous()
    found = run(it._replace(dy=dy, x=x), case)
    assert found[0].is_contiguous()
    assert all(torch.equal(f, e) for f, e in zip(found, run(it, case), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_pixel_that_is_not_finite_breaks_what_sees_it(
    value: float, stride: int, dtype: torch.dtype
) -> None:
    case = Case(1, 2, 16, 14, 8, 3, stride, 1)
    it, options = make(case, dtype), {**case.options, "input_gradient": True}
    it.x[0, 1, 7, 5] = value
    exact = it.double()
    y, *found = run(it, case)
    expected = primitives.token_embed_forward(exact.x, *exact.parameters, **case.options)
    assert torch.equal(torch.isnan(y), torch.isnan(expected))
    wanted = primitives.token_embed_backward(exact.dy, exact.x, *exact.parameters, **options)
    for name, f, w in zip(NAMES, found, wanted, strict=True):
        assert torch.equal(torch.isnan(f), torch.isnan(w)), name


def test_refusals_name_the_reason() -> None:
    filters = torch.zeros(8, 4, 3, 3)
    x = torch.zeros(1, 4, 5, 5)
    assert token_embed.supports(x, filters, padding=1) is None
    reason = token_embed.supports(x.half(), filters, padding=1)
    assert reason == "the native extension has no kernel for torch.float16 on cpu"
    reason = token_embed.supports(torch.zeros(1, 29, 5, 5), torch.zeros(8, 29, 3, 3), padding=1)
    assert reason == "patches of 261 values are faster in plain PyTorch (up to 256 are not)"


def test_filters_beyond_the_image_are_an_error() -> None:
    it = make(Case())
    with pytest.raises(RuntimeError, match="a size is not supported"):
        token_embed.forward(it.x[:, :, :, :2], *it.parameters, stride=4, padding=0, eps=EPS)
