"""The CUDA kernels of mlp_block, run on the host, against the primitives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.native.cuda_emulator import DTYPES, Emulated, fixture, new
from tests.ops import primitives
from tests.tolerance import assert_all_as_good, assert_as_good, double

SEED = torch.tensor([2**62 + 987654321])
EPS = 1e-5
native = fixture("mlp_block.cu")


def _args(batch: int, n: int, d: int, e: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(batch * 100 + n + d + e)
    x = (torch.randn(batch, n, d) * 2 + 1).to(dtype)
    weights = [torch.randn(e, d) / d**0.5, torch.randn(e), torch.randn(d, e) / e**0.5]
    return [x, torch.rand(d) + 0.5, torch.randn(d), *weights, torch.randn(d), SEED]


def _forward(native: Emulated, args: list[Tensor], dropout: float) -> Tensor:
    x, w1 = args[0], args[3]
    y = new(tuple(x.shape), x.dtype)
    native.launch("mlp_block_forward", *args, *x.shape, w1.shape[0], dropout, EPS, y, like=x)
    return y


def _backward(native: Emulated, dy: Tensor, args: list[Tensor], dropout: float) -> list[Tensor]:
    x, w1 = args[0], args[3]
    found = [new(tuple(t.shape), t.dtype) for t in args[:-1]]
    sizes = [*x.shape, w1.shape[0]]
    native.launch("mlp_block_backward", dy, *args, *sizes, dropout, EPS, *found, like=x)
    return found


SHAPES = pytest.mark.parametrize(
    ("batch", "n", "d", "e", "dropout"),
    [
        (2, 67, 32, 64, 0.1),
        (1, 131, 32, 33, 0.0),
        (1, 37, 16, 70, 0.3),
        (2, 9, 7, 13, 0.4),
        (1, 70, 64, 96, 0.2),
        (1, 35, 100, 40, 0.2),
        (1, 66, 128, 32, 0.0),
    ],
)


@pytest.mark.parametrize("dtype", DTYPES)
@SHAPES
def test_forward(
    native: Emulated, dtype: torch.dtype, batch: int, n: int, d: int, e: int, dropout: float
) -> None:
    args = _args(batch, n, d, e, dtype)
    options = {"dropout": dropout, "eps": EPS}
    reference = primitives.mlp_block_forward(*args, **options)
    exact = primitives.mlp_block_forward(*double(args), **options)
    assert_as_good(_forward(native, args, dropout), exact, reference)


@pytest.mark.parametrize("dtype", DTYPES)
@SHAPES
def test_backward(
    native: Emulated, dtype: torch.dtype, batch: int, n: int, d: int, e: int, dropout: float
) -> None:
    args = _args(batch, n, d, e, dtype)
    dy = torch.randn(args[0].shape).to(dtype)
    found = _backward(native, dy, args, dropout)
    options = {"dropout": dropout, "eps": EPS}
    reference = primitives.mlp_block_backward(dy, *args, **options)
    exact = primitives.mlp_block_backward(dy.double(), *double(args), **options)
    assert_all_as_good(found, exact, reference, backward=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_order_of_threads(native: Emulated, dtype: torch.dtype) -> None:
    args = _args(2, 70, 20, 40, dtype)
    dy = torch.randn(args[0].shape).to(dtype)
    native.in_any_order(lambda: [_forward(native, args, 0.1), *_backward(native, dy, args, 0.1)])


def test_keeps_what_the_reference_keeps(native: Emulated) -> None:
    """With weights that let each mask be seen: hidden unit e is output channel e + 1."""
    d, ones, zeros = 12, torch.ones(12), torch.zeros(12)
    x, eye = torch.randn(2, 35, d), torch.eye(d)
    args = [x, ones, zeros, 0 * eye, 100 * ones, eye.roll(1, 0), zeros, SEED]
    factor = (_forward(native, args, 0.3) - x) / 100
    hidden, output = (primitives.keep(SEED, x.shape, 0.3, stream) for stream in (1, 2))
    assert torch.equal(factor > 0.5, hidden.roll(1, -1) * output > 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_batch(native: Emulated, dtype: torch.dtype) -> None:
    args = _args(0, 5, 8, 9, dtype)
    assert _forward(native, args, 0.1).shape == (0, 5, 8)
    assert all((t == 0).all() for t in _backward(native, args[0], args, 0.1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_row(native: Emulated, dtype: torch.dtype, value: float) -> None:
    args = _args(2, 9, 16, 20, dtype)
    args[0][1, 3, 2] = value
    y = _forward(native, args, 0.1)
    expected = torch.ones(2, 9, dtype=torch.bool)
    expected[1, 3] = False
    assert torch.equal(y.isfinite().all(-1), expected)
    dx = _backward(native, torch.randn(y.shape).to(dtype), args, 0.1)[0]
    assert torch.equal(dx.isfinite().all(-1), expected)


def test_sizes_that_are_refused(native: Emulated) -> None:
    with pytest.raises(AssertionError, match="status -3"):
        _forward(native, _args(1, 2, 129, 8, torch.float32), 0.0)
