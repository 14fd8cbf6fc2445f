"""CvT's transformer block in its parts: attention with convolutional projections, and the MLP."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bench import implementations
from bench.conftest import Measure
from bench.floor import Work
from eqcvt.nn import ConvAttention, MlpBlock, Stage

pytestmark = pytest.mark.timeout(900)

BATCH = {"cpu": 4, "cuda": 128}
# The transformer blocks of EqCvT, and of both stages of the CvT baseline: tokens a side.
STAGES = {
    "eqcvt": (Stage(32, heads=3, mlp_ratio=2), 61),
    "cvt-1": (Stage(64, heads=2), 33),
    "cvt-2": (Stage(128, heads=3), 17),
}


def attention_work(batch: int, stage: Stage, side: int, width: int, training: bool) -> Work:
    """Count the least the attention block needs: products of scores and of values, exponentials.

    A product is as wide as the narrower of token and head, since weights can be folded. Backward
    recomputes the scores and needs four products more. Tokens are read and written once each way.
    """
    queries, keys = side**2, ((side - 1) // stage.kv_stride + 1) ** 2
    scores = batch * stage.heads * queries * keys
    product = scores * min(stage.dim, stage.head_dim)
    traffic = batch * queries * stage.dim * width
    if training:
        return Work(7 * product, 2 * scores, 5 * traffic)
    return Work(2 * product, scores, 2 * traffic)


def mlp_work(batch: int, stage: Stage, side: int, width: int, training: bool) -> Work:
    """Count the two products forward, with their recomputation and gradients five in training."""
    tokens = batch * side**2
    product = tokens * stage.dim * stage.hidden
    traffic = tokens * stage.dim * width
    return (
        Work(7 * product, bytes=5 * traffic) if training else Work(2 * product, bytes=2 * traffic)
    )


@pytest.mark.parametrize("implementation", implementations.IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("case", ["training", "inference"])
@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("op", ["conv_attention", "mlp_block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bench_block(
    dtype: torch.dtype,
    op: str,
    name: str,
    case: str,
    implementation: str,
    measure: Measure,
    device: str,
    pytestconfig: pytest.Config,
) -> None:
    implementations.skip_what_is_not_there(implementation, device, pytestconfig)
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("bfloat16 is timed on GPUs")
    stage, side = STAGES[name]
    torch.manual_seed(0)
    attention = op == "conv_attention"
    block: nn.Module = ConvAttention(stage, 0.1) if attention else MlpBlock(stage, 0.1)
    block = block.to(device, dtype)
    tokens: Tensor = torch.randn(BATCH[device], stage.dim, side, side, device=device, dtype=dtype)
    tokens = tokens.to(memory_format=torch.channels_last)
    module = implementations.variant(block, implementation)
    implementations.agree(module, block, tokens[:2])
    training = case == "training"
    count = attention_work if attention else mlp_work
    measure(
        implementations.training_step(module, tokens, input_gradient=True)
        if training
        else implementations.inference(module, tokens),
        case=f"{name} {case}",
        op=op,
        implementation=implementation,
        shape=tuple(tokens.shape),
        dtype=dtype,
        rounds=1 if pytestconfig.getoption("--quick") else 11,
        work=count(len(tokens), stage, side, dtype.itemsize, training),
    )
