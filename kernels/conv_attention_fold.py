r"""What attention takes of its norms and pointwise weights, and back: one small kernel each way.

.. math::
    \mathrm{scale} = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}, \quad
    \mathrm{shift} = \beta - \mu \, \mathrm{scale}, \quad
    W^q_h = \frac{Q_h^T K_h}{\sqrt{d}}, \quad c^q_h = \frac{q_h K_h}{\sqrt{d}}, \quad
    W^o_h = V_h^T O_h, \quad c^o = c + \sum_h v_h O_h

with ``Q_h, K_h, V_h`` ``[d, D]`` the rows of head h, ``O_h`` ``[d, D]`` its columns of the last
product turned, and ``q, v, c`` biases. That of the keys adds the same to all scores of a query,
which the softmax does not see. As a chain of PyTorch's operations this was some thirty launches
both ways, each for a few thousand numbers: with 16 images a twentieth of an H100's training step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launches
from .batch_norm import store_affine, store_affine_gradients
from .common import cdiv, padded


@triton.jit
def _load(ptr, offsets, mask):
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, offsets, value, mask):
    tl.store(ptr + offsets, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _conv_attention_fold_kernel(
    mean_ptr,
    variance_ptr,
    weight_a_ptr,
    bias_a_ptr,
    weight_b_ptr,
    bias_b_ptr,
    weight_c_ptr,
    bias_c_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    q_bias_ptr,
    v_bias_ptr,
    out_bias_ptr,
    scale_ptr,
    shift_ptr,
    wq_ptr,
    bq_ptr,
    wo_ptr,
    bo_ptr,
    eps,
    factor,
    WIDTH,
    HEAD: tl.constexpr,
    D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_Q_BIAS: tl.constexpr,
    HAS_V_BIAS: tl.constexpr,
    HAS_OUT_BIAS: tl.constexpr,
):
    """Write one tile of one head's matrices; the first head's also the norms and ``bo``.

    One program owns BLOCK_D rows and columns of ``wq`` and ``wo`` of a head, and walks over its
    HEAD channels. 4 D D HEAD operations a head in fp32 and 4 HEAD D numbers: nothing, its launch is
    what it costs. WIDTH is HEAD times the heads, ``factor`` the scores' scale.
    """
    h = tl.program_id(0)
    o_i = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    o_j = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_i, m_j = o_i < D, o_j < D
    wq = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    wo = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    bq = tl.zeros([BLOCK_D], tl.float32)
    for first in tl.static_range(0, HEAD, BLOCK_E):
        o_e = h * HEAD + first + tl.arange(0, BLOCK_E)
        m_e = first + tl.arange(0, BLOCK_E) < HEAD
        m_ei, m_ej = m_e[:, None] & m_i[None, :], m_e[:, None] & m_j[None, :]
        o_ei, o_ej = o_e[:, None] * D + o_i[None, :], o_e[:, None] * D + o_j[None, :]
        k = _load(k_ptr, o_ej, m_ej)
        out = _load(out_ptr, o_e[:, None] + o_j[None, :] * WIDTH, m_ej)
        wq = tl.dot(tl.trans(_load(q_ptr, o_ei, m_ei)), k, wq, input_precision="ieee")
        wo = tl.dot(tl.trans(_load(v_ptr, o_ei, m_ei)), out, wo, input_precision="ieee")
        if HAS_Q_BIAS:
            bq += tl.sum(_load(q_bias_ptr, o_e, m_e)[:, None] * k, 0)
    o_ij = h * D * D + o_i[:, None] * D + o_j[None, :]
    m_ij = m_i[:, None] & m_j[None, :]
    tl.store(wq_ptr + o_ij, wq * factor, mask=m_ij)
    tl.store(wo_ptr + o_ij, wo, mask=m_ij)
    if tl.program_id(1) == 0:
        tl.store(bq_ptr + h * D + o_j, bq * factor, mask=m_j)
        if h == 0:
            bo = tl.zeros([BLOCK_D], tl.float32)
            if HAS_OUT_BIAS:
                bo = _load(out_bias_ptr, o_j, m_j)
            if HAS_V_BIAS:
                for column in range(0, WIDTH, BLOCK_E):
                    o_c = column + tl.arange(0, BLOCK_E)
                    m_c = o_c < WIDTH
                    o_cj = o_c[:, None] + o_j[None, :] * WIDTH
                    outputs = _load(out_ptr, o_cj, m_c[:, None] & m_j[None, :])
                    bo += tl.sum(_load(v_bias_ptr, o_c, m_c)[:, None] * outputs, 0)
            tl.store(bo_ptr + o_j, bo, mask=m_j)
            for row in tl.static_range(0, 3 if HAS_C else 2):
                store_affine(
                    row,
                    mean_ptr,
                    variance_ptr,
                    weight_a_ptr if row == 0 else weight_b_ptr if row == 1 else weight_c_ptr,
                    bias_a_ptr if row == 0 else bias_b_ptr if row == 1 else bias_c_ptr,
                    scale_ptr,
                    shift_ptr,
                    eps,
                    o_j,
                    m_j,
                    D,
                )


@triton.jit
def _conv_attention_fold_bwd_kernel(
    dscale_ptr,
    dshift_ptr,
    dwq_ptr,
    dbq_ptr,
    dwo_ptr,
    dbo_ptr,
    mean_ptr,
    variance_ptr,
    weight_a_ptr,
    weight_b_ptr,
    weight_c_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    q_bias_ptr,
    v_bias_ptr,
    dmean_ptr,
    dvariance_ptr,
    dweight_ptr,
    dbias_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    dout_ptr,
    dq_bias_ptr,
    dk_bias_ptr,
    dv_bias_ptr,
    dout_bias_ptr,
    eps,
    factor,
    WIDTH,
    HEAD: tl.constexpr,
    D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_Q_BIAS: tl.constexpr,
    HAS_K_BIAS: tl.constexpr,
    HAS_V_BIAS: tl.constexpr,
    HAS_OUT_BIAS: tl.constexpr,
):
    """Write one tile of the weights' gradients; the first program's also the norms' and the bias's.

    One program owns BLOCK_E channels of a head and BLOCK_D of the tokens'::

        dq = s k dwq^T,        dk     = s (q dwq + q_bias dbq),
        dv = out^T dwo^T,      dout^T = v dwo + v_bias dbo

    8 D D HEAD operations a head in fp32, 2 D D numbers of gradients and 8 HEAD D of weights: its
    launch is what it costs. Sums over the tokens' channels go tile by tile, in order.
    """
    h = tl.program_id(0)
    first_e = tl.program_id(1) * BLOCK_E
    o_e = h * HEAD + first_e + tl.arange(0, BLOCK_E)
    m_e = first_e + tl.arange(0, BLOCK_E) < HEAD
    o_n = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_n = o_n < D
    m_en = m_e[:, None] & m_n[None, :]
    dq = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    dk = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    dout = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    dq_bias = tl.zeros([BLOCK_E], tl.float32)
    dv_bias = tl.zeros([BLOCK_E], tl.float32)
    for first in tl.static_range(0, D, BLOCK_D):
        o_m = first + tl.arange(0, BLOCK_D)
        m_m = o_m < D
        m_em, m_mn = m_e[:, None] & m_m[None, :], m_m[:, None] & m_n[None, :]
        o_em = o_e[:, None] * D + o_m[None, :]
        # Of both matrices a tile [m, n], and the tile [n, m] that lies across the diagonal, turned.
        tile = h * D * D + o_m[:, None] * D + o_n[None, :]
        turned = h * D * D + o_n[None, :] * D + o_m[:, None]
        k = _load(k_ptr, o_em, m_em)
        out = _load(out_ptr, o_e[:, None] + o_m[None, :] * WIDTH, m_em)
        dq = tl.dot(k, _load(dwq_ptr, turned, m_mn), dq, input_precision="ieee")
        dv = tl.dot(out, _load(dwo_ptr, turned, m_mn), dv, input_precision="ieee")
        q, v = _load(q_ptr, o_em, m_em), _load(v_ptr, o_em, m_em)
        dk = tl.dot(q, _load(dwq_ptr, tile, m_mn), dk, input_precision="ieee")
        dout = tl.dot(v, _load(dwo_ptr, tile, m_mn), dout, input_precision="ieee")
        if HAS_Q_BIAS:
            dq_bias += tl.sum(k * _load(dbq_ptr, h * D + o_m, m_m)[None, :], 1)
        if HAS_V_BIAS:
            dv_bias += tl.sum(out * _load(dbo_ptr, o_m, m_m)[None, :], 1)
    if HAS_Q_BIAS:
        dbq = _load(dbq_ptr, h * D + o_n, m_n)
        dk += _load(q_bias_ptr, o_e, m_e)[:, None] * dbq[None, :]
    if HAS_V_BIAS:
        dbo = _load(dbo_ptr, o_n, m_n)
        dout += _load(v_bias_ptr, o_e, m_e)[:, None] * dbo[None, :]
    o_en = o_e[:, None] * D + o_n[None, :]
    _store(dq_ptr, o_en, dq * factor, m_en)
    _store(dk_ptr, o_en, dk * factor, m_en)
    _store(dv_ptr, o_en, dv, m_en)
    _store(dout_ptr, o_e[:, None] + o_n[None, :] * WIDTH, dout, m_en)
    if tl.program_id(2) == 0:
        if HAS_Q_BIAS:
            _store(dq_bias_ptr, o_e, dq_bias * factor, m_e)
        if HAS_K_BIAS:
            _store(dk_bias_ptr, o_e, tl.zeros([BLOCK_E], tl.float32), m_e)
        if HAS_V_BIAS:
            _store(dv_bias_ptr, o_e, dv_bias, m_e)
    if (h == 0) & (tl.program_id(1) == 0):
        if HAS_OUT_BIAS:
            _store(dout_bias_ptr, o_n, _load(dbo_ptr, o_n, m_n), m_n)
        for row in tl.static_range(0, 3 if HAS_C else 2):
            store_affine_gradients(
                row,
                dscale_ptr,
                dshift_ptr,
                mean_ptr,
                variance_ptr,
                weight_a_ptr if row == 0 else weight_b_ptr if row == 1 else weight_c_ptr,
                dmean_ptr,
                dvariance_ptr,
                dweight_ptr,
                dbias_ptr,
                eps,
                o_n,
                m_n,
                D,
            )


def _launch(kernel: str, mean: Tensor, head: int, dim: int) -> launches.Launch:
    """Return how a kernel is launched, its tiles no larger than the matrices."""
    launch = launches.find(kernel, mean)
    launch["BLOCK_E"] = min(launch["BLOCK_E"], padded(head))
    launch["BLOCK_D"] = min(launch["BLOCK_D"], padded(dim))
    return launch


def _or(t: Tensor | None, other: Tensor) -> Tensor:
    """Return a contiguous tensor, or one that stands for none."""
    return other if t is None else t.contiguous()


def fold(
    mean: Tensor,
    variance: Tensor,
    weight_a: Tensor,
    bias_a: Tensor,
    weight_b: Tensor,
    bias_b: Tensor,
    weight_c: Tensor | None,
    bias_c: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    v_bias: Tensor | None,
    out_bias: Tensor | None,
    *,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the parameters of ``attend``.

    Args:
        mean: ``[P, D]`` float32, of the queries', keys' and, if P is 3, values' projections, as is
            ``variance``, the biased one.
        weight_a: ``[D]``, and ``bias_a``: the norm of the queries, as ``b`` are of the keys and
            ``c`` of the values. These and all that follow have any dtype.
        q: ``[heads * d, D]``, as ``k`` and ``v``.
        out: ``[D, heads * d]``.
        q_bias: ``[heads * d]``, as ``k_bias`` and ``v_bias``; ``out_bias`` is ``[D]``.
        heads: number of heads.
        eps: added to the variances.

    Returns:
        ``scale`` and ``shift`` ``[P, D]``, ``wq`` ``[heads, D, D]``, ``bq`` ``[heads, D]``, ``wo``
        ``[heads, D, D]`` and ``bo`` ``[D]``, float32.
    """
    width, dim = q.shape
    head = width // heads
    scale, shift = torch.empty_like(mean), torch.empty_like(mean)
    wq, wo = (mean.new_empty(heads, dim, dim) for _ in range(2))
    bq, bo = mean.new_empty(heads, dim), mean.new_empty(dim)
    launch = _launch("conv_attention_fold", mean, head, dim)
    blocks = cdiv(dim, launch["BLOCK_D"])
    _conv_attention_fold_kernel[(heads, blocks, blocks)](
        mean.contiguous(),
        variance.contiguous(),
        *(_or(t, q) for t in (weight_a, bias_a, weight_b, bias_b, weight_c, bias_c)),
        *(_or(t, q) for t in (q, k, v, out, q_bias, v_bias, out_bias)),
        scale,
        shift,
        wq,
        bq,
        wo,
        bo,
        eps,
        head**-0.5,
        width,
        HEAD=head,
        D=dim,
        HAS_C=weight_c is not None,
        HAS_Q_BIAS=q_bias is not None,
        HAS_V_BIAS=v_bias is not None,
        HAS_OUT_BIAS=out_bias is not None,
        **launch,
    )
    return scale, shift, wq, bq, wo, bo


