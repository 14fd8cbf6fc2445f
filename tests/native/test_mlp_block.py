"""The native kernels of mlp_block against float64, beside the same-dtype primitives.

EQCVT_ISA picks the instruction set; each has to pass.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eqcvt.native import mlp_block
from tests.native.threads import threads
from tests.ops import primitives
from tests.tolerance import assert_all_as_good, assert_as_good

pytestmark = [pytest.mark.needs("native"), pytest.mark.usefixtures("_nan_in_fresh_memory")]

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
NAMES = ("dx", "dnorm_weight", "dnorm_bias", "dw1", "db1", "dw2", "db2")
EPS = 1e-5


class Case(NamedTuple):
    """Sizes and options of a call."""

    batch: int
    tokens: int
    dim: int
    hidden: int
    dropout: float = 0.1


class Inputs(NamedTuple):
    """Tensors of a call."""

    dy: Tensor
    x: Tensor
    parameters: list[Tensor]
    seed: Tensor

    def double(self) -> Inputs:
        parameters = [p.double() for p in self.parameters]
        return Inputs(self.dy.double(), self.x.double(), parameters, self.seed)


CASES = {
    "the model's": Case(2, 61, 32, 64),
    "no dropout": Case(2, 37, 32, 64, 0.0),
    "half dropped": Case(3, 29, 24, 40, 0.5),
    "all but dropped": Case(1, 97, 32, 64, 1 - 2**-20),
    "one token": Case(1, 1, 16, 32),
    "one whole tile": Case(1, 48, 8, 16),
    "a tile and a token": Case(1, 49, 40, 16),
    "fewer tokens than threads": Case(1, 1, 8, 8, 0.0),
    "narrow": Case(1, 31, 2, 5),
    "odd widths": Case(3, 17, 13, 29),
    "widths beyond blocks": Case(1, 50, 64, 131),
    "wider than a tile": Case(1, 19, 97, 67),
}


def make(case: Case, dtype: torch.dtype = torch.float32) -> Inputs:
    generator = torch.Generator().manual_seed(case.tokens)
    parameter = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).double()

    b, n, d, e, _ = case
    parameters = [
        1 + normal(d) / 4,
        normal(d) / 4,
        normal(e, d) / d**0.5,
        normal(e) / 4,
        normal(d, e) / e**0.5,
        normal(d) / 4,
    ]
    x, dy = (normal(b, n, d).to(dtype) for _ in range(2))
    return Inputs(dy, x, [p.to(parameter) for p in parameters], torch.tensor([2**40 + 12345]))


def run(it: Inputs, dropout: float = 0.1) -> list[Tensor]:
    """Return y and all gradients."""
    options = {"dropout": dropout, "eps": EPS}
    y = mlp_block.forward(it.x, *it.parameters, it.seed, **options)
    return [y, *mlp_block.backward(it.dy, it.x, *it.parameters, it.seed, **options)]


def check(case: Case, dtype: torch.dtype) -> None:
    it = make(case, dtype)
    exact = it.double()
    rough = make(case, torch.float32) if dtype == torch.float64 else it
    options = {"dropout": case.dropout, "eps": EPS}
    assert_all_as_good(
        [mlp_block.forward(it.x, *it.parameters, it.seed, **options)],
        [primitives.mlp_block_forward(exact.x, *exact.parameters, it.seed, **options)],
        [primitives.mlp_block_forward(rough.x, *rough.parameters, it.seed, **options)],
        ("y",),
    )
    assert_all_as_good(
        mlp_block.backward(it.dy, it.x, *it.parameters, it.seed, **options),
        primitives.mlp_block_backward(exact.dy, exact.x, *exact.parameters, it.seed, **options),
        primitives.mlp_block_backward(rough.dy, rough.x, *rough.parameters, it.seed, **options),
        NAMES,
        backward=True,
    )


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_as_good_as_the_primitives(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@settings(max_examples=40)
@given(
    st.integers(1, 3),
    st.integers(10, 60),
    st.integers(4, 70),
    st.integers(4, 70),
    st.sampled_from([0.0, 0.1, 0.7]),
)
def test_any_sizes(batch: int, tokens: int, dim: int, hidden: int, dropout: float) -> None:
    check(Case(batch, tokens, dim, hidden, dropout), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_many_tokens_lose_nothing(dtype: torch.dtype) -> None:
    """All terms of a sum have one sign, so that it grows far beyond them."""
    case = Case(1, 50_000, 4, 4, 0.0)
    it = make(case, dtype)
    it = it._replace(dy=it.dy.abs() + 1, x=it.x.abs())
    exact = it.double()
    found = mlp_block.backward(it.dy, it.x, *it.parameters, it.seed, dropout=0.0, eps=EPS)
    wanted = primitives.mlp_block_backward(
        exact.dy, exact.x, *exact.parameters, it.seed, dropout=0.0, eps=EPS
    )
    for f, w in zip(found[1:], wanted[1:], strict=True):
        assert_as_good(f, w, w.to(f.dtype), backward=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_nothing_in_gives_nothing_and_zeros(shape: tuple[int, int], dtype: torch.dtype) -> None:
    it = make(Case(*shape, 12, 9), dtype)
    y, dx, *rest = run(it)
    assert y.shape == dx.shape == it.x.shape
    assert all(torch.equal(g, torch.zeros_like(g)) for g in rest)


def test_one_channel_is_its_own_mean() -> None:
    it = make(Case(2, 9, 1, 8, 0.0))
    y, dx, dnorm_weight, *_ = run(it, dropout=0.0)
    expected = primitives.mlp_block_forward(it.x, *it.parameters, it.seed, dropout=0.0, eps=EPS)
    torch.testing.assert_close(y, expected)
    assert torch.equal(dx, it.dy)  # the norm's output is constant
    assert torch.equal(dnorm_weight, torch.zeros(1))


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_second_run_gives_the_same_bits(dtype: torch.dtype) -> None:
    it = make(Case(2, 333, 32, 64), dtype)
    assert all(torch.equal(a, b) for a, b in zip(run(it), run(it), strict=True))


def test_tokens_do_not_depend_on_the_threads() -> None:
    it = make(Case(1, 333, 32, 64))
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(torch.stack(run(it)[:2]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_inputs_need_not_be_contiguous() -> None:
    it = make(Case(2, 20, 8, 16))
    x, dy = (t.permute(2, 0, 1).contiguous().permute(1, 2, 0) for t in (it.x, it.dy))
    assert not x.is_contiguous()
    found = run(it._replace(dy=dy, x=x))
    assert found[0].is_contiguous()
    assert all(torch.equal(f, e) for f, e in zip(found, run(it), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_token_that_is_not_finite_stays_alone(value: float, dtype: torch.dtype) -> None:
    it = make(Case(1, 60, 12, 20, 0.0), dtype)
    it.x[0, 17, 5] = value
    y, dx, *rest = run(it, dropout=0.0)
    for t in (y, dx):
        broken = torch.isnan(t[0]).all(1)
        assert broken.nonzero().flatten().tolist() == [17]
        assert torch.isfinite(t[0, ~broken]).all()
    expected = primitives.mlp_block_backward(
        it.dy, it.x, *it.parameters, it.seed, dropout=0.0, eps=EPS
    )
    for g, e in zip(rest, expected[1:], strict=True):
        assert torch.equal(torch.isnan(g), torch.isnan(e))


VALUES = [0.0, 1e30, -1e30, 60.0, -60.0, 5.0, -5.0, float("inf"), -float("inf"), float("nan")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", VALUES)
def test_gelu_of_large_values_and_its_derivative_are_float64_s(
    value: float, dtype: torch.dtype
) -> None:
    """Float64, since torch's vectorised GELU of infinity is NaN in float32."""
    it = make(Case(1, 3, 4, 1, 0.0), dtype)
    it.parameters[2].zero_()
    it.parameters[3].fill_(value)
    exact, options = it.double(), {"dropout": 0.0, "eps": EPS}
    y, *gradients = run(it, dropout=0.0)
    expected = primitives.mlp_block_forward(exact.x, *exact.parameters, it.seed, **options)
    torch.testing.assert_close(y, expected.to(dtype), equal_nan=True)
    db1 = gradients[4]
    expected = primitives.mlp_block_backward(
        exact.dy, exact.x, *exact.parameters, it.seed, **options
    )[4]
    torch.testing.assert_close(db1, expected.to(db1.dtype), equal_nan=True)


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1])
def test_the_mask_is_the_contract_s(seed: int) -> None:
    """With the second map the identity and large biases the factors are read off the output."""
    d = 8
    x = torch.zeros(2, 21, d)
    eye, zeros = torch.eye(d), torch.zeros(d)
    parameters = [torch.ones(d), zeros, torch.zeros(d, d), torch.full((d,), 10.0), eye, zeros]
    key = torch.tensor([seed])
    y = mlp_block.forward(x, *parameters, key, dropout=0.25, eps=EPS)
    hidden, output = (primitives.keep(key, x.shape, 0.25, stream) for stream in (1, 2))
    assert isinstance(hidden, Tensor)
    torch.testing.assert_close(y, (10 * hidden * output).float())


def test_refusals_name_the_reason() -> None:
    w1 = torch.zeros(8, 4)
    assert mlp_block.supports(torch.zeros(1, 2, 4), w1) is None
    reason = mlp_block.supports(torch.zeros(1, 2, 4, dtype=torch.float16), w1)
    assert reason == "the native extension has no kernel for torch.float16 on cpu"
