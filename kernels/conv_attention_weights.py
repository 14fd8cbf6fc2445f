r"""Fused attention's products with the folded weights: their gradients, and that of the queries.

.. math::
    da' = \sum_h dq_h (W^q_h)^T, \quad dW^q_h = a'^T dq_h, \quad dW^o_h = o_h^T t
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launches
from .common import add_part, cdiv, padded, precision, programs, sum_rows


@triton.jit
def _transposed(c, o_d, D: tl.constexpr):
    """Offsets of ``[h, d, e]`` for columns ``c = h D + e`` (rows of the tile) and channels d."""
    return (c // D * (D * D) + c % D)[:, None] + o_d[None, :] * D


@triton.jit
def _weight_block(wq_ptr, c, o_d, COLUMNS, D: tl.constexpr):
    """Return ``Wq^T`` for columns ``c``, padded with zeros."""
    mask = (c < COLUMNS)[:, None] & (o_d < D)[None, :]
    return tl.load(wq_ptr + _transposed(c, o_d, D), mask=mask, other=0.0)


@triton.jit(do_not_specialize=["tiles", "N"])
def _conv_attention_weights_bwd_kernel(
    t_ptr,
    a_ptr,
    scale_ptr,
    shift_ptr,
    wq_ptr,
    o_ptr,
    dq_ptr,
    da_ptr,
    parts_ptr,
    tiles,
    N,
    COLUMNS,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write ``da`` and this program's share of the gradients of weights, scale and shift.

    One program owns a run of the ``tiles`` of BLOCK_N of all N queries of the batch, and one row of
    ``parts``. The h D = COLUMNS latent channels of all heads are one axis, BLOCK_C at a time::

                   columns of dq, o
        queries  [ dq Wq^T          -> da        ]
        BLOCK_N  [ a^T dq, o^T t    -> raw, dwo  ]  and dbq, dbo: the sums of dq and t

    The rest follows from the sums of all tiles, with ``a`` as it was before scale and shift: ``dwq
    = scale raw + shift dbq``, ``dscale = sum(Wq raw)`` and ``dshift = sum(Wq dbq)`` over columns.
    So a tile needs no sums across warps but two, and its factors go to the products as they come.

    ``parts`` is ``[programs, COLUMNS (2 D + 1) + 3 D]``: dwq, dwo, dbq, dbo, dscale, dshift.
    Weights are summed in registers where all columns are one block, else in ``parts``. Bytes: 2 h +
    3 times D numbers per query (dq, o; t, a, da), 0.09 ms at batch 128, D = 32 and 3 heads; 6 D
    operations per column and query. Accumulates in fp32, tiles in order.
    """
    i_p = tl.program_id(0).to(tl.int64)
    first = i_p * tiles // tl.num_programs(0)
    last = (i_p + 1) * tiles // tl.num_programs(0)
    dtype = da_ptr.dtype.element_ty
    o_d = tl.arange(0, BLOCK_D)
    o_c = tl.arange(0, BLOCK_C)
    m_d = o_d < D
    dwq_ptr = parts_ptr + i_p * (COLUMNS * (2 * D + 1) + 3 * D)
    dwo_ptr = dwq_ptr + COLUMNS * D
    dbq_ptr = dwo_ptr + COLUMNS * D
    dbo_ptr = dbq_ptr + COLUMNS
    scale = tl.load(scale_ptr + o_d, mask=m_d, other=0.0)
    shift = tl.load(shift_ptr + o_d, mask=m_d, other=0.0)

    raw = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    dwo = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    dbq = tl.zeros([BLOCK_C], tl.float32)
    dbo = tl.zeros([BLOCK_D], tl.float32)
    wq = _weight_block(wq_ptr, o_c, o_d, COLUMNS, D)
    tl.assume(first < last)
    # Tiles are counted in 64 bits, places inside one in 32.
    for tile in tl.range(first, last):
        row = tile * BLOCK_N
        o_n = tl.arange(0, BLOCK_N)
        m_n = row + o_n < N
        mask = m_n[:, None] & m_d[None, :]
        offsets = o_n[:, None] * D + o_d[None, :]
        a = tl.load(a_ptr + row * D + offsets, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_D]
        t = tl.load(t_ptr + row * D + offsets, mask=mask, other=0.0)
        dbo += tl.sum(t.to(tl.float32), 0)
        if ONE_BLOCK:
            o_nc = row * COLUMNS + o_n[:, None] * COLUMNS + o_c[None, :]
            m_nc = m_n[:, None] & (o_c < COLUMNS)[None, :]
            dq = tl.load(dq_ptr + o_nc, mask=m_nc, other=0.0)  # [BLOCK_N, BLOCK_C]
            o = tl.load(o_ptr + o_nc, mask=m_nc, other=0.0)
            dbq += tl.sum(dq.to(tl.float32), 0)
            raw = tl.dot(tl.trans(dq), a, raw, input_precision=PRECISION)
            dwo = tl.dot(tl.trans(o), t, dwo, input_precision=PRECISION)
            # Last, since it is waited for, and with it the others: Triton fetches the next dq and t
            # to where Hopper's matrix unit reads these, for they are summed besides.
            da = tl.dot(dq, wq.to(dtype), input_precision=PRECISION)
        else:
            # The barrier shows what was added for the last tile to all threads.
            tl.debug_barrier()
            da = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            for column in tl.range(0, COLUMNS, BLOCK_C, num_stages=1, disable_licm=True):
                c = column + o_c
                m_c = c < COLUMNS
                o_nc = row * COLUMNS + o_n[:, None] * COLUMNS + c[None, :]
                m_nc = m_n[:, None] & m_c[None, :]
                m_cd = m_c[:, None] & m_d[None, :]
                dq = tl.load(dq_ptr + o_nc, mask=m_nc, other=0.0)
                o = tl.load(o_ptr + o_nc, mask=m_nc, other=0.0)
                wq = _weight_block(wq_ptr, c, o_d, COLUMNS, D)
                da = tl.dot(dq, wq.to(dtype), da, input_precision=PRECISION)
                raw = tl.dot(tl.trans(dq), a, input_precision=PRECISION)
                dwo = tl.dot(tl.trans(o), t, input_precision=PRECISION)
                add_part(dbq_ptr + c, tl.sum(dq.to(tl.float32), 0), m_c, tile == first)
                add_part(dwq_ptr + _transposed(c, o_d, D), raw, m_cd, tile == first)
                add_part(dwo_ptr + c[:, None] * D + o_d[None, :], dwo, m_cd, tile == first)
        tl.store(da_ptr + row * D + offsets, (da * scale[None, :]).to(dtype), mask=mask)

    tl.store(dbo_ptr + o_d, dbo, mask=m_d)
    tl.debug_barrier()
    dscale = tl.zeros([BLOCK_D], tl.float32)
    dshift = tl.zeros([BLOCK_D], tl.float32)
    for column in tl.range(0, COLUMNS, BLOCK_C, num_stages=1, disable_licm=True):
        c = column + o_c
        m_c = c < COLUMNS
        m_cd = m_c[:, None] & m_d[None, :]
        if ONE_BLOCK:
            tl.store(dwo_ptr + c[:, None] * D + o_d[None, :], dwo, mask=m_cd)
            tl.store(dbq_ptr + c, dbq, mask=m_c)
        else:
            raw = tl.load(dwq_ptr + _transposed(c, o_d, D), mask=m_cd, other=0.0)
            dbq = tl.load(dbq_ptr + c, mask=m_c, other=0.0)
        wq = _weight_block(wq_ptr, c, o_d, COLUMNS, D).to(dtype).to(tl.float32)
        dscale += tl.sum(wq * raw, 0)
        dshift += tl.sum(wq * dbq[:, None], 0)
        dwq = raw * scale[None, :] + dbq[:, None] * shift[None, :]
        tl.store(dwq_ptr + _transposed(c, o_d, D), dwq, mask=m_cd)
    tl.store(dbo_ptr + D + o_d, dscale, mask=m_d)
    tl.store(dbo_ptr + 2 * D + o_d, dshift, mask=m_d)


