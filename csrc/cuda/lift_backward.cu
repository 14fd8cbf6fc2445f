// The steerable block, backward: nothing is kept from the forward pass but arg.
//
// A block owns every so many-th tile of u's pixels. It routes dy to the winners, blurs that
// backwards in shared memory, makes u again in registers and turns it into its gradient:
//
//     dy, arg + halo -> routed -> blur across, down -> dw     image -> u
//     du = scale dw [scale u + shift > 0],  dscale += dw [..] u,  dshift += dw [..]
//
// du goes back to shared memory as the left side of a product over the tile's pixels with the image
// that is still there: dbank. It is written to memory only where the image's gradient is wanted or
// the taps are too many for a block.
#include "../lift.h"

#include "lift_blur.cuh"
#include "lift_gradients.cuh"

namespace {

struct Backward {
    Conv conv;
    Plan plan;
    const void* dy;     // [B, F, height, width], without pool [B, F G, height, width]
    const uint8_t* arg; // or null
    const float *scale, *shift, *blur;
    int F, G, fields; // of a block
    int kb, step, height, width;
    int pitch, plane;                       // values of a row of routed gradients; of a filter
    bool correlate;                         // here
    void* du;                               // [B, F G, out_h, out_w] or null
    float* partials;                        // [blocks][F G][C k k]
    float *scale_partials, *shift_partials; // [blocks][F]
};

// dy where u wins, with zeros where the blur's step left pixels out, and a halo above and to the
// left of the tile.
template <class T>
__device__ void route(T* planes, const Backward& a, const Tile& tile, int first_field, int fields) {
    const int rows = a.plan.rows + a.kb - 1, columns = a.plan.columns + a.kb - 1;
    const int each = rows * columns, copies = a.arg ? a.G : 1;
    const int64_t channel = a.arg ? tile.b * a.F + first_field : (tile.b * a.F + first_field) * a.G;
    const T zero = from_float<T>(0.0f);
    for (int i = threadIdx.x; i < each * (a.arg ? fields : fields * a.G); i += kThreads) {
        const int c = i / each, row = i % each / columns, column = i % columns;
        const int y = tile.y - (a.kb - 1) + row, x = tile.x - (a.kb - 1) + column;
        T value = zero;
        int winner = 0;
        if (y >= 0 && x >= 0 && y % a.step == 0 && x % a.step == 0 && y / a.step < a.height &&
            x / a.step < a.width) {
            const int64_t from = ((channel + c) * a.height + y / a.step) * a.width + x / a.step;
            value = static_cast<const T*>(a.dy)[from];
            if (a.arg) winner = a.arg[from];
        }
        T* to = planes + c * copies * a.plane + row * a.pitch + column;
        for (int g = 0; g < copies; ++g) to[g * a.plane] = g == winner ? value : zero;
    }
}

template <class T, int KB> __global__ void __launch_bounds__(kThreads, 2)
    backward_kernel(Backward a) {
    const Conv& conv = a.conv;
    const Plan& plan = a.plan;
    const int pixel_count = plan.rows * plan.columns;
    const int padded = value_cells<T>(pixel_count) * kValues<T>;
    const Shared<T> s = divide_shared<T>(plan, kFilters);
    float2* scratch = reinterpret_cast<float2*>(s.rest);                    // [kWarps][kFilters]
    float2* affine = scratch + kWarps * kFilters;                           // [kFilters]
    float2* totals = affine + kFilters;                                     // [kFilters]
    float* line = reinterpret_cast<float*>(totals + kFilters);              // [kb]
    Term* pixels = reinterpret_cast<Term*>(line + round_up(a.kb, 4));       // [value_cells]
    T* planes = reinterpret_cast<T*>(pixels + value_cells<T>(pixel_count)); // [kFilters][plane]

    const int first_field = blockIdx.y * a.fields;
    const int fields = min(a.fields, a.F - first_field), rows = fields * a.G;
    for (int r = threadIdx.x; r < kFilters; r += kThreads) {
        const int f = first_field + r / a.G;
        affine[r] = r < rows ? make_float2(a.scale[f], a.shift[f]) : make_float2(0, 0);
        totals[r] = make_float2(0, 0);
    }
    // Backwards, the line is walked from its end.
    for (int t = threadIdx.x; t < a.kb; t += kThreads) {
        line[t] = a.blur ? a.blur[a.kb - 1 - t] : 1.0f;
    }
    float total[3][kTapTiles][4] = {};

    for (int index = static_cast<int>(blockIdx.x); index < plan.tiles; index += gridDim.x) {
        const Tile tile = locate(plan, index);
        __syncthreads();
        route(planes, a, tile, first_field, fields);
        if (a.blur) {
            __syncthreads();
            blur_rows<T, KB>(planes, rows, a.plane, a.pitch, plan.columns, plan.rows + a.kb - 1,
                             line, a.kb, 1);
            __syncthreads();
            blur_columns<T, KB>(planes, rows, a.plane, a.pitch, plan.columns, plan.rows, line, a.kb,
                                1);
        }
        float sum[3][kValueTiles][4];
        convolve_tile<T, 3, kValueTiles>(sum, s, conv, plan, tile, first_field * a.G, rows,
                                         index != static_cast<int>(blockIdx.x));
        const unsigned inside = own_inside<kValueTiles>(conv, plan, tile);
#pragma unroll
        for (int i = 0; i < 6; ++i) {
            const int row = own_row(i / 2, i % 2);
            const float2 f = affine[row];
            float with_u = 0, alone = 0;
#pragma unroll
            for (int n = 0; n < kValueTiles; ++n) {
                const int p = own_pixel<kValueTiles>(n);
                const int y = p / plan.columns, x = p % plan.columns;
                const float2 dw = row < rows && y < plan.rows
                                      ? load_pair(planes + row * a.plane + y * a.pitch + x)
                                      : make_float2(0, 0);
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& u = sum[i / 2][n][i % 2 * 2 + e];
                    // Where scale u + shift is NaN the gradient passes.
                    const bool off = fmaf(f.x, u, f.y) <= 0;
                    const float d = off ? 0 : e ? dw.y : dw.x;
                    if (inside >> (2 * n + e) & 1) {
                        with_u = fmaf(d, u, with_u);
                        alone += d;
                        u = f.x * d;
                    } else {
                        u = 0;
                    }
                }
            }
            deposit(scratch, row, with_u, alone);
        }
        __syncthreads();
        if (threadIdx.x < kFilters) {
            const float2 all = collect(scratch, threadIdx.x);
            totals[threadIdx.x].x += all.x;
            totals[threadIdx.x].y += all.y;
        }
        // Behind the barrier nobody reads dw any more.
#pragma unroll
        for (int n = 0; n < kValueTiles; ++n) {
            const int p = own_pixel<kValueTiles>(n);
            if (p >= padded) continue;
#pragma unroll
            for (int i = 0; i < 6; ++i) {
                const float* du = &sum[i / 2][n][i % 2 * 2];
                store_pair(planes + own_row(i / 2, i % 2) * a.plane + p, du[0], du[1]);
            }
        }
        if (a.correlate) stage_pixels<T>(pixels, conv, plan, tile);
        __syncthreads();
        if (a.du) {
            T* du = static_cast<T*>(a.du) + (tile.b * a.F + first_field) * a.G *
                                                static_cast<int64_t>(conv.out_h) * conv.out_w;
            move_tile<T, false>(planes, a.plane, du, rows, conv, plan, tile);
        }
        if (a.correlate) {
            correlate_tile<T>(total, planes, a.plane / kValues<T>, s, pixels, conv, plan, conv.C);
        }
    }
    if (a.correlate) {
        const int64_t taps = static_cast<int64_t>(conv.C) * conv.kh * conv.kw;
        write_taps(total, conv, rows, conv.C,
                   a.partials + (blockIdx.x * a.F + first_field) * a.G * taps, taps, nullptr);
    }
    __syncthreads();
    for (int f = threadIdx.x; f < fields; f += kThreads) {
        float2 field = make_float2(0, 0);
        for (int g = 0; g < a.G; ++g) {
            field.x += totals[f * a.G + g].x;
            field.y += totals[f * a.G + g].y;
        }
        const int64_t to = blockIdx.x * static_cast<int64_t>(a.F) + first_field + f;
        a.scale_partials[to] = field.x;
        a.shift_partials[to] = field.y;
    }
}

