"""Every op by its kernels: results and gradients against float64, and what torch asks of an op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from eqcvt import ops, use_backend
from eqcvt.ops import _backend
from tests.tolerance import assert_as_good

pytestmark = pytest.mark.needs("native")
OPS = ("lift", "conv_attention", "mlp_block", "token_embed")
Call = Callable[..., list[Tensor]]


def lift(training: bool, **options: Any) -> tuple[Call, list[Tensor]]:
    """Return a call of the steerable block, and its differentiable inputs."""
    fields, order, channels = 3, 4, 2
    inputs = [torch.randn(2, channels, 19, 17), torch.randn(fields, order, channels, 5, 5) / 7]
    inputs += [torch.rand(fields) + 0.5, torch.randn(fields) / 2]
    running = (torch.randn(fields) / 5, torch.rand(fields) + 0.5)
    mask, blur = torch.rand(19, 17, dtype=torch.float64), ops.blur_line(0.66)

    def call(*t: Tensor) -> list[Tensor]:
        still = None if training else tuple(r.to(t[2]) for r in running)
        return [y for y in ops.lift(*t, still, mask, blur, padding=1, **options) if y is not None]

    return call, inputs


def conv_attention(training: bool, **options: Any) -> tuple[Call, list[Tensor]]:
    """Return a call of the attention block, and its differentiable inputs."""
    dim, heads, head_dim = 16, 3, 16
    width = heads * head_dim
    inputs = [torch.randn(2, dim, 9, 7), torch.randn(2, dim, 9, 7)]
    for _ in range(3):
        inputs += [torch.randn(dim, 1, 3, 3) / 3, torch.rand(dim) + 0.5, torch.randn(dim) / 2]
    inputs += [torch.randn(width, dim) / 4 for _ in range(3)] + [torch.randn(dim, width) / 7]
    inputs += [torch.randn(width) / 4 for _ in range(3)] + [torch.randn(dim)]
    running = [(torch.randn(dim) / 5, torch.rand(dim) + 0.5) for _ in range(3)]

    def call(*t: Tensor) -> list[Tensor]:
        parts = []
        for i, r in enumerate(running):
            still = None if training else tuple(s.to(t[3]) for s in r)
            parts.append(ops.Depthwise(*t[2 + 3 * i : 5 + 3 * i], still))
        w = ops.Pointwise(*t[11:])
        y, statistics = ops.conv_attention(*t[:2], *parts, w, heads=heads, **options)
        return [y, *(s for pair in statistics if pair is not None for s in pair)]

    return call, inputs


def mlp_block(training: bool, **options: Any) -> tuple[Call, list[Tensor]]:
    """Return a call of the MLP block, and its differentiable inputs."""
    shapes = [(2, 16, 7, 9), (16,), (16,), (24, 16), (24,), (16, 24), (16,)]
    inputs = [torch.randn(shape) / (4 if len(shape) == 2 else 1) for shape in shapes]
    return lambda *t: [ops.mlp_block(*t, **options)], inputs


def token_embed(training: bool, **options: Any) -> tuple[Call, list[Tensor]]:
    """Return a call of the token embedding, and its differentiable inputs."""
    shapes = [(2, 5, 13, 11), (16, 5, 3, 3), (16,), (16,), (16,)]
    inputs = [torch.randn(shape) / (5 if shape[1:] == (5, 3, 3) else 1) for shape in shapes]
    return lambda *t: [ops.token_embed(*t, stride=2, padding=1, **options)], inputs


CALLS = {"lift": lift, "conv_attention": conv_attention, "mlp_block": mlp_block}
CALLS["token_embed"] = token_embed


def results(call: Call, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return what a call gives, and the gradients of a fixed sum of the first result."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = call(*leaves)
    y = outputs[0]
    weight = torch.sin(torch.arange(y.numel(), dtype=torch.float64, device=y.device)).view(y.shape)
    found = torch.autograd.grad(y, leaves, weight.to(y.dtype), allow_unused=True)
    gradients = [
        torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True)
    ]
    return [t.detach() for t in outputs], gradients


def activations(op: str, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the inputs with the activations, and all parameters beside float64, in ``dtype``."""
    count = 2 if op == "conv_attention" else 1
    wide = torch.promote_types(dtype, torch.float32)
    return [t.to(dtype if i < count else wide) for i, t in enumerate(inputs)]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("op", OPS)
