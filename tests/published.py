"""State dicts as the published models have them, made from their keys and shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eqcvt.groups import lifting_basis
from eqcvt.nn import Stage
from eqcvt.ops import blur_kernel, circular_mask

State = dict[str, Tensor]
needs_escnn = pytest.mark.needs("escnn")
SAMPLED = "block1.1._basisexpansion.block_expansion_('irrep_0', 'regular').sampled_basis"
SMALL: dict[str, Any] = {"image_size": 33, "fields": 3}
SMALL_STAGES = [
    Stage(8, 1, 2, 4, mlp_ratio=27 / 8),
    # 15 hidden channels of 11, a quotient that rounds down so that 15 / 11 * 11 gives 14.
    Stage(11, 2, 1, 8, 5, 1, mlp_ratio=15 / 11, kernel_size=5, kv_stride=1),
]


def norm(state: State, name: str, size: int) -> None:
    """Add a batch norm that has seen data."""
    state[f"{name}.weight"] = torch.rand(size) + 0.5
    state[f"{name}.bias"] = torch.randn(size) * 0.2
    state[f"{name}.running_mean"] = torch.randn(size) * 0.2
    state[f"{name}.running_var"] = torch.rand(size) + 0.5
    state[f"{name}.num_batches_tracked"] = torch.tensor(7)


def filled(state: State, shapes: dict[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        fan_in = max(1, torch.Size(shape[1:]).numel())
        state[name] = torch.randn(shape) * fan_in**-0.5


def stage_state(
    s: int, in_channels: int, kernel: int, dim: int, heads: int, depth: int, ratio: int
) -> State:
    """Return the entries of one stage, names and shapes as the author's state dicts have them."""
    state: State = {}
    filled(state, {f"layers.{s}.0.weight": (dim, in_channels, kernel, kernel)})
    width, column = 64 * heads, (1, dim, 1, 1)
    filled(state, {f"layers.{s}.0.bias": (dim,), f"layers.{s}.1.g": column})
    filled(state, {f"layers.{s}.1.b": column})
    for i in range(depth):
        p = f"layers.{s}.2.layers.{i}"
        filled(state, {f"{p}.0.norm.g": column, f"{p}.0.norm.b": column})
        filled(state, {f"{p}.0.fn.to_q.net.0.weight": (dim, 1, 3, 3)})
        norm(state, f"{p}.0.fn.to_q.net.1", dim)
        filled(state, {f"{p}.0.fn.to_q.net.2.weight": (width, dim, 1, 1)})
        filled(state, {f"{p}.0.fn.to_kv.net.0.weight": (dim, 1, 3, 3)})
        norm(state, f"{p}.0.fn.to_kv.net.1", dim)
        filled(state, {f"{p}.0.fn.to_kv.net.2.weight": (2 * width, dim, 1, 1)})
        filled(state, {f"{p}.0.fn.to_out.0.weight": (dim, width, 1, 1)})
        filled(state, {f"{p}.0.fn.to_out.0.bias": (dim,)})
        filled(state, {f"{p}.1.norm.g": column, f"{p}.1.norm.b": column})
        filled(state, {f"{p}.1.fn.net.0.weight": (ratio * dim, dim, 1, 1)})
        filled(state, {f"{p}.1.fn.net.0.bias": (ratio * dim,)})
        filled(state, {f"{p}.1.fn.net.3.weight": (dim, ratio * dim, 1, 1)})
        filled(state, {f"{p}.1.fn.net.3.bias": (dim,)})
    return state


def head_state(first: int, dim: int, hidden: int, classes: int) -> State:
    state: State = {}
    filled(state, {f"layers.{first}.weight": (hidden, dim), f"layers.{first}.bias": (hidden,)})
    norm(state, f"layers.{first + 1}", hidden)
    filled(state, {f"layers.{first + 3}.weight": (classes, hidden)})
    filled(state, {f"layers.{first + 3}.bias": (classes,)})
    return state


def published_eqcvt(channels: int = 1, size: int = 129, *, shuffled: bool = False) -> State:
    """Return a state dict with the keys and shapes of the author's EqCvT.

    With ``shuffled`` the stored basis has other signs and another order than ours, as e2cnn's has.
    """
    basis = lifting_basis("C4", 7)
    if shuffled:
        signs = torch.randint(0, 2, (18, 1, 1, 1)) * 2 - 1
        basis = (basis * signs)[torch.randperm(18)]
    weights = torch.randn(10, channels, 18) * (18 * channels) ** -0.5
    bank = torch.einsum("fcb,bgij->fgcij", weights.double(), basis)
    state = {
        "block1.0.mask": circular_mask(size).float()[None, None],
        "block1.1.weights": weights.flatten(),
        "block1.1.filter": bank.reshape(40, channels, 7, 7).float(),
        SAMPLED: basis.reshape(18, 4, 1, 49).float(),
        "block1.1._basisexpansion.in_indices_('irrep_0', 'regular')": torch.tensor([0, 1, 1]),
        "block1.1._basisexpansion.out_indices_('irrep_0', 'regular')": torch.tensor([0, 40, 40]),
        "block1.2.indices_4": torch.tensor([0, 40]),
    }
    norm(state, "block1.2.batch_norm_[4]", 10)
    state["pool1.filter"] = blur_kernel(0.66).float().expand(40, 1, 5, 5).clone()
    state["gpool.in_indices_4"] = torch.tensor([0, 40])
    state["gpool.out_indices_4"] = torch.tensor([0, 10])
    return {**state, **stage_state(0, 10, 3, 32, 3, 2, 2), **head_state(3, 32, 64, 2)}


def published_cvt() -> State:
    """Return a state dict with the keys and shapes of the author's two-stage CvT."""
    first = stage_state(0, 1, 7, 64, 2, 2, 4)
    return {**first, **stage_state(1, 64, 3, 128, 3, 1, 4), **head_state(4, 128, 128, 2)}


def saved(state: object, path: Path) -> Path:
    torch.save(state, path)
    return path


def randomised(model: nn.Module) -> nn.Module:
    """Give every entry of a model values of its own, statistics included."""
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif value.is_floating_point() and value.dim() < 2:
            value.add_(torch.randn_like(value) * 0.2)
        elif not value.is_floating_point():
            value.fill_(7)
    return model


@torch.no_grad()
def difference(a: nn.Module, b: nn.Module, channels: int, size: int) -> float:
    x = torch.rand(2, channels, size, size)
    return float((a(x) - b(x)).abs().max())


def same_weights(a: nn.Module, b: nn.Module) -> float:
    """Return the largest difference of two models' entries, which must have the same names."""
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    return max(float((left[k].double() - right[k].double()).abs().max()) for k in left)
