"""The Triton kernels of convolutional attention against plain PyTorch in float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eqcvt import ops
from eqcvt.nn.backend import set_backend
from eqcvt.nn.transformer import Block, Stage
from tests.ops import primitives
from tests.tolerance import assert_all_as_good, double, of_other_strides

pytest.importorskip("triton")
from eqcvt.kernels import (
    common,
    conv_attention,
    conv_attention_attend,
    conv_attention_attend_backward,
    conv_attention_key_gradients,
    launches,
)
from tests.kernels.memory import filled_memory

pytestmark = pytest.mark.needs("interpreter")
NAMES = ("y", "o", "lse")
GRADIENTS = ("da", "db", "dc", "dscale", "dshift", "dwq", "dbq", "dwo", "dbo")


def _compare(
    names: tuple[str, ...],
    call: Callable[[Any], Callable[..., tuple[Tensor, ...]]],
    arguments: list[Any],
    settings: dict[str, Any],
    backward: bool = False,
) -> tuple[Tensor, ...]:
    """Check every result of a kernel; ``call`` picks the function of a module."""
    actual = call(conv_attention)(*arguments, **settings)
    reference = call(primitives)(*arguments, **settings)
    exact = call(primitives)(*double(arguments), **settings)
    assert_all_as_good(actual, exact, reference, names, backward=backward)
    return actual


def _of(name: str) -> Callable[[Any], Any]:
    return lambda m: getattr(m, name if m is not primitives else f"conv_attention_{name}")


class Attention:
    """Arguments of ``attend``."""

    def __init__(
        self,
        batch: int = 2,
        queries: int = 19,
        keys: int = 13,
        width: int = 16,
        heads: int = 2,
        values: bool = False,
        residual: bool = True,
        gain: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.a, self.residual, self.dy = (torch.randn(3, batch, queries, width).to(dtype)).unbind()
        self.b, self.c = torch.randn(2, batch, keys, width).to(dtype).unbind()
        projections = 3 if values else 2
        self.parameters = [
            1 + 0.3 * torch.randn(projections, width),
            0.3 * torch.randn(projections, width),
            gain * torch.randn(heads, width, width) / width,
            0.1 * torch.randn(heads, width),
            torch.randn(heads, width, width) / width**0.5,
            0.1 * torch.randn(width),
            torch.tensor([2**40 + 77]),
        ]
        self.has_values, self.has_residual = values, residual

    def forward(self) -> list[Any]:
        residual = self.residual if self.has_residual else None
        return [self.a, self.b, self.c if self.has_values else None, residual, *self.parameters]

    def backward(self, o: Tensor, lse: Tensor) -> list[Any]:
        a, b, c, _, *rest = self.forward()
        return [self.dy, a, b, c, *rest, o, lse]


CASES: dict[str, dict[str, Any]] = {
    "model": {"width": 32, "heads": 3, "queries": 67, "keys": 37, "batch": 1},
    "values": {"values": True, "residual": False},
    "padded channels": {"width": 24, "heads": 3, "values": True, "batch": 1},
    "wide": {"width": 40, "heads": 2, "batch": 1, "queries": 33, "keys": 32},
    "sharp": {"gain": 300.0, "heads": 1},
    "one query": {"queries": 1, "keys": 2, "batch": 1, "heads": 1},
    "odd channels": {"width": 18, "heads": 1, "batch": 3},
}


@pytest.mark.parametrize("name", CASES)
def test_attention_and_gradients_are_as_good_as_pytorch_s(name: str) -> None:
    case = Attention(**CASES[name])
    settings = {"dropout": 0.0 if name == "values" else 0.3}
    _, o, lse = _compare(NAMES, _of("attend"), case.forward(), settings | {"save": True})
    _compare(GRADIENTS, _of("attend_backward"), case.backward(o, lse), settings, backward=True)


@pytest.mark.parametrize("name", ["model", "padded channels"])
def test_half_precision_attention_is_as_good_as_pytorch_s(name: str) -> None:
    case = Attention(**CASES[name], dtype=torch.float16)
    settings = {"dropout": 0.3}
    _, o, lse = _compare(NAMES, _of("attend"), case.forward(), settings | {"save": True})
    _compare(GRADIENTS, _of("attend_backward"), case.backward(o, lse), settings, backward=True)


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("gain", [1.0, 300.0], ids=["bounded", "unbounded"])
def test_what_bfloat16_allows_is_as_good_as_pytorch_s(
    values: bool, gain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exponentials as they are, and a part of them by products; the interpreter has no products of
    bfloat16, and float16 will do for few keys.
    """
    case = Attention(queries=70, keys=131, width=32, values=values, gain=gain, dtype=torch.float16)
    monkeypatch.setattr(conv_attention_attend, "may_bound", lambda dtype: True)
    for module in (conv_attention_attend, conv_attention_attend_backward):
        monkeypatch.setattr(module, "coarse", lambda dtype: True)
    monkeypatch.setattr(conv_attention_key_gradients, "FLAGS", 2)  # of tiles and heads are more
    name = "conv_attention_attend_fwd 16 D32"
    launch = launches.nearest(*name.split(" "), 90) | {"BLOCK_M": 64}
    settings = {"dropout": 0.3}
    for products, registers in ((0, 96), (4, 128)):
        fields = {"PRODUCTS": products, "REGISTERS": registers}
        with launches.installed({f"sm90 {name}": launch | fields}):
            _, o, lse = _compare(NAMES, _of("attend"), case.forward(), settings | {"save": True})
        _compare(GRADIENTS, _of("attend_backward"), case.backward(o, lse), settings, backward=True)


