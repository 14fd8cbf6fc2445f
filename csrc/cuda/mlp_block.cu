// The residual MLP of a transformer block, y = x + drop(w2 drop(gelu(w1 LN(x) + b1)) + b2).
//
// A block owns kRows tokens, whose hidden values exist 32 at a time in registers: the weights of 32
// hidden units are in shared memory while they are used. Per token 2 D E products forward; backward
// makes the hidden values again, twice (for dx, and for the weights' gradients): 12 D E products
// and nothing of size E in memory. Sums over tokens run tile by tile in a block, then over blocks.
#include "../mlp_block.h"

#include <type_traits>

#include "product.cuh"

namespace {

constexpr int kUnits = 32; // hidden units at a time

template <class T, int DP> struct Shape {
    static constexpr int MT = DP <= 32 ? 2 : 1;
    static constexpr int kWarps = sizeof(T) == 4 && DP == 128 ? 2 : 4;
    static constexpr int kThreads = kWarps * kWarp;
    static constexpr int kRows = kWarps * 16 * MT;
    static constexpr int kStride = DP + kPad<T>, kUnitStride = kUnits + kPad<T>;
    static constexpr int kTile = kRows * kStride;
    static constexpr int kWeights = kUnits * kStride + DP * kUnitStride;
    static constexpr int kUnitTile = kRows * kUnitStride;
};

template <class T> struct Mlp {
    const T *x, *dy;
    const float *norm_weight, *norm_bias, *b1, *b2;
    const T *w1, *w2; // [chunks][kUnits][DP] and [chunks][DP][kUnits]
    Dropout hidden, output;
    T* out; // y or dx
    float* partials;
    int64_t rows;
    int D, E;
    float eps;
};

// w1 [E, D] and w2 [D, E] in chunks of units, padded with zeros.
template <class T> __global__ void chunks_kernel(const float* w1, const float* w2, T* out1, T* out2,
                                                 int D, int E, int DP, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, e = i / DP, d = i % DP;
    if (i >= count) return;
    const bool inside = e < E && d < D;
    out1[i] = from_float<T>(inside ? w1[e * D + d] : 0);
    out2[(e / kUnits * DP + d) * kUnits + e % kUnits] = from_float<T>(inside ? w2[d * E + e] : 0);
}

// Eight lanes own a row, lane l of them columns l, l + 8, ..; all return mean and 1 / deviation.
template <class T, int DP>
__device__ inline float2 read_row(float (&v)[DP / 8], const T* row, int D, float eps) {
    const int l = threadIdx.x % 8;
    float sum = 0, squares = 0;
#pragma unroll
    for (int j = 0; j < DP / 8; ++j) {
        v[j] = row && l + 8 * j < D ? to_float(row[l + 8 * j]) : 0;
        sum += v[j];
    }
    const float mean = warp_sum<8>(sum) / D;
#pragma unroll
    for (int j = 0; j < DP / 8; ++j) {
        const float centred = l + 8 * j < D ? v[j] - mean : 0;
        squares = fmaf(centred, centred, squares);
    }
    return make_float2(mean, rsqrtf(warp_sum<8>(squares) / D + eps));
}

// LN(x) of the rows [first, first + kRows) to shared memory; zero outside the tensor.
template <class T, int DP>
__device__ inline void load_normalised(T* tile, const Mlp<T>& p, int64_t first) {
    using S = Shape<T, DP>;
    const int l = threadIdx.x % 8;
    for (int r = threadIdx.x / 8; r < S::kRows; r += S::kThreads / 8) {
        float v[DP / 8];
        const bool inside = first + r < p.rows;
        const float2 norm =
            read_row<T, DP>(v, inside ? p.x + (first + r) * p.D : nullptr, p.D, p.eps);
#pragma unroll
        for (int j = 0; j < DP / 8; ++j) {
            const int d = l + 8 * j;
            float t = 0;
            if (inside && d < p.D) {
                t = fmaf((v[j] - norm.x) * norm.y, p.norm_weight[d], p.norm_bias[d]);
            }
            tile[r * S::kStride + d] = from_float<T>(t);
        }
    }
}

// dy under the output's dropout to shared memory.
template <class T, int DP>
__device__ inline void load_gradient(T* tile, const Mlp<T>& p, int64_t first) {
    using S = Shape<T, DP>;
    for (int i = threadIdx.x; i < S::kRows * DP / 4; i += S::kThreads) {
        const int r = i / (DP / 4), d = i % (DP / 4) * 4;
        const int64_t at = (first + r) * p.D + d;
        float keep[4];
        if (first + r < p.rows && d < p.D) p.output.four(keep, at);
        for (int j = 0; j < 4; ++j) {
            const bool inside = first + r < p.rows && d + j < p.D;
            tile[r * S::kStride + d + j] =
                from_float<T>(inside ? to_float(p.dy[at + j]) * keep[j] : 0);
        }
    }
}

template <class T, int DP>
__device__ inline void load_chunk(T* w1, T* w2, const Mlp<T>& p, int chunk) {
    using S = Shape<T, DP>;
    load_tile<kUnits, DP, S::kThreads>(w1, p.w1 + chunk * kUnits * DP);
    load_tile<DP, kUnits, S::kThreads>(w2, p.w2 + chunk * kUnits * DP);
    copies_begun();
    copies_done<0>();
    __syncthreads();
}

__device__ inline float gelu(float u) { return 0.5f * u * (1 + erff(u * 0.70710678f)); }
__device__ inline float gelu_slope(float u) {
    const float density = 0.39894228f * fast_exp2(-0.5f * kLog2E * u * u);
    return fmaf(u, density, 0.5f * (1 + erff(u * 0.70710678f)));
}

// Values of a chunk's units before GELU.
template <class T, int DP, int MT> __device__ inline void
units(Sums<MT, kUnits>& u, const Left<T, MT, DP>& t, const T* w1, const Mlp<T>& p, int chunk) {
    u.zero();
    multiply<NK, kUnits>(u, t, w1, Shape<T, DP>::kStride);
    u.each([&](float& x, int, int c) {
        const int e = chunk * kUnits + c;
        x += e < p.E ? p.b1[e] : 0.0f;
    });
}

template <class T, int DP> __global__ void __launch_bounds__(Shape<T, DP>::kThreads)
    forward_kernel(Mlp<T> p) {
    using S = Shape<T, DP>;
    constexpr int MT = S::MT;
    T* tile = reinterpret_cast<T*>(shared_memory());
    T *w1 = tile + S::kTile, *w2 = w1 + kUnits * S::kStride;
    const int warp = threadIdx.x / kWarp, chunks = static_cast<int>(ceil_div(p.E, kUnits));
    T* scratch = w1 + S::kWeights + warp * Left<T, MT, kUnits>::kScratch;
    const int64_t first = blockIdx.x * static_cast<int64_t>(S::kRows),
                  mine = first + warp * 16 * MT;
    load_normalised<T, DP>(tile, p, first);
    __syncthreads();
    Left<T, MT, DP> t;
    t.load(tile + warp * 16 * MT * S::kStride, S::kStride);
    Sums<MT, DP> y;
    y.zero();
    for (int chunk = 0; chunk < chunks; ++chunk) {
        __syncthreads();
        load_chunk<T, DP>(w1, w2, p, chunk);
        Sums<MT, kUnits> u;
        units(u, t, w1, p, chunk);
        u.each([](float& x, int, int) { x = gelu(x); });
        drop(u, p.hidden, mine, p.E, chunk * kUnits);
        Left<T, MT, kUnits> hidden;
        hidden.from(u, scratch);
        multiply<NK, DP>(y, hidden, w2, S::kUnitStride);
    }
    y.each([&](float& x, int, int c) { x += c < p.D ? p.b2[c] : 0.0f; });
    drop(y, p.output, mine, p.D, 0);
    y.each_pair([&](float x0, float x1, int r, int c) {
        if (mine + r >= p.rows || c >= p.D) return;
        const T* x = p.x + (mine + r) * p.D + c;
        x0 += to_float(x[0]);
        if (c + 1 < p.D) x1 += to_float(x[1]);
        store_pair(p.out + (mine + r) * p.D, c, p.D, x0, x1);
    });
}

// dx, and partials [2][gridDim.x][D] for the norm's weight and bias; a block takes every
// gridDim.x-th tile.
template <class T, int DP> __global__ void __launch_bounds__(Shape<T, DP>::kThreads)
    input_kernel(Mlp<T> p) {
    using S = Shape<T, DP>;
    constexpr int MT = S::MT;
    T* t_tile = reinterpret_cast<T*>(shared_memory());
    T* dy_tile = t_tile + S::kTile;
    float* dt_tile = reinterpret_cast<float*>(t_tile); // [kRows][kStride], over both
    T *w1 = dy_tile + S::kTile, *w2 = w1 + kUnits * S::kStride;
    const int warp = threadIdx.x / kWarp, l = threadIdx.x % 8;
    const int chunks = static_cast<int>(ceil_div(p.E, kUnits));
    T* scratch = w1 + S::kWeights + warp * Left<T, MT, kUnits>::kScratch;
    float dweight[DP / 8] = {}, dbias[DP / 8] = {};
    for (int64_t first = blockIdx.x * static_cast<int64_t>(S::kRows); first < p.rows;
         first += gridDim.x * static_cast<int64_t>(S::kRows)) {
        const int64_t mine = first + warp * 16 * MT;
        __syncthreads();
        load_normalised<T, DP>(t_tile, p, first);
        load_gradient<T, DP>(dy_tile, p, first);
        __syncthreads();
        Left<T, MT, DP> t, dy;
        t.load(t_tile + warp * 16 * MT * S::kStride, S::kStride);
        dy.load(dy_tile + warp * 16 * MT * S::kStride, S::kStride);
        Sums<MT, DP> dt;
        dt.zero();
        for (int chunk = 0; chunk < chunks; ++chunk) {
            __syncthreads();
            load_chunk<T, DP>(w1, w2, p, chunk);
            Sums<MT, kUnits> u, du;
            units(u, t, w1, p, chunk);
            du.zero();
            multiply<KN, kUnits>(du, dy, w2, S::kUnitStride);
            drop(du, p.hidden, mine, p.E, chunk * kUnits);
#pragma unroll
            for (int i = 0; i < MT * kUnits / 2; ++i) {
                du.v[i / 16][i / 4 % 4][i % 4] *= gelu_slope(u.v[i / 16][i / 4 % 4][i % 4]);
            }
            Left<T, MT, kUnits> left;
            left.from(du, scratch);
            multiply<KN, DP>(dt, left, w1, S::kStride);
        }
        __syncthreads();
        dt.each_pair([&](float x, float y, int r, int c) {
            float* at = dt_tile + (warp * 16 * MT + r) * S::kStride + c;
            *reinterpret_cast<float2*>(at) = make_float2(x, y);
        });
        __syncthreads();
        for (int r = threadIdx.x / 8; r < S::kRows; r += S::kThreads / 8) {
            const bool inside = first + r < p.rows;
            const int64_t row = (first + r) * p.D;
            float x[DP / 8], g[DP / 8], sum = 0, dot = 0;
            const float2 norm = read_row<T, DP>(x, inside ? p.x + row : nullptr, p.D, p.eps);
#pragma unroll
            for (int j = 0; j < DP / 8; ++j) {
                const int d = l + 8 * j;
                g[j] = 0;
                if (!inside || d >= p.D) continue;
                const float dt_at = dt_tile[r * S::kStride + d];
                x[j] = (x[j] - norm.x) * norm.y;
                dweight[j] = fmaf(dt_at, x[j], dweight[j]);
                dbias[j] += dt_at;
                g[j] = dt_at * p.norm_weight[d];
                sum += g[j];
                dot = fmaf(g[j], x[j], dot);
            }
            sum = warp_sum<8>(sum) / p.D;
            dot = warp_sum<8>(dot) / p.D;
#pragma unroll
            for (int j = 0; j < DP / 8; ++j) {
                const int d = l + 8 * j;
                if (!inside || d >= p.D) continue;
                const float dx = norm.y * (g[j] - sum - x[j] * dot);
                p.out[row + d] = from_float<T>(to_float(p.dy[row + d]) + dx);
            }
        }
    }
    constexpr int kStrands = S::kThreads / 8;
    float* strands = reinterpret_cast<float*>(t_tile); // [2][kStrands][DP]
    __syncthreads();
#pragma unroll
    for (int j = 0; j < DP / 8; ++j) {
        const int at = threadIdx.x / 8 * DP + l + 8 * j;
        strands[at] = dweight[j];
        strands[kStrands * DP + at] = dbias[j];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * DP; i += S::kThreads) {
        if (i % DP >= p.D) continue;
        float sum = 0;
        for (int j = 0; j < kStrands; ++j) sum += strands[(i / DP * kStrands + j) * DP + i % DP];
        p.partials[(i / DP * static_cast<int64_t>(gridDim.x) + blockIdx.x) * p.D + i % DP] = sum;
    }
}

// Gradients of the weights of chunk blockIdx.y, over every gridDim.x-th tile of tokens:
// partials[gridDim.x][chunk] of du^T t and hidden^T dy [2][kUnits][DP], sums of du [kUnits] and dy
// [DP]. Each warp owns 16 units of one of the products (with two warps, of both).
template <int DP> constexpr int64_t kChunkSums = 2 * kUnits * DP + kUnits + DP;
template <class T, int DP> __global__ void __launch_bounds__(Shape<T, DP>::kThreads)
    weights_kernel(Mlp<T> p) {
    using S = Shape<T, DP>;
    constexpr int MT = S::MT, kJobs = 4 / S::kWarps, kStep = 32;
    T* t_tile = reinterpret_cast<T*>(shared_memory());
    T* dy_tile = t_tile + S::kTile;
    T *w1 = dy_tile + S::kTile, *w2 = w1 + kUnits * S::kStride;
    T* du_tile = w1 + S::kWeights; // [kRows][kUnitStride]
    T* hidden_tile = du_tile + S::kUnitTile;
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, chunk = blockIdx.y;
    load_chunk<T, DP>(w1, w2, p, chunk);
    Sums<1, DP> sums[kJobs];
#pragma unroll
    for (int job = 0; job < kJobs; ++job) sums[job].zero();
    float du_sum = 0, dy_sum[DP > S::kThreads ? 2 : 1] = {};
    for (int64_t first = blockIdx.x * static_cast<int64_t>(S::kRows); first < p.rows;
         first += gridDim.x * static_cast<int64_t>(S::kRows)) {
        const int64_t mine = first + warp * 16 * MT;
        __syncthreads();
        load_normalised<T, DP>(t_tile, p, first);
        load_gradient<T, DP>(dy_tile, p, first);
        __syncthreads();
        {
            Left<T, MT, DP> left;
            Sums<MT, kUnits> u, du, mask;
            left.load(t_tile + warp * 16 * MT * S::kStride, S::kStride);
            units(u, left, w1, p, chunk);
            left.load(dy_tile + warp * 16 * MT * S::kStride, S::kStride);
            du.zero();
            multiply<KN, kUnits>(du, left, w2, S::kUnitStride);
            mask.each([](float& x, int, int) { x = 1; });
            drop(mask, p.hidden, mine, p.E, chunk * kUnits);
#pragma unroll
            for (int i = 0; i < MT * kUnits / 2; ++i) {
                float &value = u.v[i / 16][i / 4 % 4][i % 4],
                      &slope = du.v[i / 16][i / 4 % 4][i % 4];
                const float keep = mask.v[i / 16][i / 4 % 4][i % 4];
                slope *= keep * gelu_slope(value);
                value = keep * gelu(value);
            }
            u.each_pair([&](float x, float y, int r, int c) {
                store_pair(hidden_tile + (warp * 16 * MT + r) * S::kUnitStride, c, kUnits, x, y);
            });
            du.each_pair([&](float x, float y, int r, int c) {
                store_pair(du_tile + (warp * 16 * MT + r) * S::kUnitStride, c, kUnits, x, y);
            });
        }
        __syncthreads();
#pragma unroll
        for (int job = 0; job < kJobs; ++job) {
            const int task = warp + job * S::kWarps; // product, half of the units
            const T* left_tile = (task / 2 == 0 ? du_tile : hidden_tile) + task % 2 * 16;
            const T* right_tile = task / 2 == 0 ? t_tile : dy_tile;
            for (int r = 0; r < S::kRows; r += kStep) {
                Left<T, 1, kStep> left;
                left.load_transposed(left_tile + r * S::kUnitStride, S::kUnitStride);
                multiply<KN, DP>(sums[job], left, right_tile + r * S::kStride, S::kStride);
            }
        }
        for (int r = warp; r < S::kRows; r += S::kWarps) {
            du_sum += to_float(du_tile[r * S::kUnitStride + lane]);
        }
        for (int d = threadIdx.x, j = 0; d < DP && chunk == 0; d += S::kThreads, ++j) {
            for (int r = 0; r < S::kRows; ++r) dy_sum[j] += to_float(dy_tile[r * S::kStride + d]);
        }
    }
    float* out =
        p.partials + (blockIdx.x * static_cast<int64_t>(gridDim.y) + chunk) * kChunkSums<DP>;
#pragma unroll
    for (int job = 0; job < kJobs; ++job) {
        const int unit =
            (warp + job * S::kWarps) * 16; // of both products' units, one after the other
        sums[job].each([&](float& x, int r, int c) { out[(unit + r) * DP + c] = x; });
    }
    float* strands = reinterpret_cast<float*>(shared_memory());
    __syncthreads();
    strands[threadIdx.x] = du_sum;
    __syncthreads();
    out += 2 * kUnits * DP;
    if (warp == 0) {
        for (int i = 1; i < S::kWarps; ++i) du_sum += strands[i * kWarp + lane];
        out[lane] = du_sum;
    }
    for (int d = threadIdx.x, j = 0; d < DP; d += S::kThreads, ++j) out[kUnits + d] = dy_sum[j];
}

// Sums of all chunks to dw1 [E, D], db1, dw2 [D, E], db2.
__global__ void scatter_kernel(const float* sums, float* dw1, float* db1, float* dw2, float* db2,
                               int D, int E, int DP) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, e = i / D, d = i % D;
    if (e >= E) return;
    const float* chunk = sums + e / kUnits * (2 * kUnits * DP + kUnits + DP);
    dw1[i] = chunk[e % kUnits * DP + d];
    dw2[d * E + e] = chunk[(kUnits + e % kUnits) * DP + d];
    if (d == 0) db1[e] = chunk[2 * kUnits * DP + e % kUnits];
    if (e == 0) db2[d] = chunk[2 * kUnits * DP + kUnits + d];
}

