// Convolutions as matrix products over tiles of an image in shared memory.
//
//     u[r, p] = sum over taps (c, i, j) of w[r, (c, i, j)] x[c, p stride + (i, j) - padding]
//
// A block of eight warps owns one tile of output pixels p and up to 48 filters r. Nothing is
// unfolded: a lane fetches an operand at (offset of its pixel) + (offset of its tap) in the tile.
// The gradient of the filters is the same product with pixels and taps in each other's place.
//
//       filters x taps          taps x pixels
//     [ weights, rows    ]   [ gathered from the ]      sums in registers, fp32:
//     [ of `pitch` cells ] x [ image, one cell   ]  ->  row 16 m + g (+ 8), pixel 8 n + 2 t (+ 1)
//                            [ a step of k       ]      with g = lane / 4, t = lane % 4
//
// A cell is what a lane fetches at a time: one float, or two 16-bit values, the pixel and its right
// neighbour, as the matrix unit wants pairs. Rows of an odd number of taps end in half a cell; what
// is fetched beyond is masked out, since even a zero weight would let a NaN through.
#pragma once

#include <stdlib.h>

#include "device.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kFilters = 48; // of a block, at most
constexpr int kStep = 8;     // cells that a step of the matrix unit contracts over

template <class T> struct CellOf {
    using type = uint32_t;
};
template <> struct CellOf<float> {
    using type = float;
};
template <class T> using Cell = typename CellOf<T>::type;
template <class T> constexpr int kValues = 4 / sizeof(T); // in a cell
template <class T> constexpr int kGathered = sizeof(T) == 2 ? 1 : 2;

// A cell of values. It is put together in a register: a memcpy to shared memory, whose alignment
// the compiler may not see, stores bytes, and of those ptxas (12.8 and 13.0, sm_80 and sm_90) gets
// one wrong. For the low byte of a value that was just converted to 16 bits it stores the value's
// whole part (F2I.U8.F16).
template <class T> __device__ inline Cell<T> cell_of(const Pack<T, kValues<T>>& values) {
    Cell<T> cell;
    memcpy(&cell, &values, sizeof cell);
    return cell;
}

// The e-th column (of eight) whose operands this lane gathers.
template <class T> __device__ inline int gathered(int e) {
    const int lane = threadIdx.x % kWarp;
    return sizeof(T) == 2 ? lane / 4 : lane % 4 * 2 + e;
}

// Where a term of the contraction lies relative to a column, and which bits of the cell count.
struct Term {
    int offset;
    uint32_t mask;
};

template <class T> __device__ inline void store_pair(T* to, float a, float b) {
    *reinterpret_cast<Pack<T, 2>*>(to) = {{from_float<T>(a), from_float<T>(b)}};
}
template <class T> __device__ inline float2 load_pair(const T* from) {
    const Pack<T, 2> pair = *reinterpret_cast<const Pack<T, 2>*>(from);
    return make_float2(to_float(pair.value[0]), to_float(pair.value[1]));
}

// Columns that start 8 rows apart in shared memory fall on different banks.
__host__ __device__ constexpr int conflict_free(int cells) {
    return static_cast<int>(round_up(cells, 8)) + 4;
}

// A convolution of a stack of images.
struct Conv {
    const void* x;     // [B, C, H, W]
    const float* mask; // [H, W], multiplied onto x, or null
    const float* bank; // filter r, channel c, tap (i, j): r row + c channel + i line + j column
    int64_t row, channel;
    int line, column;
    int C, H, W, kh, kw, stride, top, left; // zeros before the image, negative where it is cropped
    int out_h, out_w;

    template <class T> __host__ __device__ int cells() const { // of a channel
        return kh * static_cast<int>(ceil_div(kw, kValues<T>));
    }
};

// How it is cut into tiles.
struct Plan {
    int rows, columns;  // output pixels of a tile; columns is even
    int step_y, step_x; // from one tile to the next
    int down, across;   // tiles of an image
    int tiles;          // of all images
    int height, width;  // of the image under a tile
    int channels;       // in shared memory at a time
    int pitch;          // cells of a row of weights
    int64_t shared;     // bytes of shared memory
};

struct Tile {
    int64_t b;
    int y, x; // of its first output pixel
};

