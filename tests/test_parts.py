"""Parts of blocks that are read and never called must not look as if they were."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from eqcvt import EqCvT
from eqcvt.nn import Block, ConvAttention, MlpBlock, Stage, SteerableLift, TokenEmbed

STAGE = Stage(8, heads=2, head_dim=8)
TOKENS = torch.rand(2, 8, 9, 9)


class Adapted(nn.Linear):
    """A linear map with something beside it, as low-rank adapters have."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


@pytest.mark.parametrize("part", ["q", "k", "v", "out", "fc1", "fc2"])
def test_an_adapted_linear_map_is_refused(part: str) -> None:
    block = MlpBlock(STAGE, 0.0) if part.startswith("fc") else ConvAttention(STAGE, 0.0)
    old = getattr(block, part)
    setattr(block, part, Adapted(old.in_features, old.out_features))
    with pytest.raises(TypeError, match=f"reads the parameters of '{part}' .* what Adapted does"):
        block(TOKENS)


def test_a_forward_of_its_own_is_refused() -> None:
    block = MlpBlock(STAGE, 0.0)
    block.fc1.forward = lambda x: 2 * x
    with pytest.raises(TypeError, match=r"what its own forward does would be left out"):
        block(TOKENS)


def test_norms_of_projections_with_more_than_one_eps_are_refused() -> None:
    block = ConvAttention(STAGE, 0.0)
    block.k_conv.norm.eps = 0.5
    with pytest.raises(ValueError, match=r"must have one eps, got \[1e-05, 0\.5\]"):
        block(TOKENS)


@pytest.mark.parametrize(
    "block", [ConvAttention(STAGE, 0.0), MlpBlock(STAGE, 0.0), TokenEmbed(8, STAGE)]
)
def test_another_norm_is_refused(block: nn.Module) -> None:
    block.norm = nn.GroupNorm(1, 8)
    with pytest.raises(TypeError, match=r"reads the parameters of 'norm' .* what GroupNorm does"):
        block(TOKENS)


def test_torch_s_synchronised_norm_is_refused_with_ours_named() -> None:
    lift = SteerableLift("C4", 1, 2)
    for model, x in (
        (EqCvT(1, image_size=33), torch.rand(2, 1, 33, 33)),
        (lift, torch.rand(1, 1, 9, 9)),
    ):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        with pytest.raises(
            TypeError, match=r"SyncBatchNorm does .* eqcvt\.nn\.set_sync_batch_norm"
        ):
            model(x)


def test_pruning_by_a_hook_is_refused_until_it_is_permanent() -> None:
    block = Block(STAGE, 0.0)
    prune.l1_unstructured(block.mlp.fc1, "weight", 0.5)
    with pytest.raises(TypeError, match=r"the hook that makes its weight would not run"):
        block(TOKENS)
    prune.remove(block.mlp.fc1, "weight")
    assert block(TOKENS).shape == TOKENS.shape


def test_parametrizations_and_hooks_that_look_on_are_no_hindrance() -> None:
    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    block = MlpBlock(STAGE, 0.0)
    with torch.no_grad():
        block.fc2.bias.zero_()
    block.fc1.register_forward_pre_hook(lambda *_: None)
    before = block(TOKENS) - TOKENS
    parametrize.register_parametrization(block.fc2, "weight", Half())
    torch.testing.assert_close(block(TOKENS) - TOKENS, before / 2)


def test_a_compiled_block_refuses_them_too() -> None:
    block = MlpBlock(STAGE, 0.0)
    whole = torch.compile(block, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(TOKENS), block(TOKENS))
    block.fc1 = Adapted(block.fc1.in_features, block.fc1.out_features)
    with pytest.raises(TypeError, match=r"reads the parameters of 'fc1'"):
        torch.compile(block, backend="eager")(TOKENS)
