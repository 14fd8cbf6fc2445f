"""Attention with convolutional projections against its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eqcvt import groups, ops
from eqcvt.nn import Filters

pytestmark = pytest.mark.usefixtures("backend")


def _depthwise(dim: int, kernel: int = 3, symmetric: bool = False) -> ops.Depthwise:
    filters = torch.randn(dim, 1, kernel, kernel, dtype=torch.float64)
    if symmetric:
        filters = sum(filters.rot90(turn, (2, 3)) for turn in range(4))
    scale, shift = torch.rand(dim, dtype=torch.float64), torch.randn(dim, dtype=torch.float64)
    return ops.Depthwise(filters, scale, shift, None)


def _pointwise(dim: int, heads: int, head_dim: int, bias: bool = False) -> ops.Pointwise:
    width = heads * head_dim
    q, k, v = (torch.randn(width, dim, dtype=torch.float64) for _ in range(3))
    out = torch.randn(dim, width, dtype=torch.float64)
    biases = [torch.randn(width, dtype=torch.float64) if bias else None for _ in range(3)]
    return ops.Pointwise(q, k, v, out, *biases, torch.randn(dim, dtype=torch.float64))


def _normalised(x: Tensor, p: ops.Depthwise, stride: int) -> Tensor:
    a = F.conv2d(x, p.filters, stride=stride, padding=p.filters.shape[-1] // 2, groups=x.shape[1])
    a = (a - a.mean((0, 2, 3), keepdim=True)) / (
        a.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    return a * p.weight.view(1, -1, 1, 1) + p.bias.view(1, -1, 1, 1)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kv_stride", [1, 2])
def test_op_is_its_formula_written_out(separate: bool, bias: bool, kv_stride: int) -> None:
    dim, heads, head_dim = 4, 3, 5
    x, residual = torch.randn(2, 2, dim, 7, 7, dtype=torch.float64)
    q, k = _depthwise(dim), _depthwise(dim)
    v = _depthwise(dim) if separate else None
    w = _pointwise(dim, heads, head_dim, bias)
    y, statistics = ops.conv_attention(x, residual, q, k, v, w, heads=heads, kv_stride=kv_stride)

    a = _normalised(x, q, 1).flatten(2)
    b = _normalised(x, k, kv_stride).flatten(2)
    c = b if v is None else _normalised(x, v, kv_stride).flatten(2)
    expected = torch.zeros_like(a) + (0 if w.out_bias is None else w.out_bias[:, None])
    for h in range(heads):
        rows = slice(h * head_dim, (h + 1) * head_dim)

        def project(
            weight: Tensor, offset: Tensor | None, tokens: Tensor, rows: slice = rows
        ) -> Tensor:
            y = weight[rows] @ tokens
            return y if offset is None else y + offset[rows, None]

        queries, keys = project(w.q, w.q_bias, a), project(w.k, w.k_bias, b)
        scores = queries.transpose(1, 2) @ keys / head_dim**0.5
        values = project(w.v, w.v_bias, c)
        expected = expected + w.out[:, rows] @ (values @ scores.softmax(-1).transpose(1, 2))
    torch.testing.assert_close(y, residual + expected.reshape(x.shape), atol=1e-10, rtol=0)
    assert len(statistics) == (3 if separate else 2)


@pytest.mark.parametrize("separate", [False, True])
def test_a_norm_in_front_is_layer_norm_of_the_tokens(separate: bool) -> None:
    x, residual = torch.randn(2, 2, 16, 7, 5, dtype=torch.float64)
    q, k, v, w = _depthwise(16), _depthwise(16), _depthwise(16), _pointwise(16, 2, 16)
    norm = ops.Norm(*torch.randn(2, 16, dtype=torch.float64), eps=0.1)
    options = {"heads": 2, "kv_stride": 2}
    parts = (residual, q, k, v if separate else None, w)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    y, statistics = ops.conv_attention(leaves[0], *parts, norm=norm, **options)
    z = F.layer_norm(leaves[1].permute(0, 2, 3, 1), (16,), *norm).permute(0, 3, 1, 2)
    expected, wanted = ops.conv_attention(z, *parts, **options)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)
    for found, pair in zip(statistics, wanted, strict=True):
        torch.testing.assert_close(found, pair)
    dy = torch.randn_like(y)
    dx, dz = (torch.autograd.grad(t, leaf, dy)[0] for t, leaf in zip((y, expected), leaves))  # noqa: B905
    torch.testing.assert_close(dx, dz, atol=1e-11, rtol=0)
    weights = ops.attention_weights(x, q, k, w, norm=norm, **options)
    torch.testing.assert_close(weights, ops.attention_weights(z.detach(), q, k, w, **options))


def test_weights_are_a_distribution_over_the_keys() -> None:
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    q, k, w = _depthwise(4), _depthwise(4), _pointwise(4, 3, 5)
    weights = ops.attention_weights(x, q, k, w, heads=3)
    assert weights.shape == (2, 3, 81, 25)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 81, dtype=torch.float64))


def test_weights_are_the_op_s_own() -> None:
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    q, k, w = _depthwise(4), _depthwise(4), _pointwise(4, 1, 4)
    y, _ = ops.conv_attention(x, torch.zeros_like(x), q, k, None, w, heads=1, kv_stride=1)
    weights = ops.attention_weights(x, q, k, w, heads=1, kv_stride=1)[0, 0]
    values = w.v @ _normalised(x, k, 1).flatten(2)[0]
    expected = w.out @ values @ weights.T + w.out_bias[:, None]
    torch.testing.assert_close(y.flatten(2)[0], expected)


def test_gradients_are_those_of_finite_differences() -> None:
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    q, k, v = (_depthwise(3) for _ in range(3))
    w = _pointwise(3, 2, 4, bias=True)
    leaves = [t.requires_grad_() for p in (q, k, v) for t in p[:3]] + [
        t.requires_grad_() for t in w if t is not None
    ]
    leaves += [t.requires_grad_() for t in torch.randn(2, 3, dtype=torch.float64).unbind()]

    def run(x: Tensor, *leaves: Tensor) -> Tensor:
        parts = [ops.Depthwise(*leaves[3 * i : 3 * i + 3], None) for i in range(3)]
        pointwise, norm = ops.Pointwise(*leaves[9:-2]), ops.Norm(*leaves[-2:])
        y, _ = ops.conv_attention(x, x, *parts, pointwise, norm=norm, heads=2)
        return y

    assert torch.autograd.gradcheck(run, (x, *leaves), atol=1e-4)


@pytest.mark.parametrize("kv_stride", [1, 2])
def test_symmetric_filters_let_every_turn_through(kv_stride: int) -> None:
    group = groups.Group.from_name("C4")
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    q, k, w = _depthwise(4, symmetric=True), _depthwise(4, symmetric=True), _pointwise(4, 2, 8)

    def op(t: Tensor) -> Tensor:
        return ops.conv_attention(t, t, q, k, None, w, heads=2, kv_stride=kv_stride)[0]

    for g in range(4):
        turned = group.act_on_image(op(x), g)
        torch.testing.assert_close(op(group.act_on_image(x, g)), turned, atol=1e-12, rtol=0)


def test_an_even_size_with_stride_two_does_not() -> None:
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    q, k, w = _depthwise(4, symmetric=True), _depthwise(4, symmetric=True), _pointwise(4, 2, 8)
    y = ops.conv_attention(x, x, q, k, None, w, heads=2)[0]
    turned = ops.conv_attention(x.rot90(1, (2, 3)), x.rot90(1, (2, 3)), q, k, None, w, heads=2)[0]
    assert (turned - y.rot90(1, (2, 3))).abs().max() > 1e-3


@settings(max_examples=25)
@given(
    batch=st.integers(0, 3),
    dim=st.sampled_from([1, 3, 8, 17]),
    heads=st.integers(1, 4),
    head_dim=st.sampled_from([1, 4, 7]),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    kernel=st.sampled_from([1, 3, 5]),
    kv_stride=st.integers(1, 3),
)
def test_any_size_works(
    batch: int,
    dim: int,
    heads: int,
    head_dim: int,
    height: int,
    width: int,
    kernel: int,
    kv_stride: int,
) -> None:
    x = torch.randn(batch, dim, height, width, dtype=torch.float64)
    running = (torch.zeros(dim, dtype=torch.float64), torch.ones(dim, dtype=torch.float64))
    q, k = (_depthwise(dim, kernel)._replace(running=running) for _ in range(2))
    y, statistics = ops.conv_attention(
        x, x, q, k, None, _pointwise(dim, heads, head_dim), heads=heads, kv_stride=kv_stride
    )
    assert y.shape == x.shape
    assert torch.isfinite(y).all()
    assert statistics == (None, None)


def test_large_scores_do_not_overflow() -> None:
    x = torch.randn(1, 4, 6, 6) * 100
    q, k = (
        ops.Depthwise(*(t.float() for t in _depthwise(4)[:3]), (torch.zeros(4), torch.ones(4)))
        for _ in range(2)
    )
    w = ops.Pointwise(*(None if t is None else t.float() for t in _pointwise(4, 2, 8)))
    y, _ = ops.conv_attention(x, x, q, k, None, w, heads=2)
    assert torch.isfinite(y).all()


def test_nan_spreads_over_its_own_image_only() -> None:
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    x[0, 0, 3, 3] = float("nan")
    running = (torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64))
    q, k = (_depthwise(4)._replace(running=running) for _ in range(2))
    y, _ = ops.conv_attention(x, x, q, k, None, _pointwise(4, 2, 4), heads=2)
    assert y[0].isnan().all()
    assert not y[1].isnan().any()


def test_dropout_keeps_the_mean_and_the_residual() -> None:
    x = torch.randn(1, 4, 30, 30, dtype=torch.float64)
    q, k, w = _depthwise(4), _depthwise(4), _pointwise(4, 2, 4)
    clean = ops.conv_attention(x, torch.zeros_like(x), q, k, None, w, heads=2)[0]
    y = ops.conv_attention(x, torch.zeros_like(x), q, k, None, w, heads=2, dropout=0.25)[0]
    kept = y != 0
    assert abs(kept.double().mean().item() - 0.75) < 0.03
    torch.testing.assert_close(y[kept], clean[kept] / 0.75)


def test_channels_last_tokens_give_the_same() -> None:
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    q, k, w = _depthwise(4), _depthwise(4), _pointwise(4, 2, 4)
    last = x.to(memory_format=torch.channels_last)
    y = ops.conv_attention(x, x, q, k, None, w, heads=2)[0]
    torch.testing.assert_close(ops.conv_attention(last, last, q, k, None, w, heads=2)[0], y)


def test_compiles_without_graph_breaks_for_any_batch() -> None:
    q, k, w = _depthwise(4), _depthwise(4), _pointwise(4, 2, 4)
    compiled = torch.compile(
        lambda t: ops.conv_attention(t, t, q, k, None, w, heads=2)[0],
        fullgraph=True,
        dynamic=True,
        backend="eager",
    )
    for batch in (2, 3, 5):
        x = torch.randn(batch, 4, 7, 7, dtype=torch.float64)
        expected = ops.conv_attention(x, x, q, k, None, w, heads=2)[0]
        torch.testing.assert_close(compiled(x), expected)


def test_symmetric_filters_hold_one_weight_per_orbit() -> None:
    filters = Filters(4, 1, 3, groups.Group.from_name("C4"))
    assert filters.weight.shape == (4, 1, 3)
    for turn in range(4):
        assert torch.equal(filters(), filters().rot90(turn, (2, 3)))
    assert Filters(4, 1, 5, groups.Group.from_name("C4")).weight.shape == (4, 1, 7)
    assert Filters(4, 1, 5, groups.Group.from_name("D4")).weight.shape == (4, 1, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": torch.zeros(2, 4, 5, 6)}, r"one shape, got \[2, 4, 5, 5\]"),
        ({"heads": 3}, "8 query channels cannot be split into 3 heads"),
        ({"k": torch.zeros(6, 4)}, r"pointwise weights do not fit: q \[8, 4\], k \[6, 4\]"),
    ],
)
def test_wrong_shapes_are_named(change: dict[str, object], message: str) -> None:
    x = torch.zeros(2, 4, 5, 5)
    q, k, w = _depthwise(4), _depthwise(4), _pointwise(4, 2, 4)
    if "k" in change:
        w = w._replace(k=change["k"])
    with pytest.raises(ValueError, match=message):
        ops.conv_attention(
            x, change.get("residual", x), q, k, None, w, heads=change.get("heads", 2)
        )


@pytest.mark.parametrize("size", [(4, 4), (3, 5)])
def test_filters_without_a_middle_are_refused(size: tuple[int, int]) -> None:
    x, k = torch.zeros(2, 4, 5, 5), _depthwise(4)
    q = k._replace(filters=torch.zeros(4, 1, *size))
    with pytest.raises(ValueError, match=r"filters \[4, 1, k, k\] with odd k, got \[4, 1, "):
        ops.conv_attention(x, x, q, k, None, _pointwise(4, 2, 4), heads=2)


def test_a_norm_of_other_tokens_is_refused() -> None:
    x = torch.randn(1, 4, 5, 5)
    norm = ops.Norm(torch.ones(5), torch.zeros(4))
    with pytest.raises(ValueError, match=r"needs norm\.weight \[4\], got \[5\]"):
        ops.conv_attention(
            x, x, _depthwise(4), _depthwise(4), None, _pointwise(4, 2, 4), norm=norm, heads=2
        )
