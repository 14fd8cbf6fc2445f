// The products between a tile of queries and the keys, in both passes, by vectors of any precision.
//
// A pass meets the keys of an image in blocks. For each it asks for the scores, which lie as
// [key of the block][query], hands back what becomes of them, and has that added to its sums.
// In conv_attention_matrix.h the matrix unit does the same; products_of says which is taken.
#pragma once

#include "conv_attention_matrix.h"
#include "conv_attention_tile.h"

namespace {

template <class T> struct VectorProducts {
    using S = number_t<T>;
    static constexpr int V = kVectors<S>, W = width<S>;
    static constexpr int kAtOnce = sizeof(vec<S>) == 64 ? 2 : 1; // exponentials in registers
    static constexpr int64_t L = kLanes<S>, kBlock = 64; // keys whose scores fit in the first cache
    const Sizes<S>& z;
    S *keys, *values;

    VectorProducts(Pieces<S>& pieces, const Sizes<S>& z_, bool separate)
        : z(z_), keys(pieces.take(z.keys * z.stride)),
          values(separate ? pieces.take(z.keys * z.stride) : keys) {}
    void load_image(const T* b, const T* c, const S* scale, const S* shift) const {
        load_keys(z, keys, b, scale + z.D, shift + z.D);
        if (c) load_keys(z, values, c, scale + 2 * z.D, shift + 2 * z.D);
    }
    template <int G> static EQCVT_INLINE void exp2(vec<S> (&x)[G]) { vector_exp2<S>(x); }
    // to [key][query] = `count` rows of a times lanes; calls seen(v, x) with each vector.
    template <class Seen> EQCVT_INLINE void multiply(S* to, const S* a, const S* lanes,
                                                     int64_t count, const Seen& seen) const {
        lane_product<Lies::by_row>(round_up(count, kRows<S>), a, z.stride, lanes, z.D,
                                   [&](int64_t r, int v, vec<S> x) {
                                       store<S>(to + r * L + v * W, x);
                                       seen(v, x);
                                   });
    }
};

template <class T> struct VectorForward : VectorProducts<T> {
    using Base = VectorProducts<T>;
    using S = number_t<T>;
    using Base::kBlock, Base::L, Base::V, Base::W, Base::z;
    // Weights are relative to the largest score so far, until one exceeds it by more than this.
    static constexpr S slack = 0;
    S* s;
    const S* q = nullptr;
    S* o = nullptr;

    VectorForward(Pieces<S>& pieces, const Sizes<S>& z_, bool separate)
        : Base(pieces, z_, separate), s(pieces.take(kBlock * L)) {}
    // Takes a head's queries, and lanes of zeros for the sums.
    void begin(const S* queries, S* sums) { q = queries, o = sums; }
    // Makes the scores of `count` keys from j0 on, in s; calls seen(v, x) with each vector.
    template <class Seen>
    EQCVT_INLINE void scores(int64_t j0, int64_t count, const Seen& seen) const {
        this->multiply(s, this->keys + j0 * z.stride, q, count, seen);
    }
    // Takes the weights of K keys of the block, from j on.
    template <int K> EQCVT_INLINE void put(int64_t j, const vec<S> (&x)[K * V]) const {
#pragma GCC unroll 8
        for (int i = 0; i < K * V; ++i) store<S>(s + j * L + i * W, x[i]);
    }
    // Scales the sums, and adds `count` weighted values from j0 on; complete behind end().
    EQCVT_INLINE void add(const vec<S> (&scale)[V], int64_t j0, int64_t count) const {
        lane_product<Lies::by_column>(z.rows, this->values + j0 * z.stride, z.stride, s, count,
                                      [&](int64_t r, int v, vec<S> x) {
                                          S* entry = o + r * L + v * W;
                                          store<S>(entry, load(entry) * scale[v] + x);
                                      });
    }
    void end() const {}
};

template <class T> struct VectorBackward : VectorProducts<T> {
    using Base = VectorProducts<T>;
    using S = number_t<T>;
    using Base::kBlock, Base::L, Base::V, Base::W, Base::z;
    S *p, *ds;
    Head<S> head{};

    VectorBackward(Pieces<S>& pieces, const Sizes<S>& z_, bool separate)
        : Base(pieces, z_, separate), p(pieces.take(kBlock * L)), ds(pieces.take(kBlock * L)) {}
    void begin(const Head<S>& head_) { head = head_; }
    // Makes the scores of `count` keys from j0 on, in p, and the gradients of their weights, in ds.
    void scores(int64_t j0, int64_t count) const {
        const auto ignored = [](int, vec<S>) {};
        this->multiply(p, this->keys + j0 * z.stride, head.q, count, ignored);
        this->multiply(ds, this->values + j0 * z.stride, head.dout, count, ignored);
    }
    // Takes the weights of K keys of the block, from j on, and the gradients of their scores.
    template <int K> EQCVT_INLINE void put(int64_t j, const vec<S> (&weight)[K * V],
                                           const vec<S> (&gradient)[K * V]) const {
#pragma GCC unroll 8
        for (int i = 0; i < K * V; ++i) {
            store<S>(p + j * L + i * W, weight[i]);
            store<S>(ds + j * L + i * W, gradient[i]);
        }
    }
    // Adds to the gradients of the queries, and of `count` keys and values from j0 on; complete
    // behind end().
    void add(int64_t j0, int64_t count) const {
        const int64_t at = j0 * z.stride, rows = round_up(count, kRows<S>);
        lane_product<Lies::by_column>(z.rows, this->keys + at, z.stride, ds, count,
                                      [&](int64_t r, int v, vec<S> x) {
                                          S* entry = head.dq + r * L + v * W;
                                          store<S>(entry, load(entry) + x);
                                      });
        add_product<Lies::by_row>(z, head.dkeys + at, rows, ds, L, head.q_rows, head.count);
        add_product<Lies::by_row>(z, head.dvalues + at, rows, p, L, head.do_rows, head.count);
    }
    void end() const {}
};

template <class T> struct products_of {
    using forward = VectorForward<T>;
    using backward = VectorBackward<T>;
    using unit = char; // what has to live while a thread uses them
};
#if defined(EQCVT_MATRIX_UNIT)
template <> struct products_of<bf16> {
    using forward = MatrixForward;
    using backward = MatrixBackward;
    using unit = MatrixUnit;
};
#endif

} // namespace
