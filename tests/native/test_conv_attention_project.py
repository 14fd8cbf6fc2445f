"""The native projections of conv_attention against float64, beside the same-dtype primitives.

EQCVT_ISA picks the instruction set; each has to pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eqcvt.native import conv_attention
from tests.native.threads import threads
from tests.ops import primitives
from tests.tolerance import assert_all_as_good, double

pytestmark = [pytest.mark.needs("native"), pytest.mark.usefixtures("_nan_in_fresh_memory")]

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
PROJECTED = ("a", "b", "c", "mean", "variance")
PROJECT_GRADIENTS = ("dx", "dq", "dk", "dv", "dnorm_weight", "dnorm_bias")


class Projection(NamedTuple):
    """Sizes and options of a call."""

    batch: int
    dim: int
    height: int
    width: int
    filter: int = 3
    stride: int = 2
    separate: bool = False
    moments: bool = True
    offset: float = 1.0
    norm: bool = True


PROJECTIONS = {
    "the model's": Projection(2, 32, 13, 11),
    "no layer norm": Projection(2, 32, 9, 8, norm=False),
    "separate values": Projection(2, 32, 7, 12, separate=True),
    "no statistics": Projection(2, 32, 7, 9, separate=True, moments=False),
    "one pixel": Projection(1, 16, 1, 1, separate=True),
    "one row": Projection(2, 24, 1, 9),
    "one column": Projection(3, 24, 9, 1),
    "5 x 5": Projection(2, 40, 6, 8, filter=5, separate=True),
    "7 x 7, wider than the image": Projection(1, 20, 5, 3, filter=7),
    "1 x 1": Projection(2, 128, 4, 3, filter=1, stride=1),
    "stride 1": Projection(1, 64, 5, 7, stride=1),
    "stride 3": Projection(2, 17, 8, 10, stride=3),
    "stride beyond the filter": Projection(2, 19, 9, 11, stride=5, separate=True),
    "a mean of a thousand": Projection(2, 32, 13, 11, offset=1e3),
    "the same without a norm": Projection(2, 32, 13, 11, offset=1e3, norm=False),
}


def projection_inputs(case: Projection, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(case.height)
    parameter = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).double()

    x = normal(case.batch, case.dim, case.height, case.width) + case.offset
    filters = [normal(case.dim, 1, case.filter, case.filter) for _ in range(3)]
    parameters = [
        *filters[:2],
        filters[2] if case.separate else None,
        *([normal(case.dim) / 4 + 1, normal(case.dim)] if case.norm else [None, None]),
    ]
    return [
        x.to(dtype).to(memory_format=torch.channels_last),
        *(None if p is None else p.to(parameter) for p in parameters),
    ]


def projection_gradients(case: Projection, found: Sequence[Tensor]) -> list[Tensor | None]:
    """Make what project_backward takes in front of ``x``."""
    generator = torch.Generator().manual_seed(case.width)
    a, b, c, mean, variance = found
    da, db, dc, dmean, dvariance = (
        torch.randn(t.shape, generator=generator).to(t.dtype) for t in (a, b, c, mean, variance)
    )
    statistics = [dmean, dvariance] if case.moments else [None, None]
    return [
        *(da, db, dc if case.separate else None),
        *statistics,
        *(a, b, c if case.separate else None),
        mean if case.moments else None,
    ]


def check_projection(case: Projection, dtype: torch.dtype) -> None:
    it = projection_inputs(case, dtype)
    rough = projection_inputs(case) if dtype == torch.float64 else it
    options = {"kv_stride": case.stride, "moments": case.moments}
    found = conv_attention.project(*it, **options)
    assert_all_as_good(
        found,
        primitives.conv_attention_project(*double(it), **options),
        primitives.conv_attention_project(*rough, **options),
        PROJECTED,
    )
    given_ = projection_gradients(case, found)
    in_rough = [None if t is None else t.to(torch.float32) for t in given_]
    dx, *rest = conv_attention.project_backward(*given_, *it, kv_stride=case.stride)
    assert dx.is_contiguous(memory_format=torch.channels_last)
    assert_all_as_good(
        [dx, *rest],
        primitives.conv_attention_project_backward(
            *double(given_), *double(it), kv_stride=case.stride
        ),
        primitives.conv_attention_project_backward(
            *(in_rough if dtype == torch.float64 else given_), *rough, kv_stride=case.stride
        ),
        PROJECT_GRADIENTS,
        backward=True,
    )


# The gradient of torch's own bfloat16 filters, the measure, is at times NaN for one pixel.
MEASURABLE = [
    pytest.param(case, dtype, id=f"{name}-{dtype}")
    for name, case in PROJECTIONS.items()
    for dtype in DTYPES
    if (name, dtype) != ("one pixel", torch.bfloat16)
]


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize(("case", "dtype"), MEASURABLE)
def test_projection_is_as_good_as_the_primitives(case: Projection, dtype: torch.dtype) -> None:
    check_projection(case, dtype)


@settings(max_examples=20)
@given(
    case=st.builds(
        Projection,
        batch=st.integers(1, 3),
        dim=st.sampled_from([16, 19, 24, 32, 40, 128]),
        height=st.integers(1, 12),
        width=st.integers(1, 12),
        filter=st.sampled_from([1, 3, 5, 7]),
        stride=st.integers(1, 4),
        separate=st.booleans(),
        moments=st.booleans(),
        offset=st.just(1.0),
        norm=st.booleans(),
    )
)
def test_projection_of_any_size(case: Projection) -> None:
    check_projection(case, torch.float32)


@pytest.mark.parametrize("order", ["contiguous", "sliced", "transposed"])
def test_projection_of_any_strides(order: str) -> None:
    x, *parameters = projection_inputs(Projection(2, 32, 6, 6))
    layouts = {
        "contiguous": x.contiguous(),
        "sliced": torch.cat([x, x], 1)[:, 16:48].roll(16, 1),
        "transposed": x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
    }
    options = {"kv_stride": 2, "moments": True}
    expected = conv_attention.project(x, *parameters, **options)
    found = conv_attention.project(layouts[order], *parameters, **options)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_projection_of_an_empty_batch() -> None:
    case = Projection(0, 32, 7, 5, separate=True)
    it = projection_inputs(case)
    found = conv_attention.project(*it, kv_stride=2, moments=True)
    assert [t.shape for t in found] == [(0, 35, 32), (0, 12, 32), (0, 12, 32), (3, 32), (3, 32)]
    assert not any(t.any() for t in found[3:])
    gradients = conv_attention.project_backward(
        *projection_gradients(case, found), *it, kv_stride=2
    )
    assert [t.shape for t in gradients] == [(0, 32, 7, 5), *(3 * [(32, 1, 3, 3)]), (32,), (32,)]
    assert not any(t.any() for t in gradients)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_projection_gives_the_same_bits_again(count: int) -> None:
    case = Projection(2, 32, 11, 9, separate=True)
    it = projection_inputs(case)

    def both() -> list[Tensor]:
        found = conv_attention.project(*it, kv_stride=2, moments=True)
        gradients = conv_attention.project_backward(
            *projection_gradients(case, found), *it, kv_stride=2
        )
        return [*found, *gradients]

    with threads(count):
        found, again = both(), both()
    assert all(torch.equal(f, g) for f, g in zip(found, again, strict=True))


@pytest.mark.parametrize("norm", [False, True])
def test_nan_in_an_image_spreads_as_in_a_convolution(norm: bool) -> None:
    x, *parameters = projection_inputs(Projection(2, 32, 9, 9, norm=norm))
    x[1, 3, 4, 4] = float("nan")
    options = {"kv_stride": 2, "moments": True}
    found = conv_attention.project(x, *parameters, **options)
    expected = primitives.conv_attention_project(x, *parameters, **options)
    for f, e in zip(found, expected, strict=True):
        assert torch.equal(f.isnan(), e.isnan())