def test_the_dropout_mask_is_the_one_of_all_backends() -> None:
    for width in (16, 18):
        case = Attention(width=width, residual=False, gain=0.0)
        case.parameters[4].zero_()
        case.parameters[5].fill_(1.0)
        y, _, _ = conv_attention.attend(*case.forward(), dropout=0.3, save=False)
        keep = primitives.keep(case.parameters[6], y.shape, 0.3, 0)
        assert torch.equal(y, keep.float())


def test_a_running_maximum_and_none_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Attention(**CASES["model"])
    bounded = conv_attention.attend(*case.forward(), dropout=0.0, save=True)
    monkeypatch.setattr(conv_attention_attend, "may_bound", lambda dtype: False)
    running = conv_attention.attend(*case.forward(), dropout=0.0, save=True)
    assert not torch.equal(bounded[2], running[2])
    for a, b in zip(bounded, running, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_weights_too_many_for_one_block_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Attention(heads=3, batch=1)
    _, o, lse = conv_attention.attend(*case.forward(), dropout=0.0, save=True)
    whole = conv_attention.attend_backward(*case.backward(o, lse), dropout=0.0)
    key = "sm80 conv_attention_weights_bwd 32 D32"
    small = launches.table()[key] | {"BLOCK_C": 32, "BLOCK_N": 16}
    monkeypatch.setattr(common, "INTERPRETED_PROGRAMS", 1)
    with launches.installed({key: small}):
        parts = conv_attention.attend_backward(*case.backward(o, lse), dropout=0.0)
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 32), (torch.float16, 16)])
@pytest.mark.parametrize("values", [False, True])
def test_keys_fetched_together_give_what_tiles_of_them_do(
    dtype: torch.dtype, bits: int, values: bool
) -> None:
    """In attention, with a running maximum (fp16) and without, and in its query gradient."""
    case = Attention(keys=131, batch=1, values=values, dtype=dtype)
    names = [f"conv_attention_attend_{kernel} {bits} D32" for kernel in ("fwd", "bwd_queries")]
    own = {f"sm90 {name}": launches.nearest(*name.split(" "), 90) for name in names}
    found = []
    for keys in (32, 64):
        with launches.installed({name: launch | {"BLOCK_M": keys} for name, launch in own.items()}):
            y, o, lse = conv_attention.attend(*case.forward(), dropout=0.2, save=True)
            gradients = conv_attention.attend_backward(*case.backward(o, lse), dropout=0.2)
        found.append([y, o, lse, *gradients])
    for a, b in zip(*found, strict=True):
        most = float(b.abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=0, atol=8 * torch.finfo(dtype).eps * most)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_leaves_room_for_more_programs_gives_the_same(dtype: torch.dtype) -> None:
    case = Attention(keys=131, batch=1, dtype=dtype)
    queries, keys = (
        f"conv_attention_attend_bwd_{kernel} {8 * dtype.itemsize} D32"
        for kernel in ("queries", "keys")
    )
    queries_launch, keys_launch = (
        launches.nearest(*name.split(" "), 90) for name in (queries, keys)
    )
    _, o, lse = conv_attention.attend(*case.forward(), dropout=0.2, save=True)
    found = []
    for reloaded, step in ((0, 64), (1, 32)):
        with launches.installed(
            {
                f"sm90 {queries}": queries_launch | {"RELOADED": reloaded},
                f"sm90 {keys}": keys_launch | {"STEP": step, "BLOCK_N": 64},
            }
        ):
            found.append(conv_attention.attend_backward(*case.backward(o, lse), dropout=0.2))
    for a, b in zip(*found, strict=True):
        most = float(b.abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=0, atol=8 * torch.finfo(dtype).eps * most)


