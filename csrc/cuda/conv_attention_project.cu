// The depthwise projections of attention, forward and backward, channels last.
//
// All are bound by memory; a thread owns V neighbouring channels (one access of 4 V or 2 V bytes)
// and walks over tokens, so that a warp's accesses are contiguous and the filter's taps come from
// the first-level cache. Sums are float; those over tokens are made in a fixed order: a thread's
// tokens, the threads of a block, the blocks (in double).
//
// Statistics are those of the values as stored, so that the backward pass can make them again. A
// layer norm in front is applied to what is read; a pass before makes its two numbers per token.
#include <initializer_list>
#include <type_traits>

#include "../conv_attention.h"
#include "device.cuh"
#include "layer_norm.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kTaps = 9; // filter taps whose gradients a thread of the filter kernel holds

// Blocks of `threads / groups` strands: lanes of a strand own the channel groups of one token.
struct Strands {
    int groups, strands;
    __host__ __device__ Strands(int D, int V) : groups(D / V), strands(kThreads / groups) {}
};

template <class T, int V> __device__ inline void load(float (&out)[V], const T* from) {
    const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(from);
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] = to_float(pack.value[i]);
}

// Token i of [., H, W]; division of 32-bit numbers is several times cheaper.
struct Position {
    int64_t image;
    int row, column;
    __device__ Position(int64_t i, int H, int W) {
        if (i <= INT32_MAX) {
            const uint32_t n = static_cast<uint32_t>(i), line = n / W;
            image = line / H, row = line % H, column = n % W;
        } else {
            const int64_t line = i / W;
            image = line / H, row = static_cast<int>(line % H), column = static_cast<int>(i % W);
        }
    }
};

// Whether `stride` divides i, and how often.
__device__ inline bool divides(int stride, int i, int& quotient) {
    if (stride <= 2) {
        quotient = i >> (stride - 1);
        return (i & (stride - 1)) == 0;
    }
    quotient = i / stride;
    return quotient * stride == i;
}

// Count, mean and sum of squared distances from it, of some values.
struct Moments {
    float count, mean, squares;

    __device__ void add(const Moments& other) { // Chan, Golub and LeVeque, 1983
        const float total = count + other.count;
        if (other.count == 0) return;
        const float delta = other.mean - mean, share = other.count / total;
        mean = fmaf(delta, share, mean);
        squares += other.squares + delta * delta * count * share;
        count = total;
    }
};

// One projection: tokens [B, H1, W1, D] = depthwise convolution of x [B, H, W, D] with filters
// [D, k, k], stride s, padding k / 2; partials [gridDim.x][D] if not null. KK is k, or 0 for any.
template <class T> struct Project {
    const T* x;
    Norm norm;
    const float* filters;
    T* out;
    Moments* partials;
    int64_t B;
    int D, H, W, H1, W1, k, stride;
};
template <class T, int V, int KK> __global__ void __launch_bounds__(kThreads)
    project_kernel(Project<T> p) {
    float* weights = reinterpret_cast<float*>(shared_memory()); // [k * k][D]
    const int k = KK ? KK : p.k, taps = k * k;
    for (int i = threadIdx.x; i < taps * p.D; i += kThreads) {
        weights[i] = p.filters[i % p.D * taps + i / p.D];
    }
    __syncthreads();
    const Strands shape(p.D, V);
    const int strand = threadIdx.x / shape.groups, d = threadIdx.x % shape.groups * V;
    const int64_t tokens = p.B * p.H1 * p.W1;
    // Sums around the first value: no cancellation when the mean is large.
    float first[V] = {}, sum[V] = {}, squares[V] = {}, count = 0;
    if (strand < shape.strands) {
        const int64_t step = static_cast<int64_t>(gridDim.x) * shape.strands;
        for (int64_t i = blockIdx.x * static_cast<int64_t>(shape.strands) + strand; i < tokens;
             i += step) {
            const Position at(i, p.H1, p.W1);
            const int column = at.column * p.stride - k / 2, row = at.row * p.stride - k / 2;
            const int64_t image = at.image * p.H * p.W;
            float y[V] = {};
#pragma unroll
            for (int u = 0; u < k; ++u) {
#pragma unroll
                for (int v = 0; v < k; ++v) {
                    const int r = row + u, c = column + v;
                    if (r < 0 || r >= p.H || c < 0 || c >= p.W) continue;
                    const int64_t token = image + static_cast<int64_t>(r) * p.W + c;
                    float x[V];
                    load<T, V>(x, p.x + token * p.D + d);
                    p.norm.apply(x, token, d);
#pragma unroll
                    for (int j = 0; j < V; ++j) {
                        y[j] = fmaf(x[j], weights[(u * k + v) * p.D + d + j], y[j]);
                    }
                }
            }
            Pack<T, V> pack;
#pragma unroll
            for (int j = 0; j < V; ++j) {
                pack.value[j] = from_float<T>(y[j]);
                const float stored = to_float(pack.value[j]);
                if (count == 0) first[j] = stored;
                sum[j] += stored - first[j];
                squares[j] = fmaf(stored - first[j], stored - first[j], squares[j]);
            }
            ++count;
            *reinterpret_cast<Pack<T, V>*>(p.out + i * p.D + d) = pack;
        }
    }
    if (!p.partials) return;
    __syncthreads();
    Moments* strands = reinterpret_cast<Moments*>(shared_memory()); // [strands][D]
    if (strand < shape.strands) {
        for (int j = 0; j < V; ++j) {
            Moments m = {count, 0, 0};
            if (count > 0) {
                m.mean = first[j] + sum[j] / count;
                m.squares = squares[j] - sum[j] * (sum[j] / count);
            }
            strands[strand * p.D + d + j] = m;
        }
    }
    __syncthreads();
    for (int c = threadIdx.x; c < p.D; c += kThreads) {
        Moments m = strands[c];
        for (int i = 1; i < shape.strands; ++i) m.add(strands[i * p.D + c]);
        p.partials[blockIdx.x * static_cast<int64_t>(p.D) + c] = m;
    }
}

