"""The steerable block alone: convolution, norm, ReLU, blur, group pooling."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

import eqcvt
from bench.cases import DTYPES, Case, both
from bench.conftest import Measure
from bench.floor import Work
from bench.implementations import calls, contender
from bench.timing import Function
from eqcvt.convert import to_escnn

SIZE, FILTERS, KERNEL, BLUR = 129, 40, 7, 5
BATCH = {"cpu": 4, "cuda": 128}


def cases(device: str) -> list[Case]:
    result = []
    for channels in (3, 1):
        for dtype in ("float32",) if device == "cpu" else ("bfloat16", "tf32", "float32"):
            rare = device == "cuda" and dtype == "float32"
            level = "full" if rare else "quick" if channels == 1 else "default"
            shape = (BATCH[device], channels, SIZE, SIZE)
            result += both("lift", shape=shape, dtype=dtype, level=level)
    return result


def work(case: Case) -> Work:
    """Count the block's multiply-accumulates and bytes.

    Inference is one convolution and one separable blur; images are read and the pooled maps
    written. Training needs the convolution once more, to be recomputed, the weight gradient once,
    and the transposed blur; its statistics follow from the products of every two pixels that one
    filter meets. Maps, their gradient and a byte that says which element won are read and written.
    """
    batch, channels = case.shape[:2]
    width = DTYPES[case.dtype].itemsize
    grid, blurred = (SIZE + 2 - KERNEL + 1) ** 2, (SIZE + 2 - KERNEL - BLUR + 2) ** 2
    convolution = batch * grid * FILTERS * channels * KERNEL**2
    blur = batch * blurred * FILTERS * 2 * BLUR
    images, maps = batch * channels * SIZE**2 * width, batch * blurred * FILTERS // 4
    if not case.training:
        return Work(convolution + blur, bytes=images + maps * width)
    pairs = (channels * (2 * KERNEL - 1)) ** 2 // 2
    statistics = batch * SIZE**2 * pairs
    return Work(3 * convolution + statistics + 2 * blur, bytes=3 * images + maps * (2 * width + 2))


class EscnnFront(nn.Module):
    """escnn's modules up to group pooling, from tensor to tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.block, self.blur, self.pool = model.block1, model.pool1, model.gpool
        self.input_type = model.block1[0].in_type

    def forward(self, x: Tensor) -> Tensor:
        """Map images to pooled maps."""
        from escnn import nn as enn

        y = self.pool(self.blur(self.block(enn.GeometricTensor(x, self.input_type))))
        return y.tensor.to(x.dtype)  # escnn's group pooling gives float32 whatever it is given


@lru_cache(maxsize=1)
def plain(channels: int, device: str) -> eqcvt.EqCvT:
    """Return a plain model, which stays untrained."""
    torch.manual_seed(0)
    return eqcvt.EqCvT(in_channels=channels, image_size=SIZE).to(device)


def test_bench_lift(case: Case, implementation: str, measure: Measure, device: str) -> None:
    model = plain(case.shape[1], device)
    images = torch.rand(case.shape, device=device, dtype=DTYPES[case.dtype])

    def build() -> Function:
        module = contender(
            case,
            implementation,
            model.lift[0],
            images,
            escnn=lambda: EscnnFront(to_escnn(model)).to(device),
        )
        return calls(case, implementation, module, images)

    measure(case, implementation, build, work=work(case))
