"""The mean over tokens, and its gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import eqcvt
from eqcvt import ops

pytestmark = pytest.mark.usefixtures("backend")


def test_it_is_the_mean_and_its_gradient_is_one_row_per_image() -> None:
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64).requires_grad_()
    torch.testing.assert_close(ops.token_mean(x), x.mean((2, 3)), atol=0, rtol=0)
    assert torch.autograd.gradcheck(ops.token_mean, x)
    assert torch.autograd.gradgradcheck(lambda t: ops.token_mean(t).square(), x)
    seen: list[tuple[int, ...]] = []
    y = x * 1
    y.register_hook(lambda gradient: seen.append(gradient.stride()))
    ops.token_mean(y).sum().backward()
    assert seen[0][2:] == (0, 0)


def test_it_can_be_transformed_as_any_of_torch_s() -> None:
    x = torch.randn(4, 2, 5, 3, 4, dtype=torch.float64)

    def of(mean: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        def f(t: torch.Tensor) -> torch.Tensor:
            return mean(t).sin().sum()

        second = torch.func.grad(lambda t: torch.func.grad(f)(t).square().sum())
        return [
            torch.func.vmap(torch.func.grad(f))(x),
            torch.func.vmap(mean, in_dims=2, out_dims=1)(x.movedim(0, 2)),
            second(x[0]),
            torch.func.jacrev(mean)(x[0]),
            torch.func.jvp(torch.func.grad(f), (x[0],), (x[1],))[1],
        ]

    torch.testing.assert_close(of(ops.token_mean), of(lambda t: t.mean((2, 3))))


@pytest.mark.parametrize("tokens", [(3, 5), (1, 1)])
def test_it_and_the_mlp_block_have_the_gradients_of_both(tokens: tuple[int, int]) -> None:
    shapes = [(2, 16, *tokens), (16,), (16,), (24, 16), (24,), (16, 24), (16,)]
    inputs = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    weight = torch.randn(2, 16, dtype=torch.float64)
    found, wanted = (
        torch.autograd.grad((mean(ops.mlp_block(*inputs)) * weight).sum(), inputs)
        for mean in (ops.token_mean, lambda y: y.mean((2, 3)))
    )
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)


def test_the_models_pool_by_it() -> None:
    model = eqcvt.EqCvT(in_channels=1, image_size=33)
    tokens = torch.randn(2, model.num_features, 4, 5).requires_grad_()
    seen: list[tuple[int, ...]] = []
    y = tokens * 1
    y.register_hook(lambda gradient: seen.append(gradient.stride()))
    model.forward_head(y).sum().backward()
    assert seen[0][2:] == (0, 0)