template <class Function> int with_width(int64_t D, int64_t E, const Function& f) {
    if (D < 1 || D > 128 || E < 1 || E > 65535) return EQCVT_BAD_SIZE;
    if (D <= 16) return f(std::integral_constant<int, 16>());
    if (D <= 32) return f(std::integral_constant<int, 32>());
    if (D <= 64) return f(std::integral_constant<int, 64>());
    return f(std::integral_constant<int, 128>());
}

// What both directions share: the arguments, and the weights in chunks.
template <class T, int DP> int prepare(Mlp<T>& p, Workspace& space, const void* x,
                                       const void* norm_weight, const void* norm_bias,
                                       const void* w1, const void* b1, const void* w2,
                                       const void* b2, const void* seed, int64_t rows, int64_t D,
                                       int64_t E, double dropout, double eps, void* stream) {
    constexpr int kThreads = 256;
    const int64_t count = round_up(E, kUnits) * DP;
    T *w1_chunks = space.take<T>(count), *w2_chunks = space.take<T>(count);
    p.x = static_cast<const T*>(x);
    p.norm_weight = static_cast<const float*>(norm_weight);
    p.norm_bias = static_cast<const float*>(norm_bias);
    p.b1 = static_cast<const float*>(b1), p.b2 = static_cast<const float*>(b2);
    p.w1 = w1_chunks, p.w2 = w2_chunks;
    p.hidden = Dropout::of(seed, dropout, 1), p.output = Dropout::of(seed, dropout, 2);
    p.rows = rows, p.D = static_cast<int>(D), p.E = static_cast<int>(E);
    p.eps = static_cast<float>(eps);
    if (!space.base) return EQCVT_OK;
    return launch(chunks_kernel<T>, Grid(ceil_div(count, kThreads)), kThreads, 0, stream,
                  static_cast<const float*>(w1), static_cast<const float*>(w2), w1_chunks,
                  w2_chunks, p.D, p.E, DP, static_cast<int>(count));
}