// Combines the blocks' moments of channel blockIdx.x, in double; 32 strands of blocks.
__global__ void moments_kernel(const Moments* partials, int64_t blocks, int D, float* mean,
                               float* variance) {
    double* shared = reinterpret_cast<double*>(shared_memory()); // [3][32]
    const int lane = threadIdx.x;
    double count = 0, center = 0, squares = 0;
    const auto add = [&](double n, double m, double s) {
        if (n == 0) return;
        const double delta = m - center, total = count + n;
        center += delta * n / total;
        squares += s + delta * delta * count * n / total;
        count = total;
    };
    for (int64_t i = lane; i < blocks; i += kWarp) {
        const Moments m = partials[i * D + blockIdx.x];
        add(m.count, m.mean, m.squares);
    }
    shared[lane] = count, shared[kWarp + lane] = center, shared[2 * kWarp + lane] = squares;
    __syncwarp();
    if (lane != 0) return;
    for (int i = 1; i < kWarp; ++i) {
        add(shared[i], shared[kWarp + i], shared[2 * kWarp + i]);
    }
    // Of nothing: NaN, as in PyTorch.
    mean[blockIdx.x] = static_cast<float>(count > 0 ? center : NAN);
    variance[blockIdx.x] = static_cast<float>(squares / count);
}

// The total gradient of one projection's raw output: dt + (dmean + 2 dvariance (t - mean)) / n.
template <class T> struct Gradient {
    const T *dt, *t;
    const float *dmean, *dvariance, *mean; // [D], or null
    const float* filters;
    float share; // 1 / n
    int H1, W1, stride;

    template <int V> __device__ void at(float (&g)[V], int64_t offset, int d) const {
        load<T, V>(g, dt + offset);
        if (!dmean) return;
        float raw[V];
        load<T, V>(raw, t + offset);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const float centred = raw[j] - mean[d + j];
            g[j] += fmaf(2 * dvariance[d + j], centred, dmean[d + j]) * share;
        }
    }
};

template <class T> struct ProjectBackward {
    Gradient<T> parts[3];
    const T* x;
    Norm norm;
    T* dx;
    float* partials; // [gridDim.x][k * k][D]
    int64_t B;
    int D, H, W, k, projections;
};

