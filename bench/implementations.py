"""The ways to run a module: compared with the plain one first, then timed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from eqcvt import ops
from eqcvt.nn import set_backend

IMPLEMENTATIONS = ("escnn", "eager", "compile", "native", "triton")


def skip_what_is_not_there(implementation: str, device: str, config: pytest.Config) -> None:
    """Skip a case that the options leave out, or that this machine cannot run."""
    if implementation == "compile" and not config.getoption("--compile"):
        pytest.skip("--compile times torch.compile too")
    if implementation in ("native", "triton"):
        rows = [row for row in ops.explain((device,)) if row.backend == implementation]
        if not any(row.available for row in rows):
            pytest.skip(rows[0].reason if rows else f"{implementation} does not run on {device}")


def variant(module: nn.Module, implementation: str) -> nn.Module:
    """Return a copy of a reference module that runs as ``implementation`` (not escnn)."""
    other = copy.deepcopy(module)
    set_backend(other, "reference" if implementation in ("eager", "compile") else implementation)
    if implementation != "compile":
        return other
    torch._dynamo.reset()
    compiled: nn.Module = torch.compile(other)
    return compiled


def agree(one: nn.Module, other: nn.Module, x: Tensor) -> None:
    """Compare results and input gradients in evaluation mode; nothing wrong is timed."""
    results = []
    for module in (one, other):
        training = module.training
        leaf = x.detach().clone().requires_grad_()
        y = module.eval()(leaf)
        (
            y.float() * torch.cos(torch.arange(y.numel(), device=y.device)).view(y.shape)
        ).sum().backward()
        module.zero_grad(set_to_none=True)
        module.train(training)
        results.append((y.detach(), leaf.grad))
    for ours, theirs in zip(*results, strict=True):
        assert ours is not None
        assert theirs is not None
        error = (ours - theirs).abs().max() / theirs.abs().max()
        limit = 1e-3 if x.dtype in (torch.float32, torch.float64) else 0.1
        assert error < limit, f"relative difference {error:.1e}: nothing is timed"


def training_step(module: nn.Module, x: Tensor, *, input_gradient: bool) -> Callable[[], None]:
    """Return a function that runs the module forward and backward in training mode."""
    module.train()
    leaf = x.detach().clone().requires_grad_(input_gradient)
    gradient: list[Tensor] = []

    def step() -> None:
        module.zero_grad(set_to_none=True)
        leaf.grad = None
        y = module(leaf)
        if not gradient:
            gradient.append(torch.randn_like(y))
        y.backward(gradient[0])

    return step


def inference(module: nn.Module, x: Tensor) -> Callable[[], None]:
    """Return a function that runs the module forward in evaluation mode."""
    module.eval()

    def forward() -> None:
        with torch.inference_mode():
            module(x)

    return forward
