"""Calls of every op: what its kernels are checked on and timed with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eqcvt import ops

Call = Callable[..., list[Tensor]]
Results = tuple[list[Tensor], list[Tensor]]


def lift(
    training: bool,
    *,
    shape: tuple[int, ...] = (2, 2, 19, 17),
    fields: int = 3,
    order: int = 4,
    kernel: int = 5,
    padding: int = 1,
    masked: bool = True,
    sigma: float | None = 0.66,
    **options: Any,
) -> tuple[Call, list[Tensor]]:
    """Return a call of the steerable block, and its differentiable inputs."""
    channels = shape[1]
    bank = torch.randn(fields, order, channels, kernel, kernel) / (channels**0.5 * kernel)
    # Not around zero: the mean of what cancels is rounding and no more.
    inputs = [torch.randn(shape) + 0.5, bank, torch.rand(fields) + 0.5, torch.randn(fields) / 2]
    running = (torch.randn(fields) / 5, torch.rand(fields) + 0.5)
    mask = torch.rand(*shape[2:], dtype=torch.float64) if masked else None
    blur = None if sigma is None else ops.blur_line(sigma)

    def call(*t: Tensor) -> list[Tensor]:
        still = None if training else (running[0].to(t[2]), running[1].to(t[2]))
        x, bank, weight, bias = t
        found = ops.lift(x, bank, weight, bias, still, mask, blur, padding=padding, **options)
        return [y for y in found if y is not None]

    return call, inputs


def conv_attention(
    training: bool,
    *,
    shape: tuple[int, ...] = (2, 16, 9, 7),
    heads: int = 3,
    head_dim: int = 16,
    kernel: int = 3,
    values: bool = True,
    norm: bool = True,
    memory_format: torch.memory_format = torch.contiguous_format,
    **options: Any,
) -> tuple[Call, list[Tensor]]:
    """Return a call of the attention block, and its differentiable inputs."""
    dim, width = shape[1], heads * head_dim
    count = 3 if values else 2
    inputs = [torch.randn(shape).to(memory_format=memory_format) for _ in range(2)]
    for _ in range(count):
        filters = torch.randn(dim, 1, kernel, kernel) / kernel
        inputs += [filters, torch.rand(dim) + 0.5, torch.randn(dim) / 2]
    inputs += [torch.randn(width, dim) / dim**0.5 for _ in range(3)]
    inputs += [torch.randn(dim, width) / width**0.5]
    inputs += [torch.randn(width) / 4 for _ in range(3)] + [torch.randn(dim)]
    if norm:
        inputs += [torch.rand(dim) + 0.5, torch.randn(dim) / 2]
    running = [(torch.randn(dim) / 5, torch.rand(dim) + 0.5) for _ in range(count)]

    def call(*t: Tensor) -> list[Tensor]:
        parts = []
        for i, (mean, variance) in enumerate(running):
            still = None if training else (mean.to(t[3]), variance.to(t[3]))
            filters, weight, bias = t[2 + 3 * i : 5 + 3 * i]
            parts.append(ops.Depthwise(filters, weight, bias, still))
        v = parts[2] if values else None
        w = ops.Pointwise(*t[2 + 3 * count : 10 + 3 * count])
        first = ops.Norm(t[-2], t[-1]) if norm else None
        y, statistics = ops.conv_attention(
            t[0], t[1], parts[0], parts[1], v, w, norm=first, heads=heads, **options
        )
        return [y, *(s for pair in statistics if pair is not None for s in pair)]

    return call, inputs


def mlp_block(
    training: bool,
    *,
    shape: tuple[int, ...] = (2, 16, 7, 9),
    hidden: int = 24,
    averaged: bool = False,
    memory_format: torch.memory_format = torch.contiguous_format,
    **options: Any,
) -> tuple[Call, list[Tensor]]:
    """Return a call of the MLP block, maybe averaged over tokens, and its differentiable inputs."""
    dim = shape[1]
    shapes = [shape, (dim,), (dim,), (hidden, dim), (hidden,), (dim, hidden), (dim,)]
    inputs = [torch.randn(s) / (s[1] ** 0.5 if len(s) == 2 else 1) for s in shapes]
    inputs[0] = inputs[0].to(memory_format=memory_format)

    def call(*t: Tensor) -> list[Tensor]:
        y = ops.mlp_block(*t, **options)
        return [ops.token_mean(y) if averaged else y]

    return call, inputs


def token_embed(
    training: bool,
    *,
    shape: tuple[int, ...] = (2, 5, 13, 11),
    dim: int = 16,
    kernel: int = 3,
    stride: int = 2,
    padding: int = 1,
    **options: Any,
) -> tuple[Call, list[Tensor]]:
    """Return a call of the token embedding, and its differentiable inputs."""
    filters = torch.randn(dim, shape[1], kernel, kernel) / (shape[1] ** 0.5 * kernel)
    inputs = [torch.randn(shape), filters, *(torch.randn(dim) for _ in range(3))]

    def call(*t: Tensor) -> list[Tensor]:
        return [ops.token_embed(*t, stride=stride, padding=padding, **options)]

    return call, inputs


CALLS: dict[str, Callable[..., tuple[Call, list[Tensor]]]] = {
    "lift": lift,
    "conv_attention": conv_attention,
    "mlp_block": mlp_block,
    "token_embed": token_embed,
}

_IMAGES = {"fields": 10, "kernel": 7}
# Tokens are channels last between the model's layers, and any way in other calls.
_LAST = {"memory_format": torch.channels_last}
_TOKENS = {"shape": (2, 32, 61, 61), "head_dim": 64, "values": False, **_LAST}
_MLP = {"shape": (2, 32, 61, 61), "hidden": 64, **_LAST}
# The model's shapes first, then odd ones: what a tile leaves over, and of every shape class the
# largest, so that no tuned tile is too large for another member.
CHECKED: dict[str, dict[str, dict[str, Any]]] = {
    "lift": {
        "three channels": {"shape": (4, 3, 129, 129), **_IMAGES},
        "one channel": {"shape": (4, 1, 129, 129), **_IMAGES},
        # With many images where they are small: rounding decides a ReLU or a maximum in a few.
        "small": {"shape": (16, 2, 19, 17)},
        "stacked, D4": {
            "shape": (8, 40, 17, 23),
            "fields": 5,
            "order": 8,
            "padding": 2,
            "masked": False,
            "pool": False,
        },
        "strided": {"shape": (192, 4, 33, 30), "stride": 2, "blur_stride": 2, "padding": 0},
        "wide filters": {"shape": (16, 4, 25, 21), "kernel": 11, "padding": 3, "sigma": None},
        "wide image": {"shape": (4, 3, 14, 290), **_IMAGES},
        "large group": {"shape": (16, 1, 31, 14), "fields": 9, "order": 16, "kernel": 3},
    },
    "conv_attention": {
        "model": _TOKENS,
        "small": {},
        "64 channels": {"shape": (1, 64, 14, 19), "head_dim": 64, **_LAST},
        "5x5": {"shape": (1, 20, 8, 9), "head_dim": 32, "kernel": 5},
        "128 channels": {"shape": (1, 128, 11, 13), "head_dim": 128, "heads": 2, **_LAST},
        "two keys": {"shape": (3, 18, 3, 2), "heads": 1, "head_dim": 32},
        "normalised": {"shape": (2, 20, 9, 7), "norm": False},
        "wider than the heads": {"shape": (2, 64, 9, 7), "head_dim": 32},
        "sixteen heads": {"shape": (2, 32, 11, 9), "heads": 16, "head_dim": 32},
        # Small enough for a sanitizer, with keys for more than one tile.
        "one filter, odd": {"shape": (1, 18, 21, 20), "values": False, "head_dim": 32},
    },
    "mlp_block": {
        "model": _MLP,
        "model, averaged": {**_MLP, "averaged": True},
        "small": {},
        "32 channels": {"shape": (1, 32, 9, 5), "hidden": 256},
        "64 channels": {"shape": (1, 64, 13, 5), "hidden": 256},
        "128 channels": {"shape": (1, 128, 9, 9), "hidden": 390},
        "64 channels, averaged": {"shape": (2, 64, 13, 11), "hidden": 256, "averaged": True},
        "128 channels, averaged": {"shape": (3, 128, 9, 16), "hidden": 512, "averaged": True},
        "one token": {"shape": (1, 18, 1, 1), "hidden": 7},
    },
    "token_embed": {
        "model": {"shape": (2, 10, 121, 121), "dim": 32},
        "small": {},
        "32 channels": {"shape": (1, 64, 12, 9), "dim": 32},
        "64 channels, 7x7": {
            "shape": (1, 3, 35, 30),
            "dim": 64,
            "kernel": 7,
            "stride": 4,
            "padding": 2,
        },
        "64 channels, 3x3": {"shape": (1, 3, 33, 31), "dim": 64},
        "128 channels": {"shape": (1, 64, 15, 16), "dim": 128},
        "128 channels, few taps": {"shape": (1, 3, 33, 31), "dim": 128},
        "one token": {"shape": (1, 1, 2, 2), "dim": 18, "padding": 0, "kernel": 2, "stride": 1},
    },
}
# The model's training step at batch 128. Its images need no gradient, so one call makes it apart.
TIMED: dict[str, list[tuple[dict[str, Any], bool]]] = {
    "lift": [
        ({"shape": (128, 3, 129, 129), **_IMAGES}, False),
        ({"shape": (128, 1, 129, 129), **_IMAGES}, False),
        ({"shape": (128, 3, 129, 129), **_IMAGES}, True),
    ],
    "conv_attention": [({**_TOKENS, "shape": (128, 32, 61, 61), "dropout": 0.1}, True)],
    "mlp_block": [({**_MLP, "shape": (128, 32, 61, 61), "dropout": 0.1}, True)],
    "token_embed": [({"shape": (128, 10, 121, 121), "dim": 32}, True)],
}


def results(call: Call, inputs: list[Tensor]) -> Results:
    """Return what a call gives, and the gradients of a fixed sum of the first result."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = call(*leaves)
    y = outputs[0]
    weight = torch.sin(torch.arange(y.numel(), dtype=torch.float64, device=y.device)).view(y.shape)
    found = torch.autograd.grad(y, leaves, weight.to(y.dtype), allow_unused=True)
    gradients = [
        torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True)
    ]
    return [t.detach() for t in outputs], gradients


def activations(op: str, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the inputs with the activations, and all parameters beside float64, in ``dtype``."""
    count = 2 if op == "conv_attention" else 1
    wide = torch.promote_types(dtype, torch.float32)
    return [t.to(dtype if i < count else wide) for i, t in enumerate(inputs)]


def step(op: str, options: dict[str, Any], image_gradient: bool, x: Tensor) -> Callable[[], object]:
    """Return a training step of an op on the device and in the dtype of ``x``."""
    torch.manual_seed(0)
    with x.device:
        call, inputs = CALLS[op](True, **options)
    leaves = activations(op, inputs, x.dtype)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i > 0 or image_gradient)
    weight: list[Tensor] = []

    def run() -> None:
        y = call(*leaves)[0]
        if not weight:
            weight.append(torch.randn_like(y))
        torch.autograd.grad(y, [t for t in leaves if t.requires_grad], weight[0], allow_unused=True)

    return run
