// The two halves of a convolution's backward, from gradients of its output in memory:
// transposed() gives those of the image, Correlation those of the filters.
#pragma once

#include "lift_conv.cuh"

namespace {

// A convolution written out, with an affine map per group of rows and a mask on the result.
struct Convolve {
    Conv conv;
    Plan plan;
    const float *c1, *c2; // of each `group` rows: c1 + c2 u; null: u
    const float* mask;    // [H, W] or null
    void* out;            // [B, rows, H, W]
    int rows, group, pitch;
    int H, W, step, first_y, first_x; // pixel (y, x) goes to (first_y + step y, first_x + step x)
};

// Eight-pixel tiles of a warp: as many as there are registers for.
template <int MT> constexpr int kConvolveTiles = MT == 1 ? 8 : 7;

template <class T, int MT> __global__ void __launch_bounds__(kThreads, 2)
    convolve_kernel(Convolve a) {
    constexpr int NT = kConvolveTiles<MT>;
    const Plan& plan = a.plan;
    const Shared<T> s = divide_shared<T>(plan, 16 * MT);
    T* values = reinterpret_cast<T*>(s.rest); // [16 MT][pitch]
    const int first = blockIdx.y * 16 * MT, rows = min(16 * MT, a.rows - first);
    const int pixels = plan.rows * plan.columns;

    for (int index = static_cast<int>(blockIdx.x); index < plan.tiles; index += gridDim.x) {
        const Tile tile = locate(plan, index);
        float sum[MT][NT][4];
        convolve_tile<T, MT, NT>(sum, s, a.conv, plan, tile, first, rows,
                                 index != static_cast<int>(blockIdx.x));
#pragma unroll
        for (int i = 0; i < 2 * MT; ++i) {
            const int row = own_row(i / 2, i % 2);
            if (row >= rows) continue;
            const float c1 = a.c1 ? a.c1[(first + row) / a.group] : 0.0f;
            const float c2 = a.c1 ? a.c2[(first + row) / a.group] : 1.0f;
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                const int p = own_pixel<NT>(n);
                if (p >= pixels) continue;
                const float* u = &sum[i / 2][n][i % 2 * 2];
                if (a.c1) {
                    store_pair(values + row * a.pitch + p, fmaf(c2, u[0], c1), fmaf(c2, u[1], c1));
                } else {
                    store_pair(values + row * a.pitch + p, u[0], u[1]);
                }
            }
        }
        __syncthreads();
        const int64_t plane = static_cast<int64_t>(a.H) * a.W;
        T* out = static_cast<T*>(a.out) + (tile.b * a.rows + first) * plane;
        for (int p = threadIdx.x; p < pixels; p += kThreads) {
            const int y = tile.y + p / plan.columns, x = tile.x + p % plan.columns;
            if (y >= a.conv.out_h || x >= a.conv.out_w) continue;
            const int to = (a.first_y + a.step * y) * a.W + a.first_x + a.step * x;
            for (int row = 0; row < rows; ++row) {
                const T value = values[row * a.pitch + p];
                out[row * plane + to] =
                    a.mask ? from_float<T>(to_float(value) * a.mask[to]) : value;
            }
        }
    }
}

template <class T, int MT>
int convolve_with(Convolve& a, int64_t B, const Device& device, void* stream) {
    const auto pitch = [](int rows, int columns) {
        return kValues<T> * conflict_free(static_cast<int>(ceil_div(rows * columns, kValues<T>)));
    };
    EQCVT_TRY(make_plan<T>(
        a.plan, a.conv, B, 16 * MT, kConvolveTiles<MT> * kWarps * 8,
        {1, 1, 1, a.conv.out_h, a.conv.out_w}, false, device, [&](int rows, int columns) {
            return int64_t{16} * MT * pitch(rows, columns) * static_cast<int64_t>(sizeof(T));
        }));
    a.pitch = pitch(a.plan.rows, a.plan.columns);
    const int64_t groups = ceil_div(a.rows, 16 * MT);
    const Grid grid(resident_blocks(device, a.plan.tiles, groups), static_cast<unsigned>(groups));
    return launch(convolve_kernel<T, MT>, grid, kThreads, a.plan.shared, stream, a);
}