def test_values_and_gradients_are_as_good_as_the_reference_s(op: str, training: bool) -> None:
    torch.manual_seed(1)
    call, inputs = CALLS[op](training)
    with use_backend("reference"):
        exact = results(call, [t.double() for t in inputs])
        reference = results(call, inputs)
    with use_backend("native"):
        actual = results(call, inputs)
        actual64 = results(call, [t.double() for t in inputs])
    for part, backward in ((0, False), (1, True)):
        for mine, true, theirs in zip(actual[part], exact[part], reference[part], strict=True):
            assert_as_good(mine, true, theirs, backward=backward)
        for mine, true in zip(actual64[part], exact[part], strict=True):
            torch.testing.assert_close(mine, true, rtol=0, atol=1e-13 * (1 + true.abs().sum()))


@pytest.mark.parametrize("op", OPS)
def test_autocast_gives_bfloat16_and_keeps_statistics_and_gradients_in_float32(op: str) -> None:
    torch.manual_seed(1)
    call, inputs = CALLS[op](True)
    with use_backend("reference"):
        exact = results(call, [t.double() for t in inputs])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            reference = results(call, inputs)
    with use_backend("native"), torch.autocast("cpu", dtype=torch.bfloat16):
        actual = results(call, inputs)
    assert actual[0][0].dtype == torch.bfloat16
    assert {t.dtype for t in [*actual[0][1:], *actual[1]]} == {torch.float32}
    for mine, true, theirs in zip(actual[1], exact[1], reference[1], strict=True):
        # A result in bfloat16 is rounded where the reference, whose norms widen, is not.
        rounded = theirs.to(torch.bfloat16).to(theirs)
        assert_as_good(mine.to(torch.bfloat16), true, rounded.to(torch.bfloat16), backward=True)


@pytest.mark.parametrize("op", OPS)
def test_strided_inputs_and_gradients_give_the_same(op: str) -> None:
    torch.manual_seed(1)
    call, inputs = CALLS[op](True)
    with use_backend("native"):
        expected = results(call, inputs)
        x = inputs[0]
        for other in (
            x.to(memory_format=torch.channels_last),
            torch.zeros(*x.shape[:3], 2 * x.shape[3])[..., ::2].copy_(x),
        ):
            for mine, same in zip(results(call, [other, *inputs[1:]]), expected, strict=True):
                for a, b in zip(mine, same, strict=True):
                    torch.testing.assert_close(a, b, rtol=0, atol=0)
        leaf = x.clone().requires_grad_()
        call(leaf, *inputs[1:])[0].sum().backward()  # a gradient of stride zero
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("op", OPS)
def test_kernels_pass_gradcheck(op: str, training: bool) -> None:
    torch.manual_seed(1)
    call, inputs = CALLS[op](training)
    leaves = [t.double().requires_grad_() for t in inputs]
    with use_backend("native"):
        assert torch.autograd.gradcheck(lambda *t: call(*t)[0], leaves, fast_mode=True, atol=1e-6)


@pytest.mark.parametrize("op", OPS)
def test_torch_ops_keep_their_promises(op: str) -> None:
    """Schema, fakes, gradients and static shapes, for every torch op a call makes."""
    torch.manual_seed(1)
    seen: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.namespace == "eqcvt":
                seen.append((func, args, kwargs))
            return func(*args, **(kwargs or {}))

    call, inputs = CALLS[op](True)
    with use_backend("native"), Record():
        results(call, inputs)
    assert len(seen) >= 2
    for func, args, kwargs in seen:
        differentiable = "backward" not in func.__name__ and "input" not in func.__name__
        fresh = [
            a.detach().clone().requires_grad_(differentiable and a.is_floating_point())
            if isinstance(a, Tensor)
            else a
            for a in args
        ]
        opcheck(func, tuple(fresh), kwargs)


