"""The MLP block of a transformer: layer norm, linear map, GELU, linear map, residual."""

from __future__ import annotations

import torch

from bench import blocks
from bench.cases import DTYPES, Case
from bench.conftest import Measure
from bench.floor import Work
from eqcvt.nn import MlpBlock, Stage


def cases(device: str) -> list[Case]:
    return blocks.cases("mlp_block", device)


def work(case: Case, stage: Stage) -> Work:
    """Count the least it needs: two products forward, seven in training.

    There the first one is computed again, and each has two gradients. Tokens are read and written
    once each way.
    """
    batch, dim, height, width = case.shape
    tokens = batch * height * width
    product = tokens * dim * stage.hidden
    traffic = tokens * dim * DTYPES[case.dtype].itemsize
    if case.training:
        return Work(7 * product, bytes=5 * traffic)
    return Work(2 * product, bytes=2 * traffic)


def test_bench_mlp_block(case: Case, implementation: str, measure: Measure, device: str) -> None:
    torch.manual_seed(0)
    stage: Stage = case.options["stage"]
    block = MlpBlock(stage, dropout=0.1)
    blocks.time_block(case, implementation, block, measure, device, work(case, stage))
