"""The mean over tokens, in front of the head.

Its gradient is the same for all tokens of an image. PyTorch's writes it out for each of them and
copies that to where the tokens' channels lie; here it stays one row per image, which the MLP's
gradient kernels read as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eqcvt.ops import _backend


class _TokenMean(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.mean((2, 3))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        batch, dim, height, width = ctx.shape
        each: Tensor = gradients[0] / (height * width)
        return each.view(batch, dim, 1, 1).expand(ctx.shape)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], x: Tensor) -> tuple[Tensor, int]:
        return x.movedim(in_dims[0], 0).mean((3, 4)), 0


class _EagerTokenMean(_TokenMean):
    """With the forward derivative too, which torch.compile does not take."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return tangents[0].mean((2, 3))


def token_mean(x: Tensor) -> Tensor:
    """Average tokens ``[B, D, H, W]``, floating point, to features ``[B, D]`` of their dtype."""
    if _backend._exporting() or not (torch.is_grad_enabled() and x.requires_grad):
        return x.mean((2, 3))
    function = _TokenMean if torch.compiler.is_compiling() else _EagerTokenMean
    y: Tensor = function.apply(x)  # type: ignore[no-untyped-call]
    return y
