"""What torch is told of the attention: three torch ops, ``project``, ``fold`` and ``attend``.

Each has the schema of the function of that name in the backends' modules, the shapes of its results
and its gradient, which is a torch op too. :mod:`eqcvt.ops.conv_attention` says what they compute,
and does without ``fold`` where a backend has none.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from eqcvt.ops._register import define, zeros_if_none
from eqcvt.ops._sizes import conv_size


def _sizes(x: Tensor, kernel: int, kv_stride: int) -> tuple[int, int]:
    """Return the numbers of queries and keys."""
    height, width = x.shape[-2:]
    rows, columns = (conv_size(n, kernel, kv_stride, kernel // 2) for n in (height, width))
    return height * width, rows * columns


def _project_fake(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *_norm: Tensor | None,
    kv_stride: int,
    moments: bool,
    eps: float,
) -> tuple[Tensor, ...]:
    batch, dim = x.shape[:2]
    queries, keys = _sizes(x, q.shape[-1], kv_stride)
    statistics = (2 if v is None else 3, dim) if moments else 0
    return (
        x.new_empty(batch, queries, dim),
        x.new_empty(batch, keys, dim),
        x.new_empty(0 if v is None else (batch, keys, dim)),
        q.new_empty(statistics),
        q.new_empty(statistics),
    )


def _project_backward_fake(*inputs: Any, **_: Any) -> tuple[Tensor, ...]:
    x, q, *rest = inputs[-6:]
    dx = x.new_empty(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
    return dx, *(q.new_empty(0 if t is None else t.shape) for t in (q, *rest))


_project_backward_op = define(
    "conv_attention",
    "project_backward",
    "(Tensor da, Tensor db, Tensor? dc, Tensor? dmean, Tensor? dvariance, Tensor a, Tensor b,"
    " Tensor? c, Tensor? mean, Tensor x, Tensor q, Tensor k, Tensor? v, Tensor? norm_weight,"
    " Tensor? norm_bias, *, int kv_stride, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _project_backward_fake,
)


def _project_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ctx.options = keyword_only_inputs
    ctx.save_for_backward(*output[:4], *inputs)


def _project_backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    a, b, c, mean, *inputs = ctx.saved_tensors
    separate = inputs[3] is not None
    da, db, dc = (zeros_if_none(g, t) for g, t in zip(gradients, (a, b, c)))  # noqa: B905
    options = dict(ctx.options)
    dmean = dvariance = None
    if options.pop("moments"):
        dmean, dvariance = (zeros_if_none(g, mean) for g in gradients[3:])
    found = _project_backward_op(
        da,
        db,
        dc if separate else None,
        dmean,
        dvariance,
        a,
        b,
        c if separate else None,
        mean if dmean is not None else None,
        *inputs,
        **options,
    )
    return tuple(None if t is None else g for g, t in zip(found, inputs, strict=True))


project = define(
    "conv_attention",
    "project",
    "(Tensor x, Tensor q, Tensor k, Tensor? v, Tensor? norm_weight, Tensor? norm_bias, *,"
    " int kv_stride, bool moments, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _project_fake,
    setup_context=_project_context,
    backward=_project_backward,
)


_PARAMETERS = (
    "Tensor mean, Tensor variance, Tensor weight_a, Tensor bias_a, Tensor weight_b, Tensor bias_b,"
    " Tensor? weight_c, Tensor? bias_c, Tensor q, Tensor k, Tensor v, Tensor out, Tensor? q_bias,"
    " Tensor? k_bias, Tensor? v_bias, Tensor? out_bias, *, int heads, float eps"
)


def _fold_fake(
    mean: Tensor, variance: Tensor, *params: Tensor, heads: int, **_: Any
) -> tuple[Tensor, ...]:
    dim = mean.shape[1]
    shapes = ((heads, dim, dim), (heads, dim), (heads, dim, dim), (dim,))
    scales = (mean.new_empty(mean.shape) for _ in range(2))
    return *scales, *(mean.new_empty(shape) for shape in shapes)


def _fold_backward_fake(*inputs: Any, **_: Any) -> tuple[Tensor, ...]:
    mean, q = inputs[6], inputs[14]
    norms = (mean.new_empty(mean.shape) for _ in range(4))
    weights = (q.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs[14:])
    return *norms, *weights


_fold_backward_op = define(
    "conv_attention",
    "fold_backward",
    "(Tensor dscale, Tensor dshift, Tensor dwq, Tensor dbq, Tensor dwo, Tensor dbo, "
    f"{_PARAMETERS}) -> ({', '.join(['Tensor'] * 12)})",
    _fold_backward_fake,
)


def _fold_backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    found = _fold_backward_op(*gradients, *inputs, **ctx.options)
    dmean, dvariance, dweight, dbias, *rest = found
    norms = [t[i] for i in range(len(dweight)) for t in (dweight, dbias)]
    norms = [g.to(t.dtype) for g, t in zip(norms, inputs[2:], strict=False)]
    weights = [None if t is None else g for g, t in zip(rest, inputs[8:], strict=True)]
    return dmean, dvariance, *norms, *[None] * (6 - len(norms)), *weights


fold = define(
    "conv_attention",
    "fold",
    f"({_PARAMETERS}) -> ({', '.join(['Tensor'] * 6)})",
    _fold_fake,
    backward=_fold_backward,
)


def _attend_fake(
    a: Tensor, b: Tensor, c: Tensor | None, residual: Tensor | None, *params: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    wq = params[2]
    batch, queries, dim = a.shape
    if not options["save"]:
        return a.new_empty(a.shape), a.new_empty(0), wq.new_empty(0)
    heads = wq.shape[0]
    return (
        a.new_empty(a.shape),
        a.new_empty(batch, queries, heads, dim),
        wq.new_empty(batch, heads, queries),
    )


def _attend_backward_fake(
    dy: Tensor, a: Tensor, b: Tensor, c: Tensor | None, *params: Tensor, dropout: float
) -> tuple[Tensor, ...]:
    dc = a.new_empty(0 if c is None else c.shape)
    parameters = [t.new_empty(t.shape) for t in params[:6]]
    return a.new_empty(a.shape), b.new_empty(b.shape), dc, *parameters


_attend_backward_op = define(
    "conv_attention",
    "attend_backward",
    "(Tensor dy, Tensor a, Tensor b, Tensor? c, Tensor scale, Tensor shift, Tensor wq, Tensor bq,"
    " Tensor wo, Tensor bo, Tensor seed, Tensor o, Tensor lse, *, float dropout)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _attend_backward_fake,
)


def _attend_context(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    a, b, c, _, *params = inputs
    _, o, lse = output
    ctx.options = keyword_only_inputs
    ctx.save_for_backward(a, b, c, *params, o, lse)
    ctx.mark_non_differentiable(o, lse)
    ctx.set_materialize_grads(False)  # no zeros of the size of o


def _attend_backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if not ctx.options["save"]:
        raise RuntimeError("conv_attention_attend was called without save, but needs a gradient")
    a, b, c, *rest = ctx.saved_tensors
    dy = zeros_if_none(dy, a)
    da, db, dc, *params = _attend_backward_op(
        dy, a, b, c, *rest, dropout=ctx.options["dropout"], backend=ctx.options["backend"]
    )
    residual = dy if ctx.needs_input_grad[3] else None
    return da, db, None if c is None else dc, residual, *params, None


attend = define(
    "conv_attention",
    "attend",
    "(Tensor a, Tensor b, Tensor? c, Tensor? residual, Tensor scale, Tensor shift, Tensor wq,"
    " Tensor bq, Tensor wo, Tensor bo, Tensor seed, *, float dropout, bool save)"
    " -> (Tensor, Tensor, Tensor)",
    _attend_fake,
    setup_context=_attend_context,
    backward=_attend_backward,
)