__device__ inline Tile locate(const Plan& plan, int index) {
    const int each = plan.down * plan.across, i = index % each;
    return {index / each, i / plan.across * plan.step_y, i % plan.across * plan.step_x};
}

// What convolve_tile and correlate_tile keep in shared memory.
template <class T> struct Shared {
    Cell<T>* image;   // [channels][height][width]
    Cell<T>* weights; // [16 MT][pitch]
    Term* terms;      // [pitch]
    unsigned char* rest;
};

__host__ __device__ inline int64_t image_bytes(const Plan& plan) {
    return round_up(int64_t{4} * plan.channels * plan.height * plan.width, 16);
}

template <class T> __device__ inline Shared<T> divide_shared(const Plan& plan, int filters) {
    Shared<T> s;
    unsigned char* memory = shared_memory();
    s.image = reinterpret_cast<Cell<T>*>(memory);
    memory += image_bytes(plan);
    s.weights = reinterpret_cast<Cell<T>*>(memory);
    memory += 4 * filters * plan.pitch;
    s.terms = reinterpret_cast<Term*>(memory);
    s.rest = memory + sizeof(Term) * plan.pitch;
    return s;
}

template <class T> __device__ inline T pixel(const Conv& conv, const T* plane, int y, int x) {
    if (y < 0 || y >= conv.H || x < 0 || x >= conv.W) return from_float<T>(0.0f);
    const T value = plane[y * conv.W + x];
    return conv.mask ? from_float<T>(to_float(value) * conv.mask[y * conv.W + x]) : value;
}

// The channels [first, first + count) of the image under a tile.
template <class T> __device__ void stage_image(Cell<T>* image, const Conv& conv, const Plan& plan,
                                               const Tile& tile, int first, int count) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int top = tile.y * conv.stride - conv.top, left = tile.x * conv.stride - conv.left;
    const T* x = static_cast<const T*>(conv.x) + (tile.b * conv.C + first) * conv.H * conv.W;
    for (int line = warp; line < count * plan.height; line += kWarps) {
        const T* plane = x + static_cast<int64_t>(line / plan.height) * conv.H * conv.W;
        const int y = top + line % plan.height;
        for (int i = lane; i < plan.width; i += kWarp) {
            Pack<T, kValues<T>> values;
            for (int v = 0; v < kValues<T>; ++v) {
                values.value[v] = pixel(conv, plane, y, left + i + v);
            }
            image[line * plan.width + i] = cell_of(values);
        }
    }
}

// The same channels of `rows` filters from the first_row-th on (zeros after them, up to `filters`)
// and where their taps lie in the image.
template <class T> __device__ void stage_weights(const Shared<T>& s, const Conv& conv,
                                                 const Plan& plan, int first, int count,
                                                 int first_row, int rows, int filters) {
    const int used = count * conv.cells<T>();
    const int cells = static_cast<int>(round_up(used, kStep));
    const int across = static_cast<int>(ceil_div(conv.kw, kValues<T>));
    constexpr int strands = 4; // threads that share a column of weights
    for (int task = threadIdx.x; task < strands * cells; task += kThreads) {
        const int k = task % cells;
        const int c = k / conv.cells<T>(), i = k / across % conv.kh, j = k % across * kValues<T>;
        const bool half = j + kValues<T> > conv.kw;
        if (task < cells) {
            s.terms[k] = k < used
                             ? Term{(c * plan.height + i) * plan.width + j, half ? 0xffffu : ~0u}
                             : Term{0, 0};
        }
        const float* tap = conv.bank + (first + c) * conv.channel + i * conv.line + j * conv.column;
        for (int r = task / cells; r < filters; r += strands) {
            Pack<T, kValues<T>> values;
            for (int v = 0; v < kValues<T>; ++v) {
                const bool there = r < rows && k < used && j + v < conv.kw;
                values.value[v] =
                    from_float<T>(there ? tap[(first_row + r) * conv.row + v * conv.column] : 0.0f);
            }
            s.weights[r * plan.pitch + k] = cell_of(values);
        }
    }
}