template <class T> int convolve(Convolve& a, int64_t B, const Device& device, void* stream) {
    return a.rows <= 16 ? convolve_with<T, 1>(a, B, device, stream)
                        : convolve_with<T, 3>(a, B, device, stream);
}

// dx[B, C, H, W] = mask times what `forward`, a convolution to `rows` channels, makes of its
// output's gradient du. A stride s cuts the image into s^2 lattices: the pixels q = o + s i of one
// have every s-th tap in common, and du reaches them by an ordinary convolution with these.
template <class T> int transposed(const Conv& forward, const void* du, int rows, int64_t B,
                                  void* dx, const Device& device, void* stream) {
    const int s = forward.stride, H = forward.H, W = forward.W;
    for (int lattice = 0; lattice < s * s; ++lattice) {
        const int oy = lattice / s, ox = lattice % s;
        if (oy >= H || ox >= W) continue;
        const int tap_y = (oy + forward.top) % s, tap_x = (ox + forward.left) % s;
        Convolve a = {};
        a.conv.x = du;
        a.conv.C = rows;
        a.conv.H = forward.out_h;
        a.conv.W = forward.out_w;
        a.conv.out_h = static_cast<int>(ceil_div(H - oy, s));
        a.conv.out_w = static_cast<int>(ceil_div(W - ox, s));
        a.conv.stride = 1;
        a.conv.kh = tap_y < forward.kh ? static_cast<int>(ceil_div(forward.kh - tap_y, s)) : 0;
        a.conv.kw = tap_x < forward.kw ? static_cast<int>(ceil_div(forward.kw - tap_x, s)) : 0;
        // Tap m of the lattice, counted from the end, is tap_y + s (kh - 1 - m) of the filter.
        a.conv.top = a.conv.kh - 1 - (oy + forward.top - tap_y) / s;
        a.conv.left = a.conv.kw - 1 - (ox + forward.left - tap_x) / s;
        a.conv.bank = forward.bank + (tap_y + s * (a.conv.kh - 1)) * forward.line +
                      (tap_x + s * (a.conv.kw - 1)) * forward.column;
        a.conv.line = -s * forward.line;
        a.conv.column = -s * forward.column;
        a.conv.row = forward.channel;
        a.conv.channel = forward.row;
        if (a.conv.kh == 0 || a.conv.kw == 0) a.conv.kh = a.conv.kw = 0;
        a.mask = forward.mask;
        a.out = dx;
        a.rows = forward.C;
        a.group = 1;
        a.H = H;
        a.W = W;
        a.step = s;
        a.first_y = oy;
        a.first_x = ox;
        EQCVT_TRY(convolve<T>(a, B, device, stream));
    }
    return EQCVT_OK;
}

constexpr int kValueTiles = 4; // of eight pixels, of a warp, where filters' gradients are made
constexpr int kValuePixels = kValueTiles * kWarps * 8;

// Gradients of filters from those of the output: out[row, (c, i, j)] = sum of du[row, p] x at the
// tap. A block owns 48 rows, the taps of a few channels and every so many-th tile; it keeps its
// sums in registers and writes them once, for sum_partials() to add up.
struct Correlate {
    Conv conv;
    Plan plan;       // plan.channels: whose taps a block owns
    const void* du;  // [B, rows, out_h, out_w]
    float* partials; // [blocks][rows][C kh kw]
    float* ones;     // [blocks][C kh kw], of a row of ones; or null
    int rows, each;  // in all, of a block
    int pitch;       // cells of a row of values
};

// 1 at the pixels of a tile, 0 at what pads them.
template <class T>
__device__ inline void mark_pixels(T* row, const Conv& conv, const Plan& plan, const Tile& tile) {
    const int padded = value_cells<T>(plan.rows * plan.columns) * kValues<T>;
    for (int p = threadIdx.x; p < padded; p += kThreads) {
        const int y = p / plan.columns;
        const bool inside =
            y < plan.rows && tile.y + y < conv.out_h && tile.x + p % plan.columns < conv.out_w;
        row[p] = from_float<T>(inside ? 1.0f : 0.0f);
    }
}