// dx[i] = sum over projections and taps of g[(i + pad - tap) / stride] filter[tap]; with a norm it
// is that of the norm's result.
template <class T, int V, int KK> __global__ void __launch_bounds__(kThreads)
    input_kernel(ProjectBackward<T> p) {
    float* weights = reinterpret_cast<float*>(shared_memory()); // [projections][k * k][D]
    const int k = KK ? KK : p.k, taps = k * k;
    for (int n = 0; n < p.projections; ++n) {
        for (int i = threadIdx.x; i < taps * p.D; i += kThreads) {
            weights[n * taps * p.D + i] = p.parts[n].filters[i % p.D * taps + i / p.D];
        }
    }
    __syncthreads();
    const Strands shape(p.D, V);
    const int strand = threadIdx.x / shape.groups, d = threadIdx.x % shape.groups * V;
    if (strand >= shape.strands) return;
    const int64_t pixels = p.B * p.H * p.W, step = static_cast<int64_t>(gridDim.x) * shape.strands;
    for (int64_t i = blockIdx.x * static_cast<int64_t>(shape.strands) + strand; i < pixels;
         i += step) {
        const Position at(i, p.H, p.W);
        const int column = at.column + k / 2, row = at.row + k / 2;
        float sum[V] = {};
#pragma unroll
        for (int n = 0; n < 3; ++n) {
            if (n >= p.projections) break;
            const Gradient<T>& part = p.parts[n];
            const float* weight = weights + n * taps * p.D + d;
#pragma unroll
            for (int u = 0; u < k; ++u) {
#pragma unroll
                for (int v = 0; v < k; ++v) {
                    int r, c;
                    if (!divides(part.stride, row - u, r)) continue;
                    if (!divides(part.stride, column - v, c)) continue;
                    if (r < 0 || r >= part.H1 || c < 0 || c >= part.W1) continue;
                    float g[V];
                    part.template at<V>(g, ((at.image * part.H1 + r) * part.W1 + c) * p.D + d, d);
#pragma unroll
                    for (int j = 0; j < V; ++j) {
                        sum[j] = fmaf(g[j], weight[(u * k + v) * p.D + j], sum[j]);
                    }
                }
            }
        }
        Pack<T, V> pack;
#pragma unroll
        for (int j = 0; j < V; ++j) pack.value[j] = from_float<T>(sum[j]);
        *reinterpret_cast<Pack<T, V>*>(p.dx + i * p.D + d) = pack;
    }
}

// dfilter[tap] = sum over tokens of g[i] x[i stride + tap - pad] for projection `part`; a block
// takes a part of the tokens and the taps [kTaps blockIdx.y, ..).
template <class T, int V, int KK> __global__ void __launch_bounds__(kThreads)
    filter_kernel(ProjectBackward<T> p, Gradient<T> part) {
    const int k = KK ? KK : p.k, taps = k * k, tap0 = KK == 3 ? 0 : blockIdx.y * kTaps;
    const Strands shape(p.D, V);
    const int strand = threadIdx.x / shape.groups, d = threadIdx.x % shape.groups * V;
    const int64_t tokens = p.B * part.H1 * part.W1;
    float sums[kTaps][V] = {};
    if (strand < shape.strands) {
        const int64_t step = static_cast<int64_t>(gridDim.x) * shape.strands;
        for (int64_t i = blockIdx.x * static_cast<int64_t>(shape.strands) + strand; i < tokens;
             i += step) {
            const Position at(i, part.H1, part.W1);
            const int column = at.column * part.stride - k / 2, row = at.row * part.stride - k / 2;
            const int64_t image = at.image * p.H * p.W;
            float g[V];
            part.template at<V>(g, i * p.D + d, d);
#pragma unroll
            for (int tap = 0; tap < kTaps; ++tap) {
                const int r = row + (tap0 + tap) / k, c = column + (tap0 + tap) % k;
                if (tap0 + tap >= taps || r < 0 || r >= p.H || c < 0 || c >= p.W) continue;
                const int64_t token = image + static_cast<int64_t>(r) * p.W + c;
                float x[V];
                load<T, V>(x, p.x + token * p.D + d);
                p.norm.apply(x, token, d);
#pragma unroll
                for (int j = 0; j < V; ++j) sums[tap][j] = fmaf(g[j], x[j], sums[tap][j]);
            }
        }
    }
    float* strands = reinterpret_cast<float*>(shared_memory()); // [strands][D]
    float* out = p.partials + static_cast<int64_t>(blockIdx.x) * taps * p.D;
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
        if (tap0 + tap >= taps) break;
        __syncthreads();
        if (strand < shape.strands) {
#pragma unroll
            for (int j = 0; j < V; ++j) strands[strand * p.D + d + j] = sums[tap][j];
        }
        __syncthreads();
        for (int c = threadIdx.x; c < p.D; c += kThreads) {
            float sum = strands[c];
            for (int i = 1; i < shape.strands; ++i) sum += strands[i * p.D + c];
            out[(tap0 + tap) * p.D + c] = sum;
        }
    }
}

