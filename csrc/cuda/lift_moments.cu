// The steerable block's batch statistics, and what they send back to the image.
//
// A block keeps tiles of u in registers: its mean and squared deviations are exact to fp32 within a
// tile, and tiles are put together by Chan's formula in fp64. With `correlate` the tile goes to
// shared memory as the left side of a second product, over pixels, with the image that is there.
#include "../lift.h"

#include "lift_gradients.cuh"

namespace {

struct Moments {
    Conv conv;
    Plan plan;
    int F, G, fields, pitch; // fields of a block; cells of a row of values
    bool correlate;          // here; else u is written, if not null
    void* u;                 // [B, F G, out_h, out_w]
    double* statistics;      // [blocks][F] of count, mean, squared deviations
    float* partials;         // [blocks][F G][C k k]
    float* ones;             // [blocks][C k k]
};

struct Spread {
    double count, mean, squares;

    __device__ void add(const Spread& other) {
        if (other.count == 0) return;
        const double all = count + other.count, delta = other.mean - mean;
        mean += delta * other.count / all;
        squares += other.squares + delta * delta * count * other.count / all;
        count = all;
    }
};

template <class T> __global__ void __launch_bounds__(kThreads, 2) moments_kernel(Moments a) {
    const Conv& conv = a.conv;
    const Plan& plan = a.plan;
    const int pixel_count = plan.rows * plan.columns;
    const int padded = value_cells<T>(pixel_count) * kValues<T>;
    const Shared<T> s = divide_shared<T>(plan, kFilters);
    Spread* spreads = reinterpret_cast<Spread*>(s.rest);                    // [kFilters]
    float2* scratch = reinterpret_cast<float2*>(spreads + kFilters);        // [kWarps][kFilters]
    float* mean = reinterpret_cast<float*>(scratch + kWarps * kFilters);    // [kFilters]
    Term* pixels = reinterpret_cast<Term*>(mean + kFilters);                // [value_cells]
    T* values = reinterpret_cast<T*>(pixels + value_cells<T>(pixel_count)); // [kFilters][pitch]

    const int first_field = blockIdx.y * a.fields;
    const int fields = min(a.fields, a.F - first_field), rows = fields * a.G;
    float total[3][kTapTiles][4] = {};
    if (threadIdx.x < kFilters) spreads[threadIdx.x] = {0, 0, 0};

    for (int index = static_cast<int>(blockIdx.x); index < plan.tiles; index += gridDim.x) {
        const Tile tile = locate(plan, index);
        float sum[3][kValueTiles][4];
        convolve_tile<T, 3, kValueTiles>(sum, s, conv, plan, tile, first_field * a.G, rows,
                                         index != static_cast<int>(blockIdx.x));
        const unsigned inside = own_inside<kValueTiles>(conv, plan, tile);
        const float count = static_cast<float>(min(plan.rows, conv.out_h - tile.y) *
                                               min(plan.columns, conv.out_w - tile.x));
#pragma unroll
        for (int i = 0; i < 6; ++i) {
            float all = 0;
#pragma unroll
            for (int n = 0; n < 2 * kValueTiles; ++n) {
                if (inside >> n & 1) all += sum[i / 2][n / 2][i % 2 * 2 + n % 2];
            }
            deposit(scratch, own_row(i / 2, i % 2), all, 0);
        }
        __syncthreads();
        if (threadIdx.x < kFilters) mean[threadIdx.x] = collect(scratch, threadIdx.x).x / count;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 6; ++i) {
            const float centre = mean[own_row(i / 2, i % 2)];
            float squares = 0;
#pragma unroll
            for (int n = 0; n < 2 * kValueTiles; ++n) {
                const float d = sum[i / 2][n / 2][i % 2 * 2 + n % 2] - centre;
                if (inside >> n & 1) squares = fmaf(d, d, squares);
            }
            deposit(scratch, own_row(i / 2, i % 2), squares, 0);
        }
        __syncthreads();
        if (threadIdx.x < kFilters) {
            spreads[threadIdx.x].add({count, mean[threadIdx.x], collect(scratch, threadIdx.x).x});
        }
        if (!a.correlate && !a.u) continue;
#pragma unroll
        for (int n = 0; n < kValueTiles; ++n) {
            const int p = own_pixel<kValueTiles>(n);
            if (p >= padded) continue;
#pragma unroll
            for (int i = 0; i < 6; ++i) {
                const float* u = &sum[i / 2][n][i % 2 * 2];
                const int row = own_row(i / 2, i % 2);
                T* to = values + row * a.pitch * kValues<T> + p;
                const bool one = row == rows;
                store_pair(to, inside >> 2 * n & 1 ? one ? 1 : u[0] : 0,
                           inside >> (2 * n + 1) & 1 ? one ? 1 : u[1] : 0);
            }
        }
        if (a.correlate) stage_pixels<T>(pixels, conv, plan, tile);
        __syncthreads();
        if (a.u) {
            T* u = static_cast<T*>(a.u) + (tile.b * a.F + first_field) * a.G *
                                              static_cast<int64_t>(conv.out_h) * conv.out_w;
            move_tile<T, false>(values, a.pitch * kValues<T>, u, rows, conv, plan, tile);
        }
        if (a.correlate) {
            correlate_tile<T>(total, values, a.pitch, s, pixels, conv, plan, conv.C);
        }
    }
    if (a.correlate) {
        const int64_t taps = static_cast<int64_t>(conv.C) * conv.kh * conv.kw;
        write_taps(total, conv, rows, conv.C,
                   a.partials + (blockIdx.x * a.F + first_field) * a.G * taps, taps,
                   blockIdx.y == 0 ? a.ones + blockIdx.x * taps : nullptr);
    }
    __syncthreads();
    for (int f = threadIdx.x; f < fields; f += kThreads) {
        Spread field = {0, 0, 0};
        for (int g = 0; g < a.G; ++g) field.add(spreads[f * a.G + g]);
        double* out = a.statistics + (blockIdx.x * static_cast<int64_t>(a.F) + first_field + f) * 3;
        out[0] = field.count;
        out[1] = field.mean;
        out[2] = field.squares;
    }
}

