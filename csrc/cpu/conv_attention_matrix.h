// The products between a tile of queries and the keys on the matrix unit, from bfloat16. What each
// function has to do is said in conv_attention_products.h, where vectors do it.
//
// What was just stored is slow to load as a tile, and the unit takes a third of a microsecond to
// wake up when it has been idle for longer. So blocks are short, and what a block adds to the sums
// is left until the scores of the next one are made.
#pragma once

#include "conv_attention_tile.h"
#include "matrix_unit.h"

#if defined(EQCVT_MATRIX_UNIT)
namespace {

struct MatrixProducts {
    static constexpr int V = kVectors<float>, W = width<float>, kAtOnce = 2;
    static constexpr int64_t L = kLanes<float>, kBlock = kTileDepth;
    const Sizes<float>& z;
    const int64_t depth, padded; // channels in whole tiles, keys in whole blocks
    bf16 *keys, *values;         // [key][channel]
    bf16* turned;                // [block][channel][key of the block], of one of them
    float* rows;                 // a block of them as numbers
    int64_t block = 0, left = 0; // the first key, and the keys, of what is left to be added

    static bf16* take(Pieces<float>& pieces, int64_t count) {
        return reinterpret_cast<bf16*>(pieces.take(round_up(count, 2) / 2));
    }
    MatrixProducts(Pieces<float>& pieces, const Sizes<float>& z_, bool both)
        : z(z_), depth(round_up(z.D, kTileDepth)), padded(round_up(z.M, kBlock)),
          keys(take(pieces, padded * depth)), values(both ? take(pieces, padded * depth) : keys),
          turned(take(pieces, padded * z.stride)), rows(pieces.take(kBlock * z.stride)) {}
    template <int G> static EQCVT_INLINE void exp2(vec<float> (&x)[G]) { rough_exp2(x); }
    // Normalised rows and their transpose, either of which may be null.
    void load_side(bf16* to, bf16* transpose, const bf16* from, const float* scale,
                   const float* shift) const {
        const vec<float> none = {};
        for (int64_t j0 = 0; j0 < padded; j0 += kBlock) {
            const int64_t count = z.M - j0 < kBlock ? z.M - j0 : kBlock;
            load_affine(rows, from + j0 * z.D, count, kBlock, z.D, z.stride, scale, shift);
            for (int64_t j = 0; to && j < kBlock; ++j)
                for (int64_t d = 0; d < depth; d += W)
                    store_numbers(to + (j0 + j) * depth + d,
                                  d < z.stride ? load(rows + j * z.stride + d) : none);
            for (int64_t d = 0; transpose && d < z.stride; ++d)
                for (int64_t j = 0; j < kBlock; ++j)
                    from_number(transpose + j0 * z.stride + d * kBlock + j, rows[j * z.stride + d]);
        }
    }
    // Lanes in pairs of channels.
    void pack_lanes(bf16* to, const float* lanes) const {
        const vec<float> none = {};
        for (int64_t d = 0; d < depth; d += 2)
            for (int v = 0; v < V; ++v) {
                const float* at = lanes + d * L + v * W;
                store_pairs(to + d * L + v * 2 * W, d < z.rows ? load(at) : none,
                            d < z.rows ? load(at + L) : none);
            }
    }
    // to [key][query] = `count` rows of a times packed lanes.
    void multiply(float* to, const bf16* a, const bf16* lanes, int64_t count) const {
        for (int64_t j = 0; j < count; j += kTileRows)
            multiply_tiles<V>(a + j * depth, depth, lanes, 2 * L, depth, to + j * L, L, false);
    }
    // to [channel][query] += the transposed keys or values left times [key][query] in pairs.
    void add_turned(float* to, bf16* pairs) const {
        for (int64_t i = round_up(left, 2) * L; i < kBlock * L; ++i) pairs[i].bits = 0;
        for (int64_t d = 0; d < z.stride; d += kTileRows)
            multiply_tiles<V>(turned + block * z.stride + d * kBlock, kBlock, pairs, 2 * L, kBlock,
                              to + d * L, L, true);
    }
};

struct MatrixForward : MatrixProducts {
    // To scale all sums is dear, and weights of 256 are as exact as those of 1.
    static constexpr float slack = 8;
    bf16 *q, *p; // in pairs
    float *s, *o = nullptr;
    vec<float> scale[V] = {};

    MatrixForward(Pieces<float>& pieces, const Sizes<float>& z_, bool)
        : MatrixProducts(pieces, z_, false), q(take(pieces, depth * L)),
          p(take(pieces, kBlock * L)), s(pieces.take(kBlock * L)) {}
    void load_image(const bf16* b, const bf16* c, const float* scales, const float* shifts) const {
        load_side(keys, c ? nullptr : turned, b, scales + z.D, shifts + z.D);
        if (c) load_side(nullptr, turned, c, scales + 2 * z.D, shifts + 2 * z.D);
    }
    void begin(const float* queries, float* sums) {
        pack_lanes(q, queries);
        o = sums;
    }
    template <class Seen> EQCVT_INLINE void scores(int64_t j0, int64_t count, const Seen& seen) {
        multiply(s, keys + j0 * depth, q, count);
        end();
        for (int64_t j = 0; j < count; ++j)
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) seen(v, load(s + j * L + v * W));
    }
    template <int K> EQCVT_INLINE void put(int64_t j, const vec<float> (&x)[K * V]) const {
        const vec<float> none = {};
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v)
            store_pairs(p + j * L + v * 2 * W, x[v], K == 2 ? x[(K - 1) * V + v] : none);
    }
    void add(const vec<float> (&scale_)[V], int64_t j0, int64_t count) {
        for (int v = 0; v < V; ++v) scale[v] = scale_[v];
        block = j0, left = count;
    }
    void end() {
        if (left == 0) return;
        bool other = false;
        for (int v = 0; v < V; ++v)
            for (int i = 0; i < W; ++i) other |= scale[v][i] != 1;
        for (int64_t r = 0; other && r < z.rows; ++r)
            for (int v = 0; v < V; ++v) {
                float* entry = o + r * L + v * W;
                store<float>(entry, load(entry) * scale[v]);
            }
        add_turned(o, p);
        left = 0;
    }
};

