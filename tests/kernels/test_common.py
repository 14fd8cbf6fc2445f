"""What the kernels share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.runtime import interpreter

from eqcvt.kernels.common import add_product


@triton.jit
def _products(a_ptr, b_ptr, sum_ptr, N, APART: tl.constexpr):
    """Add up the products of tiles of 16."""
    o = tl.arange(0, 16)
    offsets = o[:, None] * 16 + o[None, :]
    total = tl.zeros([16, 16], tl.float32)
    for first in range(0, N, 16):
        a = tl.load(a_ptr + first * 16 + offsets)
        b = tl.load(b_ptr + first * 16 + offsets)
        if APART:
            total = add_product(total, tl.trans(a), b, N, "ieee")
        else:
            total = tl.dot(tl.trans(a), b, total, input_precision="ieee")
    tl.store(sum_ptr + offsets, total)


pytestmark = pytest.mark.needs("interpreter")


def test_float32_products_are_summed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made as on a GPU, term by term from what they are given; the interpreter's are not."""

    def term_by_term(_builder: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        total = d.data
        for k in range(a.data.shape[1]):
            wide = a.data[:, k, None].astype(np.float64) * b.data[None, k] + total
            total = wide.astype(np.float32)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", term_by_term)
    torch.manual_seed(0)
    a, b = torch.rand(2, 4096, 16).unbind()
    exact = a.double().T @ b.double()
    errors = []
    for apart in (True, False):
        found = torch.empty(16, 16)
        _products[(1,)](a, b, found, 4096, APART=apart)
        errors.append(float((found - exact).square().mean().sqrt()))
    assert errors[0] < errors[1] / 2