template <class T> int backward(Backward& a, int64_t B, const void* x, void* dbank, void* dscale,
                                void* dshift, void* dx, Workspace& workspace, void* stream) {
    Device device;
    EQCVT_TRY(current_device(device));
    const Conv& conv = a.conv;
    const int64_t taps = static_cast<int64_t>(conv.C) * conv.kh * conv.kw;
    const int rows = a.F * a.G;
    const int64_t image = static_cast<int64_t>(rows) * conv.out_h * conv.out_w;
    const int64_t groups = ceil_div(a.F, kFilters / a.G);
    a.fields = static_cast<int>(ceil_div(a.F, groups));
    // Of a filter: routed gradients with their halo, or the left side of the product.
    const auto plane = [&](int tile_rows, int columns) {
        const int routed = (tile_rows + a.kb - 1) * blur_pitch(columns + a.kb - 1);
        const int cells = static_cast<int>(ceil_div(routed, kValues<T>));
        const int product = value_cells<T>(tile_rows * columns);
        return kValues<T> * conflict_free(cells > product ? cells : product);
    };
    const auto plan = [&](bool all_channels) {
        return make_plan<T>(
            a.plan, conv, B, kFilters, kValuePixels, {1, 1, kBlurRows, conv.out_h, conv.out_w},
            all_channels, device, [&](int tile_rows, int columns) -> int64_t {
                return 8 * (kWarps + 2) * kFilters + 4 * round_up(a.kb, 4) +
                       8 * value_cells<T>(tile_rows * columns) +
                       static_cast<int64_t>(sizeof(T)) * kFilters * plane(tile_rows, columns);
            });
    };
    a.correlate = taps <= kTaps && plan(true) == EQCVT_OK;
    if (!a.correlate) EQCVT_TRY(plan(false));
    a.pitch = blur_pitch(a.plan.columns + a.kb - 1);
    a.plane = plane(a.plan.rows, a.plan.columns);

    const bool written = dx || !a.correlate;
    const int64_t slice = written ? slice_size(B, image * static_cast<int64_t>(sizeof(T))) : B;
    const int64_t slices = B > slice ? ceil_div(B, slice) : 1;
    Correlation<T> correlation;
    if (!a.correlate) EQCVT_TRY(correlation.plan(conv, slice, rows, false, device));
    int64_t blocks = resident_blocks(device, slice * a.plan.down * a.plan.across, groups);
    if (blocks == 0) blocks = 1;
    const int64_t each = a.correlate ? blocks : correlation.blocks;
    float* partials = workspace.take<float>(slices * each * rows * taps);
    float* scale_partials = workspace.take<float>(slices * blocks * a.F);
    float* shift_partials = workspace.take<float>(slices * blocks * a.F);
    T* du = workspace.take<T>(written ? slice * image : 0);
    if (!workspace.base) return EQCVT_OK;

    const T* dy = static_cast<const T*>(a.dy);
    const uint8_t* arg = a.arg;
    const int64_t result = static_cast<int64_t>(arg ? a.F : rows) * a.height * a.width;
    const int64_t pixels = static_cast<int64_t>(conv.C) * conv.H * conv.W;
    a.du = written ? du : nullptr;
    for (int64_t i = 0; i < slices; ++i) {
        const int64_t first = i * slice, count = B - first < slice ? B - first : slice;
        a.conv.x = static_cast<const T*>(x) + first * pixels;
        a.dy = dy + first * result;
        a.arg = arg ? arg + first * result : nullptr;
        a.plan.tiles = static_cast<int>(count * a.plan.down * a.plan.across);
        a.partials = partials + i * each * rows * taps;
        a.scale_partials = scale_partials + i * blocks * a.F;
        a.shift_partials = shift_partials + i * blocks * a.F;
        const Grid grid(blocks, static_cast<unsigned>(groups));
        const auto kernel = a.kb == 5 ? backward_kernel<T, 5> : backward_kernel<T, 0>;
        EQCVT_TRY(launch(kernel, grid, kThreads, a.plan.shared, stream, a));
        if (!a.correlate) {
            EQCVT_TRY(correlation.run(a.conv.x, du, count, a.partials, nullptr, stream));
        }
        if (dx) {
            EQCVT_TRY(transposed<T>(conv, du, rows, count, static_cast<T*>(dx) + first * pixels,
                                    device, stream));
        }
    }
    EQCVT_TRY(
        sum_partials(partials, slices * each, rows * taps, static_cast<float*>(dbank), stream));
    EQCVT_TRY(
        sum_partials(scale_partials, slices * blocks, a.F, static_cast<float*>(dscale), stream));
    return sum_partials(shift_partials, slices * blocks, a.F, static_cast<float*>(dshift), stream);
}

} // namespace