// sums [k * k][D] to filters [D][k * k].
__global__ void transpose_kernel(const float* sums, float* filters, int taps, int D) {
    const int i = blockIdx.x * kThreads + threadIdx.x;
    if (i < taps * D) filters[i % D * taps + i / D] = sums[i];
}

// Calls f with V and KK: how many channels a thread owns, and the filter size if it is known.
template <class T, class Function> int
with_shape(int64_t D, int64_t k, std::initializer_list<const void*> tensors, const Function& f) {
    using std::integral_constant;
    if (D < 1 || D > 128 || k < 1 || k % 2 == 0 || k > 7) return EQCVT_BAD_SIZE;
    bool wide = D % 4 == 0;
    for (const void* t : tensors) wide &= reinterpret_cast<uintptr_t>(t) % (4 * sizeof(T)) == 0;
    if (!wide) return f(integral_constant<int, 1>(), integral_constant<int, 0>());
    if (k == 3) return f(integral_constant<int, 4>(), integral_constant<int, 3>());
    return f(integral_constant<int, 4>(), integral_constant<int, 0>());
}

// Blocks for a walk over `tokens`: a few tokens for each strand, and at most 1024.
int64_t blocks_for(int64_t tokens, int64_t D, int V) {
    const int64_t blocks = ceil_div(tokens, Strands(static_cast<int>(D), V).strands * 4);
    return blocks < 1024 ? blocks : 1024;
}

int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }

} // namespace

EQCVT_API int eqcvt_cuda_conv_attention_project(
    int dtype, const void* x, const void* q, const void* k, const void* v, const void* norm_weight,
    const void* norm_bias, int64_t B, int64_t D, int64_t H, int64_t W, int64_t kk,
    int64_t kv_stride, int moments, double eps, void* a, void* b, void* c, void* mean,
    void* variance, void* workspace, int64_t* workspace_bytes, void* stream) {
    return with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        const auto run = [&](auto width, auto size) -> int {
            constexpr int V = decltype(width)::value, KK = decltype(size)::value;
            Workspace space(workspace);
            Moments* partials = space.take<Moments>(moments ? blocks_for(B * H * W, D, V) * D : 0);
            float2* statistics = space.take<float2>(norm_weight ? B * H * W : 0);
            if (workspace_bytes) {
                *workspace_bytes = space.used;
                return EQCVT_OK;
            }
            if (norm_weight) {
                EQCVT_TRY(norm_statistics(static_cast<const T*>(x), statistics, B * H * W, D, eps,
                                          stream));
            }
            const Norm norm = {norm_weight ? statistics : nullptr,
                               static_cast<const float*>(norm_weight),
                               static_cast<const float*>(norm_bias)};
            const void* filters[] = {q, k, v};
            void* outs[] = {a, b, c};
            const int n = static_cast<int>(D);
            for (int i = 0; i < (v ? 3 : 2); ++i) {
                const int64_t stride = i == 0 ? 1 : kv_stride;
                const int64_t H1 = (H - 1) / stride + 1, W1 = (W - 1) / stride + 1;
                const int64_t blocks = blocks_for(B * H1 * W1, D, V);
                const Project<T> p = {static_cast<const T*>(x),
                                      norm,
                                      static_cast<const float*>(filters[i]),
                                      static_cast<T*>(outs[i]),
                                      moments ? partials : nullptr,
                                      B,
                                      n,
                                      static_cast<int>(H),
                                      static_cast<int>(W),
                                      static_cast<int>(H1),
                                      static_cast<int>(W1),
                                      static_cast<int>(kk),
                                      static_cast<int>(stride)};
                const int64_t shared = largest(kk * kk * D * sizeof(float),
                                               Strands(n, V).strands * D * sizeof(Moments));
                EQCVT_TRY(
                    launch(project_kernel<T, V, KK>, Grid(blocks), kThreads, shared, stream, p));
                if (!moments) continue;
                EQCVT_TRY(launch(moments_kernel, Grid(D), kWarp, 3 * kWarp * sizeof(double), stream,
                                 partials, blocks, n, static_cast<float*>(mean) + i * D,
                                 static_cast<float*>(variance) + i * D));
            }
            return EQCVT_OK;
        };
        return with_shape<T>(D, kk, {x, a, b, c}, run);
    });
}

