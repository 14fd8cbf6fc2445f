"""Attention's gradients in one pass against plain PyTorch in float64, and against two kernels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.ops import primitives
from tests.tolerance import assert_all_as_good, double

pytest.importorskip("triton")
from eqcvt.kernels import (
    conv_attention,
    conv_attention_attend_backward,
    conv_attention_key_gradients,
    conv_attention_one_pass,
    launches,
)
from tests.kernels import aot
from tests.kernels.memory import filled_memory
from tests.kernels.test_conv_attention import Attention

pytestmark = pytest.mark.needs("interpreter")
HALF = {"dtype": torch.float16, "width": 32}
# The interpreter has no products of bfloat16.
DTYPES = [torch.float16] + [torch.bfloat16] * torch.cuda.is_available()


@contextmanager
def _held(tiles: int, capability: int | None = None) -> Iterator[None]:
    """Have so many tiles of keys held, and the kernel that makes a second pass not be there."""
    if capability is None and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor
    capability = capability or launches.INTERPRETER
    name = "conv_attention_attend_bwd 16 D32"
    launch = launches.nearest(*name.split(" "), capability) | {"HELD": tiles}
    module, second = conv_attention_attend_backward, "key_gradients"
    with (
        launches.installed({f"sm{capability} {name}": launch}),
        mock.patch.object(module, second, None if tiles else getattr(module, second)),
    ):
        yield


def _gradients(case: Attention, tiles: int, dropout: float = 0.3) -> tuple[Tensor, ...]:
    _, o, lse = conv_attention.attend(*case.forward(), dropout=dropout, save=True)
    with _held(tiles):
        return conv_attention.attend_backward(*case.backward(o, lse), dropout=dropout)


def _check(case: Attention, tiles: int, dropout: float = 0.3) -> None:
    _, o, lse = conv_attention.attend(*case.forward(), dropout=dropout, save=True)
    given = case.backward(o, lse)
    with _held(tiles):
        found = conv_attention.attend_backward(*given, dropout=dropout)
    exact = primitives.conv_attention_attend_backward(*double(given), dropout=dropout)
    plain = primitives.conv_attention_attend_backward(*given, dropout=dropout)
    assert_all_as_good(found, exact, plain, backward=True)


CASES: dict[str, dict[str, Any]] = {
    "one tile of keys": {"queries": 67, "keys": 64, "heads": 3},
    "two ranges of tiles": {"queries": 130, "keys": 321, "heads": 1},
    "padded channels": {"queries": 33, "keys": 81, "width": 18},
    "sharp": {"queries": 37, "keys": 77, "gain": 300.0},
    "one query": {"queries": 1, "keys": 65, "heads": 1},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_as_good_as_pytorch_s(name: str, dtype: torch.dtype) -> None:
    _check(Attention(**(HALF | CASES[name] | {"dtype": dtype})), 4)


def test_without_dropout_and_with_all_tiles_held() -> None:
    _check(Attention(**HALF, queries=40, keys=321, batch=1), 8, dropout=0.0)


@pytest.mark.parametrize("gain", [1.0, 300.0], ids=["bounded", "unbounded"])
def test_what_bfloat16_allows(gain: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exponentials as they are; float16 will do for few keys."""
    monkeypatch.setattr(conv_attention_attend_backward, "coarse", lambda dtype: True)
    monkeypatch.setattr(conv_attention_key_gradients, "FLAGS", 2)
    _check(Attention(**HALF, queries=70, keys=131, gain=gain), 4)


@pytest.mark.parametrize("queries", [16, 32, 128])
def test_tiles_of_the_kernel_before_need_not_fit(queries: int) -> None:
    case = Attention(**HALF, queries=150, keys=70, batch=1)
    expected = _gradients(case, 4)
    name = "conv_attention_attend_bwd_queries 16 D32"
    own = launches.nearest(*name.split(" "), 90)
    with launches.installed({f"sm90 {name}": own | {"BLOCK_N": queries, "num_warps": 4}}):
        found = _gradients(case, 4)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_parts_of_the_queries_add_up(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_attention_one_pass, "_parts", lambda *_: parts)
    _check(Attention(**HALF, queries=100, keys=90, heads=3), 4)


