// Products of small tiles. Every warp owns 16 MT rows of the product; 16-bit types go through the
// matrix unit, float through fused multiply-adds (full float precision, no TF32).
//
//                      right, in shared memory: [N][K] (NK) or [K][N] (KN)
//                     +---------------+
//                     |  all warps    |
//   left   +-------+  +---------------+
//          | warp 0|  | 16 MT x N     |   sums, in registers: float, whatever T is
//          | warp 1|  |               |
//          +-------+  +---------------+
//
// Sums are spread over the lanes as those of mma.m16n8k16 for every T, so what is done with them is
// written once: with g = lane / 4 and t = lane % 4, entry i of v[m][n] is
// row 16 m + g + 8 (i / 2), column 8 n + 2 t + i % 2.
//
// Rows of tiles in shared memory are 16 bytes longer than their content, so that the eight rows of
// a matrix that ldmatrix fetches lie in different banks (for a width that is a power of two).
#pragma once

#include "device.cuh"

namespace {

template <class T> constexpr int kPad = 16 / sizeof(T);

enum Form { NK, KN };

template <int MT, int N> struct Sums {
    float v[MT][N / 8][4];

    __device__ void zero() {
        each([](float& x, int, int) { x = 0; });
    }
    // f(value, row, column) for this lane's entries, of the warp's 16 MT rows.
    template <class Function> __device__ void each(const Function& f) {
        const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
            for (int n = 0; n < N / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    f(v[m][n][i], 16 * m + g + 8 * (i / 2), 8 * n + 2 * t + i % 2);
                }
            }
        }
    }
    // f(first, second, row, column) for pairs of neighbouring columns, of which `column` is even.
    template <class Function> __device__ void each_pair(const Function& f) {
        const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
            for (int n = 0; n < N / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; i += 2) {
                    f(v[m][n][i], v[m][n][i + 1], 16 * m + g + 4 * i, 8 * n + 2 * t);
                }
            }
        }
    }
};

// The left operand of one warp, 16 MT x K: registers.
template <class T, int MT, int K> struct Left {
    static constexpr int kScratch = 0; // values of shared memory that from() needs, for each warp
    uint32_t v[MT][K / 16][4];

    // Of a tile of rows [16 MT][K].
    __device__ void load(const T* tile, int stride) {
        const int lane = threadIdx.x % kWarp;
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
            for (int k = 0; k < K; k += 16) {
                load_matrices<false>(v[m][k / 16],
                                     tile + (16 * m + lane % 16) * stride + k + lane / 16 * 8);
            }
        }
    }
    // Of a tile of columns [K][16 MT].
    __device__ void load_transposed(const T* tile, int stride) {
        const int lane = threadIdx.x % kWarp;
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
            for (int k = 0; k < K; k += 16) {
                load_matrices<true>(v[m][k / 16], tile + (k + lane % 8 + lane / 16 * 8) * stride +
                                                      16 * m + lane / 8 % 2 * 8);
            }
        }
    }
    // Of sums: a lane already holds what it needs.
    __device__ void from(const Sums<MT, K>& sums, T*) {
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
            for (int k = 0; k < K / 16; ++k) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float* pair = &sums.v[m][2 * k + i / 2][i % 2 * 2];
                    v[m][k][i] = pack2<T>(pair[0], pair[1]);
                }
            }
        }
    }
};

// The same for float: a view of shared memory.
template <int MT, int K> struct Left<float, MT, K> {
    static constexpr int kScratch = 16 * MT * (K + kPad<float>);
    const float* tile;
    int row, k; // distance of rows, of entries of a row

    __device__ void load(const float* from, int stride) { tile = from, row = stride, k = 1; }
    __device__ void load_transposed(const float* from, int stride) {
        tile = from, row = 1, k = stride;
    }
    __device__ void from(Sums<MT, K>& sums, float* scratch) {
        constexpr int kStride = K + kPad<float>;
        __syncwarp(); // all lanes are done with what scratch held
        sums.each_pair([&](float x, float y, int r, int c) {
            *reinterpret_cast<float2*>(&scratch[r * kStride + c]) = make_float2(x, y);
        });
        __syncwarp();
        load(scratch, kStride);
    }
};

// Columns [n0, n0 + N) of sums += left right.
template <Form FORM, int N, class T, int MT, int K, int WIDTH>
__device__ inline void multiply(Sums<MT, WIDTH>& sums, const Left<T, MT, K>& left, const T* right,
                                int stride, int n0 = 0) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int k = 0; k < K; k += 16) {
#pragma unroll
        for (int n = 0; n < N; n += 16) {
            uint32_t r[4]; // two blocks of eight columns
            if (FORM == NK) {
                load_matrices<false>(r, right + (n + lane % 8 + lane / 16 * 8) * stride + k +
                                            lane / 8 % 2 * 8);
            } else {
                load_matrices<true>(r, right + (k + lane % 16) * stride + n + lane / 16 * 8);
            }
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                mma<T>(sums.v[m][(n0 + n) / 8], left.v[m][k / 16], {r[0], r[1]});
                mma<T>(sums.v[m][(n0 + n) / 8 + 1], left.v[m][k / 16], {r[2], r[3]});
            }
        }
    }
}

