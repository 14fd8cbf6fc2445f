"""The token embedding: strided convolution and layer norm."""

from __future__ import annotations

import math

import torch

from bench import blocks
from bench.cases import DTYPES, Case
from bench.conftest import Measure
from bench.floor import Work
from eqcvt.nn import Stage, TokenEmbed
from eqcvt.ops import conv_size


def cases(device: str) -> list[Case]:
    return blocks.cases("token_embed", device, embed=True)


def work(case: Case, stage: Stage) -> Work:
    """Count the least it needs: one convolution forward, and its two gradients in training.

    Maps and tokens are read or written once each way; the tokens' norm needs the convolution or its
    result once more.
    """
    batch, channels, size, _ = case.shape
    tokens = batch * conv_size(size, stage.embed_kernel, stage.embed_stride, stage.padding) ** 2
    product = tokens * stage.dim * channels * stage.embed_kernel**2
    width = DTYPES[case.dtype].itemsize
    maps, tokens = math.prod(case.shape) * width, tokens * stage.dim * width
    if case.training:
        return Work(3 * product, bytes=3 * maps + 3 * tokens)
    return Work(product, bytes=maps + tokens)


def test_bench_token_embed(case: Case, implementation: str, measure: Measure, device: str) -> None:
    torch.manual_seed(0)
    stage: Stage = case.options["stage"]
    embed = TokenEmbed(case.options["channels"], stage)
    reads = case.case.split()[0]  # EqCvT's block gives maps, CvT's first stage has the images
    blocks.time_block(
        case,
        implementation,
        embed,
        measure,
        device,
        work(case, stage),
        tokens=reads == "cvt-2",
        input_gradient=reads != "cvt-1",
    )