EQCVT_API int eqcvt_cuda_lift_apply_backward(
    int dtype, const void* dy, const void* arg, const void* x, const void* bank, const void* mask,
    const void* scale, const void* shift, const void* blur, int64_t B, int64_t C, int64_t H,
    int64_t W, int64_t F, int64_t G, int64_t k, int64_t kb, int64_t stride, int64_t padding,
    int64_t blur_stride, int pool, int input_gradient, void* dbank, void* dscale, void* dshift,
    void* dx, void* workspace, int64_t* workspace_bytes, void* stream) {
    if (G > kFilters) return EQCVT_BAD_SIZE;
    Backward a = {};
    a.conv = lift_conv(x, bank, mask, C, H, W, k, stride, padding);
    a.dy = dy;
    a.arg = pool ? static_cast<const uint8_t*>(arg) : nullptr;
    a.scale = static_cast<const float*>(scale);
    a.shift = static_cast<const float*>(shift);
    a.blur = static_cast<const float*>(blur);
    a.F = static_cast<int>(F);
    a.G = static_cast<int>(G);
    a.kb = blur ? static_cast<int>(kb) : 1;
    a.step = blur ? static_cast<int>(blur_stride) : 1;
    a.height = (a.conv.out_h - a.kb) / a.step + 1;
    a.width = (a.conv.out_w - a.kb) / a.step + 1;
    return with_dtype(dtype, [&](auto zero) {
        return with_workspace(workspace, workspace_bytes, [&](Workspace& space) {
            return backward<decltype(zero)>(a, B, x, dbank, dscale, dshift,
                                            input_gradient ? dx : nullptr, space, stream);
        });
    });
}
