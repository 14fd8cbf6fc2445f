"""The CUDA kernels of conv_attention, run on the host, against the primitives."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.native.cuda_emulator import DTYPES, Emulated, fixture, new
from tests.ops import primitives
from tests.tolerance import assert_all_as_good, double

EPS = 1e-3
SEED = torch.tensor([-(2**61) + 987654321])
native = fixture("conv_attention*.cu")


class Attention(NamedTuple):
    """Sizes and options of a call."""

    batch: int
    n: int
    m: int
    d: int
    heads: int
    separate: bool = False
    residual: bool = False
    dropout: float = 0.0


ATTENTIONS = pytest.mark.parametrize(
    "case",
    [
        Attention(2, 13, 7, 32, 3, False, True, 0.1),
        Attention(1, 131, 129, 32, 1, False, False, 0.0),
        Attention(1, 67, 65, 16, 2, True, True, 0.3),
        Attention(1, 5, 70, 24, 1, True, False, 0.0),
        Attention(1, 3, 5, 7, 2, False, True, 0.4),
        Attention(2, 11, 9, 7, 2, False, False, 0.4),
        Attention(1, 65, 33, 64, 1, True, True, 0.0),
        Attention(1, 17, 35, 100, 1, True, True, 0.2),
    ],
)


def _attend_args(case: Attention, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    batch, n, m, d, heads, *_ = case
    torch.manual_seed(batch * 1000 + n + m + d + heads)
    p = 3 if case.separate else 2
    a, b, c = torch.randn(batch, n, d), torch.randn(batch, m, d), torch.randn(batch, m, d)
    rows = [
        a + 0.5,
        b - 0.5,
        c if case.separate else None,
        torch.randn(batch, n, d) if case.residual else None,
    ]
    tokens = [t.to(dtype) if t is not None else None for t in rows]
    scale, shift = torch.rand(p, d) + 0.5, torch.randn(p, d) / 2
    wq, wo = torch.randn(heads, d, d) / d, torch.randn(heads, d, d) / d**0.5
    return *tokens, scale, shift, wq, torch.randn(heads, d) / 4, wo, torch.randn(d), SEED


def _attend(
    native: Emulated, args: tuple[Tensor | None, ...], *, dropout: float, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    a, b, wq = args[0], args[1], args[6]
    assert a is not None
    assert b is not None
    assert wq is not None
    batch, n, d = a.shape
    heads = wq.shape[0]
    y, o = new((batch, n, d), a.dtype), new((batch, n, heads, d) if save else (0,), a.dtype)
    lse = new((batch, heads, n) if save else (0,), torch.float32)
    sizes = [batch, n, b.shape[1], d, heads]
    saved = [o, lse] if save else [None, None]
    native.launch("conv_attention_attend", *args, *sizes, save, dropout, y, *saved, like=a)
    return y, o, lse


def _check_attend(native: Emulated, args: tuple[Tensor | None, ...], dropout: float) -> None:
    found = _attend(native, args, dropout=dropout, save=True)
    reference = primitives.conv_attention_attend(*args, dropout=dropout, save=True)
    exact = primitives.conv_attention_attend(*double(args), dropout=dropout, save=True)
    assert_all_as_good(found, exact, reference)


@pytest.mark.parametrize("dtype", DTYPES)
@ATTENTIONS
def test_attend(native: Emulated, dtype: torch.dtype, case: Attention) -> None:
    _check_attend(native, _attend_args(case, dtype), case.dropout)


def _attend_backward(
    native: Emulated,
    dy: Tensor,
    args: tuple[Tensor | None, ...],
    o: Tensor,
    lse: Tensor,
    dropout: float,
) -> tuple[Tensor, ...]:
    a, b, c, _, scale, shift, *weights, _ = args
    assert a is not None
    assert b is not None
    sizes = [a.shape[0], a.shape[1], b.shape[1], a.shape[2], o.shape[2]]
    like = [a, b, c, scale, shift, *weights]
    found = [new(tuple(t.shape), t.dtype) if t is not None else None for t in like]
    rest = [a, b, c, *args[4:], o, lse]
    native.launch("conv_attention_attend_backward", dy, *rest, *sizes, dropout, *found, like=a)
    return tuple(t if t is not None else a.new_empty(0) for t in found)


@pytest.mark.parametrize("dtype", DTYPES)
@ATTENTIONS
def test_attend_backward(native: Emulated, dtype: torch.dtype, case: Attention) -> None:
    args, dropout = _attend_args(case, dtype), case.dropout
    a, rest = args[0], [*args[:3], *args[4:]]
    assert a is not None
    dy = torch.randn(a.shape).to(a.dtype)
    _, o, lse = _attend(native, args, dropout=dropout, save=True)
    found = _attend_backward(native, dy, args, o, lse, dropout)
    reference = primitives.conv_attention_attend_backward(dy, *rest, o, lse, dropout=dropout)
    wide = double([dy, *rest, o, lse])
    exact = primitives.conv_attention_attend_backward(*wide, dropout=dropout)
    assert_all_as_good(found, exact, reference, backward=True)


class Projection(NamedTuple):
    """Sizes and options of a call."""

    batch: int
    d: int
    h: int
    w: int
    kk: int
    kv_stride: int = 2
    separate: bool = False
    moments: bool = False
    norm: bool = True


PROJECTIONS = pytest.mark.parametrize(
    "case",
    [
        Projection(2, 32, 7, 5, 3, 2, False, True, True),
        Projection(1, 16, 11, 13, 3, 2, True, True, False),
        Projection(1, 7, 6, 4, 3, 1, True, False, True),
        Projection(3, 128, 3, 2, 3, 2, False, True, True),
        Projection(1, 20, 9, 8, 5, 3, True, True, True),
        Projection(1, 3, 1, 1, 7, 2, False, False, False),
        Projection(1, 4, 40, 37, 3, 2, False, True, True),
    ],
)


def _project(
    native: Emulated, x: Tensor, parameters: list[Tensor | None], kv_stride: int, moments: bool
) -> tuple[Tensor, ...]:
    """Call the launcher with x [B, D, H, W], whose memory it wants channels last."""
    batch, d, h, w = x.shape
    kk, p = parameters[0].shape[-1], sum(f is not None for f in parameters[:3])
    n, m = h * w, -(-h // kv_stride) * -(-w // kv_stride)
    outs = [new((batch, t, d), x.dtype) for t in (n, m, m)]
    stats = [new((p, d) if moments else (0,), torch.float32) for _ in range(2)]
    results = [outs[0], outs[1], outs[2] if p == 3 else None, *(stats if moments else [None, None])]
    last = x.permute(0, 2, 3, 1).contiguous()
    options = [batch, d, h, w, kk, kv_stride, moments, EPS]
    native.launch("conv_attention_project", last, *parameters, *options, *results, like=x)
    return outs[0], outs[1], outs[2] if p == 3 else x.new_empty(0), *stats


def _project_args(case: Projection, dtype: torch.dtype) -> tuple[Tensor, list[Tensor | None]]:
    batch, d, h, w, kk, *_ = case
    torch.manual_seed(batch + d + h + w + kk)
    x = (torch.randn(batch, d, h, w) + 1).to(dtype)
    filters = [torch.randn(d, 1, kk, kk) / kk for _ in range(3)]
    affine = [torch.rand(d) + 0.5, torch.randn(d) / 2] if case.norm else [None, None]
    return x, [filters[0], filters[1], filters[2] if case.separate else None, *affine]


def _call_project_backward(
    native: Emulated,
    x: Tensor,
    parameters: list[Tensor | None],
    gradients: list[Tensor | None],
    statistics: list[Tensor | None],
    tokens: list[Tensor | None],
    mean: Tensor,
    kv_stride: int,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return the results, and the arguments that the primitive wants before x."""
    batch, d, h, w = x.shape
    dx = new((batch, h, w, d), x.dtype)
    found = [None if p is None else new(tuple(p.shape), p.dtype) for p in parameters]
    args = [*gradients, *statistics, *tokens, mean if statistics[0] is not None else None]
    last = x.permute(0, 2, 3, 1).contiguous()
    options = [batch, d, h, w, parameters[0].shape[-1], kv_stride, EPS]
    native.launch(
        "conv_attention_project_backward", *args, last, *parameters, *options, dx, *found, like=x
    )
    empty = x.new_empty(0)
    return [dx.permute(0, 3, 1, 2), *(empty if t is None else t for t in found)], args