// sum += left x right over `steps` steps of kStep cells. `left` are rows of `pitch` cells; column n
// of `right` is gathered at image + at[n] + terms. `columns` of the NT tiles of eight are wanted.
// NEIGHBOURS: the two values of a cell are next to each other in the image, not `apart`.
template <class T, bool NEIGHBOURS, int MT, int NT> struct Multiply {
    static __device__ inline void run(float (&sum)[MT][NT][4], const uint32_t* left, int pitch,
                                      const uint32_t* image, const Term* terms, int steps,
                                      const int (&at)[NT], int apart, int columns) {
        const int lane = threadIdx.x % kWarp;
        left += lane % 16 * pitch + lane / 16 * 4;
        terms += lane % 4;
        const auto cell = [&](int offset) {
            if (NEIGHBOURS) return image[offset];
            return (image[offset] & 0xffffu) | image[offset + apart] << 16;
        };
#pragma unroll 1
        for (int s = 0; s < steps; ++s, left += kStep, terms += kStep) {
            uint32_t a[MT][4];
#pragma unroll
            for (int m = 0; m < MT; ++m) load_matrices<false>(a[m], left + m * 16 * pitch);
            const Term low = terms[0], high = terms[4];
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                if (n >= columns) break;
                const uint32_t b[2] = {cell(at[n] + low.offset) & low.mask,
                                       cell(at[n] + high.offset) & high.mask};
#pragma unroll
                for (int m = 0; m < MT; ++m) mma<T>(sum[m][n], a[m], b);
            }
        }
    }
};

template <bool NEIGHBOURS, int MT, int NT> struct Multiply<float, NEIGHBOURS, MT, NT> {
    static __device__ inline void run(float (&sum)[MT][NT][4], const float* left, int pitch,
                                      const float* image, const Term* terms, int steps,
                                      const int (&at)[2 * NT], int, int columns) {
        left += threadIdx.x % kWarp / 4 * pitch;
#pragma unroll 1
        for (int k = 0; k < steps * kStep; ++k, ++left) {
            const Term term = terms[k];
            if (term.mask == 0) continue;
            float a[MT][2];
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                a[m][0] = left[m * 16 * pitch];
                a[m][1] = left[(m * 16 + 8) * pitch];
            }
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                if (n >= columns) break;
                const float b[2] = {image[at[2 * n] + term.offset],
                                    image[at[2 * n + 1] + term.offset]};
#pragma unroll
                for (int i = 0; i < 4 * MT; ++i) {
                    sum[i / 4][n][i % 4] =
                        fmaf(a[i / 4][i % 4 / 2], b[i % 2], sum[i / 4][n][i % 4]);
                }
            }
        }
    }
};

// Which pixels of a tile this thread's sums belong to: pixel(n) and the one after it.
template <int NT> __device__ inline int own_pixel(int n) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    return (warp * NT + n) * 8 + lane % 4 * 2;
}
// Which row its sums [m][n][2 half] and [2 half + 1] belong to.
__device__ inline int own_row(int m, int half) {
    return m * 16 + half * 8 + threadIdx.x % kWarp / 4;
}

// Which of them are inside the output: bit 2 n for pixel(n), 2 n + 1 for the one after it.
template <int NT>
__device__ inline unsigned own_inside(const Conv& conv, const Plan& plan, const Tile& tile) {
    unsigned inside = 0;
    for (int n = 0; n < NT; ++n) {
        const int p = own_pixel<NT>(n), y = p / plan.columns, x = tile.x + p % plan.columns;
        if (y >= plan.rows || tile.y + y >= conv.out_h) continue;
        inside |= (x < conv.out_w ? 1u : 0u) << 2 * n | (x + 1 < conv.out_w ? 2u : 0u) << 2 * n;
    }
    return inside;
}

// Where the pixels lie in the image of whose products this lane gathers operands.
template <class T, int NT> __device__ inline void
pixel_offsets(int (&at)[NT * kGathered<T>], const Conv& conv, const Plan& plan) {
    for (int i = 0; i < NT * kGathered<T>; ++i) {
        const int n = i / kGathered<T>, e = i % kGathered<T>;
        const int p = (threadIdx.x / kWarp * NT + n) * 8 + gathered<T>(e);
        const int y = p / plan.columns, x = p % plan.columns;
        at[i] = y < plan.rows ? (y * plan.width + x) * conv.stride : 0;
    }
}