int64_t at_most(int64_t x, int64_t limit) { return x < limit ? x : limit; }

} // namespace

EQCVT_API int eqcvt_cuda_mlp_block_forward(int dtype, const void* x, const void* norm_weight,
                                           const void* norm_bias, const void* w1, const void* b1,
                                           const void* w2, const void* b2, const void* seed,
                                           int64_t B, int64_t N, int64_t D, int64_t E,
                                           double dropout, double eps, void* y, void* workspace,
                                           int64_t* workspace_bytes, void* stream) {
    return with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        return with_width(D, E, [&](auto width) -> int {
            constexpr int DP = decltype(width)::value;
            using S = Shape<T, DP>;
            Workspace space(workspace_bytes ? nullptr : workspace);
            Mlp<T> p = {};
            EQCVT_TRY((prepare<T, DP>(p, space, x, norm_weight, norm_bias, w1, b1, w2, b2, seed,
                                      B * N, D, E, dropout, eps, stream)));
            if (workspace_bytes) {
                *workspace_bytes = space.used;
                return EQCVT_OK;
            }
            p.out = static_cast<T*>(y);
            constexpr int64_t kShared =
                sizeof(T) * (S::kTile + S::kWeights + S::kWarps * Left<T, S::MT, kUnits>::kScratch);
            return launch(forward_kernel<T, DP>, Grid(ceil_div(p.rows, S::kRows)), S::kThreads,
                          kShared, stream, p);
        });
    });
}

