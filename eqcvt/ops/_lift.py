"""What torch is told of the steerable block: three torch ops, ``moments``, ``norm`` and ``apply``.

Each has the schema of the function of that name in the backends' modules, the shapes of its results
and its gradient, which is a torch op too. :mod:`eqcvt.ops.lift` says what they compute, and does
without ``norm`` where a backend has none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eqcvt.ops import _backend
from eqcvt.ops._register import define, zeros_if_none
from eqcvt.ops._sizes import conv_size


def grid(x: Tensor, bank: Tensor, stride: int, padding: int) -> tuple[int, ...]:
    """Return the height and width of the convolution's result."""
    return tuple(conv_size(n, bank.shape[-1], stride, padding) for n in x.shape[-2:])


def _moments_fake(
    x: Tensor, bank: Tensor, mask: Tensor | None, *, stride: int, padding: int, correlate: bool
) -> tuple[Tensor, ...]:
    fields, _, *filters = bank.shape
    return (
        bank.new_empty(fields),
        bank.new_empty(fields),
        bank.new_empty(bank.shape if correlate else 0),
        bank.new_empty(filters if correlate else 0),
    )


def _moments_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    x, bank, mask = inputs
    mean, _, ux, ones_x = output
    ctx.options = keyword_only_inputs
    ctx.save_for_backward(x, bank, mask, mean, ux, ones_x)


def _moments_backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    x, bank, mask, mean, ux, ones_x = ctx.saved_tensors
    stride, padding = ctx.options["stride"], ctx.options["padding"]
    dmean, dvariance = (zeros_if_none(g, mean) for g in gradients[:2])
    height, width = grid(x, bank, stride, padding)
    count = max(x.shape[0] * bank.shape[1] * height * width, 1)
    backend = ctx.options["backend"]
    fused = _backend.has("lift", backend, "moments_backward")
    if ctx.needs_input_grad[0] or not fused:
        # The gradient by u is constant + slope u.
        slope = dvariance * (2 / count)
        constant = torch.addcmul(dmean / count, slope, mean, value=-1)
    dx = dbank = None
    if ctx.needs_input_grad[1]:
        if ctx.options["correlate"] is False:
            raise RuntimeError("lift_moments was called without correlate, but needs a gradient")
        if fused:
            dbank = _moments_backward_op(
                dmean, dvariance, mean, ux, ones_x, count=count, backend=backend
            )
        else:
            view = (-1, 1, 1, 1, 1)
            dbank = torch.addcmul(slope.view(view) * ux, constant.view(view), ones_x)
    if ctx.needs_input_grad[0]:
        dx = _moments_input_op(
            x,
            bank,
            mask,
            constant,
            slope,
            stride=stride,
            padding=padding,
            backend=backend,
        )
    return dx, dbank, None


_moments_backward_op = define(
    "lift",
    "moments_backward",
    "(Tensor dmean, Tensor dvariance, Tensor mean, Tensor ux, Tensor ones_x, *, SymInt count)"
    " -> Tensor",
    lambda dmean, dvariance, mean, ux, *_, **__: ux.new_empty(ux.shape),
)
_moments_input_op = define(
    "lift",
    "moments_input",
    "(Tensor x, Tensor bank, Tensor? mask, Tensor c1, Tensor c2, *, int stride, int padding)"
    " -> Tensor",
    lambda x, *_, **__: x.new_empty(x.shape),
)
moments = define(
    "lift",
    "moments",
    "(Tensor x, Tensor bank, Tensor? mask, *, int stride, int padding, bool correlate)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _moments_fake,
    setup_context=_moments_context,
    backward=_moments_backward,
)


_norm_backward_op = define(
    "lift",
    "norm_backward",
    "(Tensor dscale, Tensor dshift, Tensor mean, Tensor variance, Tensor weight, Tensor bias, *,"
    " float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda dscale, dshift, mean, *_, **__: tuple(mean.new_empty(mean.shape) for _ in range(4)),
)


def _norm_backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
    inputs = ctx.saved_tensors
    found = _norm_backward_op(*gradients, *inputs, **ctx.options)
    return tuple(g.to(t.dtype) for g, t in zip(found, inputs, strict=True))


norm = define(
    "lift",
    "norm",
    "(Tensor mean, Tensor variance, Tensor weight, Tensor bias, *, float eps) -> (Tensor, Tensor)",
    lambda mean, *_, **__: (mean.new_empty(mean.shape), mean.new_empty(mean.shape)),
    backward=_norm_backward,
)


def _apply_fake(
    x: Tensor,
    bank: Tensor,
    mask: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    blur: Tensor | None,
    *,
    stride: int,
    padding: int,
    blur_stride: int,
    pool: bool,
) -> tuple[Tensor, Tensor]:
    size = grid(x, bank, stride, padding)
    if blur is not None:
        size = tuple(conv_size(n, blur.shape[0], blur_stride, 0) for n in size)
    fields, order = bank.shape[:2]
    shape = (x.shape[0], fields, *([] if pool else [order]), *size)
    return x.new_empty(shape), x.new_empty(shape if pool else 0, dtype=torch.uint8)


def _apply_backward_fake(
    dy: Tensor,
    arg: Tensor,
    x: Tensor,
    bank: Tensor,
    mask: Tensor | None,
    scale: Tensor,
    *_: Any,
    input_gradient: bool,
    **__: Any,
) -> tuple[Tensor, ...]:
    dx = x.new_empty(x.shape if input_gradient else 0)
    return (
        bank.new_empty(bank.shape),
        scale.new_empty(scale.shape),
        scale.new_empty(scale.shape),
        dx,
    )


_apply_backward_op = define(
    "lift",
    "apply_backward",
    "(Tensor dy, Tensor arg, Tensor x, Tensor bank, Tensor? mask, Tensor scale, Tensor shift,"
    " Tensor? blur, *, int stride, int padding, int blur_stride, bool pool, bool input_gradient)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _apply_backward_fake,
)


def _apply_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ctx.options = keyword_only_inputs
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros of the size of the winners


def _apply_backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 6
    *inputs, arg = ctx.saved_tensors
    dbank, dscale, dshift, dx = _apply_backward_op(
        dy.contiguous(), arg, *inputs, **ctx.options, input_gradient=ctx.needs_input_grad[0]
    )
    return dx if ctx.needs_input_grad[0] else None, dbank, None, dscale, dshift, None


apply = define(
    "lift",
    "apply",
    "(Tensor x, Tensor bank, Tensor? mask, Tensor scale, Tensor shift, Tensor? blur, *,"
    " int stride, int padding, int blur_stride, bool pool) -> (Tensor, Tensor)",
    _apply_fake,
    setup_context=_apply_context,
    backward=_apply_backward,
)
