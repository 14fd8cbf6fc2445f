"""The steerable block alone: convolution, norm, ReLU, blur, group pooling."""

from __future__ import annotations

import copy
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

import eqcvt
from bench import implementations
from bench.conftest import Measure
from bench.floor import Work
from eqcvt.convert import to_escnn

pytestmark = pytest.mark.timeout(900)

SIZE, FILTERS, KERNEL, BLUR = 129, 40, 7, 5
BATCH = {"cpu": 4, "cuda": 128}


def work(batch: int, channels: int, width: int, training: bool) -> Work:
    """Count the block's multiply-accumulates and bytes, for values of ``width`` bytes.

    Inference is one convolution and one separable blur; images are read and the pooled maps
    written. Training needs the convolution once more for the statistics and once to be recomputed,
    the weight gradient once, and the transposed blur; maps, their gradient and a byte that says
    which element won are read and written.
    """
    grid, blurred = (SIZE + 2 - KERNEL + 1) ** 2, (SIZE + 2 - KERNEL - BLUR + 2) ** 2
    convolution = batch * grid * FILTERS * channels * KERNEL**2
    blur = batch * blurred * FILTERS * 2 * BLUR
    images, maps = batch * channels * SIZE**2 * width, batch * blurred * FILTERS // 4
    if not training:
        return Work(convolution + blur, bytes=images + maps * width)
    return Work(4 * convolution + 2 * blur, bytes=3 * images + maps * (2 * width + 2))


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
def plain(channels: int, device: str) -> tuple[eqcvt.EqCvT, Tensor]:
    """Return a plain model, which stays untrained, and images."""
    torch.manual_seed(0)
    model = eqcvt.EqCvT(in_channels=channels, image_size=SIZE).to(device)
    return model, torch.rand(BATCH[device], channels, SIZE, SIZE, device=device)


@pytest.mark.parametrize("implementation", implementations.IMPLEMENTATIONS)
@pytest.mark.parametrize("case", ["training", "inference"])
@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bench_lift(
    dtype: torch.dtype,
    case: str,
    channels: int,
    implementation: str,
    measure: Measure,
    device: str,
    pytestconfig: pytest.Config,
) -> None:
    implementations.skip_what_is_not_there(implementation, device, pytestconfig)
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("bfloat16 is timed on GPUs")
    model, images = plain(channels, device)
    images = images.to(dtype)
    ours = copy.deepcopy(model.lift[0]).to(dtype)
    if implementation == "escnn":
        module: nn.Module = EscnnFront(to_escnn(model)).to(device, dtype)
    else:
        module = implementations.variant(ours, implementation)
    implementations.agree(module, ours, images[:2])
    training = case == "training"
    measure(
        implementations.training_step(module, images, input_gradient=False)
        if training
        else implementations.inference(module, images),
        case=case,
        op="lift",
        implementation=implementation,
        shape=tuple(images.shape),
        dtype=dtype,
        rounds=1 if pytestconfig.getoption("--quick") else 15,
        work=work(len(images), channels, dtype.itemsize, training),
    )
