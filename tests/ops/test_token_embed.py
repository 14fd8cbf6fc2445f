"""Token embedding against its formula."""

from __future__ import annotations

import pytest
import torch

from eqcvt import groups, ops
from eqcvt.nn import Filters

pytestmark = pytest.mark.usefixtures("backend")


def _weights(
    dim: int = 6, channels: int = 3, kernel: int = 3
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.randn(dim, channels, kernel, kernel, dtype=torch.float64),
        torch.randn(dim, dtype=torch.float64),
        torch.rand(dim, dtype=torch.float64),
        torch.randn(dim, dtype=torch.float64),
    )


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (7, 4, 3), (7, 4, 2)])
def test_op_is_its_formula_written_out(kernel: int, stride: int, padding: int) -> None:
    x = torch.randn(2, 3, 17, 13, dtype=torch.float64)
    filters, bias, scale, shift = _weights(kernel=kernel)
    y = ops.token_embed(x, filters, bias, scale, shift, stride=stride, padding=padding)
    padded = torch.nn.functional.pad(x, [padding] * 4)
    patches = padded.unfold(2, kernel, stride).unfold(3, kernel, stride)
    u = torch.einsum("bchwij,dcij->bdhw", patches, filters) + bias.view(1, -1, 1, 1)
    u = (u - u.mean(1, True)) / (u.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    expected = u * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
    torch.testing.assert_close(y, expected, atol=1e-10, rtol=0)


def test_gradients_are_those_of_finite_differences() -> None:
    x = torch.randn(1, 2, 7, 7, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, *_weights(3, 2))]
    assert torch.autograd.gradcheck(
        lambda *t: ops.token_embed(*t, stride=2, padding=1), inputs, atol=1e-4
    )


@pytest.mark.parametrize("name", ["C4", "D4"])
def test_symmetric_filters_turn_tokens_with_the_image(name: str) -> None:
    group = groups.Group.from_name(name)
    _, bias, scale, shift = _weights()
    filters = Filters(6, 3, 3, group).double()()
    x = torch.randn(2, 3, 13, 13, dtype=torch.float64)

    def embed(t: torch.Tensor) -> torch.Tensor:
        return ops.token_embed(t, filters, bias, scale, shift, stride=2, padding=1)

    for g in range(group.order):
        turned = group.act_on_image(embed(x), g)
        torch.testing.assert_close(embed(group.act_on_image(x, g)), turned, atol=1e-9, rtol=0)


def test_wrong_channels_are_named() -> None:
    with pytest.raises(ValueError, match=r"needs x \[B, 3, H, W\] for these filters, got \[2, 4"):
        ops.token_embed(torch.zeros(2, 4, 9, 9), *_weights(), stride=2, padding=1)


def test_filters_that_are_not_square_are_named() -> None:
    filters, *rest = _weights()
    with pytest.raises(ValueError, match=r"needs filters \[D, C, k, k\], got \[.*, 3, 2\]"):
        ops.token_embed(torch.zeros(2, 3, 9, 9), filters[..., :2], *rest, stride=2, padding=1)
