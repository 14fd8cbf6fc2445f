// The sums over tokens behind the gradients of attention: those of the weights, and of the scales
// and shifts of its operands. A block sums its part of the tokens, then the blocks' sums are added.
#pragma once

#include "conv_attention.cuh"

namespace {

// Sums over tokens of x^T y [D][D] and of y [D], for each head (blockIdx.y), with x [B, N, .] of D
// values and y [B, ., Np, DP]. Block p of gridDim.x takes the p-th part of the tokens and writes
// partials[p][head][DP * DP + DP]. Each warp owns 16 rows of the product.
template <class T> struct Outer {
    const T *x, *y;
    int64_t x_token, x_head, y_batch, y_head; // distances
    float* partials;
    int64_t B, N;
    int D;
};
template <class T, int DP> struct OuterShape {
    static constexpr int kThreads = DP / 16 * kWarp, kRows = 32, kStride = DP + kPad<T>;
    static constexpr int64_t kColumns = DP * DP + DP;
    static constexpr int64_t kShared = 2 * kRows * kStride * sizeof(T);
};

template <class T, int DP> __global__ void __launch_bounds__(OuterShape<T, DP>::kThreads)
    outer_kernel(Outer<T> p) {
    using S = OuterShape<T, DP>;
    T* x = reinterpret_cast<T*>(shared_memory());
    T* y = x + S::kRows * S::kStride;
    const int warp = threadIdx.x / kWarp, column = threadIdx.x % DP, strand = threadIdx.x / DP;
    const int64_t tiles = ceil_div(p.N, S::kRows), count = p.B * tiles;
    Sums<1, DP> sums;
    sums.zero();
    float sum = 0;
    const int64_t end = count * (blockIdx.x + 1) / gridDim.x;
    for (int64_t i = count * blockIdx.x / gridDim.x; i < end; ++i) {
        const int64_t batch = i / tiles, first = i % tiles * S::kRows;
        const T* from = p.x + (batch * p.N + first) * p.x_token + blockIdx.y * p.x_head;
        load_tile<S::kRows, DP, S::kThreads>(y, p.y + batch * p.y_batch + blockIdx.y * p.y_head +
                                                    first * DP);
        copies_begun();
        for (int j = threadIdx.x; j < S::kRows * DP; j += S::kThreads) {
            const int r = j / DP, d = j % DP;
            const bool inside = first + r < p.N && d < p.D;
            x[r * S::kStride + d] = inside ? from[r * p.x_token + d] : from_float<T>(0);
        }
        copies_done<0>();
        __syncthreads();
        Left<T, 1, S::kRows> left;
        left.load_transposed(x + warp * 16, S::kStride);
        multiply<KN, DP>(sums, left, y, S::kStride);
        for (int r = strand; r < S::kRows; r += 2) sum += to_float(y[r * S::kStride + column]);
        __syncthreads();
    }
    float* out =
        p.partials + (blockIdx.x * static_cast<int64_t>(gridDim.y) + blockIdx.y) * S::kColumns;
    sums.each([&](float& v, int r, int c) { out[(warp * 16 + r) * DP + c] = v; });
    float* strands = reinterpret_cast<float*>(x);
    strands[threadIdx.x] = sum;
    __syncthreads();
    if (strand == 0) out[DP * DP + column] = strands[column] + strands[DP + column];
}

// The gradients that follow from g = a^T dq, s = sum of dq, and o^T dt, sum of dt; block d of D.
struct Weights {
    const float *scale, *shift, *wq;
    const float *query, *out; // [h][DP * DP + DP]
    float *dscale, *dshift, *dwq, *dbq, *dwo, *dbo;
    int D, DP, heads;
};
__global__ void weights_kernel(Weights p) {
    const int d = blockIdx.x, lane = threadIdx.x, columns = p.DP * p.DP + p.DP;
    float dscale = 0, dshift = 0;
    for (int head = 0; head < p.heads; ++head) {
        for (int e = lane; e < p.D; e += kWarp) {
            const int at = (head * p.D + d) * p.D + e;
            const float g = p.query[head * columns + d * p.DP + e];
            const float s = p.query[head * columns + p.DP * p.DP + e];
            p.dwq[at] = fmaf(p.scale[d], g, p.shift[d] * s);
            p.dwo[at] = p.out[head * columns + d * p.DP + e];
            dscale = fmaf(p.wq[at], g, dscale);
            dshift = fmaf(p.wq[at], s, dshift);
            if (d == 0) p.dbq[head * p.D + e] = s;
            if (d == 0 && head == 0) p.dbo[e] = p.out[p.DP * p.DP + e];
        }
    }
    dscale = warp_sum(dscale);
    dshift = warp_sum(dshift);
    if (lane == 0) {
        p.dscale[d] = dscale;
        p.dshift[d] = dshift;
    }
}

// out = scale sum_h g_h for g [h, B, Mp, DP]; the sums of sum_h g_h t and sum_h g_h over tokens,
// block by block: partials [2][gridDim.x][D].
template <class T> struct Tokens {
    const float* g;
    const T* t;
    const float* scale;
    T* out;
    float* partials;
    int64_t B, M, Mp;
    int D, heads;
};
constexpr int kTokensThreads = 256;
template <class T, int DP> __global__ void __launch_bounds__(kTokensThreads)
    tokens_kernel(Tokens<T> p) {
    constexpr int kStrands = kTokensThreads / DP;
    float* strands = reinterpret_cast<float*>(shared_memory()); // [2][kTokensThreads]
    const int d = threadIdx.x % DP, strand = threadIdx.x / DP;
    const int64_t count = p.B * p.M, end = count * (blockIdx.x + 1) / gridDim.x;
    float dscale = 0, dshift = 0;
    if (d < p.D) {
        const float scale = p.scale[d];
        for (int64_t i = count * blockIdx.x / gridDim.x + strand; i < end; i += kStrands) {
            const int64_t row = i / p.M * p.Mp + i % p.M;
            float sum = 0;
            for (int head = 0; head < p.heads; ++head) {
                sum += p.g[(head * p.B * p.Mp + row) * DP + d];
            }
            p.out[i * p.D + d] = from_float<T>(sum * scale);
            dscale = fmaf(sum, to_float(p.t[i * p.D + d]), dscale);
            dshift += sum;
        }
    }
    strands[threadIdx.x] = dscale;
    strands[kTokensThreads + threadIdx.x] = dshift;
    __syncthreads();
    if (strand != 0 || d >= p.D) return;
    for (int i = 1; i < kStrands; ++i) {
        dscale += strands[i * DP + d];
        dshift += strands[kTokensThreads + i * DP + d];
    }
    p.partials[blockIdx.x * static_cast<int64_t>(p.D) + d] = dscale;
    p.partials[(gridDim.x + static_cast<int64_t>(blockIdx.x)) * p.D + d] = dshift;
}

// The gradient of b or c, and of its scale and shift.
template <class T, int DP>
int finish_tokens(const Tokens<T>& p, int64_t blocks, float* dscale, float* dshift, void* stream) {
    EQCVT_TRY(launch(tokens_kernel<T, DP>, Grid(blocks), kTokensThreads,
                     2 * kTokensThreads * sizeof(float), stream, p));
    EQCVT_TRY(sum_partials(p.partials, blocks, p.D, dscale, stream));
    return sum_partials(p.partials + blocks * p.D, blocks, p.D, dshift, stream);
}

} // namespace