// The convolution of one tile with `rows` filters from first_row on. `staged`: whether the weights
// are those that the last call left behind. Begins with a barrier.
template <class T, int MT, int NT>
__device__ void convolve_tile(float (&sum)[MT][NT][4], const Shared<T>& s, const Conv& conv,
                              const Plan& plan, const Tile& tile, int first_row, int rows,
                              bool staged) {
    int at[NT * kGathered<T>];
    pixel_offsets<T, NT>(at, conv, plan);
#pragma unroll
    for (int i = 0; i < MT * NT * 4; ++i) sum[i / 4 / NT][i / 4 % NT][i % 4] = 0;
    for (int first = 0; first < conv.C; first += plan.channels) {
        const int count = min(plan.channels, conv.C - first);
        __syncthreads();
        stage_image<T>(s.image, conv, plan, tile, first, count);
        if (!staged || plan.channels < conv.C) {
            stage_weights<T>(s, conv, plan, first, count, first_row, rows, 16 * MT);
        }
        __syncthreads();
        Multiply<T, true, MT, NT>::run(sum, s.weights, plan.pitch, s.image, s.terms,
                                       static_cast<int>(ceil_div(count * conv.cells<T>(), kStep)),
                                       at, 1, NT);
    }
}

// Gradients of filters: rows of `values` (at the pixels of a tile) times the image.

constexpr int kTapTiles = 3; // tiles of eight taps of a warp
constexpr int kTaps = kTapTiles * kWarps * 8;

// Values of a row, with the pixels of a tile padded to what the contraction takes at a time.
template <class T> __host__ __device__ constexpr int value_cells(int pixels) {
    return static_cast<int>(round_up(ceil_div(pixels, kValues<T>), kStep));
}

// The pixels of a tile as terms; those outside the output count for nothing.
template <class T>
__device__ void stage_pixels(Term* terms, const Conv& conv, const Plan& plan, const Tile& tile) {
    const int pixels = plan.rows * plan.columns;
    for (int k = threadIdx.x; k < value_cells<T>(pixels); k += kThreads) {
        const int y = k * kValues<T> / plan.columns, x = k * kValues<T> % plan.columns;
        const bool inside = y < plan.rows && tile.y + y < conv.out_h && tile.x + x < conv.out_w;
        const bool whole = kValues<T> == 1 || tile.x + x + 1 < conv.out_w;
        terms[k] =
            inside ? Term{(y * plan.width + x) * conv.stride, whole ? ~0u : 0xffffu} : Term{0, 0};
    }
}

// Where the taps of `count` channels lie; tile i of this warp is the (i kWarps + warp)-th.
template <class T> __device__ inline void
tap_offsets(int (&at)[kTapTiles * kGathered<T>], const Conv& conv, const Plan& plan, int count) {
    for (int i = 0; i < kTapTiles * kGathered<T>; ++i) {
        const int tile = i / kGathered<T> * kWarps + threadIdx.x / kWarp;
        const int tap = tile * 8 + gathered<T>(i % kGathered<T>);
        const int c = tap / (conv.kh * conv.kw), row = tap / conv.kw % conv.kh;
        at[i] = c < count ? (c * plan.height + row) * plan.width + tap % conv.kw : 0;
    }
}

// sum[row, tap] += the tile's share, from values [48][pitch cells] and staged pixels and image.
template <class T>
__device__ inline void correlate_tile(float (&sum)[3][kTapTiles][4], const T* values, int pitch,
                                      const Shared<T>& s, const Term* pixels, const Conv& conv,
                                      const Plan& plan, int count) {
    int at[kTapTiles * kGathered<T>];
    tap_offsets<T>(at, conv, plan, count);
    const int tiles = static_cast<int>(ceil_div(count * conv.kh * conv.kw, 8));
    const int own =
        static_cast<int>(ceil_div(tiles - static_cast<int>(threadIdx.x / kWarp), kWarps));
    const Cell<T>* left = reinterpret_cast<const Cell<T>*>(values);
    const int steps = value_cells<T>(plan.rows * plan.columns) / kStep;
    if (conv.stride == 1) {
        Multiply<T, true, 3, kTapTiles>::run(sum, left, pitch, s.image, pixels, steps, at, 1, own);
    } else {
        Multiply<T, false, 3, kTapTiles>::run(sum, left, pitch, s.image, pixels, steps, at,
                                              conv.stride, own);
    }
}

