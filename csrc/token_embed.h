// Launchers of the token_embed op: x [B, C, H, W], filters [D, C, k, k], tokens [B, H1, W1, D] with
// H1 = (H + 2 padding - k) / stride + 1.
#pragma once

#include "eqcvt.h"

EQCVT_LAUNCHER(token_embed_forward, int dtype, const void* x, const void* filters, const void* bias,
               const void* norm_weight, const void* norm_bias, int64_t B, int64_t C, int64_t H,
               int64_t W, int64_t D, int64_t k, int64_t stride, int64_t padding, double eps,
               void* y);

// dx is null where the gradient of x is not wanted.
EQCVT_LAUNCHER(token_embed_backward, int dtype, const void* dy, const void* x, const void* filters,
               const void* bias, const void* norm_weight, const void* norm_bias, int64_t B,
               int64_t C, int64_t H, int64_t W, int64_t D, int64_t k, int64_t stride,
               int64_t padding, double eps, void* dx, void* dfilters, void* dbias,
               void* dnorm_weight, void* dnorm_bias);
