// Layer normalisation of tokens [rows, D], D up to 128: its statistics, for kernels that apply it
// when they read a token, and its gradient behind them. A warp owns a token.
#pragma once

#include "device.cuh"

namespace {

constexpr int kNormThreads = 256, kNormWarps = kNormThreads / kWarp;
constexpr int kNormSpan = 4; // a lane owns channels lane, lane + 32, ..

// unit = (x - mean) * rstd, y = unit * gamma + beta.
struct Norm {
    const float2* statistics; // mean and rstd of each token; null for no norm
    const float *gamma, *beta;

    // From channels d .. d + V - 1 of a token to those of y.
    template <int V> __device__ void apply(float (&x)[V], int64_t token, int d) const {
        if (!statistics) return;
        const float2 s = statistics[token];
#pragma unroll
        for (int j = 0; j < V; ++j) x[j] = fmaf((x[j] - s.x) * s.y, gamma[d + j], beta[d + j]);
    }
};

template <class T> __global__ void __launch_bounds__(kNormThreads)
    norm_statistics_kernel(const T* x, float2* statistics, int64_t rows, int D, float eps) {
    const int lane = threadIdx.x % kWarp;
    const int64_t step = static_cast<int64_t>(gridDim.x) * kNormWarps;
    int64_t row = blockIdx.x * static_cast<int64_t>(kNormWarps) + threadIdx.x / kWarp;
    for (; row < rows; row += step) {
        float v[kNormSpan], sum = 0, squares = 0;
#pragma unroll
        for (int j = 0; j < kNormSpan; ++j) {
            const int d = lane + kWarp * j;
            v[j] = d < D ? to_float(x[row * D + d]) : 0;
            sum += v[j];
        }
        const float mean = warp_sum(sum) / D;
#pragma unroll
        for (int j = 0; j < kNormSpan; ++j) {
            const float centred = lane + kWarp * j < D ? v[j] - mean : 0;
            squares = fmaf(centred, centred, squares);
        }
        const float variance = warp_sum(squares) / D;
        if (lane == 0) statistics[row] = make_float2(mean, rsqrtf(variance + eps));
    }
}

// d, the gradient of y, becomes that of x; partials [2][gridDim.x][D] are the block's share of the
// gradients of gamma and of beta.
template <class T> __global__ void __launch_bounds__(kNormThreads)
    norm_backward_kernel(const T* x, Norm norm, T* d, float* partials, int64_t rows, int D) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int64_t step = static_cast<int64_t>(gridDim.x) * kNormWarps;
    float gamma[kNormSpan], dgamma[kNormSpan] = {}, dbeta[kNormSpan] = {};
    for (int j = 0; j < kNormSpan; ++j) {
        gamma[j] = lane + kWarp * j < D ? norm.gamma[lane + kWarp * j] : 0;
    }
    for (int64_t row = blockIdx.x * static_cast<int64_t>(kNormWarps) + warp; row < rows;
         row += step) {
        const float2 s = norm.statistics[row];
        float unit[kNormSpan], g[kNormSpan], level = 0, along = 0;
#pragma unroll
        for (int j = 0; j < kNormSpan; ++j) {
            const int c = lane + kWarp * j;
            unit[j] = c < D ? (to_float(x[row * D + c]) - s.x) * s.y : 0;
            g[j] = c < D ? to_float(d[row * D + c]) : 0;
            dgamma[j] = fmaf(g[j], unit[j], dgamma[j]);
            dbeta[j] += g[j];
            g[j] *= gamma[j];
            level += g[j];
            along = fmaf(g[j], unit[j], along);
        }
        level = warp_sum(level) / D;
        along = warp_sum(along) / D;
#pragma unroll
        for (int j = 0; j < kNormSpan; ++j) {
            const int c = lane + kWarp * j;
            if (c < D) d[row * D + c] = from_float<T>((g[j] - level - unit[j] * along) * s.y);
        }
    }
    float* warps = reinterpret_cast<float*>(shared_memory()); // [kNormWarps][2][D]
    for (int j = 0; j < kNormSpan; ++j) {
        const int c = lane + kWarp * j;
        if (c >= D) break;
        warps[(2 * warp) * D + c] = dgamma[j];
        warps[(2 * warp + 1) * D + c] = dbeta[j];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * D; i += kNormThreads) {
        float sum = 0;
        for (int w = 0; w < kNormWarps; ++w) sum += warps[2 * w * D + i];
        partials[(i / D * static_cast<int64_t>(gridDim.x) + blockIdx.x) * D + i % D] = sum;
    }
}

// Blocks for a walk over `rows` tokens, at most 1024.
inline int64_t norm_blocks(int64_t rows) {
    const int64_t blocks = ceil_div(rows, kNormWarps * 4);
    return blocks < 1024 ? blocks : 1024;
}

template <class T> int norm_statistics(const T* x, float2* statistics, int64_t rows, int64_t D,
                                       double eps, void* stream) {
    return launch(norm_statistics_kernel<T>, Grid(norm_blocks(rows)), kNormThreads, 0, stream, x,
                  statistics, rows, static_cast<int>(D), static_cast<float>(eps));
}

// See norm_backward_kernel; `partials` has room for norm_blocks(rows) * 2 D.
template <class T> int norm_backward(const T* x, const Norm& norm, T* d, float* partials,
                                     int64_t rows, int64_t D, float* dgamma, float* dbeta,
                                     void* stream) {
    const int64_t blocks = norm_blocks(rows);
    EQCVT_TRY(launch(norm_backward_kernel<T>, Grid(blocks), kNormThreads,
                     kNormWarps * 2 * D * sizeof(float), stream, x, norm, d, partials, rows,
                     static_cast<int>(D)));
    EQCVT_TRY(sum_partials(partials, blocks, D, dgamma, stream));
    return sum_partials(partials + blocks * D, blocks, D, dbeta, stream);
}

} // namespace
