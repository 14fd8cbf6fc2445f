"""The native kernels of conv_attention against float64, beside the same-dtype primitives.

EQCVT_ISA picks the instruction set; each has to pass.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eqcvt.native import conv_attention
from tests.native.threads import threads
from tests.ops import primitives
from tests.tolerance import assert_all_as_good, assert_as_good, double

pytestmark = [pytest.mark.needs("native"), pytest.mark.usefixtures("_nan_in_fresh_memory")]

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SEED = torch.tensor([-(2**61) + 987654321])
ATTENDED = ("y", "o", "lse")
ATTEND_GRADIENTS = ("da", "db", "dc", "dscale", "dshift", "dwq", "dbq", "dwo", "dbo")


class Attention(NamedTuple):
    """Sizes and options of a call."""

    batch: int
    queries: int
    keys: int
    dim: int
    heads: int
    separate: bool = False
    residual: bool = True
    dropout: float = 0.1
    gain: float = 1.0


ATTENTIONS = {
    "the model's": Attention(2, 61, 37, 32, 3),
    "separate values": Attention(2, 61, 37, 32, 3, separate=True),
    "no residual, no dropout": Attention(1, 50, 67, 32, 2, residual=False, dropout=0.0),
    "half dropped": Attention(3, 29, 13, 24, 1, dropout=0.5),
    "one query": Attention(1, 1, 5, 16, 1, separate=True),
    "one key": Attention(1, 50, 1, 16, 2, separate=True),
    "one key, large scores": Attention(1, 200, 1, 16, 2, separate=True, gain=1e4),
    "one tile": Attention(1, 48, 64, 40, 4),
    "a tile and a query, a block and a key": Attention(1, 49, 65, 32, 2),
    "more images than threads": Attention(5, 7, 9, 16, 1, separate=True),
    "an image that threads share": Attention(3, 101, 130, 32, 1),
    "odd width": Attention(1, 53, 71, 17, 2, separate=True),
    "width 64": Attention(1, 50, 67, 64, 2),
    "width 80": Attention(1, 30, 70, 80, 1, separate=True),
    "width 128": Attention(1, 30, 70, 128, 2),
    "scores of ten thousands": Attention(1, 211, 67, 32, 2, gain=1e4),
}


def attention_inputs(case: Attention, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(case.queries)
    sides, d, h = 3 if case.separate else 2, case.dim, case.heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).double()

    tokens = [
        normal(case.batch, case.queries, d),
        normal(case.batch, case.keys, d),
        normal(case.batch, case.keys, d) if case.separate else None,
        normal(case.batch, case.queries, d) if case.residual else None,
    ]
    parameters = [
        1 + normal(sides, d) / 4,
        normal(sides, d) / 4,
        normal(h, d, d) / d * case.gain,
        normal(h, d) / 4,
        normal(h, d, d) / d**0.5,
        normal(d) / 4,
    ]
    return [
        *(None if t is None else t.to(dtype) for t in tokens),
        *(p.to(torch.promote_types(dtype, torch.float32)) for p in parameters),
        SEED,
    ]


def check_attention(case: Attention, dtype: torch.dtype) -> None:
    it = attention_inputs(case, dtype)
    rough = attention_inputs(case) if dtype == torch.float64 else it
    drop = {"dropout": case.dropout}
    found = conv_attention.attend(*it, **drop, save=True)
    assert_all_as_good(
        found,
        primitives.conv_attention_attend(*double(it), **drop, save=True),
        primitives.conv_attention_attend(*rough, **drop, save=True),
        ATTENDED,
    )
    y, o, lse = found
    alone, *nothing = conv_attention.attend(*it, **drop, save=False)
    assert torch.equal(alone, y)
    assert [t.shape for t in nothing] == [(0,), (0,)]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def backward(inputs: list[Tensor | None]) -> list[Tensor | None]:
        a, b, c, _, *parameters = inputs
        return [dy.to(a.dtype), a, b, c, *parameters, o, lse]

    assert_all_as_good(
        conv_attention.attend_backward(*backward(it), **drop),
        primitives.conv_attention_attend_backward(*double(backward(it)), **drop),
        primitives.conv_attention_attend_backward(*backward(rough), **drop),
        ATTEND_GRADIENTS,
        backward=True,
    )


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ATTENTIONS.values(), ids=ATTENTIONS)
def test_attention_is_as_good_as_the_primitives(case: Attention, dtype: torch.dtype) -> None:
    check_attention(case, dtype)


@settings(max_examples=20)
@given(
    case=st.builds(
        Attention,
        batch=st.integers(1, 3),
        queries=st.integers(1, 120),
        keys=st.integers(1, 150),
        dim=st.sampled_from([16, 19, 24, 32, 40, 51, 64, 96, 128]),
        heads=st.integers(1, 4),
        separate=st.booleans(),
        residual=st.booleans(),
        dropout=st.sampled_from([0.0, 0.1, 0.9]),
        gain=st.just(1.0),
    )
)
def test_attention_of_any_size(case: Attention) -> None:
    check_attention(case, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.1, 0.5, 1 - 2**-20])
def test_the_dropped_entries_are_those_of_the_generator(dtype: torch.dtype, dropout: float) -> None:
    it = attention_inputs(Attention(3, 59, 7, 19, 2, residual=False), dtype)
    it[8] = torch.zeros_like(it[8])
    it[9] = torch.ones_like(it[9])
    y, _, _ = conv_attention.attend(*it, dropout=dropout, save=False)
    assert torch.equal(y, primitives.keep(SEED, y.shape, dropout, 0).to(dtype))


@pytest.mark.parametrize("separate", [False, True])
def test_attention_of_an_empty_batch(separate: bool) -> None:
    it = attention_inputs(Attention(0, 50, 13, 32, 3, separate=separate))
    y, o, lse = conv_attention.attend(*it, dropout=0.1, save=True)
    assert (y.shape, o.shape, lse.shape) == ((0, 50, 32), (0, 50, 3, 32), (0, 3, 50))
    a, b, c, _, *parameters = it
    found = conv_attention.attend_backward(y, a, b, c, *parameters, o, lse, dropout=0.1)
    for gradient, like in zip(found, [a, b, c, *parameters[:-1]], strict=True):
        assert gradient.shape == (like.shape if like is not None else (0,))
        assert not gradient.any()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_attention_gives_the_same_bits_again(count: int) -> None:
    it = attention_inputs(Attention(3, 101, 71, 32, 2, separate=True))
    a, b, c, _, *parameters = it

    def both() -> list[Tensor]:
        y, o, lse = conv_attention.attend(*it, dropout=0.1, save=True)
        gradients = conv_attention.attend_backward(y, a, b, c, *parameters, o, lse, dropout=0.1)
        return [y, o, lse, *gradients]

    alone = both()
    with threads(count):
        found, again = both(), both()
    assert all(torch.equal(f, g) for f, g in zip(found, again, strict=True))
    # What belongs to a query does not depend on the partition of the tiles.
    assert all(torch.equal(f, g) for f, g in zip(found[:4], alone[:4], strict=True))


def plain_inputs(first_channel: Tensor, keys: Tensor, dtype: torch.dtype) -> list[Tensor | None]:
    """Inputs whose scores are the outer product of two lists of numbers; values are separate."""
    d, n, m = 16, len(first_channel), len(keys)
    a, b, c = torch.zeros(1, n, d), torch.zeros(1, m, d), torch.arange(m * d).view(1, m, d) / 64
    a[0, :, 0], b[0, :, 0] = first_channel, keys
    one = torch.eye(d).unsqueeze(0)
    parameters = [torch.ones(3, d), torch.zeros(3, d), one, torch.zeros(1, d), one, torch.zeros(d)]
    return [
        *(t.to(dtype) for t in (a, b, c)),
        None,
        *(p.to(torch.promote_types(dtype, torch.float32)) for p in parameters),
        SEED,
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", [0, 3, 63, 64, 99])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinite_scores(value: float, position: int, dtype: torch.dtype) -> None:
    keys = torch.linspace(-2, 2, 100)
    keys[position] = value
    it = plain_inputs(torch.tensor([1.0, -1.0, 2.0]), keys, dtype)
    y, _, _ = conv_attention.attend(*it, dropout=0.0, save=False)
    exact = primitives.conv_attention_attend(*double(it), dropout=0.0, save=False)[0]
    reference = primitives.conv_attention_attend(*it, dropout=0.0, save=False)[0]
    assert torch.equal(y.isnan(), exact.isnan())
    assert_as_good(y.nan_to_num(), exact.nan_to_num(), reference.nan_to_num())


def test_a_first_block_of_keys_without_weight() -> None:
    keys = torch.linspace(-2, 2, 150)
    keys[:100] = -float("inf")
    it = plain_inputs(torch.tensor([1.0, 2.0]), keys, torch.float32)
    y, _, lse = conv_attention.attend(*it, dropout=0.0, save=True)
    exact = primitives.conv_attention_attend(*double(it), dropout=0.0, save=True)
    reference = primitives.conv_attention_attend(*it, dropout=0.0, save=True)
    assert_as_good(y, exact[0], reference[0])
    assert_as_good(lse, exact[2], reference[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_weight_at_all_is_nan(dtype: torch.dtype) -> None:
    keys = torch.full((100,), -float("inf"))
    it = plain_inputs(torch.tensor([1.0]), keys, dtype)
    y, o, lse = conv_attention.attend(*it, dropout=0.0, save=True)
    assert y.isnan().all()
    assert (lse == -float("inf")).all()
    a, b, c, _, *parameters = it
    found = conv_attention.attend_backward(
        torch.ones_like(y), a, b, c, *parameters, o, lse, dropout=0.0
    )
    assert found[0].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [40, 100])
def test_a_key_that_nobody_looks_at_has_no_gradient(count: int, dtype: torch.dtype) -> None:
    keys = torch.linspace(-2, 2, count)
    keys[3] = -float("inf")
    it = plain_inputs(torch.tensor([1.0, 2.0]), keys, dtype)
    y, o, lse = conv_attention.attend(*it, dropout=0.0, save=True)
    a, b, c, _, *parameters = it
    dy = torch.ones_like(y)
    dc = conv_attention.attend_backward(dy, a, b, c, *parameters, o, lse, dropout=0.0)[2]
    assert not dc[0, 3].any()
    assert dc[0, 4:].all()


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_token_or_its_image(dtype: torch.dtype) -> None:
    it = attention_inputs(Attention(3, 101, 71, 32, 2), dtype)
    it[0][1, 60, 5] = float("nan")
    it[1][2, 70, 31] = float("nan")
    y, o, lse = conv_attention.attend(*it, dropout=0.0, save=True)
    lost = torch.zeros(3, 101, dtype=torch.bool)
    lost[1, 60] = lost[2] = True
    assert torch.equal(y.isnan(), lost.unsqueeze(-1).expand_as(y))
    a, b, c, _, *parameters = it
    found = conv_attention.attend_backward(
        torch.ones_like(y), a, b, c, *parameters, o, lse, dropout=0.0
    )
    assert torch.equal(found[0].isnan(), lost.unsqueeze(-1).expand_as(y))
    assert torch.equal(found[1].isnan().flatten(1).any(1), torch.tensor([False, True, True]))


def test_supports() -> None:
    filters = torch.ones(32, 1, 3, 3)

    def reason(x: Tensor, filters: Tensor = filters, heads: int = 3) -> str | None:
        return conv_attention.supports(x, filters, heads=heads, kv_stride=2)

    x = torch.ones(2, 32, 7, 7)
    for dtype in DTYPES:
        assert reason(x.to(dtype)) is None
    assert "no kernel for torch.float16" in (reason(x.half()) or "")
    assert "8 channels" in (reason(torch.ones(2, 8, 7, 7)) or "")
    assert "129 channels" in (reason(torch.ones(2, 129, 7, 7)) or "")
    assert "pixels are wider than 31" in (reason(x, torch.ones(32, 1, 33, 33)) or "")