def weight_gradients(
    t: Tensor,
    a: Tensor,
    scale: Tensor,
    shift: Tensor,
    wq: Tensor,
    bo: Tensor,
    o: Tensor,
    dq: Tensor,
    dscale: Tensor,
    dshift: Tensor,
) -> tuple[Tensor, ...]:
    """Return ``da``, ``dwq``, ``dbq``, ``dwo``, ``dbo`` from ``dq`` ``[B, N, h, D]``.

    ``t`` ``[B, N, D]`` is the gradient of ``y`` before its dropout, and ``o`` the attended values.
    ``dscale`` and ``dshift`` ``[D]``, those of the queries, are written in place.
    """
    batch, queries, width = a.shape
    columns = wq.shape[0] * width
    da = torch.empty_like(a)
    launch = launches.find("conv_attention_weights_bwd", a, launches.width_class(width))
    launch["BLOCK_C"] = min(launch["BLOCK_C"], padded(columns))
    tiles = cdiv(batch * queries, launch["BLOCK_N"])
    count = programs(a, launch.pop("RESIDENT"), tiles)
    parts = wq.new_empty(count, columns * (2 * width + 1) + 3 * width)
    _conv_attention_weights_bwd_kernel[(count,)](
        t,
        a,
        scale,
        shift,
        wq,
        o,
        dq,
        da,
        parts,
        tiles,
        batch * queries,
        columns,
        D=width,
        BLOCK_D=padded(width),
        ONE_BLOCK=columns <= launch["BLOCK_C"],
        PRECISION=precision(),
        **launch,
    )
    dwq, dwo, dbq = torch.empty_like(wq), torch.empty_like(wq), torch.empty_like(wq[:, 0])
    dbo = torch.empty_like(bo)
    sum_rows(parts, (dwq, dwo, dbq, dbo, dscale, dshift))
    return da, dwq, dbq, dwo, dbo