// One warp a field.
__global__ void moments_finish_kernel(const double* statistics, int64_t blocks, int F, float* mean,
                                      float* variance) {
    const int f = blockIdx.x;
    Spread spread = {0, 0, 0};
    for (int64_t i = threadIdx.x; i < blocks; i += kWarp) {
        const double* s = statistics + (i * F + f) * 3;
        spread.add({s[0], s[1], s[2]});
    }
    for (int step = kWarp / 2; step > 0; step /= 2) {
        spread.add({__shfl_down_sync(~0u, spread.count, step),
                    __shfl_down_sync(~0u, spread.mean, step),
                    __shfl_down_sync(~0u, spread.squares, step)});
    }
    if (threadIdx.x == 0) {
        // An empty batch has no mean: 0 / 0.
        mean[f] = static_cast<float>(spread.count > 0 ? spread.mean : 0 / spread.count);
        variance[f] = static_cast<float>(spread.squares / spread.count);
    }
}

template <class T> int moments(const Conv& conv, int64_t B, int F, int G, bool correlate,
                               void* mean, void* variance, void* ux, void* ones_x,
                               Workspace& workspace, void* stream) {
    Device device;
    EQCVT_TRY(current_device(device));
    const int64_t taps = static_cast<int64_t>(conv.C) * conv.kh * conv.kw;
    const int64_t image = static_cast<int64_t>(F) * G * conv.out_h * conv.out_w;
    Moments a = {};
    a.conv = conv;
    a.F = F;
    a.G = G;
    const int64_t groups = ceil_div(F, (kFilters - 1) / G);
    a.fields = static_cast<int>(ceil_div(F, groups));
    const auto plan = [&](bool all_channels) {
        return make_plan<T>(a.plan, conv, B, kFilters, kValuePixels,
                            {1, 1, 1, conv.out_h, conv.out_w}, all_channels, device,
                            [&](int rows, int columns) -> int64_t {
                                const int cells = value_cells<T>(rows * columns);
                                return (sizeof(Spread) + 8 * kWarps + 4) * kFilters + 8 * cells +
                                       4 * kFilters * conflict_free(cells);
                            });
    };
    a.correlate = correlate && taps <= kTaps && plan(true) == EQCVT_OK;
    if (!a.correlate) EQCVT_TRY(plan(false));
    a.pitch = conflict_free(value_cells<T>(a.plan.rows * a.plan.columns));

    // Where the taps are too many for a block, u is written for a kernel of their own.
    const bool apart = correlate && !a.correlate;
    const int64_t slice = apart ? slice_size(B, image * static_cast<int64_t>(sizeof(T))) : B;
    const int64_t slices = B > slice ? ceil_div(B, slice) : 1;
    Correlation<T> correlation;
    if (apart) EQCVT_TRY(correlation.plan(conv, slice, F * G, true, device));
    int64_t blocks = resident_blocks(device, slice * a.plan.down * a.plan.across, groups);
    if (blocks == 0) blocks = 1;
    const int64_t sums = correlate ? slices * (apart ? correlation.blocks : blocks) : 0;
    double* statistics = workspace.take<double>(slices * blocks * F * 3);
    float* partials = workspace.take<float>(sums * F * G * taps);
    float* ones = workspace.take<float>(sums * taps);
    T* u = workspace.take<T>(apart ? slice * image : 0);
    if (!workspace.base) return EQCVT_OK;

    for (int64_t i = 0; i < slices; ++i) {
        const int64_t first = i * slice, count = B - first < slice ? B - first : slice;
        const T* x = static_cast<const T*>(conv.x) + first * conv.C * conv.H * conv.W;
        a.conv.x = x;
        a.plan.tiles = static_cast<int>(count * a.plan.down * a.plan.across);
        a.statistics = statistics + i * blocks * F * 3;
        a.u = apart ? u : nullptr;
        a.partials = partials;
        a.ones = ones;
        const Grid grid(blocks, static_cast<unsigned>(groups));
        EQCVT_TRY(launch(moments_kernel<T>, grid, kThreads, a.plan.shared, stream, a));
        if (apart) {
            EQCVT_TRY(correlation.run(x, u, count, partials + i * correlation.blocks * F * G * taps,
                                      ones + i * correlation.blocks * taps, stream));
        }
    }
    EQCVT_TRY(launch(moments_finish_kernel, Grid(F), kWarp, 0, stream, statistics, slices * blocks,
                     F, static_cast<float*>(mean), static_cast<float*>(variance)));
    if (!correlate) return EQCVT_OK;
    EQCVT_TRY(sum_partials(partials, sums, F * G * taps, static_cast<float*>(ux), stream));
    return sum_partials(ones, sums, taps, static_cast<float*>(ones_x), stream);
}

} // namespace

