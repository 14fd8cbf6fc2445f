// Forward pass of attention: y = residual + dropout(bo + sum over heads of softmax(q_h b') c'
// wo_h).
//
// A tile of queries meets the keys in blocks. Per block: scores, their running maximum,
// exponentials, and the values they weigh. Two multiply-adds per score and channel, in two
// products; a block's scores and keys stay in the first cache. Nothing of the size of queries times
// keys, and no query, goes to memory.
#include "../conv_attention.h"

#include "conv_attention_products.h"

namespace {

template <class T> struct Forward {
    using S = number_t<T>;
    Sizes<S> z;
    const T *a, *b, *c, *residual;
    const S *scale, *shift;
    uint64_t seed;
    double dropout;
    T *y, *o;
    S* lse;
};

// The scores of K keys become weights, which are added to `sum`.
template <int K, class S, class Products> EQCVT_INLINE void weigh(Products& products, int64_t j,
                                                                  const vec<S> (&base)[kVectors<S>],
                                                                  vec<S> (&sum)[kVectors<S>]) {
    constexpr int V = kVectors<S>;
    vec<S> x[K * V];
#pragma GCC unroll 8
    for (int i = 0; i < K * V; ++i)
        x[i] = load(products.s + j * kLanes<S> + i * width<S>) - base[i % V];
    Products::exp2(x);
#pragma GCC unroll 8
    for (int i = 0; i < K * V; ++i) sum[i % V] += x[i];
    products.template put<K>(j, x);
}

// o [channel][query] and the log-sum-exp of one head of a tile.
template <class S, class Products>
void attend(const Sizes<S>& z, S* o, S* lse, const S* q, Products& products) {
    constexpr int V = kVectors<S>, W = width<S>, K = Products::kAtOnce;
    constexpr int64_t L = kLanes<S>;
    vec<S> top[V], total[V];
    for (int v = 0; v < V; ++v) {
        top[v] = broadcast<S>(-static_cast<S>(INFINITY));
        total[v] = broadcast<S>(0);
    }
    for (int64_t i = 0; i < z.lanes; ++i) o[i] = 0;
    products.begin(q, o);
    for (int64_t j0 = 0; j0 < z.M; j0 += Products::kBlock) {
        const int64_t left = z.M - j0, count = left < Products::kBlock ? left : Products::kBlock;
        vec<S> next[V], scale[V];
        for (int v = 0; v < V; ++v) next[v] = top[v];
        products.scores(j0, count, [&](int v, vec<S> x) { next[v] = x > next[v] ? x : next[v]; });
        for (int v = 0; v < V; ++v) {
            next[v] = next[v] > top[v] + Products::slack ? next[v] : top[v];
            // A row of -inf so far has no weights yet; in the end it is 0 / 0, as in PyTorch.
            const vec<S> none = broadcast<S>(-static_cast<S>(INFINITY));
            const vec<S> base = next[v] == none ? broadcast<S>(0) : next[v];
            scale[v] = vector_exp2<S>(top[v] - base);
            top[v] = next[v];
            next[v] = base;
        }
        vec<S> sum[V] = {};
        int64_t j = 0;
        for (; j + K <= count; j += K) weigh<K, S>(products, j, next, sum);
        for (; j < count; ++j) weigh<1, S>(products, j, next, sum);
        for (int v = 0; v < V; ++v) total[v] = total[v] * scale[v] + sum[v];
        products.add(scale, j0, count);
    }
    products.end();
    for (int64_t r = 0; r < z.rows; ++r)
        for (int v = 0; v < V; ++v) {
            S* entry = o + r * L + v * W;
            store<S>(entry, load(entry) / total[v]);
        }
    if (!lse) return;
    S sums[L], tops[L];
    for (int v = 0; v < V; ++v) {
        store<S>(sums + v * W, total[v]);
        store<S>(tops + v * W, top[v]);
    }
    for (int i = 0; i < L; ++i) lse[i] = tops[i] * static_cast<S>(kLn2) + logarithm(sums[i]);
}

template <class T>
void write(const Forward<T>& p, const Tile& tile, number_t<T>* rows, number_t<T>* factors) {
    using S = number_t<T>;
    const int64_t D = p.z.D, first = (tile.image * p.z.N + tile.first) * D;
    if (p.dropout > 0) keep_factors(factors, p.seed, first, tile.count * D, 0, p.dropout);
    for (int64_t i = 0; i < tile.count; ++i) {
        S* row = rows + i * p.z.stride;
        if (p.dropout > 0)
            for (int64_t d = 0; d < D; ++d) row[d] *= factors[i * D + d];
        if (p.residual)
            for (int64_t d = 0; d < D; ++d) row[d] += to_number(p.residual[first + i * D + d]);
        store_row(p.y + first + i * D, row, D);
    }
}

// One thread's memory.
template <class T> struct Space {
    using S = number_t<T>;
    typename products_of<T>::forward products;
    S *rows, *y;  // [query][channel]
    S *a, *q, *o; // [channel][query]

    Space(Pieces<S>& pieces, const Sizes<S>& z, bool separate)
        : products(pieces, z, separate), rows(pieces.take(z.tokens)), y(pieces.take(z.tokens)),
          a(pieces.take(z.lanes)), q(pieces.take(z.lanes)), o(pieces.take(z.lanes)) {}
};

template <class T>
void run(const Forward<T>& p, const Weights<number_t<T>>& w, Space<T>& m, Range range) {
    using S = number_t<T>;
    const Sizes<S>& z = p.z;
    constexpr int64_t L = kLanes<S>;
    [[maybe_unused]] const typename products_of<T>::unit unit{};
    S lse[L];
    int64_t image = -1;
    for (int64_t t = range.begin; t < range.end; ++t) {
        const Tile tile(z, t);
        if (tile.image != image) {
            image = tile.image;
            m.products.load_image(p.b + image * z.M * z.D, p.c ? p.c + image * z.M * z.D : nullptr,
                                  p.scale, p.shift);
        }
        const int64_t first = image * z.N + tile.first;
        load_affine(m.rows, p.a + first * z.D, tile.count, L, z.D, z.stride, p.scale, p.shift);
        to_lanes(z, m.a, m.rows);
        for (int64_t i = 0; i < L; ++i)
            memcpy(m.y + i * z.stride, w.bo, static_cast<size_t>(z.stride) * sizeof(S));
        for (int64_t h = 0; h < z.heads; ++h) {
            make_queries(z, m.q, m.a, w.wq + h * z.matrix, w.bq + h * z.stride);
            attend(z, m.o, p.lse ? lse : nullptr, m.q, m.products);
            product<Lies::by_column>(L, z.stride, m.o, L, w.wo + h * z.matrix, z.stride, z.D,
                                     [&](int64_t r, int64_t i, vec<S> x) {
                                         S* entry = m.y + r * z.stride + i;
                                         store<S>(entry, load(entry) + x);
                                     });
            if (!p.lse) continue;
            memcpy(p.lse + (image * z.heads + h) * z.N + tile.first, lse,
                   static_cast<size_t>(tile.count) * sizeof(S));
            to_rows(z, m.rows, m.o);
            for (int64_t i = 0; i < tile.count; ++i)
                store_row(p.o + ((first + i) * z.heads + h) * z.D, m.rows + i * z.stride, z.D);
        }
        write(p, tile, m.y, m.rows);
    }
}

template <class T> int forward(const Forward<T>& p, const Weights<number_t<T>>& w, int threads) {
    using S = number_t<T>;
    const Sizes<S>& z = p.z;
    const bool separate = p.c != nullptr;
    const int64_t each = size_of<Space<T>, S>(z, separate);
    Scratch<S> memory(each * threads);
    if (!memory.data) return EQCVT_NO_MEMORY;
    parallel(threads, [&](int i, int n) {
        Pieces<S> pieces(memory.data + i * each);
        Space<T> space(pieces, z, separate);
        run(p, w, space, Range(z.B * z.tiles, i, n));
    });
    return EQCVT_OK;
}

} // namespace