def test_parts_fill_what_runs_at_once() -> None:
    parts = conv_attention_one_pass._parts
    assert parts(128, 177, 264) == 2
    assert parts(16, 177, 264) == 15
    assert parts(1, 177, 264) == 177
    assert parts(512, 177, 264) == 1
    assert parts(264, 177, 264) == 1


def test_keys_beyond_the_last_do_nothing_to_very_small_scores() -> None:
    """Their scores of 0 would be beyond any other by more than fp32 can say."""
    case = Attention(**HALF, queries=20, keys=70, heads=1, batch=1)
    scale, shift, wq, bq = case.parameters[:4]
    for t, value in ((scale, 1.0), (shift, 0.0), (bq, 0.0)):
        t.fill_(value)
    wq.copy_(torch.eye(32))
    case.a.fill_(-8.0)
    case.b.copy_(1 + 0.01 * case.b)
    for a, b in zip(_gradients(case, 4), _gradients(case, 0), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_its_image_only(value: float) -> None:
    case = Attention(**HALF, queries=20, keys=70)
    case.b[1, 5, 2] = value
    da, db, *_ = _gradients(case, 4)
    assert da[0].isfinite().all()
    assert db[0].isfinite().all()
    assert not da[1].isfinite().any()


def test_second_runs_and_filled_memory_give_the_same_bits() -> None:
    case = Attention(**HALF, queries=70, keys=300, batch=1)
    expected = _gradients(case, 4)
    with filled_memory():
        found = _gradients(case, 4)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_who_may_be_made_in_one_pass() -> None:
    a = torch.empty(2, 100, 32, dtype=torch.float16)
    launch = conv_attention_one_pass.launch
    with _held(8):
        assert launch(a, None, 64, 3) is not None
        assert launch(a, None, 63, 3) is None
        assert launch(a, a, 64, 3) is None
        assert launch(a.float(), None, 64, 3) is None
        assert launch(a.repeat(1, 1, 2), None, 64, 3) is None
        assert launch(a[:1, :1].expand(1, 2**24, 32), None, 64, 3) is None
    with _held(0):
        assert launch(a, None, 64, 3) is None


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """The model's backward pass, for kernels to be assembled; EQCVT_AOT leaves dtypes out."""
    names = os.environ.get("EQCVT_AOT", "bfloat16 float16").split()

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for dtype in (getattr(torch, name) for name in names):
        for tiles in (8, 4):

            def run(dtype: torch.dtype = dtype, tiles: int = tiles) -> None:
                major, minor = torch.cuda.get_device_capability()  # the one compiled for
                a, b = new(128, 3721, 32, dtype=dtype), new(128, 961, 32, dtype=dtype)
                affine, square, line = new(2, 32), new(3, 32, 32), new(3, 32)
                seed = new(1, dtype=torch.int64)
                weights = affine, affine, square, line, square, new(32), seed
                o, lse = new(128, 3721, 3, 32, dtype=dtype), new(128, 3, 3721)
                with _held(tiles, 10 * major + minor):
                    conv_attention.attend_backward(a, a, b, None, *weights, o, lse, dropout=0.1)

            yield f"{dtype} {tiles}", run


def test_kernels_assemble_for_the_gpus_we_aim_at() -> None:
    reports = aot.in_process(f"{__name__}:calls", 80, 90, EQCVT_AOT="bfloat16")
    names = {r.kernel for r in reports}
    assert "_conv_attention_attend_bwd_keys_kernel" not in names
    assert "_conv_attention_attend_bwd_finish_kernel" in names
    ours = [r for r in reports if r.kernel == "_conv_attention_attend_bwd_kernel"]
    assert {r.capability for r in ours} == {80, 90}
    for r in reports:
        assert not r.serialised, r
        # Two programs share a multiprocessor.
        resident = conv_attention_one_pass.RESIDENT if r in ours else 1
        assert resident * r.shared <= aot.SHARED_LIMIT[r.capability], r
        assert r.spilled <= (600 if r in ours else 0), r
    for r in ours:
        assert r.matrix == {80: "HMMA", 90: "HGMMA"}[r.capability], r
