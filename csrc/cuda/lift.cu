// The steerable block, forward: convolution, affine, ReLU, blur and maximum over the group.
//
// A block makes a tile of results of one image for up to 48 filters, all in shared memory:
//
//     image + halo -> u (registers) -> relu(scale u + shift) -> blur down, across -> max over g
//
// Limits, beyond which lift's launchers return EQCVT_BAD_SIZE: G <= 47 and k <= 13; an image of
// fewer than 2^31 values; a blur that leaves room for a tile (eqcvt/native/lift.py). Any C, F,
// stride and padding will do.
//
// Only the image is read and only y and arg are written. Of a tile's 448 products per filter those
// in the halo of the blur are thrown away: with a blur of 5 about a third.
#include "../lift.h"

#include "lift_blur.cuh"

namespace {

constexpr int kApplyTiles = 7; // of eight pixels, of a warp
constexpr int kApplyPixels = kApplyTiles * kWarps * 8;

struct Apply {
    Conv conv;
    Plan plan;
    const float *scale, *shift, *blur;
    void* y;
    uint8_t* arg;
    int F, G, fields; // of a block
    int kb, step, height, width, pitch, plane;
    bool pool;
};

// Value i of the tile's results: the largest of the group (NaN if one is; the first of equals).
template <class T> __device__ inline void pool_group(const Apply& a, const T* group, int64_t out) {
    float best = to_float(group[0]);
    int arg = 0;
    for (int g = 1; g < a.G; ++g) {
        const float value = to_float(group[g * a.plane]);
        if (value > best || (value != value && best == best)) {
            best = value;
            arg = g;
        }
    }
    static_cast<T*>(a.y)[out] = from_float<T>(best);
    a.arg[out] = static_cast<uint8_t>(arg);
}

template <class T, int KB> __global__ void __launch_bounds__(kThreads, 2) apply_kernel(Apply a) {
    const Plan& plan = a.plan;
    const Shared<T> s = divide_shared<T>(plan, kFilters);
    float2* affine = reinterpret_cast<float2*>(s.rest); // [kFilters]
    float* line = reinterpret_cast<float*>(affine + kFilters);
    T* planes = reinterpret_cast<T*>(line + round_up(a.kb, 4)); // [rows][plane]

    const int first_field = blockIdx.y * a.fields;
    const int fields = min(a.fields, a.F - first_field), rows = fields * a.G;
    for (int r = threadIdx.x; r < rows; r += kThreads) {
        const int f = first_field + r / a.G;
        affine[r] = make_float2(a.scale[f], a.shift[f]);
    }
    for (int t = threadIdx.x; t < a.kb; t += kThreads) line[t] = a.blur ? a.blur[t] : 1.0f;

    const int down = plan.step_y / a.step, across = plan.step_x / a.step; // results of a tile
    for (int index = static_cast<int>(blockIdx.x); index < plan.tiles; index += gridDim.x) {
        const Tile tile = locate(plan, index);
        float sum[3][kApplyTiles][4];
        convolve_tile<T, 3, kApplyTiles>(sum, s, a.conv, plan, tile, first_field * a.G, rows,
                                         index != static_cast<int>(blockIdx.x));
#pragma unroll
        for (int n = 0; n < kApplyTiles; ++n) {
            const int p = own_pixel<kApplyTiles>(n), y = p / plan.columns, x = p % plan.columns;
            if (y >= plan.rows) continue;
#pragma unroll
            for (int i = 0; i < 6; ++i) {
                const int row = own_row(i / 2, i % 2);
                if (row >= rows) continue;
                const float2 f = affine[row];
                const float* u = &sum[i / 2][n][i % 2 * 2];
                const float left = fmaf(f.x, u[0], f.y), right = fmaf(f.x, u[1], f.y);
                // Written so that NaN stays.
                store_pair(planes + row * a.plane + y * a.pitch + x, left <= 0 ? 0 : left,
                           right <= 0 ? 0 : right);
            }
        }
        __syncthreads();
        if (a.blur) {
            blur_columns<T, KB>(planes, rows, a.plane, a.pitch, plan.columns, down, line, a.kb,
                                a.step);
            __syncthreads();
            blur_rows<T, KB>(planes, rows, a.plane, a.pitch, across, down, line, a.kb, a.step);
            __syncthreads();
        }
        const int each = down * across, top = tile.y / a.step, left = tile.x / a.step;
        for (int i = threadIdx.x; i < each * (a.pool ? fields : rows); i += kThreads) {
            const int c = i / each, y = i % each / across, x = i % across;
            if (top + y >= a.height || left + x >= a.width) continue;
            const int64_t channel =
                a.pool ? tile.b * a.F + first_field + c : (tile.b * a.F + first_field) * a.G + c;
            const int64_t out = (channel * a.height + top + y) * a.width + left + x;
            const T* value = planes + y * a.pitch + x;
            if (a.pool) {
                pool_group(a, value + c * a.G * a.plane, out);
            } else {
                static_cast<T*>(a.y)[out] = value[c * a.plane];
            }
        }
    }
}

} // namespace