template <Form FORM, int N, int MT, int K, int WIDTH>
__device__ inline void multiply(Sums<MT, WIDTH>& sums, const Left<float, MT, K>& left,
                                const float* right, int stride, int n0 = 0) {
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll 4
    for (int k = 0; k < K; ++k) {
        float a[MT][2];
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            a[m][0] = left.tile[(16 * m + g) * left.row + k * left.k];
            a[m][1] = left.tile[(16 * m + g + 8) * left.row + k * left.k];
        }
#pragma unroll
        for (int n = 0; n < N; n += 8) {
            const int column = n + 2 * t;
            const float b[2] = {
                FORM == NK ? right[column * stride + k] : right[k * stride + column],
                FORM == NK ? right[(column + 1) * stride + k] : right[k * stride + column + 1]};
#pragma unroll
            for (int m = 0; m < MT; ++m) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float& sum = sums.v[m][(n0 + n) / 8][i];
                    sum = fmaf(a[m][i / 2], b[i % 2], sum);
                }
            }
        }
    }
}

// Begins to copy [ROWS][WIDTH] contiguous values to a tile; all threads of the block take part.
template <int ROWS, int WIDTH, int THREADS, class T>
__device__ inline void load_tile(T* tile, const T* from) {
    constexpr int kValues = 16 / sizeof(T), kPieces = WIDTH / kValues, kStep = THREADS / kPieces;
    static_assert(THREADS % kPieces == 0, "a thread copies the same part of each of its rows");
    const int first = threadIdx.x / kPieces;
    tile += first * (WIDTH + kPad<T>)+threadIdx.x % kPieces * kValues;
    from += threadIdx.x * kValues;
#pragma unroll
    for (int r = 0; r < ROWS; r += kStep) {
        if (ROWS % kStep != 0 && first + r >= ROWS) break;
        copy_async(tile + r * (WIDTH + kPad<T>), from + r * WIDTH);
    }
}

// sums += left weights^T for weights [WIDTH][K] in global memory, in parts that fit `buffer`:
// [32][K + pad]. All threads of the block must call it; the buffer may be reused at once after a
// barrier.
template <int K, int THREADS, class T, int MT, int WIDTH> __device__ inline void
multiply_weights(Sums<MT, WIDTH>& sums, const Left<T, MT, K>& left, const T* weights, T* buffer) {
    constexpr int kRows = WIDTH < 32 ? WIDTH : 32;
#pragma unroll
    for (int n0 = 0; n0 < WIDTH; n0 += kRows) {
        __syncthreads();
        load_tile<kRows, K, THREADS>(buffer, weights + n0 * K);
        copies_begun();
        copies_done<0>();
        __syncthreads();
        multiply<NK, kRows>(sums, left, buffer, K + kPad<T>, n0);
    }
}

// Applies dropout to a warp's sums, which are rows [row, ..) and columns [column, ..) of a tensor
// of `channels` columns; column is a multiple of 8. Four neighbouring lanes hold eight neighbours,
// a block, in each of two rows. The first of each two of these lanes makes the block of one row and
// the second that of the other; each then hands the other lanes' words on.
template <int MT, int N> __device__ inline void drop(Sums<MT, N>& sums, const Dropout& dropout,
                                                     int64_t row, int64_t channels, int column) {
    if (dropout.off()) return;
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4, odd = t % 2;
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int n = 0; n < N / 8; ++n) {
            const int64_t first = (row + 16 * m + g) * channels + column + 8 * n;
            float (&v)[4] = sums.v[m][n];
            if (channels % 8 == 0) {
                const uint4 w = dropout.words((first + 8 * odd * channels) >> 3);
                // Lanes 0 and 1 keep the words x and y of the block they made, 2 and 3 z and w.
                const uint32_t even = t < 2 ? w.x : w.z, uneven = t < 2 ? w.y : w.w;
                const uint32_t other = __shfl_xor_sync(~0u, odd ? even : uneven, 1);
                const uint32_t upper = odd ? other : even, lower = odd ? uneven : other;
                v[0] *= dropout.low(upper);
                v[1] *= dropout.high(upper);
                v[2] *= dropout.low(lower);
                v[3] *= dropout.high(lower);
            } else {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    v[i] *= dropout(first + 2 * t + i / 2 * 8 * channels + i % 2);
            }
        }
    }
}

// Writes two neighbours of a row of D values, of which `column` is the first.
template <class T>
__device__ inline void store_pair(T* row, int column, int64_t D, float x, float y) {
    if (D % 2 == 0) { // rows then begin on a multiple of two values
        if (column < D) {
            *reinterpret_cast<Pack<T, 2>*>(row + column) = {{from_float<T>(x), from_float<T>(y)}};
        }
        return;
    }
    if (column < D) row[column] = from_float<T>(x);
    if (column + 1 < D) row[column + 1] = from_float<T>(y);
}

} // namespace
