"""Every op by its kernels: results and gradients against float64, and what torch asks of an op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from eqcvt import ops, use_backend
from eqcvt.ops import _backend, _conv_attention_fused
from eqcvt.tune.cases import CALLS, mlp_block, results
from tests.tolerance import assert_as_good, of_other_strides

pytestmark = pytest.mark.needs("native")
OPS = ("lift", "conv_attention", "mlp_block", "token_embed")


@pytest.fixture
def backend() -> str:
    """Whose kernels run; ``test_gpu`` runs tests of this file with those of GPUs."""
    return "native"


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
def test_autocast_gives_bfloat16_and_keeps_statistics_and_gradients_in_float32(
    op: str, backend: str
) -> None:
    torch.manual_seed(1)
    call, inputs = CALLS[op](True)
    device = inputs[0].device.type
    with use_backend("reference"):
        exact = results(call, [t.double() for t in inputs])
        with torch.autocast(device, dtype=torch.bfloat16):
            reference = results(call, inputs)
    with use_backend(backend), torch.autocast(device, dtype=torch.bfloat16):
        actual = results(call, inputs)
    assert actual[0][0].dtype == torch.bfloat16
    assert {t.dtype for t in [*actual[0][1:], *actual[1]]} == {torch.float32}
    for mine, true, theirs in zip(actual[1], exact[1], reference[1], strict=True):
        # A result in bfloat16 is rounded where the reference, whose norms widen, is not.
        rounded = theirs.to(torch.bfloat16).to(theirs)
        assert_as_good(mine.to(torch.bfloat16), true, rounded.to(torch.bfloat16), backward=True)


@pytest.mark.parametrize("chosen", ["native", "reference"])
@pytest.mark.parametrize("op", OPS)
def test_parameters_of_other_shapes_are_refused(op: str, chosen: str) -> None:
    # Kernels read as many numbers as the first of them says, and write as many gradients.
    for training in (True, False):
        call, inputs = CALLS[op](training)
        with use_backend(chosen):
            for i, t in enumerate(inputs[1:], 1):
                for other in (t[:1], t[:-1], torch.cat([t, t])):
                    with pytest.raises(ValueError, match=r"got|do not fit|cannot be split"):
                        call(*inputs[:i], other, *inputs[i + 1 :])


@pytest.mark.parametrize("chosen", ["native", "reference"])
@pytest.mark.parametrize("shape", [(9, 8), (1, 9), (1, 1), (2, 9, 9), (8, 9)])
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, ...], chosen: str) -> None:
    x, bank, line = torch.rand(2, 2, 9, 9), torch.rand(3, 4, 2, 3, 3), torch.ones(3)
    with pytest.raises(ValueError, match=r"lift needs mask \[9, 9\], got"):
        ops.lift(x, bank, line, line, None, torch.ones(shape), backend=chosen)
    with pytest.raises(ValueError, match=r"needs the running variance \[3\], got \[1\]"):
        ops.lift(x, bank, line, line, (line, line[:1]), backend=chosen)


@pytest.mark.parametrize("chosen", ["native", "reference"])
@pytest.mark.parametrize(
    ("op", "options", "message"),
    [
        ("lift", {"stride": 0}, "must be at least 1 and padding at least 0, got 0, 1 and 1"),
        ("lift", {"blur_stride": 0}, "must be at least 1 and padding at least 0, got 1, 0 and 1"),
        ("lift", {"padding": -1}, "must be at least 1 and padding at least 0, got 1, 1 and -1"),
        (
            "lift",
            {"shape": (1, 2, 6, 6)},
            "too small for 5x5 filters with padding 1 and a blur of 5",
        ),
        ("conv_attention", {"kv_stride": 0}, "heads and kv_stride must be at least 1, got 3 and 0"),
        ("conv_attention", {"dropout": 1.5}, r"dropout must lie in \[0, 1\), got 1.5"),
        ("mlp_block", {"dropout": -1}, r"dropout must lie in \[0, 1\), got -1"),
        ("token_embed", {"stride": 0}, "stride must be at least 1 .* got 0 and 1"),
        ("token_embed", {"shape": (1, 5, 1, 1), "padding": 0}, "1x1 pixels are too small for 3x3"),
    ],
)
def test_options_out_of_range_are_named(
    op: str, options: dict[str, Any], message: str, chosen: str
) -> None:
    call, inputs = CALLS[op](True, **options)
    with use_backend(chosen), pytest.raises(ValueError, match=message):
        call(*inputs)


@pytest.mark.parametrize("op", OPS)
def test_strided_inputs_and_gradients_give_the_same(op: str, backend: str) -> None:
    torch.manual_seed(1)
    call, inputs = CALLS[op](True)
    with use_backend(backend):
        expected = results(call, inputs)
        x = inputs[0]
        for other in (
            x.to(memory_format=torch.channels_last),
            torch.zeros(*x.shape[:3], 2 * x.shape[3])[..., ::2].copy_(x),
        ):
            for mine, same in zip(results(call, [other, *inputs[1:]]), expected, strict=True):
                for a, b in zip(mine, same, strict=True):
                    torch.testing.assert_close(a, b, rtol=0, atol=of_other_strides(b))
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
def test_torch_ops_keep_their_promises(op: str, backend: str) -> None:
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
    with use_backend(backend), Record():
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
def test_compiles_as_one_graph_with_gradients_for_any_batch(op: str, backend: str) -> None:
    torch.manual_seed(1)
    call, inputs = CALLS[op](True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: call(*t), fullgraph=True, dynamic=True, backend="aot_eager")
    with use_backend(backend):
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
def test_dropout_is_torch_s_seed_s(op: str, backend: str) -> None:
    torch.manual_seed(1)
    call, inputs = CALLS[op](False, dropout=0.4)
    with use_backend(backend):
        runs = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            runs.append(results(call, inputs))
    assert torch.equal(runs[0][0][0], runs[1][0][0])
    assert not torch.equal(runs[0][0][0], runs[2][0][0])


@pytest.mark.parametrize("op", ["conv_attention", "mlp_block"])
def test_dropout_is_the_same_backward(op: str) -> None:
    torch.manual_seed(1)
    call, inputs = CALLS[op](False, dropout=0.4)
    leaves = [t.double().requires_grad_() for t in inputs]

    def seeded(*t: Tensor) -> Tensor:
        torch.manual_seed(3)
        return call(*t)[0]

    with use_backend("native"):
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


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("values", [True, False], ids=["values", "shared"])
def test_attention_without_folding_is_as_good_as_the_reference(
    training: bool, values: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_conv_attention_fused, "UNFOLDED_PAYS", {"cpu"})
    torch.manual_seed(1)
    options = {"shape": (2, 64, 7, 9), "head_dim": 32, "values": values}
    call, inputs = CALLS["conv_attention"](training, **options)
    with use_backend("reference"):
        exact = results(call, [t.double() for t in inputs])
        reference = results(call, inputs)
    with use_backend("native"):
        actual = results(call, inputs)
    for part, backward in ((0, False), (1, True)):
        for mine, true, theirs in zip(actual[part], exact[part], reference[part], strict=True):
            assert_as_good(mine, true, theirs, backward=backward)


def test_heads_of_queries_and_values_may_differ_in_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_conv_attention_fused, "UNFOLDED_PAYS", {"cpu"})
    x = torch.randn(2, 16, 5, 5)
    p = ops.Depthwise(torch.randn(16, 1, 3, 3), torch.ones(16), torch.zeros(16), None)
    w = ops.Pointwise(*(torch.randn(n, 16) for n in (32, 32, 48)), torch.randn(16, 48))
    found = []
    for name in ("native", "reference"):
        with use_backend(name):
            found.append(ops.conv_attention(x, x, p, p, None, w, heads=2)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_wide_tokens_are_not_folded_into_narrow_heads() -> None:
    dim, head_dim = 48, 8
    x = torch.randn(1, dim, 5, 5)
    p = ops.Depthwise(torch.randn(dim, 1, 3, 3), torch.ones(dim), torch.zeros(dim), None)
    w = ops.Pointwise(*(torch.randn(head_dim, dim) for _ in range(3)), torch.randn(dim, head_dim))
    with use_backend("native"), pytest.raises(RuntimeError, match="48 channels are too many"):
        ops.conv_attention(x, x, p, p, None, w, heads=1)
    assert _backend.explain(("cpu",))