// Writes the sums of `rows` rows and `count` channels: out[row stride + tap]; the row after the
// last goes to `last`, if that is not null.
__device__ inline void write_taps(const float (&sum)[3][kTapTiles][4], const Conv& conv, int rows,
                                  int count, float* out, int64_t stride, float* last) {
    for (int i = 0; i < 3 * kTapTiles * 4; ++i) {
        const int m = i / 4 / kTapTiles, n = i / 4 % kTapTiles;
        const int row = own_row(m, i % 4 / 2);
        const int tap = (n * kWarps + threadIdx.x / kWarp) * 8 + threadIdx.x % 4 * 2 + i % 2;
        if (tap >= count * conv.kh * conv.kw) continue;
        const float value = sum[m][n][i % 4];
        if (row < rows) out[row * stride + tap] = value;
        if (row == rows && last) last[tap] = value;
    }
}

// Tiles between shared memory (rows of `pitch` values) and tensors [row][out_h][out_w].

template <class T, bool LOAD> __device__ void move_tile(T* tile_values, int pitch, T* tensor,
                                                        int rows, const Conv& conv,
                                                        const Plan& plan, const Tile& tile) {
    const int64_t plane = static_cast<int64_t>(conv.out_h) * conv.out_w;
    const int padded = value_cells<T>(plan.rows * plan.columns) * kValues<T>;
    for (int p = threadIdx.x; p < padded; p += kThreads) {
        const int y = p / plan.columns, x = p % plan.columns;
        const bool inside = y < plan.rows && tile.y + y < conv.out_h && tile.x + x < conv.out_w;
        T* there = tensor + static_cast<int64_t>(tile.y + y) * conv.out_w + tile.x + x;
        for (int row = 0; row < (LOAD ? kFilters : rows); ++row) {
            T& here = tile_values[row * pitch + p];
            if (LOAD)
                here = inside && row < rows ? there[row * plane] : from_float<T>(0.0f);
            else if (inside)
                there[row * plane] = here;
        }
    }
}

// Sums over the pixels of a tile: deposit() those of this thread's pixels for each of its rows,
// then a barrier, then collect() gives thread r < kFilters the totals of row r. `scratch` is
// [kWarps][kFilters].
__device__ inline void deposit(float2* scratch, int row, float x, float y) {
    x = warp_sum<4>(x);
    y = warp_sum<4>(y);
    if (threadIdx.x % 4 == 0) scratch[threadIdx.x / kWarp * kFilters + row] = make_float2(x, y);
}
__device__ inline float2 collect(const float2* scratch, int row) {
    float2 total = make_float2(0, 0);
    for (int warp = 0; warp < kWarps; ++warp) {
        total.x += scratch[warp * kFilters + row].x;
        total.y += scratch[warp * kFilters + row].y;
    }
    return total;
}

// The host's side.

// Blocks that share `tiles` and stay on the device to the end: two to a multiprocessor.
inline int64_t resident_blocks(const Device& device, int64_t tiles, int64_t others) {
    const int64_t fit = 2 * device.multiprocessors / others;
    return tiles < fit ? tiles : fit < 1 ? 1 : fit;
}

// The block's convolution with all F G filters, mask and all.
inline Conv lift_conv(const void* x, const void* bank, const void* mask, int64_t C, int64_t H,
                      int64_t W, int64_t k, int64_t stride, int64_t padding) {
    Conv conv = {};
    conv.x = x;
    conv.mask = static_cast<const float*>(mask);
    conv.bank = static_cast<const float*>(bank);
    conv.row = C * k * k;
    conv.channel = k * k;
    conv.line = conv.kh = conv.kw = static_cast<int>(k);
    conv.column = 1;
    conv.C = static_cast<int>(C);
    conv.H = static_cast<int>(H);
    conv.W = static_cast<int>(W);
    conv.stride = static_cast<int>(stride);
    conv.top = conv.left = static_cast<int>(padding);
    conv.out_h = static_cast<int>((H + 2 * padding - k) / stride + 1);
    conv.out_w = static_cast<int>((W + 2 * padding - k) / stride + 1);
    return conv;
}

