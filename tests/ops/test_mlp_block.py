"""The MLP block against its formula."""

from __future__ import annotations

import pytest
import torch

from eqcvt import ops

pytestmark = pytest.mark.usefixtures("backend")


def _weights(dim: int = 4, hidden: int = 7) -> list[torch.Tensor]:
    shapes = [(dim,), (dim,), (hidden, dim), (hidden,), (dim, hidden), (dim,)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def test_op_is_its_formula_written_out() -> None:
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    scale, shift, w1, b1, w2, b2 = _weights()
    tokens = x.flatten(2).transpose(1, 2)
    n = (tokens - tokens.mean(2, True)) / (tokens.var(2, unbiased=False)[..., None] + 1e-5).sqrt()
    hidden = (n * scale + shift) @ w1.T + b1
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    expected = tokens + hidden @ w2.T + b2
    y = ops.mlp_block(x, scale, shift, w1, b1, w2, b2)
    torch.testing.assert_close(y.flatten(2).transpose(1, 2), expected, atol=1e-11, rtol=0)


def test_gradients_are_those_of_finite_differences() -> None:
    x = torch.randn(2, 4, 2, 3, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, *_weights())]
    assert torch.autograd.gradcheck(ops.mlp_block, inputs, atol=1e-4)


def test_permuted_tokens_give_permuted_results() -> None:
    x, weights = torch.randn(1, 4, 6, 6, dtype=torch.float64), _weights()
    order = torch.randperm(36)
    y = ops.mlp_block(x, *weights).flatten(2)[..., order]
    shuffled = x.flatten(2)[..., order].reshape(x.shape)
    torch.testing.assert_close(ops.mlp_block(shuffled, *weights).flatten(2), y)


def test_dropout_is_reproducible_by_seed_and_leaves_the_residual() -> None:
    x, weights = torch.randn(2, 4, 5, 5, dtype=torch.float64), _weights()
    torch.manual_seed(1)
    first = ops.mlp_block(x, *weights, dropout=0.5)
    torch.manual_seed(1)
    assert torch.equal(first, ops.mlp_block(x, *weights, dropout=0.5))
    dropped = ((first - x) == 0).double().mean().item()
    assert 0.35 < dropped < 0.65


def test_wrong_widths_are_named() -> None:
    weights = _weights()
    weights[4] = torch.zeros(4, 9, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"mlp_block needs w2 \[4, 7\], got \[4, 9\]"):
        ops.mlp_block(torch.zeros(2, 4, 5, 5), *weights)
