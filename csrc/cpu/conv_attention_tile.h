// What the forward and the backward pass of attention share: tiles of queries, keys, weights.
//
// The lanes of vectors are the queries of a tile, so that the softmax over keys needs no sum across
// lanes. "Lanes" below are matrices [channel][query of the tile]; "rows" are [token][channel],
// padded to `stride` channels with zeros. Scores are kept in units of ln 2: the exponential is then
// 2^x.
#pragma once

#include "exp.h"
#include "parallel.h"
#include "philox.h"
#include "pieces.h"
#include "product.h"
#include "rows.h"

namespace {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

inline float logarithm(float x) { return logf(x); }
inline double logarithm(double x) { return log(x); }

template <class S> struct Sizes {
    int64_t B, N, M, D, heads;
    int64_t rows = round_up(D, kRows<S>);            // of a matrix with one row per channel
    int64_t stride = round_up(rows, width<S>);       // of a row of channels
    int64_t keys = round_up(M, 16);                  // in blocks of rows of any kernel
    int64_t tiles = (N + kLanes<S> - 1) / kLanes<S>; // of an image
    int64_t matrix = rows * stride;
    int64_t lanes = stride * kLanes<S>;  // size of a tile with a row per channel
    int64_t tokens = stride * kLanes<S>; // size of a tile with a row per token
};

// The tile of a number, counted through all images.
struct Tile {
    int64_t image, first, count; // of queries
    template <class S> Tile(const Sizes<S>& z, int64_t i)
        : image(i / z.tiles), first(i % z.tiles * kLanes<S>),
          count(z.N - first < kLanes<S> ? z.N - first : kLanes<S>) {}
};

// A head of a tile of `count` queries in the backward pass, and where gradients are summed.
template <class S> struct Head {
    int64_t count;
    const S *q, *dout, *q_rows, *do_rows; // the queries in units of ln 2 only as lanes
    S *dq, *dkeys, *dvalues;              // lanes, and rows of an image's keys
};

// to += A B, with rows of channels in B and `to`.
template <Lies LIES, class S> inline void add_product(const Sizes<S>& z, S* to, int64_t rows,
                                                      const S* a, int64_t a_stride, const S* b,
                                                      int64_t depth) {
    product<LIES>(rows, z.stride, a, a_stride, b, z.stride, depth,
                  [&](int64_t r, int64_t i, vec<S> x) {
                      S* entry = to + r * z.stride + i;
                      store<S>(entry, load(entry) + x);
                  });
}

// rows[i] = from[i] * scale + shift for `count` tokens, then rows of zeros up to `padded`.
template <class T, class S> inline void load_affine(S* rows, const T* from, int64_t count,
                                                    int64_t padded, int64_t D, int64_t stride,
                                                    const S* scale, const S* shift) {
    for (int64_t i = 0; i < count; ++i) {
        S* row = rows + i * stride;
        const T* entry = from + i * D;
        int64_t d = 0;
        for (; d + width<S> <= D; d += width<S>)
            store<S>(row + d, load_numbers(entry + d) * load(scale + d) + load(shift + d));
        for (; d < D; ++d) row[d] = to_number(entry[d]) * scale[d] + shift[d];
        for (; d < stride; ++d) row[d] = 0;
    }
    for (int64_t i = count * stride; i < padded * stride; ++i) rows[i] = 0;
}

// Rows of a tile's tokens to lanes.
template <class S> inline void to_lanes(const Sizes<S>& z, S* lanes, const S* rows) {
    for (int64_t d0 = 0; d0 < z.rows; d0 += kRows<S>)
        for (int64_t i = 0; i < kLanes<S>; ++i)
            for (int d = 0; d < kRows<S>; ++d)
                lanes[(d0 + d) * kLanes<S> + i] = rows[i * z.stride + d0 + d];
}

template <class S> inline void to_rows(const Sizes<S>& z, S* rows, const S* lanes) {
    for (int64_t d0 = 0; d0 < z.rows; d0 += kRows<S>)
        for (int64_t i = 0; i < kLanes<S>; ++i)
            for (int d = 0; d < kRows<S>; ++d)
                rows[i * z.stride + d0 + d] = lanes[(d0 + d) * kLanes<S> + i];
}

// Copies of the last key fill the last block of rows: they leave the largest score as it is.
template <class T, class S>
inline void load_keys(const Sizes<S>& z, S* keys, const T* from, const S* scale, const S* shift) {
    load_affine(keys, from, z.M, z.M, z.D, z.stride, scale, shift);
    for (int64_t j = z.M; j < z.keys; ++j)
        memcpy(keys + j * z.stride, keys + (z.M - 1) * z.stride,
               static_cast<size_t>(z.stride) * sizeof(S));
}

// One padded copy of the weights for all threads; rows and columns beyond D are zeros.
template <class S> struct Weights {
    S *wq, *bq, *wo, *bo;     // [h][d][e], [h][e], [h][d][e], [e]
    S *wq_turned, *wo_turned; // [h][e][d], in the backward pass only

    static int64_t size(const Sizes<S>& z, bool turned) {
        return (turned ? 4 : 2) * z.heads * z.matrix + (z.heads + 1) * z.stride + 8 * 64;
    }
    Weights(const Sizes<S>& z, S* memory, const S* q, const S* q_bias, const S* o, const S* o_bias,
            bool turned) {
        memset(memory, 0, static_cast<size_t>(size(z, turned)) * sizeof(S));
        Pieces<S> pieces{memory};
        wq = pieces.take(z.heads * z.matrix);
        wo = pieces.take(z.heads * z.matrix);
        wq_turned = turned ? pieces.take(z.heads * z.matrix) : nullptr;
        wo_turned = turned ? pieces.take(z.heads * z.matrix) : nullptr;
        bq = pieces.take(z.heads * z.stride);
        bo = pieces.take(z.stride);
        memcpy(bo, o_bias, static_cast<size_t>(z.D) * sizeof(S));
        for (int64_t h = 0; h < z.heads; ++h) {
            memcpy(bq + h * z.stride, q_bias + h * z.D, static_cast<size_t>(z.D) * sizeof(S));
            for (int64_t d = 0; d < z.D; ++d)
                for (int64_t e = 0; e < z.D; ++e) {
                    const int64_t from = (h * z.D + d) * z.D + e, to = h * z.matrix;
                    wq[to + d * z.stride + e] = q[from];
                    wo[to + d * z.stride + e] = o[from];
                    if (!turned) continue;
                    wq_turned[to + e * z.stride + d] = q[from];
                    wo_turned[to + e * z.stride + d] = o[from];
                }
        }
    }
};

// The queries of one head in lanes, in units of ln 2. Both passes make them here, so that they
// compute the same scores to the last bit.
template <class S>
inline void make_queries(const Sizes<S>& z, S* lanes, const S* a_lanes, const S* wq, const S* bq) {
    lane_product<Lies::by_column>(
        z.rows, wq, z.stride, a_lanes, z.D, [&](int64_t r, int v, vec<S> x) {
            store<S>(lanes + r * kLanes<S> + v * width<S>, (x + bq[r]) * static_cast<S>(kLog2E));
        });
}

} // namespace