// Runs f with the launcher's workspace, or with one that only counts if its size is asked for.
template <class Function> int with_workspace(void* workspace, int64_t* bytes, const Function& f) {
    Workspace space(bytes ? nullptr : workspace);
    const int status = f(space);
    if (bytes) *bytes = space.used;
    return status;
}

// What becomes of the convolution's pixels: a window of `size` of them, `stride` apart, makes one
// of height x width results; a tile has a multiple of `unit` rows of results.
struct Window {
    int size, stride, unit, height, width;
};

// The cheapest plan with tiles of at most `most` pixels whose data fit into shared memory: into
// half of a multiprocessor's, so that one block computes while another waits, or into all of it if
// that is worth it. extra(rows, columns) is what the kernel needs beside the image, `filters` rows
// of weights and the terms. all_channels: the image of all channels has to be there at a time.
template <class T, class Extra> int make_plan(Plan& plan, const Conv& conv, int64_t B, int filters,
                                              int most, const Window& window, bool all_channels,
                                              const Device& device, const Extra& extra) {
    if (conv.C < 1 || int64_t{conv.C} * conv.H * conv.W > INT32_MAX) return EQCVT_BAD_SIZE;
    const int cells = conv.cells<T>();
    int64_t best = INT64_MAX;
    for (int blocks = 2; blocks >= 1; --blocks) {
        const int64_t budget = (device.shared + 1024) / blocks - 1024;
        for (int w = 2; w < window.width + 2; w += 2) {
            Plan p = {};
            p.columns = static_cast<int>(round_up((w - 1) * window.stride + window.size, 2));
            if (p.columns * window.size > most) break;
            int h = (most / p.columns - window.size) / window.stride + 1;
            if (h > window.height) h = window.height + window.unit - 1;
            for (h = h / window.unit * window.unit; h > 0; h -= window.unit) {
                p.rows = (h - 1) * window.stride + window.size;
                p.height = (p.rows - 1) * conv.stride + conv.kh;
                p.width = (p.columns - 1) * conv.stride + conv.kw;
                // A row of weights is padded by up to 12 cells.
                const int64_t fixed = 16 + 12 * (4 * filters + 8) + extra(p.rows, p.columns);
                const int64_t channel = int64_t{4} * p.height * p.width + cells * (4 * filters + 8);
                // Where the stride is larger than the filter, some pixels are none of any tap.
                const int64_t fit = budget < fixed ? 0
                                    : channel == 0 ? conv.C
                                                   : (budget - fixed) / channel;
                p.channels = static_cast<int>(fit < conv.C ? fit : conv.C);
                if (p.channels >= (all_channels ? conv.C : 1)) break;
            }
            if (h <= 0) continue;
            p.step_y = h * window.stride;
            p.step_x = w * window.stride;
            p.down = static_cast<int>(ceil_div(window.height, h));
            p.across = static_cast<int>(ceil_div(window.width, w));
            // About the instructions of a tile: what follows the products, then for each channel
            // the products, the image, and the weights unless they stay. A block alone takes
            // longer.
            const int64_t channel = cells * most / 5 + p.height * p.width / 2 +
                                    (p.channels < conv.C ? filters * cells / 2 : 0);
            const int64_t cost = (int64_t{kFilters} * most + conv.C * channel) * p.down * p.across *
                                 (blocks == 1 ? 3 : 2);
            if (cost >= best) continue;
            best = cost;
            const int64_t tiles = B * p.down * p.across;
            if (tiles > INT32_MAX / 2) return EQCVT_BAD_SIZE;
            p.tiles = static_cast<int>(tiles);
            p.pitch = conflict_free(p.channels * cells);
            p.shared = image_bytes(p) + p.pitch * (4 * filters + static_cast<int>(sizeof(Term))) +
                       extra(p.rows, p.columns);
            plan = p;
        }
    }
    return best == INT64_MAX ? EQCVT_BAD_SIZE : EQCVT_OK;
}

} // namespace