template <class T> __global__ void __launch_bounds__(kThreads, 2) correlate_kernel(Correlate a) {
    const Conv& conv = a.conv;
    const Plan& plan = a.plan;
    const Shared<T> s = divide_shared<T>(plan, 0);
    Term* pixels = reinterpret_cast<Term*>(s.rest); // [value_cells]
    T* values = reinterpret_cast<T*>(pixels + value_cells<T>(plan.rows * plan.columns));
    const int first_row = blockIdx.y * a.each, rows = min(a.each, a.rows - first_row);
    const int first = blockIdx.z * plan.channels, count = min(plan.channels, conv.C - first);
    const int64_t plane = static_cast<int64_t>(conv.out_h) * conv.out_w;
    float sum[3][kTapTiles][4] = {};

    for (int index = static_cast<int>(blockIdx.x); index < plan.tiles; index += gridDim.x) {
        const Tile tile = locate(plan, index);
        __syncthreads();
        stage_image<T>(s.image, conv, plan, tile, first, count);
        stage_pixels<T>(pixels, conv, plan, tile);
        T* du = const_cast<T*>(static_cast<const T*>(a.du)) + (tile.b * a.rows + first_row) * plane;
        move_tile<T, true>(values, a.pitch * kValues<T>, du, rows, conv, plan, tile);
        __syncthreads();
        if (a.ones) {
            mark_pixels(values + rows * a.pitch * kValues<T>, conv, plan, tile);
            __syncthreads();
        }
        correlate_tile<T>(sum, values, a.pitch, s, pixels, conv, plan, count);
    }
    const int64_t taps = static_cast<int64_t>(conv.C) * conv.kh * conv.kw;
    const int64_t from = static_cast<int64_t>(first) * conv.kh * conv.kw;
    write_taps(sum, conv, rows, count, a.partials + (blockIdx.x * a.rows + first_row) * taps + from,
               taps, a.ones && blockIdx.y == 0 ? a.ones + blockIdx.x * taps + from : nullptr);
}

// The host's side: plan() once, then run() for each slice of the batch, with `partials` and `ones`
// of `blocks` rows of their own each.
template <class T> struct Correlation {
    Correlate a = {};
    int64_t blocks = 0, tiles = 0;
    unsigned groups = 0, chunks = 0;

    int plan(const Conv& conv, int64_t B, int rows, bool ones, const Device& device) {
        const int channels = kTaps / (conv.kh * conv.kw);
        if (channels == 0) return EQCVT_BAD_SIZE;
        a.conv = conv;
        a.rows = rows;
        groups = static_cast<unsigned>(ceil_div(rows, kFilters - ones));
        a.each = static_cast<int>(ceil_div(rows, groups));
        chunks = static_cast<unsigned>(ceil_div(conv.C, channels));
        Conv part = conv;
        part.C = static_cast<int>(ceil_div(conv.C, chunks));
        EQCVT_TRY(make_plan<T>(a.plan, part, B, 0, kValuePixels, {1, 1, 1, conv.out_h, conv.out_w},
                               true, device, [](int rows, int columns) {
                                   const int cells = value_cells<T>(rows * columns);
                                   return int64_t{8} * cells +
                                          int64_t{4} * kFilters * conflict_free(cells);
                               }));
        a.pitch = conflict_free(value_cells<T>(a.plan.rows * a.plan.columns));
        blocks = resident_blocks(device, a.plan.tiles, groups * chunks);
        if (blocks == 0) blocks = 1; // of an empty batch: writes zeros
        return EQCVT_OK;
    }
    int run(const void* x, const void* du, int64_t B, float* partials, float* ones, void* stream) {
        a.conv.x = x;
        a.du = du;
        a.plan.tiles = static_cast<int>(B * a.plan.down * a.plan.across);
        a.partials = partials;
        a.ones = ones;
        return launch(correlate_kernel<T>, Grid(blocks, groups, chunks), kThreads, a.plan.shared,
                      stream, a);
    }
};

// How many images a slice of the batch has whose gradients, `bytes` of an image, are written out:
// as many as stay in the cache on the way from one kernel to the next.
inline int64_t slice_size(int64_t B, int64_t bytes) {
    const int64_t fit = (int64_t{48} << 20) / bytes;
    return B < 1 ? 1 : B < fit ? B : fit < 1 ? 1 : fit;
}

} // namespace
