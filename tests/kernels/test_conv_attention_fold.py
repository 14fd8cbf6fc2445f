"""The Triton kernels of attention's norms and folded weights against plain PyTorch in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from eqcvt import ops
from eqcvt.ops import use_backend
from tests.ops import primitives
from tests.tolerance import assert_all_as_good, double

pytest.importorskip("triton")
from eqcvt.kernels import conv_attention
from tests.kernels import aot

pytestmark = pytest.mark.needs("interpreter")
# Channels, heads, their width, whether values have a projection of their own, and biases.
CASES = {
    "model": (32, 3, 64, False, False),
    "biases": (16, 2, 16, False, True),
    "odd, values, biases": (20, 2, 24, True, True),
    "wide": (72, 1, 72, True, False),
}


def _parameters(
    dim: int, heads: int, head: int, values: bool, biases: bool, dtype: torch.dtype = torch.float32
) -> list[Tensor | None]:
    """Arguments of ``fold``; ``out`` has its bias in all cases, as in the models."""
    width, projections = heads * head, 3 if values else 2
    norms: list[Tensor | None] = [1 + torch.randn(dim) for _ in range(2 * projections)]
    weights = [torch.randn(width, dim) for _ in range(3)] + [torch.randn(dim, width)]
    given = [torch.randn(width) if biases else None for _ in range(3)] + [torch.randn(dim)]
    parameters = norms + [None] * (6 - len(norms)) + weights + given
    return [
        torch.randn(projections, dim),
        0.1 + torch.rand(projections, dim),
        *(None if t is None else t.to(dtype) for t in parameters),
    ]


@pytest.mark.parametrize("case", CASES)
def test_parameters_and_gradients_are_as_good_as_pytorch_s(case: str) -> None:
    heads = CASES[case][1]
    settings: dict[str, Any] = {"heads": heads, "eps": 1e-5}
    inputs = _parameters(*CASES[case])
    results = conv_attention.fold(*inputs, **settings)
    gradients: list[Tensor | None] = [torch.randn_like(t) for t in results]
    for name, arguments, backward in (
        ("fold", inputs, False),
        ("fold_backward", gradients + inputs, True),
    ):
        actual = getattr(conv_attention, name)(*arguments, **settings)
        definition = getattr(primitives, f"conv_attention_{name}")
        exact = definition(*double(arguments), **settings)
        reference = definition(*arguments, **settings)
        assert all(t.is_contiguous() for t in actual)
        assert_all_as_good(actual, exact, reference, backward=backward)


def test_parameters_of_half_precision_have_gradients_of_it() -> None:
    inputs = _parameters(*CASES["odd, values, biases"], dtype=torch.float16)
    results = conv_attention.fold(*inputs, heads=2, eps=1e-5)
    expected = primitives.conv_attention_fold(*double(inputs), heads=2, eps=1e-5)
    for mine, true in zip(results, expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-5)
    gradients = [torch.randn_like(t) for t in results]
    found = conv_attention.fold_backward(*gradients, *inputs, heads=2, eps=1e-5)
    assert {t.dtype for t in found[:4]} == {torch.float32}
    assert {t.dtype for t in found[4:]} == {torch.float16}


@pytest.mark.parametrize("training", [True, False])
def test_the_op_gives_what_plain_pytorch_does_with_biases_and_values(training: bool) -> None:
    """Through autograd, with all parameters that an attention may have."""
    dim, heads, head = 16, 2, 24
    torch.manual_seed(0)
    x = torch.randn(2, dim, 7, 6)
    leaves = [torch.randn(dim, 1, 3, 3) / 3 for _ in range(3)]
    leaves += [1 + 0.1 * torch.randn(dim) for _ in range(6)]
    leaves += [torch.randn(heads * head, dim) / 4 for _ in range(3)]
    leaves += [torch.randn(dim, heads * head) / 4]
    leaves += [torch.randn(heads * head) for _ in range(3)] + [torch.randn(dim)]
    running = None if training else (torch.randn(dim), 0.5 + torch.rand(dim))

    def run(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        x_, *given = (t.to(dtype).requires_grad_() for t in (x, *leaves))
        moments = None if running is None else (running[0].to(dtype), running[1].to(dtype))
        q, k, v = (ops.Depthwise(given[i], given[3 + i], given[6 + i], moments) for i in range(3))
        y, statistics = ops.conv_attention(
            x_, x_, q, k, v, ops.Pointwise(*given[9:]), heads=heads, dropout=0.0
        )
        seen = [t for pair in statistics if pair is not None for t in pair]
        found = torch.autograd.grad(y.square().sum(), [x_, *given])
        return [y.detach(), *seen], list(found)

    with use_backend("reference"):
        exact, reference = run(torch.float64), run(torch.float32)
    with use_backend("triton"):
        actual = run(torch.float32)
    for part, backward in ((0, False), (1, True)):
        assert_all_as_good(actual[part], exact[part], reference[part], backward=backward)


def test_a_key_bias_changes_nothing_and_has_a_gradient_of_zeros() -> None:
    inputs = _parameters(*CASES["biases"])
    settings: dict[str, Any] = {"heads": 2, "eps": 1e-5}
    without = [None if i == 13 else t for i, t in enumerate(inputs)]
    results = conv_attention.fold(*inputs, **settings)
    for mine, same in zip(results, conv_attention.fold(*without, **settings), strict=True):
        assert torch.equal(mine, same)
    found = conv_attention.fold_backward(*results, *inputs, **settings)
    assert torch.equal(found[9], torch.zeros(32))


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """The calls whose kernels are assembled: with as little as can be, and with all there is."""
    for name in ("model", "odd, values, biases"):

        def run(case: tuple[int, int, int, bool, bool] = CASES[name]) -> None:
            inputs = [None if t is None else t.to("meta") for t in _parameters(*case)]
            settings: dict[str, Any] = {"heads": case[1], "eps": 1e-5}
            results = conv_attention.fold(*inputs, **settings)
            conv_attention.fold_backward(*results, *inputs, **settings)

        yield name, run


def test_kernels_assemble_for_a_gpu() -> None:
    reports = aot.in_process(f"{__name__}:calls", 90)
    assert len(reports) == 4
    assert not any(r.spilled for r in reports), reports
