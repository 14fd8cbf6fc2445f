// Launchers of the steerable block, see lift_* in tests/ops/primitives.py.
//
// x [B, C, H, W], bank [F, G, C, k, k], mask [H, W] or null, blur [kb] or null (then kb = 1 and
// blur_stride = 1 are assumed). mask, like bank, has the dtype of parameters.
#pragma once

#include "eqcvt.h"

// With correlate = 0 the outputs ux [F, G, C, k, k] and ones_x [C, k, k] may be null.
EQCVT_LAUNCHER(lift_moments, int dtype, const void* x, const void* bank, const void* mask,
               int64_t B, int64_t C, int64_t H, int64_t W, int64_t F, int64_t G, int64_t k,
               int64_t stride, int64_t padding, int correlate, void* mean, void* variance, void* ux,
               void* ones_x);
EQCVT_LAUNCHER(lift_moments_input, int dtype, const void* x, const void* bank, const void* mask,
               const void* c1, const void* c2, int64_t B, int64_t C, int64_t H, int64_t W,
               int64_t F, int64_t G, int64_t k, int64_t stride, int64_t padding, void* dx);
// arg is null without pool.
EQCVT_LAUNCHER(lift_apply, int dtype, const void* x, const void* bank, const void* mask,
               const void* scale, const void* shift, const void* blur, int64_t B, int64_t C,
               int64_t H, int64_t W, int64_t F, int64_t G, int64_t k, int64_t kb, int64_t stride,
               int64_t padding, int64_t blur_stride, int pool, void* y, void* arg);
// dx is null without input_gradient.
EQCVT_LAUNCHER(lift_apply_backward, int dtype, const void* dy, const void* arg, const void* x,
               const void* bank, const void* mask, const void* scale, const void* shift,
               const void* blur, int64_t B, int64_t C, int64_t H, int64_t W, int64_t F, int64_t G,
               int64_t k, int64_t kb, int64_t stride, int64_t padding, int64_t blur_stride,
               int pool, int input_gradient, void* dbank, void* dscale, void* dshift, void* dx);