def fold_backward(
    dscale: Tensor,
    dshift: Tensor,
    dwq: Tensor,
    dbq: Tensor,
    dwo: Tensor,
    dbo: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight_a: Tensor,
    bias_a: Tensor,
    weight_b: Tensor,
    bias_b: Tensor,
    weight_c: Tensor | None,
    bias_c: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    v_bias: Tensor | None,
    out_bias: Tensor | None,
    *,
    heads: int,
    eps: float,
) -> tuple[Tensor, ...]:
    """Return the gradients of :func:`fold`, of whose results the first six are.

    Returns:
        ``dmean``, ``dvariance``; ``dweight`` and ``dbias`` ``[P, D]`` float32, of all norms;
        ``dq``, ``dk``, ``dv``, ``dout``; those of the four biases, each empty if there is none.
        That of the keys' bias is zero.
    """
    width, dim = q.shape
    head = width // heads
    norms = [torch.empty_like(mean) for _ in range(4)]
    weights = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v, out)]
    given = (q_bias, k_bias, v_bias, out_bias)
    biases = [q.new_empty(0) if t is None else torch.empty_like(t) for t in given]
    launch = _launch("conv_attention_fold_bwd", mean, head, dim)
    grid = heads, cdiv(head, launch["BLOCK_E"]), cdiv(dim, launch["BLOCK_D"])
    _conv_attention_fold_bwd_kernel[grid](
        *(t.contiguous() for t in (dscale, dshift, dwq, dbq, dwo, dbo, mean, variance)),
        *(_or(t, q) for t in (weight_a, weight_b, weight_c, q, k, v, out, q_bias, v_bias)),
        *norms,
        *weights,
        *biases,
        eps,
        head**-0.5,
        width,
        HEAD=head,
        D=dim,
        HAS_C=weight_c is not None,
        HAS_Q_BIAS=q_bias is not None,
        HAS_K_BIAS=k_bias is not None,
        HAS_V_BIAS=v_bias is not None,
        HAS_OUT_BIAS=out_bias is not None,
        **launch,
    )
    return *norms, *weights, *biases
