// Launchers of attention with convolutional projections, see conv_attention_* in
// tests/ops/primitives.py.
//
// D channels, h = heads, N = H * W queries, M = ceil(H / kv_stride) * ceil(W / kv_stride) keys. x
// and dx [B, H, W, D] hold channels last; filters [D, kk, kk], kk odd. Statistics are those of the
// values as stored in a, b and c.
#pragma once

#include "eqcvt.h"

// v and c are null where values share the keys' projection; norm_weight and norm_bias [D] of the
// layer norm in front where there is none. mean, variance [P, D] are null without moments; P = 2,
// or 3 with v.
EQCVT_LAUNCHER(conv_attention_project, int dtype, const void* x, const void* q, const void* k,
               const void* v, const void* norm_weight, const void* norm_bias, int64_t B, int64_t D,
               int64_t H, int64_t W, int64_t kk, int64_t kv_stride, int moments, double eps,
               void* a, void* b, void* c, void* mean, void* variance);
// dmean, dvariance and mean are null without moments; dc, c, v and dv without v; norm_weight,
// norm_bias, dnorm_weight and dnorm_bias without a norm.
EQCVT_LAUNCHER(conv_attention_project_backward, int dtype, const void* da, const void* db,
               const void* dc, const void* dmean, const void* dvariance, const void* a,
               const void* b, const void* c, const void* mean, const void* x, const void* q,
               const void* k, const void* v, const void* norm_weight, const void* norm_bias,
               int64_t B, int64_t D, int64_t H, int64_t W, int64_t kk, int64_t kv_stride,
               double eps, void* dx, void* dq, void* dk, void* dv, void* dnorm_weight,
               void* dnorm_bias);
// c and residual may be null; o and lse are null without save.
EQCVT_LAUNCHER(conv_attention_attend, int dtype, const void* a, const void* b, const void* c,
               const void* residual, const void* scale, const void* shift, const void* wq,
               const void* bq, const void* wo, const void* bo, const void* seed, int64_t B,
               int64_t N, int64_t M, int64_t D, int64_t heads, int save, double dropout, void* y,
               void* o, void* lse);
// c and dc may be null.
EQCVT_LAUNCHER(conv_attention_attend_backward, int dtype, const void* dy, const void* a,
               const void* b, const void* c, const void* scale, const void* shift, const void* wq,
               const void* bq, const void* wo, const void* bo, const void* seed, const void* o,
               const void* lse, int64_t B, int64_t N, int64_t M, int64_t D, int64_t heads,
               double dropout, void* da, void* db, void* dc, void* dscale, void* dshift, void* dwq,
               void* dbq, void* dwo, void* dbo);
