"""The Triton kernels of convolutional attention for GPUs: what the assembler makes of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from eqcvt.kernels import conv_attention
from tests.kernels import aot

pytestmark = pytest.mark.needs("interpreter")


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """The calls whose kernels are assembled: the model's sizes, and with EQCVT_AOT_WIDE wider."""
    names = os.environ.get("EQCVT_AOT", "bfloat16 float16 float32").split()
    widths = (64, 128) if "EQCVT_AOT_WIDE" in os.environ else (32,)
    for name in names:
        for width in widths:

            def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
                return torch.empty(shape, dtype=dtype, device="meta")

            def run(name: str = name, width: int = width) -> None:
                dtype = getattr(torch, name)
                x = new(128, 61, 61, width, dtype=dtype).permute(0, 3, 1, 2)
                q, k, affine = new(width, 1, 3, 3), new(width, 1, 3, 3), new(2, width)
                inputs = x, q, k, None, new(width), new(width)
                a, b, _, mean, variance = conv_attention.project(*inputs, kv_stride=2, moments=True)
                square, line = new(3, width, width), new(3, width)
                weights = (
                    affine,
                    affine,
                    square,
                    line,
                    square,
                    new(width),
                    new(1, dtype=torch.int64),
                )
                y, o, lse = conv_attention.attend(a, b, None, a, *weights, dropout=0.1, save=True)
                conv_attention.attend_backward(y, a, b, None, *weights, o, lse, dropout=0.1)
                gradients = a, b, None, mean, variance
                conv_attention.project_backward(*gradients, a, b, None, mean, *inputs, kv_stride=2)

            yield f"{name} {width}", run


@pytest.mark.parametrize("wide", [False, True])
def test_kernels_assemble_for_the_gpus_we_aim_at(wide: bool) -> None:
    environment = {"EQCVT_AOT": "bfloat16"} | ({"EQCVT_AOT_WIDE": "1"} if wide else {})
    reports = aot.in_process(f"{__name__}:calls", 80, 90, **environment)
    assert {r.kernel for r in reports} >= {
        "_conv_attention_attend_fwd_kernel",
        "_conv_attention_attend_bwd_queries_kernel",
        "_conv_attention_attend_bwd_keys_kernel",
        "_conv_attention_weights_bwd_kernel",
        "_conv_attention_project_fwd_kernel",
        "_conv_attention_project_bwd_kernel",
    }
    for r in reports:
        # The fastest tile of 128 channels that Hopper's matrix unit can take spills a little.
        forward = r.kernel.endswith("attend_fwd_kernel")
        assert r.spilled <= (56 if wide and forward and r.capability == 90 else 0), r
        if "attend_" in r.kernel and "finish" not in r.kernel:
            # Sums of probabilities are a product too narrow for Hopper's matrix unit.
            narrow = "+HMMA" if forward else ""
            assert r.matrix == {80: "HMMA", 90: f"HGMMA{narrow}"}[r.capability], r
            assert not r.serialised, r
