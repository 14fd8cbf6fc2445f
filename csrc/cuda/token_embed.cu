// Token embedding: a strided convolution, then layer normalisation over the channels.
//
// A block makes the tokens of a tile of one image, 32 filters at a time, into shared memory as
// [pixel][channel] in fp32. There one thread owns a pixel for its mean and variance, and a warp
// writes the channels of a pixel, which lie side by side. The backward pass makes the tokens again,
// writes the gradient of the convolution's output for the kernels of lift_gradients.cuh, and sums
// up what belongs to the norm and the bias.
//
// Limits, beyond which the launchers return EQCVT_BAD_SIZE: an image of fewer than 2^31 values and,
// in the backward pass, filters of 13x13 and D of about 2,000 on an H100, or 800 where a block gets
// 99 KiB of shared memory.
#include "../token_embed.h"

#include "lift_gradients.cuh"

namespace {

constexpr int kEmbedRows = 2; // 16-filter tiles of a pass
constexpr int kEmbedTiles = 4;
constexpr int kEmbedPixels = kEmbedTiles * kWarps * 8;

struct Embed {
    Conv conv;
    Plan plan;
    const float *bias, *norm_weight, *norm_bias;
    const void* dy; // [B, out_h, out_w, D]
    void* out;      // the same, or dt [B, D, out_h, out_w]
    float* sums[3]; // [blocks][D], of the gradients of norm_weight, norm_bias and bias
    int D;
    float eps;
};

// Odd, so that neither the pixels of a channel nor the channels of a pixel share a bank.
__host__ __device__ constexpr int token_pitch(int D) { return D | 1; }

// The tile's convolution and bias to tokens[pixel][token_pitch].
template <class T> __device__ void embed_tile(float* tokens, const Shared<T>& s, const Embed& a,
                                              const Tile& tile, bool first) {
    const int pixels = a.plan.rows * a.plan.columns;
    for (int d = 0; d < a.D; d += 16 * kEmbedRows) {
        const int rows = min(16 * kEmbedRows, a.D - d);
        float sum[kEmbedRows][kEmbedTiles][4];
        convolve_tile<T, kEmbedRows, kEmbedTiles>(sum, s, a.conv, a.plan, tile, d, rows,
                                                  !first && a.D <= 16 * kEmbedRows);
#pragma unroll
        for (int i = 0; i < 2 * kEmbedRows; ++i) {
            const int row = own_row(i / 2, i % 2);
            if (row >= rows) continue;
            const float bias = a.bias ? a.bias[d + row] : 0.0f;
#pragma unroll
            for (int n = 0; n < 2 * kEmbedTiles; ++n) {
                const int p = own_pixel<kEmbedTiles>(n / 2) + n % 2;
                if (p >= pixels) continue;
                tokens[p * token_pitch(a.D) + d + row] =
                    sum[i / 2][n / 2][i % 2 * 2 + n % 2] + bias;
            }
        }
    }
    __syncthreads();
}

// Mean and 1 / standard deviation of a pixel's channels.
__device__ inline float2 token_statistics(const float* token, int D, float eps) {
    float mean = 0, variance = 0;
    for (int d = 0; d < D; ++d) mean += token[d];
    mean /= D;
    for (int d = 0; d < D; ++d) variance = fmaf(token[d] - mean, token[d] - mean, variance);
    return make_float2(mean, 1 / sqrtf(variance / D + eps));
}

// Index of pixel p of the tile among the image's, or -1 outside.
__device__ inline int64_t token_index(const Embed& a, const Tile& tile, int p) {
    const int y = tile.y + p / a.plan.columns, x = tile.x + p % a.plan.columns;
    const bool inside = y < a.conv.out_h && x < a.conv.out_w;
    return inside ? static_cast<int64_t>(y) * a.conv.out_w + x : -1;
}

template <class T> __global__ void __launch_bounds__(kThreads, 2) embed_kernel(Embed a) {
    const int pixels = a.plan.rows * a.plan.columns, pitch = token_pitch(a.D);
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const Shared<T> s = divide_shared<T>(a.plan, 16 * kEmbedRows);
    float2* statistics = reinterpret_cast<float2*>(s.rest);        // [pixels]
    float* tokens = reinterpret_cast<float*>(statistics + pixels); // [pixels][pitch]
    for (int index = blockIdx.x; index < a.plan.tiles; index += gridDim.x) {
        const Tile tile = locate(a.plan, index);
        embed_tile(tokens, s, a, tile, index == static_cast<int>(blockIdx.x));
        for (int p = threadIdx.x; p < pixels; p += kThreads) {
            statistics[p] = token_statistics(tokens + p * pitch, a.D, a.eps);
        }
        __syncthreads();
        T* out = static_cast<T*>(a.out) +
                 tile.b * a.conv.out_h * static_cast<int64_t>(a.conv.out_w) * a.D;
        for (int d = lane; d < a.D; d += kWarp) {
            const float weight = a.norm_weight[d], bias = a.norm_bias[d];
            for (int p = warp; p < pixels; p += kWarps) {
                const int64_t to = token_index(a, tile, p);
                if (to < 0) continue;
                const float t = (tokens[p * pitch + d] - statistics[p].x) * statistics[p].y;
                out[to * a.D + d] = from_float<T>(fmaf(t, weight, bias));
            }
        }
    }
}

template <class T> __global__ void __launch_bounds__(kThreads, 2) embed_backward_kernel(Embed a) {
    const int pixels = a.plan.rows * a.plan.columns, pitch = token_pitch(a.D);
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int64_t plane = static_cast<int64_t>(a.conv.out_h) * a.conv.out_w;
    const Shared<T> s = divide_shared<T>(a.plan, 16 * kEmbedRows);
    float4* statistics = reinterpret_cast<float4*>(s.rest);      // [pixels]
    float* sums = reinterpret_cast<float*>(statistics + pixels); // [kWarps][3][D]
    float* tokens = sums + kWarps * 3 * a.D;                     // [pixels][pitch]
    T* gradient = reinterpret_cast<T*>(tokens + pixels * pitch); // [pixels][pitch]
    for (int i = threadIdx.x; i < kWarps * 3 * a.D; i += kThreads) sums[i] = 0;

    for (int index = blockIdx.x; index < a.plan.tiles; index += gridDim.x) {
        const Tile tile = locate(a.plan, index);
        const T* dy = static_cast<const T*>(a.dy) + tile.b * plane * a.D;
        T* dt = static_cast<T*>(a.out) + tile.b * plane * a.D;
        __syncthreads();
        for (int d = lane; d < a.D; d += kWarp) {
            for (int p = warp; p < pixels; p += kWarps) {
                const int64_t from = token_index(a, tile, p);
                gradient[p * pitch + d] = from < 0 ? from_float<T>(0.0f) : dy[from * a.D + d];
            }
        }
        embed_tile(tokens, s, a, tile, index == static_cast<int>(blockIdx.x));
        // With g = dy weight and t the normalised token: dt = (g - mean(g) - t mean(g t)) /
        // deviation.
        for (int p = threadIdx.x; p < pixels; p += kThreads) {
            const float2 norm = token_statistics(tokens + p * pitch, a.D, a.eps);
            float alone = 0, with_t = 0;
            for (int d = 0; d < a.D; ++d) {
                const float g = to_float(gradient[p * pitch + d]) * a.norm_weight[d];
                alone += g;
                with_t = fmaf(g, (tokens[p * pitch + d] - norm.x) * norm.y, with_t);
            }
            statistics[p] = make_float4(norm.x, norm.y, alone / a.D, with_t / a.D);
        }
        __syncthreads();
        for (int d = lane; d < a.D; d += kWarp) {
            const float weight = a.norm_weight[d];
            float sum[3] = {};
            for (int p = warp; p < pixels; p += kWarps) {
                if (token_index(a, tile, p) < 0) continue;
                const float4 of = statistics[p];
                float& token = tokens[p * pitch + d];
                const float t = (token - of.x) * of.y, g = to_float(gradient[p * pitch + d]);
                token = of.y * (g * weight - of.z - t * of.w);
                sum[0] = fmaf(g, t, sum[0]);
                sum[1] += g;
                sum[2] += token;
            }
            for (int i = 0; i < 3; ++i) sums[(warp * 3 + i) * a.D + d] += sum[i];
        }
        __syncthreads();
        for (int p = threadIdx.x; p < pixels; p += kThreads) {
            const int64_t to = token_index(a, tile, p);
            if (to < 0) continue;
            for (int d = 0; d < a.D; ++d) dt[d * plane + to] = from_float<T>(tokens[p * pitch + d]);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 3 * a.D; i += kThreads) {
        float sum = 0;
        for (int w = 0; w < kWarps; ++w) sum += sums[w * 3 * a.D + i];
        a.sums[i / a.D][static_cast<int64_t>(blockIdx.x) * a.D + i % a.D] = sum;
    }
}

template <class T> int plan_embed(Embed& a, int64_t B, bool backward, const Device& device) {
    const int64_t D = a.D, token = 4 * token_pitch(a.D);
    return make_plan<T>(
        a.plan, a.conv, B, 16 * kEmbedRows, kEmbedPixels, {1, 1, 1, a.conv.out_h, a.conv.out_w},
        false, device, [&](int rows, int columns) {
            const int64_t pixels = rows * columns;
            if (!backward) return pixels * (8 + token);
            return pixels * (16 + token) + 12 * kWarps * D +
                   round_up(pixels * token_pitch(a.D) * static_cast<int64_t>(sizeof(T)), 4);
        });
}

template <class T> int embed_backward(Embed& a, int64_t B, const void* x, void* dx, void* dfilters,
                                      void* dbias, void* dnorm_weight, void* dnorm_bias,
                                      Workspace& workspace, void* stream) {
    Device device;
    EQCVT_TRY(current_device(device));
    const Conv& conv = a.conv;
    const int64_t taps = static_cast<int64_t>(conv.C) * conv.kh * conv.kw;
    const int64_t tokens = static_cast<int64_t>(a.D) * conv.out_h * conv.out_w;
    const int64_t pixels = static_cast<int64_t>(conv.C) * conv.H * conv.W;
    const int64_t slice = slice_size(B, tokens * static_cast<int64_t>(sizeof(T)));
    const int64_t slices = B > slice ? ceil_div(B, slice) : 1;
    EQCVT_TRY(plan_embed<T>(a, slice, true, device));
    Correlation<T> correlation;
    EQCVT_TRY(correlation.plan(conv, slice, a.D, false, device));
    const int64_t blocks = resident_blocks(device, a.plan.tiles, 1);
    float* partials = workspace.take<float>(slices * correlation.blocks * a.D * taps);
    float* sums = workspace.take<float>(3 * slices * blocks * a.D);
    T* dt = workspace.take<T>(slice * tokens);
    if (!workspace.base) return EQCVT_OK;

    const T* dy = static_cast<const T*>(a.dy);
    a.out = dt;
    for (int64_t i = 0; i < slices; ++i) {
        const int64_t first = i * slice, count = B - first < slice ? B - first : slice;
        a.conv.x = static_cast<const T*>(x) + first * pixels;
        a.dy = dy + first * tokens;
        a.plan.tiles = static_cast<int>(count * a.plan.down * a.plan.across);
        for (int j = 0; j < 3; ++j) a.sums[j] = sums + (j * slices + i) * blocks * a.D;
        EQCVT_TRY(
            launch(embed_backward_kernel<T>, Grid(blocks), kThreads, a.plan.shared, stream, a));
        EQCVT_TRY(correlation.run(a.conv.x, dt, count,
                                  partials + i * correlation.blocks * a.D * taps, nullptr, stream));
        if (dx) {
            EQCVT_TRY(transposed<T>(conv, dt, a.D, count, static_cast<T*>(dx) + first * pixels,
                                    device, stream));
        }
    }
    EQCVT_TRY(sum_partials(partials, slices * correlation.blocks, a.D * taps,
                           static_cast<float*>(dfilters), stream));
    void* const outs[3] = {dnorm_weight, dnorm_bias, dbias};
    for (int i = 0; i < 3; ++i) {
        if (!outs[i]) continue;
        EQCVT_TRY(sum_partials(sums + i * slices * blocks * a.D, slices * blocks, a.D,
                               static_cast<float*>(outs[i]), stream));
    }
    return EQCVT_OK;
}

Embed embed_of(const void* x, const void* filters, const void* bias, const void* norm_weight,
               const void* norm_bias, int64_t C, int64_t H, int64_t W, int64_t D, int64_t k,
               int64_t stride, int64_t padding, double eps) {
    Embed a = {};
    a.conv = lift_conv(x, filters, nullptr, C, H, W, k, stride, padding);
    a.bias = static_cast<const float*>(bias);
    a.norm_weight = static_cast<const float*>(norm_weight);
    a.norm_bias = static_cast<const float*>(norm_bias);
    a.D = static_cast<int>(D);
    a.eps = static_cast<float>(eps);
    return a;
}

} // namespace

EQCVT_API int eqcvt_cuda_token_embed_forward(int dtype, const void* x, const void* filters,
                                             const void* bias, const void* norm_weight,
                                             const void* norm_bias, int64_t B, int64_t C, int64_t H,
                                             int64_t W, int64_t D, int64_t k, int64_t stride,
                                             int64_t padding, double eps, void* y, void* workspace,
                                             int64_t* workspace_bytes, void* stream) {
    (void)workspace;
    if (workspace_bytes) {
        *workspace_bytes = 0;
        return EQCVT_OK;
    }
    Embed a =
        embed_of(x, filters, bias, norm_weight, norm_bias, C, H, W, D, k, stride, padding, eps);
    a.out = y;
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        Device device;
        EQCVT_TRY(current_device(device));
        EQCVT_TRY(plan_embed<T>(a, B, false, device));
        return launch(embed_kernel<T>, Grid(resident_blocks(device, a.plan.tiles, 1)), kThreads,
                      a.plan.shared, stream, a);
    });
}

EQCVT_API int eqcvt_cuda_token_embed_backward(int dtype, const void* dy, const void* x,
                                              const void* filters, const void* bias,
                                              const void* norm_weight, const void* norm_bias,
                                              int64_t B, int64_t C, int64_t H, int64_t W, int64_t D,
                                              int64_t k, int64_t stride, int64_t padding,
                                              double eps, void* dx, void* dfilters, void* dbias,
                                              void* dnorm_weight, void* dnorm_bias, void* workspace,
                                              int64_t* workspace_bytes, void* stream) {
    Embed a =
        embed_of(x, filters, bias, norm_weight, norm_bias, C, H, W, D, k, stride, padding, eps);
    a.dy = dy;
    return with_dtype(dtype, [&](auto zero) {
        return with_workspace(workspace, workspace_bytes, [&](Workspace& space) {
            return embed_backward<decltype(zero)>(a, B, x, dx, dfilters, dbias, dnorm_weight,
                                                  dnorm_bias, space, stream);
        });
    });
}
