"""Layers: the ops with their parameters."""

from eqcvt.nn.backend import set_backend
from eqcvt.nn.filters import Filters
from eqcvt.nn.norm import BatchNorm, LayerNorm, set_sync_batch_norm
from eqcvt.nn.steerable import SteerableLift
from eqcvt.nn.transformer import (
    Block,
    ConvAttention,
    DepthwiseProjection,
    MlpBlock,
    Stage,
    TokenEmbed,
    TransformerStage,
)

__all__ = [
    "BatchNorm",
    "Block",
    "ConvAttention",
    "DepthwiseProjection",
    "Filters",
    "LayerNorm",
    "MlpBlock",
    "Stage",
    "SteerableLift",
    "TokenEmbed",
    "TransformerStage",
    "set_backend",
    "set_sync_batch_norm",
]