EQCVT_API int
eqcvt_cuda_mlp_block_backward(int dtype, const void* dy, const void* x, const void* norm_weight,
                              const void* norm_bias, const void* w1, const void* b1, const void* w2,
                              const void* b2, const void* seed, int64_t B, int64_t N, int64_t D,
                              int64_t E, double dropout, double eps, void* dx, void* dnorm_weight,
                              void* dnorm_bias, void* dw1, void* db1, void* dw2, void* db2,
                              void* workspace, int64_t* workspace_bytes, void* stream) {
    return with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        return with_width(D, E, [&](auto width) -> int {
            constexpr int DP = decltype(width)::value;
            using S = Shape<T, DP>;
            Workspace space(workspace_bytes ? nullptr : workspace);
            Mlp<T> p = {};
            EQCVT_TRY((prepare<T, DP>(p, space, x, norm_weight, norm_bias, w1, b1, w2, b2, seed,
                                      B * N, D, E, dropout, eps, stream)));
            const int64_t chunks = ceil_div(E, kUnits), tiles = ceil_div(p.rows, S::kRows);
            const int64_t input_blocks = at_most(tiles, 1024);
            const int64_t weight_blocks = at_most(tiles, 1 + 512 / chunks);
            float* norms = space.take<float>(input_blocks * 2 * D);
            float* partials = space.take<float>(weight_blocks * chunks * kChunkSums<DP>);
            float* sums = space.take<float>(chunks * kChunkSums<DP>);
            if (workspace_bytes) {
                *workspace_bytes = space.used;
                return EQCVT_OK;
            }
            p.dy = static_cast<const T*>(dy), p.out = static_cast<T*>(dx);
            p.partials = norms;
            constexpr int64_t kInput = sizeof(T) * (2 * S::kTile + S::kWeights +
                                                    S::kWarps * Left<T, S::MT, kUnits>::kScratch);
            EQCVT_TRY(
                launch(input_kernel<T, DP>, Grid(input_blocks), S::kThreads, kInput, stream, p));
            EQCVT_TRY(
                sum_partials(norms, input_blocks, D, static_cast<float*>(dnorm_weight), stream));
            EQCVT_TRY(sum_partials(norms + input_blocks * D, input_blocks, D,
                                   static_cast<float*>(dnorm_bias), stream));
            p.partials = partials;
            constexpr int64_t kWeightsShared =
                sizeof(T) * (2 * S::kTile + S::kWeights + 2 * S::kUnitTile);
            EQCVT_TRY(launch(weights_kernel<T, DP>,
                             Grid(weight_blocks, static_cast<unsigned>(chunks)), S::kThreads,
                             kWeightsShared, stream, p));
            EQCVT_TRY(sum_partials(partials, weight_blocks, chunks * kChunkSums<DP>, sums, stream));
            constexpr int kThreads = 256;
            return launch(scatter_kernel, Grid(ceil_div(D * E, kThreads)), kThreads, 0, stream,
                          sums, static_cast<float*>(dw1), static_cast<float*>(db1),
                          static_cast<float*>(dw2), static_cast<float*>(db2), p.D, p.E, DP);
        });
    });
}