@pytest.mark.parametrize("op", OPS)
def test_compiles_as_one_graph_with_gradients_for_any_batch(op: str) -> None:
    torch.manual_seed(1)
    call, inputs = CALLS[op](True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: call(*t), fullgraph=True, dynamic=True, backend="aot_eager")
    with use_backend("native"):
        for batch in (2, 3):
            count = 2 if op == "conv_attention" else 1
            more = [torch.randn(batch, *t.shape[1:]) for t in inputs[:count]] + inputs[count:]
            for mine, same in zip(results(compiled, more), results(call, more), strict=True):
                for a, b in zip(mine, same, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_two_runs_are_bit_equal_and_threads_change_only_rounding(op: str) -> None:
    torch.manual_seed(1)
    call, inputs = CALLS[op](True)
    before = torch.get_num_threads()
    try:
        runs = {}
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with use_backend("native"):
                first, again = (
                    [t for part in results(call, inputs) for t in part] for _ in range(2)
                )
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
            runs[threads] = first
    finally:
        torch.set_num_threads(before)
    for other in (2, 3):
        for a, b in zip(runs[1], runs[other], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max() + 1))


@pytest.mark.parametrize("op", ["conv_attention", "mlp_block"])
def test_dropout_is_torch_s_seed_s_and_the_same_backward(op: str) -> None:
    torch.manual_seed(1)
    call, inputs = CALLS[op](False, dropout=0.4)
    with use_backend("native"):
        runs = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            runs.append(results(call, inputs))
        assert torch.equal(runs[0][0][0], runs[1][0][0])
        assert not torch.equal(runs[0][0][0], runs[2][0][0])
        torch.manual_seed(3)
        inputs[0] = inputs[0].double()
        leaves = [t.double().requires_grad_() for t in inputs]

        def seeded(*t: Tensor) -> Tensor:
            torch.manual_seed(3)
            return call(*t)[0]

        assert torch.autograd.gradcheck(seeded, leaves, fast_mode=True, atol=1e-6)


@pytest.mark.parametrize("op", OPS)
def test_a_dtype_without_kernels_goes_to_the_reference_or_is_refused(op: str) -> None:
    call, inputs = CALLS[op](False)
    half = [t.half() for t in inputs]
    with use_backend("native"), pytest.raises(RuntimeError, match=f"cannot serve {op} on cpu"):
        call(*half)
    with use_backend("auto"):
        automatic = call(*half)[0]
    with use_backend("reference"):
        assert torch.equal(automatic, call(*half)[0])


def test_a_second_derivative_is_refused() -> None:
    call, inputs = mlp_block(False)
    leaves = [t.requires_grad_() for t in inputs]
    with use_backend("native"):
        (gradient,) = torch.autograd.grad(call(*leaves)[0].sum(), leaves[:1], create_graph=True)
        with pytest.raises(RuntimeError, match="use_backend\\('reference'\\)"):
            gradient.sum().backward()


def test_wide_tokens_are_not_folded_into_narrow_heads() -> None:
    dim, head_dim = 48, 8
    x = torch.randn(1, dim, 5, 5)
    p = ops.Depthwise(torch.randn(dim, 1, 3, 3), torch.ones(dim), torch.zeros(dim), None)
    w = ops.Pointwise(*(torch.randn(head_dim, dim) for _ in range(3)), torch.randn(dim, head_dim))
    with use_backend("native"), pytest.raises(RuntimeError, match="48 channels are too many"):
        ops.conv_attention(x, x, p, p, None, w, heads=1)
    assert _backend.explain(("cpu",))