struct MatrixBackward : MatrixProducts {
    static constexpr int64_t kQueries = round_up(L, kTileDepth);
    bf16 *q, *dout;  // in pairs
    bf16* weights;   // [key of the block][weights of all queries, gradients of their scores]
    bf16* sources;   // what those are multiplied by, in pairs: rows of do_h, then of q_h
    bf16* gradients; // of scores, in pairs
    float *p, *ds;
    Head<float> head{};

    MatrixBackward(Pieces<float>& pieces, const Sizes<float>& z_, bool separate)
        : MatrixProducts(pieces, z_, separate), q(take(pieces, depth * L)),
          dout(take(pieces, depth * L)), weights(take(pieces, kBlock * 2 * kQueries)),
          sources(take(pieces, 2 * kQueries * z.stride)), gradients(take(pieces, kBlock * L)),
          p(pieces.take(kBlock * L)), ds(pieces.take(kBlock * L)) {
        if (weights) memset(weights, 0, kBlock * 2 * kQueries * sizeof *weights);
    }
    void load_image(const bf16* b, const bf16* c, const float* scales, const float* shifts) const {
        load_side(keys, turned, b, scales + z.D, shifts + z.D);
        if (c) load_side(values, nullptr, c, scales + 2 * z.D, shifts + 2 * z.D);
    }
    void begin(const Head<float>& head_) {
        head = head_;
        pack_lanes(q, head.q);
        pack_lanes(dout, head.dout);
        pack_rows(sources, head.do_rows);
        pack_rows(sources + kQueries * z.stride, head.q_rows);
    }
    // Rows in pairs of queries.
    void pack_rows(bf16* to, const float* from) const {
        const vec<float> none = {};
        for (int64_t i = 0; i < kQueries; i += 2)
            for (int64_t d = 0; d < z.stride; d += W) {
                const float* at = from + i * z.stride + d;
                store_pairs(to + i * z.stride + 2 * d, i < head.count ? load(at) : none,
                            i + 1 < head.count ? load(at + z.stride) : none);
            }
    }
    void scores(int64_t j0, int64_t count) {
        multiply(p, keys + j0 * depth, q, count);
        multiply(ds, values + j0 * depth, dout, count);
        end();
    }
    template <int K> EQCVT_INLINE void put(int64_t j, const vec<float> (&weight)[K * V],
                                           const vec<float> (&gradient)[K * V]) const {
        const vec<float> none = {};
        bf16 *const row = weights + j * 2 * kQueries, *const pairs = gradients + j * L;
#pragma GCC unroll 8
        for (int v = 0; v + 1 < V; v += 2) {
            bf16s g[2] = {rounded(none, none), rounded(none, none)};
#pragma GCC unroll 2
            for (int k = 0; k < K; ++k) {
                bf16* to = row + k * 2 * kQueries + v * W;
                const int i = k * V + v;
                g[k] = rounded(gradient[i], gradient[i + 1]);
                store(to, rounded(weight[i], weight[i + 1]));
                store(to + kQueries, g[k]);
            }
            store(pairs + v * 2 * W, paired<0>(g[0], g[1]));
            store(pairs + (v + 1) * 2 * W, paired<W>(g[0], g[1]));
        }
        if (V % 2 == 0) return;
        constexpr int v = V - 1;
#pragma GCC unroll 2
        for (int k = 0; k < K; ++k) {
            bf16* to = row + k * 2 * kQueries + v * W;
            store_numbers(to, weight[k * V + v]);
            store_numbers(to + kQueries, gradient[k * V + v]);
        }
        store_pairs(pairs + v * 2 * W, gradient[v], K == 2 ? gradient[(K - 1) * V + v] : none);
    }
    void add(int64_t j0, int64_t count) { block = j0, left = count; }
    void end() {
        if (left == 0) return;
        add_turned(head.dq, gradients);
        if (head.count < L) // lanes without a query may hold NaN
            for (int64_t j = 0; j < 2 * left; ++j)
                for (int64_t i = head.count; i < L; ++i) weights[j * kQueries + i].bits = 0;
        float *dkeys = head.dkeys + block * z.stride, *dvalues = head.dvalues + block * z.stride;
        const bf16* queries = sources + kQueries * z.stride;
        if (values == keys) {
            add_rows(dkeys, weights, sources, 2 * kQueries);
        } else {
            add_rows(dvalues, weights, sources, kQueries);
            add_rows(dkeys, weights + kQueries, queries, kQueries);
        }
        left = 0;
    }
    // to [key][channel] += `count` columns of a, of the keys left, times as many rows in pairs.
    void add_rows(float* to, const bf16* a, const bf16* pairs, int64_t count) const {
        const auto add = [&](auto tiles, int64_t j, int64_t d) {
            multiply_tiles<decltype(tiles)::value>(a + j * 2 * kQueries, 2 * kQueries,
                                                   pairs + 2 * d, 2 * z.stride, count,
                                                   to + j * z.stride + d, z.stride, true);
        };
        for (int64_t j = 0; j < left; j += kTileRows) {
            int64_t d = 0;
            for (; d + kTileColumns < z.stride; d += 2 * kTileColumns) add(count_of<2>(), j, d);
            if (d < z.stride) add(count_of<1>(), j, d);
        }
    }
};

} // namespace
#endif