EQCVT_API int eqcvt_cuda_lift_moments(int dtype, const void* x, const void* bank, const void* mask,
                                      int64_t B, int64_t C, int64_t H, int64_t W, int64_t F,
                                      int64_t G, int64_t k, int64_t stride, int64_t padding,
                                      int correlate, void* mean, void* variance, void* ux,
                                      void* ones_x, void* workspace, int64_t* workspace_bytes,
                                      void* stream) {
    if (G > kFilters - 1) return EQCVT_BAD_SIZE;
    const Conv conv = lift_conv(x, bank, mask, C, H, W, k, stride, padding);
    return with_dtype(dtype, [&](auto zero) {
        return with_workspace(workspace, workspace_bytes, [&](Workspace& space) {
            return moments<decltype(zero)>(conv, B, static_cast<int>(F), static_cast<int>(G),
                                           correlate != 0, mean, variance, ux, ones_x, space,
                                           stream);
        });
    });
}

// The gradient of c1 u + c2 u^2 / 2 with respect to u, written out, goes back through the
// convolution.
EQCVT_API int eqcvt_cuda_lift_moments_input(int dtype, const void* x, const void* bank,
                                            const void* mask, const void* c1, const void* c2,
                                            int64_t B, int64_t C, int64_t H, int64_t W, int64_t F,
                                            int64_t G, int64_t k, int64_t stride, int64_t padding,
                                            void* dx, void* workspace, int64_t* workspace_bytes,
                                            void* stream) {
    Convolve a = {};
    a.conv = lift_conv(x, bank, mask, C, H, W, k, stride, padding);
    a.c1 = static_cast<const float*>(c1);
    a.c2 = static_cast<const float*>(c2);
    a.rows = static_cast<int>(F * G);
    a.group = static_cast<int>(G);
    a.H = a.conv.out_h;
    a.W = a.conv.out_w;
    a.step = 1;
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        return with_workspace(workspace, workspace_bytes, [&](Workspace& space) -> int {
            const int64_t image = F * G * a.H * a.W;
            const int64_t slice = slice_size(B, image * static_cast<int64_t>(sizeof(T)));
            a.out = space.take<T>(slice * image);
            if (!space.base) return EQCVT_OK;
            Device device;
            EQCVT_TRY(current_device(device));
            const Conv forward = a.conv;
            for (int64_t first = 0; first < B; first += slice) {
                const int64_t count = B - first < slice ? B - first : slice;
                a.conv.x = static_cast<const T*>(x) + first * C * H * W;
                EQCVT_TRY(convolve<T>(a, count, device, stream));
                EQCVT_TRY(transposed<T>(forward, a.out, a.rows, count,
                                        static_cast<T*>(dx) + first * C * H * W, device, stream));
            }
            return EQCVT_OK;
        });
    });
}