def test_queries_are_shared_where_the_last_round_of_programs_would_be_empty() -> None:
    ways = conv_attention_key_gradients._ways
    images = {128: 16 * 128, 16: 16 * 16}
    assert ways(images[128], 177, 4 * 132) == 1  # 3.9 rounds
    assert ways(images[128], 177, 6 * 132) == 3  # 7.8, of a third each, not 2.6
    assert ways(images[16], 177, 4 * 132) == 2  # half of the first
    assert ways(1, 2, 10_000) == 2  # no more than there are tiles


@pytest.mark.parametrize(("queries", "keys"), [(16, 64), (32, 16), (32, 128)])
def test_tiles_of_the_backward_kernels_need_not_fit(queries: int, keys: int) -> None:
    case = Attention(queries=37, batch=1, values=True)
    _, o, lse = conv_attention.attend(*case.forward(), dropout=0.2, save=True)
    expected = conv_attention.attend_backward(*case.backward(o, lse), dropout=0.2)
    names = [f"sm80 conv_attention_attend_bwd_{kernel} 32 D32" for kernel in ("queries", "keys")]
    own, following = (launches.table()[name] for name in names)
    tiles = own | {"BLOCK_N": queries}, following | {"BLOCK_N": keys}
    with launches.installed(dict(zip(names, tiles, strict=True))):
        found = conv_attention.attend_backward(*case.backward(o, lse), dropout=0.2)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_query_that_is_not_finite_spoils_itself_only(value: float) -> None:
    case = Attention(residual=False)
    expected = conv_attention.attend(*case.forward(), dropout=0.0, save=False)[0]
    case.a[0, 3, 2] = value
    found = conv_attention.attend(*case.forward(), dropout=0.0, save=False)[0]
    assert found[0, 3].isnan().all()
    for n in (2, 4):
        torch.testing.assert_close(found[0, n], expected[0, n])


