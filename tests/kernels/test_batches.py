"""A last batch of another size compiles nothing: of a step's kernels none is made for a count."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.needs("triton-package")


def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def step(batch: int) -> None:
    """Launch every kernel of a training step of the model, but for the head."""
    from eqcvt.kernels import conv_attention, lift, mlp_block, token_embed

    image, half = {"stride": 1, "padding": 1}, torch.bfloat16
    block = image | {"blur_stride": 1, "pool": True}
    x, bank, field = new(batch, 3, 129, 129, dtype=half), new(10, 4, 3, 7, 7), new(10)
    for mask in (None, new(129, 129)):
        lift.moments(x, bank, mask, correlate=True, **image)
    y, arg = lift.apply(x, bank, mask, field, field, new(5), **block)
    lift.apply_backward(y, arg, x, bank, mask, field, field, new(5), input_gradient=False, **block)
    vector, seed = new(32), new(1, dtype=torch.int64)
    embed = {"stride": 2, "padding": 1, "eps": 1e-5}
    filters = y, new(32, 10, 3, 3), vector, vector, vector
    tokens = token_embed.forward(*filters, **embed)
    token_embed.backward(tokens, *filters, input_gradient=True, **embed)
    tokens = new(batch, 61, 61, 32, dtype=half).permute(0, 3, 1, 2)
    projections = tokens, new(32, 1, 3, 3), new(32, 1, 3, 3), None, vector, vector
    keys = {"kv_stride": 2, "eps": 1e-5}
    a, b, _, mean, variance = conv_attention.project(*projections, moments=True, **keys)
    conv_attention.project_backward(
        a, b, None, mean, variance, a, b, None, mean, *projections, **keys
    )
    norms = new(2, 32), new(2, 32), new(3, 32, 32), new(3, 32), new(3, 32, 32), vector, seed
    y, o, lse = conv_attention.attend(a, b, None, a, *norms, dropout=0.1, save=True)
    conv_attention.attend_backward(y, a, b, None, *norms, o, lse, dropout=0.1)
    mlp = a, vector, vector, new(64, 32), new(64), new(32, 64), vector, seed
    mlp_block.forward(*mlp, dropout=0.1, eps=1e-5)
    mlp_block.backward(a, *mlp, dropout=0.1, eps=1e-5)
    mlp_block.backward(a[:, :1], *mlp, dropout=0.1, eps=1e-5)


def kernels(batch: int) -> list[str]:
    """Return what Triton would compile for a step."""
    from tests.kernels import aot

    found = aot.launches(lambda: step(batch))
    return sorted({f"{each.kernel.__name__} {aot.source(each).hash()}" for each in found})


def test_batches_of_any_size_share_their_kernels() -> None:
    program = (
        f"import json; from {__name__} import *; print(json.dumps([*map(kernels, (64, 37, 1))]))"
    )
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True
    )
    whole, *others = json.loads(run.stdout)
    assert len(whole) > 20
    for other in others:
        assert other == whole
