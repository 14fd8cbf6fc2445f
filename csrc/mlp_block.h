// Launchers of the mlp_block op: tokens x [B, N, D], w1 [E, D], w2 [D, E].
#pragma once

#include "eqcvt.h"

EQCVT_LAUNCHER(mlp_block_forward, int dtype, const void* x, const void* norm_weight,
               const void* norm_bias, const void* w1, const void* b1, const void* w2,
               const void* b2, const void* seed, int64_t B, int64_t N, int64_t D, int64_t E,
               double dropout, double eps, void* y);

EQCVT_LAUNCHER(mlp_block_backward, int dtype, const void* dy, const void* x,
               const void* norm_weight, const void* norm_bias, const void* w1, const void* b1,
               const void* w2, const void* b2, const void* seed, int64_t B, int64_t N, int64_t D,
               int64_t E, double dropout, double eps, void* dx, void* dnorm_weight,
               void* dnorm_bias, void* dw1, void* db1, void* dw2, void* db2);
