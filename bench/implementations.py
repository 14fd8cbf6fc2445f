"""The ways to run a module: equal to the plain one first, then timed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.cases import Case
from bench.timing import Function, captured
from eqcvt import ops
from eqcvt.nn import set_backend


class Implementation(NamedTuple):
    """Whose code (``auto``: what ``eqcvt.fast`` takes), how it is called, and who asks for it."""

    backend: str
    mode: str = "eager"
    asked_by: str = "default"


IMPLEMENTATIONS = {
    "escnn": Implementation("escnn"),
    "escnn-compile": Implementation("escnn", "compile", "--full"),
    "eager": Implementation("reference"),
    "compile": Implementation("reference", "compile", "--compile"),
    "compile-max": Implementation("reference", "max-autotune", "--full"),
    **{name: Implementation(name) for name in ("native", "triton", "auto")},
    **{
        f"{name}-{mode}": Implementation(name, mode, "--full")
        for mode in ("compile", "graph")
        for name in ("native", "triton", "auto")
    },
}
# The norm of a difference over the norm, of results and of gradients. Rounding to bfloat16 alone
# moves a gradient by a tenth: it makes another element win a maximum.
LIMITS = {"float32": 1e-3, "tf32": 0.05, "bfloat16": 0.1}
GRADIENT_LIMITS = LIMITS | {"bfloat16": 0.3}


def missing(name: str, device: str) -> str | None:
    """Return why an implementation is not to be had on a device, or None if it is."""
    backend, mode, _ = IMPLEMENTATIONS[name]
    if mode == "graph" and device != "cuda":
        return "a CUDA graph needs CUDA"
    if backend in ("escnn", "reference"):
        return None
    choices = ops.explain((device,))
    if backend == "auto":
        chosen = {row.backend for row in choices if row.chosen}
        return f"it takes {chosen.pop()} for every op" if len(chosen) == 1 else None
    rows = [row for row in choices if row.backend == backend]
    if not rows:
        return f"it does not run on {device}"
    return None if any(row.available for row in rows) else rows[0].reason


def autocast(case: Case, device: str) -> torch.autocast:
    """Return the context of the case's dtype, in which a module is called."""
    return torch.autocast(device, torch.bfloat16, enabled=case.dtype == "bfloat16")


def same(ours: Tensor, theirs: Tensor, limit: float) -> None:
    """Compare two results: nothing wrong is timed."""
    assert ours.shape == theirs.shape, f"{list(ours.shape)} is not {list(theirs.shape)}"
    error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
    assert error <= limit, f"relative difference {error:.1e}: nothing is timed"


class Refused(RuntimeError):
    """No part of a module can be run by the backend that is to be timed."""


def prefer(module: nn.Module, backend: str, x: Tensor, case: Case) -> None:
    """Make each part of a module take ``backend`` where that serves it, and else plain PyTorch.

    Raises:
        Refused: if it serves none.
    """
    parts = [part for part in module.modules() if hasattr(type(part), "backend")]
    set_backend(module, backend)
    last: list[nn.Module] = []
    hooks = [p.register_forward_pre_hook(lambda p, _: last.append(p)) for p in parts]
    module.eval()
    while True:
        try:
            with torch.no_grad(), autocast(case, x.device.type):
                module(x)
            break
        except ops.CannotServe as error:
            set_backend(last[-1], "reference")
            if all(part.backend == "reference" for part in parts):
                raise Refused(str(error)) from None
    for hook in hooks:
        hook.remove()
    module.train()


def agree(one: nn.Module, other: nn.Module, x: Tensor, case: Case) -> None:
    """Compare results and input gradients in evaluation mode."""
    results = []
    for module in (one, other):
        training = module.training
        leaf = x.detach().clone().requires_grad_()
        module.train().eval()  # escnn expands its filters when the mode changes
        with autocast(case, x.device.type):
            y = module(leaf)
        weight = torch.cos(torch.arange(y.numel(), device=y.device)).view(y.shape)
        (y.float() * weight).sum().backward()
        module.zero_grad(set_to_none=True)
        module.train(training)
        assert leaf.grad is not None
        results.append((y.detach(), leaf.grad))
    limits = LIMITS[case.dtype], GRADIENT_LIMITS[case.dtype]
    for ours, theirs, limit in zip(*results, limits, strict=True):
        same(ours, theirs, limit)


def contender(
    case: Case,
    implementation: str,
    plain: nn.Module,
    x: Tensor,
    escnn: Callable[[], nn.Module] | None = None,
    *,
    compare: bool = True,
) -> nn.Module:
    """Return the module that is timed, after it gave the numbers of the plain one.

    What torch's compiler makes of a module is compared in inference; in training it would have to
    be compiled once more, without dropout. Where ours cannot serve a part of the module, plain
    PyTorch does, as with the automatic choice.

    Args:
        case: what is timed.
        implementation: by whom.
        plain: our plain module; its copy is changed.
        x: the input; two of its images are enough to compare.
        escnn: makes escnn's module of the same weights.
        compare: whether to.
    """
    backend, mode, _ = IMPLEMENTATIONS[implementation]
    if backend == "escnn":
        assert escnn is not None
        module = escnn()
    else:
        module = copy.deepcopy(plain)
        if backend == "reference":
            set_backend(module, backend)
        else:
            prefer(module, backend, x[:2], case)
    if compare and backend != "reference":
        agree(module, plain, x[:2], case)
    if mode not in ("compile", "max-autotune"):
        return module
    torch.compiler.reset()
    # One graph for one shape, as in training; the second size met would make it a dynamic one.
    options: dict[str, Any] = {"mode": "max-autotune"} if mode == "max-autotune" else {}
    compiled: nn.Module = torch.compile(module, dynamic=False, **options)
    if compare and not case.training:
        with torch.inference_mode(), autocast(case, x.device.type):
            same(compiled.eval()(x), plain.eval()(x), LIMITS[case.dtype])
        plain.train()
    return compiled


def calls(
    case: Case,
    implementation: str,
    module: nn.Module,
    x: Tensor,
    loss: Callable[[Tensor], Tensor] | None = None,
    *,
    input_gradient: bool = False,
) -> Function:
    """Return the function that is timed: inference, or forward, loss and backward.

    Args:
        case: what is timed.
        implementation: by whom; a graph is captured here.
        module: from :func:`contender`.
        x: the input.
        loss: of the module's output; without one the gradient of the output is a random one.
        input_gradient: whether the input has a gradient too.
    """
    module.train(case.training)
    leaf = x.detach().requires_grad_(case.training and input_gradient)
    gradient: list[Tensor] = []

    def forward() -> None:
        with torch.inference_mode(), autocast(case, x.device.type):
            module(leaf)

    def forward_and_backward() -> None:
        module.zero_grad(set_to_none=True)
        leaf.grad = None
        with autocast(case, x.device.type):
            y = module(leaf)
            if loss is not None:
                y = loss(y)
        if loss is not None:
            y.backward()
            return
        if not gradient:
            gradient.append(torch.randn_like(y))
        y.backward(gradient[0])

    function = forward_and_backward if case.training else forward
    return captured(function) if IMPLEMENTATIONS[implementation].mode == "graph" else function