EQCVT_API int eqcvt_cuda_lift_apply(int dtype, const void* x, const void* bank, const void* mask,
                                    const void* scale, const void* shift, const void* blur,
                                    int64_t B, int64_t C, int64_t H, int64_t W, int64_t F,
                                    int64_t G, int64_t k, int64_t kb, int64_t stride,
                                    int64_t padding, int64_t blur_stride, int pool, void* y,
                                    void* arg, void* workspace, int64_t* workspace_bytes,
                                    void* stream) {
    (void)workspace;
    if (workspace_bytes) {
        *workspace_bytes = 0;
        return EQCVT_OK;
    }
    if (G > kFilters) return EQCVT_BAD_SIZE;
    Device device;
    EQCVT_TRY(current_device(device));
    Apply a = {};
    a.conv = lift_conv(x, bank, mask, C, H, W, k, stride, padding);
    a.scale = static_cast<const float*>(scale);
    a.shift = static_cast<const float*>(shift);
    a.blur = static_cast<const float*>(blur);
    a.y = y;
    a.arg = static_cast<uint8_t*>(arg);
    a.kb = blur ? static_cast<int>(kb) : 1;
    a.step = blur ? static_cast<int>(blur_stride) : 1;
    a.height = (a.conv.out_h - a.kb) / a.step + 1;
    a.width = (a.conv.out_w - a.kb) / a.step + 1;
    a.F = static_cast<int>(F);
    a.G = static_cast<int>(G);
    a.pool = pool != 0;
    const int64_t groups = ceil_div(F, kFilters / G);
    a.fields = static_cast<int>(ceil_div(F, groups));

    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        const auto plane = [&](int rows, int columns) {
            return kValues<T> * conflict_free(static_cast<int>(
                                    ceil_div(rows * blur_pitch(columns), kValues<T>)));
        };
        EQCVT_TRY(make_plan<T>(
            a.plan, a.conv, B, kFilters, kApplyPixels, {a.kb, a.step, kBlurRows, a.height, a.width},
            false, device, [&](int rows, int columns) -> int64_t {
                return 8 * kFilters + 4 * round_up(a.kb, 4) +
                       a.fields * G * plane(rows, columns) * static_cast<int64_t>(sizeof(T));
            }));
        a.pitch = blur_pitch(a.plan.columns);
        a.plane = plane(a.plan.rows, a.plan.columns);
        const Grid grid(resident_blocks(device, a.plan.tiles, groups),
                        static_cast<unsigned>(groups));
        const auto kernel = a.kb == 5 && a.step == 1 ? apply_kernel<T, 5> : apply_kernel<T, 0>;
        return launch(kernel, grid, kThreads, a.plan.shared, stream, a);
    });
}
