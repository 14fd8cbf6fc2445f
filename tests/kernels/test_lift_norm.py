"""The small kernels around the steerable block's convolution against plain PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eqcvt.ops import use_backend
from eqcvt.ops.norm import affine
from eqcvt.tune.cases import CALLS, results
from tests.tolerance import assert_all_as_good

pytest.importorskip("triton")
from eqcvt.kernels import lift, lift_norm

pytestmark = pytest.mark.needs("interpreter")


@pytest.mark.parametrize("fields", [1, 10, 131])
def test_the_norm_and_its_gradient_are_as_good_as_pytorch_s(fields: int) -> None:
    given = [torch.randn(fields), 0.1 + torch.rand(fields), *torch.randn(2, fields)]
    gradients = torch.randn(2, fields).unbind()

    def plain(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [t.to(dtype).requires_grad_() for t in given]
        found = affine(*leaves, 1e-5)
        gradient = torch.autograd.grad(found, leaves, [g.to(dtype) for g in gradients])
        return [t.detach() for t in found], list(gradient)

    exact, reference = plain(torch.float64), plain(torch.float32)
    actual = lift.norm(*given, eps=1e-5), lift.norm_backward(*gradients, *given, eps=1e-5)
    for part, backward in ((0, False), (1, True)):
        assert_all_as_good(actual[part], exact[part], reference[part], backward=backward)


@pytest.mark.parametrize("shape", [(1, 1, 1, 3, 3), (10, 4, 3, 7, 7), (3, 8, 40, 5, 5)])
def test_gradients_of_filters_are_as_good_as_pytorch_s(shape: tuple[int, ...]) -> None:
    fields = shape[0]
    dmean, dvariance, mean, scale = torch.randn(4, fields).unbind()
    ux, products, bank = torch.randn(3, *shape).unbind()
    ones, count = torch.randn(shape[2:]), 1000

    def plain(dtype: torch.dtype) -> list[Tensor]:
        per_field = (t.to(dtype).view(-1, 1, 1, 1, 1) for t in (dmean, dvariance, mean, scale))
        m, v, mu, s = per_field
        ux_, products_, ones_ = (t.to(dtype) for t in (ux, products, ones))
        by_moments = (2 / count * v) * ux_ + (m / count - 2 / count * v * mu) * ones_
        rounded = bank.half().to(dtype)
        return [by_moments, s * products_, (rounded * products_).sum((1, 2, 3, 4))]

    mine = [lift.moments_backward(dmean, dvariance, mean, ux, ones, count=count)]
    mine += lift_norm.scale_gradient(products.clone(), bank, scale, torch.float16)
    assert_all_as_good(mine, plain(torch.float64), plain(torch.float32), backward=True)


@pytest.mark.parametrize("training", [True, False])
def test_the_op_gives_what_plain_pytorch_does(training: bool) -> None:
    torch.manual_seed(1)
    call, inputs = CALLS["lift"](training)
    with use_backend("reference"):
        exact = results(call, [t.double() for t in inputs])
        reference = results(call, inputs)
    with use_backend("triton"):
        actual = results(call, inputs)
    for part, backward in ((0, False), (1, True)):
        assert_all_as_good(actual[part], exact[part], reference[part], backward=backward)
