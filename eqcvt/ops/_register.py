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


def define(
    op: str,
    function: str,
    schema: str,
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Register ``eqcvt::<op>_<function>`` and return it.

    Args:
        op: name of the op, and of its module in each backend.
        function: the function of that module.
        schema: its arguments and results as torch writes them, ``backend`` left out; what stands
            behind ``*`` is passed to the function by name.
        fake: makes empty results from the same arguments.
        setup_context: keeps what the gradient needs, as in :func:`torch.library.register_autograd`.
        backward: the gradient.
    """
    name = f"{op}_{function}"
    arguments, results = schema.split(" -> ")
    _library.define(
        f"{name}{arguments[:-1]}, str backend) -> {results}",
        tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
    )

    def run(first: Tensor, *args: Any, backend: str, **options: Any) -> Any:
        # Kernels are launched on the current device, which need not be the tensors'.
        there = torch.cuda.device_of(first)  # type: ignore[no-untyped-call]
        with there, torch.autocast(first.device.type, enabled=False):
            kernels = _backend.module(op, backend, first.device.type)
            return getattr(kernels, function)(first, *args, **options)

    def pretend(*args: Any, backend: str, **options: Any) -> Any:
        return fake(*args, **options)

    _library.impl(name, run, "CompositeExplicitAutograd")
    qualified = f"eqcvt::{name}"
    torch.library.register_fake(qualified, pretend, lib=_library)

    def refuse(*_: Any) -> None:
        raise RuntimeError(
            f"{qualified} has no derivative: take second derivatives with use_backend('reference')"
        )

    torch.library.register_autograd(
        qualified, backward or refuse, setup_context=setup_context, lib=_library
    )
    return getattr(torch.ops.eqcvt, name)


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