int EQCVT_KERNEL(conv_attention_attend)(int dtype, const void* a, const void* b, const void* c,
                                        const void* residual, const void* scale, const void* shift,
                                        const void* wq, const void* bq, const void* wo,
                                        const void* bo, const void* seed, int64_t B, int64_t N,
                                        int64_t M, int64_t D, int64_t heads, int save,
                                        double dropout, void* y, void* o, void* lse, int threads) {
    if (B < 0 || N < 1 || M < 1 || D < 1 || heads < 1) return EQCVT_BAD_SIZE;
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        using S = number_t<T>;
        const Sizes<S> z{B, N, M, D, heads};
        uint64_t key;
        memcpy(&key, seed, sizeof key);
        const Forward<T> p{z,
                           static_cast<const T*>(a),
                           static_cast<const T*>(b),
                           static_cast<const T*>(c),
                           static_cast<const T*>(residual),
                           static_cast<const S*>(scale),
                           static_cast<const S*>(shift),
                           key,
                           dropout,
                           static_cast<T*>(y),
                           save ? static_cast<T*>(o) : nullptr,
                           save ? static_cast<S*>(lse) : nullptr};
        Scratch<S> memory(Weights<S>::size(z, false));
        if (!memory.data) return static_cast<int>(EQCVT_NO_MEMORY);
        const Weights<S> w(z, memory.data, static_cast<const S*>(wq), static_cast<const S*>(bq),
                           static_cast<const S*>(wo), static_cast<const S*>(bo), false);
        return forward(p, w, useful_threads(threads, z.B * z.tiles));
    });
}