EQCVT_API int eqcvt_cuda_conv_attention_project_backward(
    int dtype, const void* da, const void* db, const void* dc, const void* dmean,
    const void* dvariance, const void* a, const void* b, const void* c, const void* mean,
    const void* x, const void* q, const void* k, const void* v, const void* norm_weight,
    const void* norm_bias, int64_t B, int64_t D, int64_t H, int64_t W, int64_t kk,
    int64_t kv_stride, double eps, void* dx, void* dq, void* dk, void* dv, void* dnorm_weight,
    void* dnorm_bias, void* workspace, int64_t* workspace_bytes, void* stream) {
    return with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        const auto run = [&](auto width, auto size) -> int {
            constexpr int V = decltype(width)::value, KK = decltype(size)::value;
            const int64_t taps = kk * kk;
            Workspace space(workspace);
            const int64_t tokens = B * H * W;
            float* partials = space.take<float>(
                largest(blocks_for(tokens, D, V) * taps * D, norm_blocks(tokens) * 2 * D));
            float* sums = space.take<float>(taps * D);
            float2* statistics = space.take<float2>(norm_weight ? tokens : 0);
            if (workspace_bytes) {
                *workspace_bytes = space.used;
                return EQCVT_OK;
            }
            const void *dts[] = {da, db, dc}, *ts[] = {a, b, c}, *filters[] = {q, k, v};
            void* dfilters[] = {dq, dk, dv};
            ProjectBackward<T> p = {};
            p.x = static_cast<const T*>(x), p.dx = static_cast<T*>(dx), p.partials = partials;
            if (norm_weight) {
                EQCVT_TRY(norm_statistics(p.x, statistics, tokens, D, eps, stream));
                p.norm = {statistics, static_cast<const float*>(norm_weight),
                          static_cast<const float*>(norm_bias)};
            }
            p.B = B, p.D = static_cast<int>(D), p.H = static_cast<int>(H);
            p.W = static_cast<int>(W), p.k = static_cast<int>(kk), p.projections = v ? 3 : 2;
            for (int i = 0; i < p.projections; ++i) {
                const int64_t stride = i == 0 ? 1 : kv_stride;
                const int64_t H1 = (H - 1) / stride + 1, W1 = (W - 1) / stride + 1;
                const auto row = [&](const void* t) {
                    return dmean ? static_cast<const float*>(t) + i * D : nullptr;
                };
                p.parts[i] = {static_cast<const T*>(dts[i]),
                              static_cast<const T*>(ts[i]),
                              row(dmean),
                              row(dvariance),
                              row(mean),
                              static_cast<const float*>(filters[i]),
                              static_cast<float>(1.0 / (B * H1 * W1)),
                              static_cast<int>(H1),
                              static_cast<int>(W1),
                              static_cast<int>(stride)};
            }
            EQCVT_TRY(launch(input_kernel<T, V, KK>, Grid(blocks_for(tokens, D, V) * 4), kThreads,
                             p.projections * taps * D * sizeof(float), stream, p));
            for (int i = 0; i < p.projections; ++i) {
                const Gradient<T>& part = p.parts[i];
                const int64_t blocks = blocks_for(B * part.H1 * part.W1, D, V);
                const Grid grid(blocks, static_cast<unsigned>(ceil_div(taps, kTaps)));
                EQCVT_TRY(launch(filter_kernel<T, V, KK>, grid, kThreads,
                                 Strands(p.D, V).strands * D * sizeof(float), stream, p, part));
                EQCVT_TRY(sum_partials(partials, blocks, taps * D, sums, stream));
                EQCVT_TRY(launch(transpose_kernel, Grid(ceil_div(taps * D, kThreads)), kThreads, 0,
                                 stream, sums, static_cast<float*>(dfilters[i]),
                                 static_cast<int>(taps), p.D));
            }
            if (!norm_weight) return EQCVT_OK;
            return norm_backward(p.x, p.norm, p.dx, partials, tokens, D,
                                 static_cast<float*>(dnorm_weight), static_cast<float*>(dnorm_bias),
                                 stream);
        };
        return with_shape<T>(D, kk, {x, a, b, c, da, db, dc, dx}, run);
    });
}
