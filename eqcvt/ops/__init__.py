"""The operations of the model: one file each, with its mathematics and plain reference."""

from eqcvt.ops._backend import CannotServe, current_backend, explain, use_backend
from eqcvt.ops._sizes import conv_size
from eqcvt.ops.conv_attention import Depthwise, Norm, Pointwise, attention_weights, conv_attention
from eqcvt.ops.lift import (
    blur_kernel,
    blur_line,
    blur_pool2d,
    circular_mask,
    filter_bank,
    group_pool,
    lift,
    lift_conv2d,
)
from eqcvt.ops.mlp_block import mlp_block
from eqcvt.ops.norm import batch_norm, layer_norm
from eqcvt.ops.token_embed import token_embed
from eqcvt.ops.token_mean import token_mean

__all__ = [
    "CannotServe",
    "Depthwise",
    "Norm",
    "Pointwise",
    "attention_weights",
    "batch_norm",
    "blur_kernel",
    "blur_line",
    "blur_pool2d",
    "circular_mask",
    "conv_attention",
    "conv_size",
    "current_backend",
    "explain",
    "filter_bank",
    "group_pool",
    "layer_norm",
    "lift",
    "lift_conv2d",
    "mlp_block",
    "token_embed",
    "token_mean",
    "use_backend",
]