def _project_backward(
    native: Emulated,
    x: Tensor,
    parameters: list[Tensor | None],
    forward: list[Tensor],
    kv_stride: int,
) -> list[Tensor]:
    """The gradients for outputs that serve as their own gradients."""
    tokens = [*forward[:2], None if parameters[2] is None else forward[2]]
    moments = forward[3].numel() > 0
    statistics = [forward[3], forward[4]] if moments else [None, None]
    args = (x, parameters, tokens, statistics, tokens, forward[3], kv_stride)
    return _call_project_backward(native, *args)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@PROJECTIONS
def test_project(native: Emulated, dtype: torch.dtype, case: Projection) -> None:
    x, filters = _project_args(case, dtype)
    found = _project(native, x, filters, case.kv_stride, case.moments)
    options = {"kv_stride": case.kv_stride, "moments": case.moments, "eps": EPS}
    reference = primitives.conv_attention_project(x, *filters, **options)
    exact = primitives.conv_attention_project(*double([x, *filters]), **options)
    assert_all_as_good(found, exact, reference)
    if case.moments:
        stored = [t.double() for t in found[:3] if t.numel()]
        mean = torch.stack([t.mean((0, 1)) for t in stored])
        variance = torch.stack([t.var((0, 1), correction=0) for t in stored])
        torch.testing.assert_close(found[3].double(), mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found[4].double(), variance, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@PROJECTIONS
def test_project_backward(native: Emulated, dtype: torch.dtype, case: Projection) -> None:
    x, filters = _project_args(case, dtype)
    *raw, mean, _ = _project(native, x, filters, case.kv_stride, case.moments)
    tokens = [t if t.numel() else None for t in raw]
    gradients = [torch.randn(t.shape).to(dtype) if t is not None else None for t in tokens]
    count = case.batch * tokens[1].shape[1]
    statistics: list[Tensor | None] = [None, None]
    if case.moments:
        statistics = [torch.randn(mean.shape) * count**0.5 for _ in range(2)]
    found, args = _call_project_backward(
        native, x, filters, gradients, statistics, tokens, mean, case.kv_stride
    )
    args += [x, *filters]
    options = {"kv_stride": case.kv_stride, "eps": EPS}
    reference = primitives.conv_attention_project_backward(*args, **options)
    exact = primitives.conv_attention_project_backward(*double(args), **options)
    assert_all_as_good(found, exact, reference, backward=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("separate", [False, True])
def test_attend_in_any_order_of_threads(
    native: Emulated, dtype: torch.dtype, separate: bool
) -> None:
    args = _attend_args(Attention(1, 135, 135, 16, 2, separate, residual=True), dtype)
    dy = torch.randn(1, 135, 16).to(dtype)

    def run() -> list[Tensor]:
        forward = _attend(native, args, dropout=0.1, save=True)
        return [*forward, *_attend_backward(native, dy, args, *forward[1:], 0.1)]

    assert not any(t.isnan().any() for t in native.in_any_order(run))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_project_in_any_order_of_threads(native: Emulated, dtype: torch.dtype) -> None:
    x, filters = _project_args(Projection(2, 20, 9, 8, 3, separate=True), dtype)

    def run() -> list[Tensor]:
        found = list(_project(native, x, filters, 2, moments=True))
        return found + _project_backward(native, x, filters, found, 2)

    native.in_any_order(run)


def test_attend_keeps_what_the_reference_keeps(native: Emulated) -> None:
    args = list(_attend_args(Attention(2, 37, 5, 7, 2), torch.float32))
    args[9] = torch.full((7,), 100.0)
    y = _attend(native, tuple(args), dropout=0.3, save=False)[0]
    assert torch.equal(y == 0, primitives.keep(SEED, y.shape, 0.3, 0) == 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("separate", [False, True])
def test_empty_batch(native: Emulated, dtype: torch.dtype, separate: bool) -> None:
    args = _attend_args(Attention(0, 6, 4, 8, 2, separate, residual=True), dtype)
    forward = _attend(native, args, dropout=0.1, save=True)
    found = _attend_backward(native, args[0], args, *forward[1:], 0.1)
    assert all((t == 0).all() for t in found)
    x, filters = _project_args(Projection(0, 8, 3, 2, 3, separate=separate), dtype)
    projected = list(_project(native, x, filters, 2, moments=False))
    assert all((t == 0).all() for t in _project_backward(native, x, filters, projected, 2)[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["a", "b"])
def test_attend_passes_nan_and_inf_on(
    native: Emulated, dtype: torch.dtype, value: float, which: str
) -> None:
    args = _attend_args(Attention(2, 21, 9, 16, 2, residual=True), dtype)
    broken = args["ab".index(which)]
    assert broken is not None
    broken[1, 3, 2] = value
    found = _attend(native, args, dropout=0.1, save=True)
    # In float32: on a CPU with AMX, torch's product of bfloat16 carries a NaN on to the row before.
    wide = [None if t is None else t.float() for t in args[:-1]] + [args[-1]]
    reference = primitives.conv_attention_attend(*wide, dropout=0.1, save=True)
    assert torch.equal(found[0].isfinite(), reference[0].isfinite())
    assert torch.equal(found[1].isfinite(), reference[1].isfinite())
    dy = torch.randn(2, 21, 16).to(dtype)
    gradients = _attend_backward(native, dy, args, *found[1:], 0.1)
    expected = primitives.conv_attention_attend_backward(
        dy.float(), *wide[:3], *wide[4:], *reference[1:], dropout=0.1
    )
    for g, e in zip(gradients[:2], expected[:2], strict=True):
        assert torch.equal(g.isnan(), e.isnan())


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_far_from_zero(native: Emulated, dtype: torch.dtype) -> None:
    """All scores of a query may be far below zero, or above: padding must not weigh in."""
    args = list(_attend_args(Attention(1, 20, 7, 16, 1, separate=True), dtype))
    args[0], args[4][0], args[5][0] = args[0].abs(), 1.0, 0.0
    args[1], args[4][1], args[5][1] = args[1].abs(), 1.0, 0.0
    for factor in (-4.0, 4.0, -30.0, 30.0):
        args[6] = torch.eye(16)[None] * factor
        if abs(factor) < 10:
            _check_attend(native, tuple(args), 0.0)
        forward = _attend(native, tuple(args), dropout=0.0, save=True)
        dy = torch.randn(1, 20, 16).to(dtype)
        found = _attend_backward(native, dy, tuple(args), *forward[1:], 0.0)
        assert all(t.isfinite().all() for t in [*forward, *found])
    assert (forward[2] > 100).any()  # e^100 is beyond float


def test_sizes_that_are_refused(native: Emulated) -> None:
    args = _attend_args(Attention(1, 2, 2, 129, 1), torch.float32)
    x, filters = _project_args(Projection(1, 4, 3, 3, 9), torch.float32)
    with pytest.raises(AssertionError, match="status -3"):
        _attend(native, args, dropout=0.0, save=True)
    with pytest.raises(AssertionError, match="status -3"):
        _project(native, x, filters, 2, moments=False)