def test_large_scores_and_infinities_are_as_in_pytorch() -> None:
    case = Attention(queries=7, keys=70, heads=1, residual=False, values=True)
    scale, shift, wq, bq = case.parameters[:4]
    shift.zero_()
    bq.zero_()
    wq.copy_(torch.eye(16))
    scale.fill_(1.0)
    case.a[0, 0] *= 3000
    case.a[0, 1, 3] = float("nan")
    case.a[0, 2, 3] = float("inf")
    # Scores of -inf for all keys of the first tiles.
    case.a[1], case.b[1] = case.a[1].abs() + 0.1, 0.5
    case.b[1, :64, 0] = -float("inf")
    actual = conv_attention.attend(*case.forward(), dropout=0.0, save=True)
    expected = primitives.conv_attention_attend(*double(case.forward()), dropout=0.0, save=True)
    assert expected[0][0].isfinite().all(1).tolist() == [True, False, False, *[True] * 4]
    assert expected[0][1].isfinite().all()
    for a, e in zip(actual[:2], expected[:2], strict=True):
        torch.testing.assert_close(a, e.float(), equal_nan=True, rtol=1e-4, atol=1e-3)
    finite = expected[2].isfinite()
    torch.testing.assert_close(actual[2][finite], expected[2][finite].float(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_key_that_is_not_finite_spoils_its_image_only(value: float) -> None:
    case = Attention(batch=2)
    case.b[1, 5, 2] = value
    y, o, lse = conv_attention.attend(*case.forward(), dropout=0.0, save=True)
    expected = primitives.conv_attention_attend(*case.forward(), dropout=0.0, save=True)[0]
    assert torch.equal(y.isnan(), expected.isnan())
    gradients = conv_attention.attend_backward(*case.backward(o, lse), dropout=0.0)
    wanted = primitives.conv_attention_attend_backward(*case.backward(o, lse), dropout=0.0)
    for a, e in zip(gradients[:2], wanted[:2], strict=True):
        assert a[0].isfinite().all()
        assert torch.equal(a.isnan(), e.isnan())


PROJECTIONS: dict[str, dict[str, Any]] = {
    "model": {"width": 32, "height": 9, "breadth": 15, "batch": 1},
    "no norm": {"norm": False, "height": 5, "batch": 1},
    "values": {"values": True, "stride": 3, "height": 13, "breadth": 5, "width": 24, "batch": 1},
    "wide filters": {"size": 5, "height": 4, "breadth": 6, "batch": 1, "width": 40},
    "no moments": {"moments": False, "stride": 1, "values": True, "height": 5},
    "one pixel": {"height": 1, "breadth": 1, "batch": 3},
}


class Projection:
    """Arguments of ``project``."""

    def __init__(
        self,
        batch: int = 2,
        width: int = 16,
        height: int = 7,
        breadth: int = 6,
        size: int = 3,
        stride: int = 2,
        values: bool = False,
        norm: bool = True,
        moments: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        x = (torch.randn(batch, width, height, breadth) + 1).to(dtype)
        self.x = x.contiguous(memory_format=torch.channels_last)
        q, k, v = torch.randn(3, width, 1, size, size).unbind()
        self.filters = [q / size, k / size, v / size if values else None]
        self.norm = [torch.rand(width) + 0.5, torch.randn(width) / 2] if norm else [None, None]
        self.stride, self.moments = {"kv_stride": stride}, moments

    def forward(self) -> list[Any]:
        return [self.x, *self.filters, *self.norm]

    def backward(self, a: Tensor, b: Tensor, c: Tensor, mean: Tensor) -> list[Any]:
        values = self.filters[2] is not None
        gradients = [torch.randn(t.shape).to(t.dtype) for t in (a, b, c)]
        statistics = [torch.randn(mean.shape) if self.moments else None for _ in range(2)]
        return [
            *gradients[:2],
            gradients[2] if values else None,
            *statistics,
            a,
            b,
            c if values else None,
            mean if self.moments else None,
            *self.forward(),
        ]


def _check_projection(case: Projection) -> None:
    settings = case.stride | {"moments": case.moments}
    names = ("a", "b", "c", "mean", "variance")
    a, b, c, mean, _ = _compare(names, _of("project"), case.forward(), settings)
    arguments = case.backward(a, b, c, mean)
    names = ("dx", "dq", "dk", "dv", "dnorm_weight", "dnorm_bias")
    dx, *_ = _compare(names, _of("project_backward"), arguments, case.stride, backward=True)
    assert dx.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections_and_gradients_are_as_good_as_pytorch_s(name: str) -> None:
    _check_projection(Projection(**PROJECTIONS[name]))


def test_without_an_eps_pixels_beyond_the_image_spoil_no_gradient() -> None:
    case = Projection()
    case.stride["eps"] = 0.0
    _check_projection(case)


def test_half_precision_projections_are_as_good_as_pytorch_s() -> None:
    _check_projection(Projection(dtype=torch.float16, values=True))


def test_statistics_keep_a_small_variance_beside_a_large_mean() -> None:
    case = Projection(height=30, breadth=11, size=3, norm=False)
    case.x = case.x / 4096 + 4
    _, _, _, mean, variance = conv_attention.project(*case.forward(), moments=True, **case.stride)
    a, b, *_ = conv_attention.project(*case.forward(), moments=False, **case.stride)
    for i, t in enumerate((a, b)):
        torch.testing.assert_close(mean[i].double(), t.double().mean((0, 1)), rtol=1e-6, atol=0)
        exact = t.double().var((0, 1), correction=0)
        torch.testing.assert_close(variance[i].double(), exact, rtol=1e-5, atol=0)


def test_a_layer_norm_of_tokens_with_a_large_mean_loses_nothing() -> None:
    case = Projection(height=5)
    case.x = case.x + 1000
    _check_projection(case)


def test_any_strides_give_the_same_projections() -> None:
    case = Projection()
    expected = conv_attention.project(*case.forward(), moments=True, **case.stride)
    wide = torch.zeros(2, 20, 7, 14)
    wide[:, 2:18, :, 1:13:2] = case.x
    for x in (case.x.contiguous(), wide[:, 2:18, :, 1:13:2]):
        case.x = x
        found = conv_attention.project(*case.forward(), moments=True, **case.stride)
        for a, b in zip(found, expected, strict=True):
            if b.numel():
                torch.testing.assert_close(a, b, rtol=0, atol=of_other_strides(b))


def test_second_runs_and_filled_memory_give_the_same_bits() -> None:
    attention = Attention(values=True, batch=1)
    projection = Projection(values=True, batch=1)
    a, b, c, mean, _ = conv_attention.project(
        *projection.forward(), moments=True, **projection.stride
    )
    arguments = projection.backward(a, b, c, mean)

    def run() -> list[Tensor]:
        y, o, lse = conv_attention.attend(*attention.forward(), dropout=0.2, save=True)
        gradients = conv_attention.attend_backward(*attention.backward(o, lse), dropout=0.2)
        found = conv_attention.project(*projection.forward(), moments=True, **projection.stride)
        back = conv_attention.project_backward(*arguments, **projection.stride)
        return [y, o, lse, *gradients, *found, *back]

    expected = run()
    with filled_memory():
        assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))


class _Passes(TorchDispatchMode):
    """Notes torch's own ops that make or fill something of a number of entries."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.entries, self.seen = entries, Counter[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.numel() >= self.entries and func.namespace == "aten":
            given = [a.data_ptr() for a in args if isinstance(a, Tensor)]
            if func._schema.is_mutable or out.data_ptr() not in given:  # no view
                self.seen[func.overloadpacket.__name__] += 1
        return out


def test_a_transformer_block_makes_no_copy_of_its_tokens() -> None:
    block = Block(Stage(16, heads=2, head_dim=32), 0.1)
    set_backend(block, "triton")
    x = torch.randn(2, 16, 12, 9).contiguous(memory_format=torch.channels_last).requires_grad_()
    dy = torch.randn(2, 16, 12, 9).contiguous(memory_format=torch.channels_last)
    with _Passes(x.numel()) as passes:
        y = block(x)
        torch.autograd.grad(y, [x, *block.parameters()], dy)
    assert y.is_contiguous(memory_format=torch.channels_last)
    # The sum is of the gradients on both ways past the attention.
    assert passes.seen == {"add": 1}
    with _Passes(x.numel()) as passes:
        features = ops.token_mean(block(x))
        torch.autograd.grad(features, [x, *block.parameters()], torch.ones_like(features))
    assert passes.seen == {"add": 1}


def test_an_empty_batch_gives_empty_results() -> None:
    case = Attention(batch=0)
    y, o, lse = conv_attention.attend(*case.forward(), dropout=0.2, save=True)
    assert (y.shape, o.shape, lse.shape) == ((0, 19, 16), (0, 19, 2, 16), (0, 2, 19))
    da, db, dc, *rest = conv_attention.attend_backward(*case.backward(o, lse), dropout=0.2)
    assert (da.shape, db.shape, dc.shape) == ((0, 19, 16), (0, 13, 16), (0,))
    for t, p in zip(rest, case.parameters[:6], strict=True):
        assert t.shape == p.shape
        assert not t.any()
    projection = Projection(batch=0)
    a, b, c, mean, variance = conv_attention.project(
        *projection.forward(), moments=True, **projection.stride
    )
    assert (a.shape, b.shape, c.shape) == ((0, 42, 16), (0, 12, 16), (0,))
    assert not mean.any()
    assert not variance.any()
    arguments = projection.backward(a, b, c, mean)
    dx, dq, dk, dv, *dnorm = conv_attention.project_backward(*arguments, **projection.stride)
    assert (dx.shape, dv.shape) == ((0, 16, 7, 6), (0,))
    for t, p in zip((dq, dk, *dnorm), [*projection.filters[:2], *projection.norm], strict=True):
        assert t.shape == p.shape
        assert not t.any()


@pytest.mark.parametrize(
    ("shape", "size", "dtype", "reason"),
    [
        ((1, 32, 5, 5), 3, torch.float64, "takes float32, float16 and bfloat16, not float64"),
        ((1, 8, 5, 5), 3, torch.float32, "takes 16 to 128 channels, not 8"),
        ((1, 129, 5, 5), 3, torch.float32, "takes 16 to 128 channels, not 129"),
        ((1, 32, 5, 5), 5, torch.float32, "takes depthwise filters of 3 pixels, not 5"),
        ((1, 32, 5000, 5000), 3, torch.float32, "takes fewer than 2 ** 31 values per image"),
    ],
)
def test_refusals_say_why(
    shape: tuple[int, ...], size: int, dtype: torch.dtype, reason: str
) -> None:
    x = torch.zeros(1, dtype=dtype).expand(shape)
    filters = torch.zeros(shape[1], 1, size, size)
    why = conv_attention.supports(x, filters, heads=3, kv_stride=2)
    assert why is not None
    assert reason in why


def test_devices_are_refused_with_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    x, filters = torch.zeros(1, 32, 5, 5), torch.zeros(32, 1, 3, 3)
    assert conv_attention.supports(x, filters, heads=3, kv_stride=2) is None
    why = conv_attention.supports(x.to("meta"), filters, heads=3, kv_stride=2)
    assert why == "runs on CUDA devices, not on meta"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    why = conv_attention.supports(x, filters, heads=3, kv_stride=2)
    assert why == "runs on CUDA devices, not on the CPU"
