"""The one place where torch learns of an op: schema, fake, implementation, gradient.

Each torch op ``eqcvt::<op>_<function>`` calls ``<function>`` of the backend's module of that op;
its last argument is the backend's name. Ops are never nested: an implementation calls kernels only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eqcvt.ops import _backend

_library: Any = torch.library.Library("eqcvt", "FRAGMENT")  # type: ignore[no-untyped-call]


def _keep_inputs(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    """Keep all inputs and the options for the gradient."""
    ctx.options = keyword_only_inputs
    ctx.save_for_backward(*inputs)


def define(
    op: str,
    function: str,
    schema: str,
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] = _keep_inputs,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Register ``eqcvt::<op>_<function>`` and return it.

    Args:
        op: name of the op, and of its module in each backend.
        function: the function of that module.
        schema: its arguments and results as torch writes them, ``backend`` left out; what stands
            behind ``*`` is passed to the function by name.
        fake: makes empty results from the same arguments.
        setup_context: keeps what the gradient needs, as in :func:`torch.library.register_autograd`;
            by default all inputs.
        backward: the gradient.
    """
    name = f"{op}_{function}"
    arguments, results = schema.split(" -> ")
    _library.define(
        f"{name}{arguments[:-1]}, str backend) -> {results}",
        tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
    )

    def run(first: Tensor, *args: Any, backend: str, **options: Any) -> Any:
        device = first.device.type
        implementation = getattr(_backend.module(op, backend, device), function)
        mixed = torch.is_autocast_enabled(device)
        if mixed:  # what torch.autocast does, in a fifth of its time
            torch.set_autocast_enabled(device, False)
        try:
            # Kernels are launched on the current device, which need not be the tensors'.
            with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
                return implementation(first, *args, **options)
        finally:
            if mixed:
                torch.set_autocast_enabled(device, True)

    def pretend(*args: Any, backend: str, **options: Any) -> Any:
        return fake(*args, **options)

    _library.impl(name, run, "CompositeExplicitAutograd")
    qualified = f"eqcvt::{name}"
    torch.library.register_fake(qualified, pretend, lib=_library)

    registered = getattr(torch.ops.eqcvt, name)
    _library.impl(name, _derivative(registered.default, setup_context, backward), "Autograd")
    return registered


def _derivative(
    op: Any, setup_context: Callable[..., None], backward: Callable[..., Any] | None
) -> Callable[..., Any]:
    """Return what ``op`` does where autograd looks on.

    It is what :func:`torch.library.register_autograd` makes, which asks the schema for each of its
    arguments at each call: with twenty of them that takes longer than a launch.
    """

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            *inputs, options = args
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*inputs, **options)
            if backward is not None:
                setup_context(ctx, inputs, options, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> Any:
            if backward is None:
                raise RuntimeError(
                    f"{op} has no derivative: take second derivatives with use_backend('reference')"
                )
            found = backward(ctx, *gradients)
            return *(found if isinstance(found, tuple) else (found,)), None

    Node.__name__ = f"{op._opname}_node"

    def run(*inputs: Any, **options: Any) -> Any:
        if torch.is_grad_enabled() and any(
            isinstance(t, Tensor) and t.requires_grad for t in inputs
        ):
            return Node.apply(*inputs, options)  # type: ignore[no-untyped-call]
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs, **options)

    return run


def parameter_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of parameters and statistics beside activations ``x``."""
    return torch.promote_types(x.dtype, torch.float32)


def parameter(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a parameter as kernels take it."""
    return t.to(dtype).contiguous()


def _autocast_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device):  # meta has no autocast
        return x.dtype
    return x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(device)


def autocast(x: Tensor) -> Tensor:
    """Return ``x`` in the precision that autocast asks for on its device, if it is on."""
    return x.to(_autocast_dtype(x))


def as_autocast(x: Tensor) -> Tensor:
    """Return something of the shape, device and dtype of ``autocast(x)``, without its values."""
    dtype = _autocast_dtype(x)
    return x if dtype == x.dtype else x.new_empty(1, dtype=dtype).expand(x.shape)


def zeros_if_none(gradient: Tensor | None, like: Tensor) -> Tensor:
    """Return a contiguous gradient, of zeros where none came."""
    return torch.zeros_like(like) if gradient is None else gradient.contiguous()


def seed_of(x: Tensor, dropout: float) -> Tensor:
    """Return the seed ``[1]`` of one call's dropout masks, drawn from torch's generator."""
    if dropout == 0:
        return torch.zeros(1, dtype=torch.int64, device=x.device)
    return torch.randint(2**62, (1,), dtype=torch.int64, device=x.device)
