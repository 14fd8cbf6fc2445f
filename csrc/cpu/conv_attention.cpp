// Forward pass of attention: y = residual + dropout(bo + sum over heads of softmax(q_h b') c'
// wo_h).
//
// A tile of queries meets the keys in blocks. Per block: scores, their running maximum,
// exponentials in place, and the values they weigh. Two multiply-adds per score and channel, in two
// products whose sums stay in registers; 12 + 8 kB of scores and keys in the first cache. Nothing
// of the size of queries times keys, and no query, goes to memory.
#include "../conv_attention.h"

#include "conv_attention_tile.h"

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
template <int K, class S>
EQCVT_INLINE void weigh(S* s, const vec<S> (&base)[kVectors<S>], vec<S> (&sum)[kVectors<S>]) {
    constexpr int V = kVectors<S>;
    vec<S> x[K * V];
#pragma GCC unroll 8
    for (int i = 0; i < K * V; ++i) x[i] = load(s + i * width<S>) - base[i % V];
    vector_exp2<S>(x);
#pragma GCC unroll 8
    for (int i = 0; i < K * V; ++i) {
        store<S>(s + i * width<S>, x[i]);
        sum[i % V] += x[i];
    }
}

// o [channel][query] and the log-sum-exp of one head of a tile.
template <class S>
void attend(const Sizes<S>& z, S* o, S* lse, const S* q, const S* keys, const S* values, S* s) {
    constexpr int V = kVectors<S>, W = width<S>;
    constexpr int64_t L = kLanes<S>;
    vec<S> top[V], total[V];
    for (int v = 0; v < V; ++v) {
        top[v] = broadcast<S>(-static_cast<S>(INFINITY));
        total[v] = broadcast<S>(0);
    }
    for (int64_t i = 0; i < z.lanes; ++i) o[i] = 0;
    for (int64_t j0 = 0; j0 < z.M; j0 += kKeys) {
        const int64_t count = z.M - j0 < kKeys ? z.M - j0 : kKeys;
        vec<S> next[V], scale[V];
        for (int v = 0; v < V; ++v) next[v] = top[v];
        lane_product<Lies::by_row>(round_up(count, kRows<S>), keys + j0 * z.stride, z.stride, q,
                                   z.D, [&](int64_t r, int v, vec<S> x) {
                                       store<S>(s + r * L + v * W, x);
                                       next[v] = x > next[v] ? x : next[v];
                                   });
        for (int v = 0; v < V; ++v) {
            // A row of -inf so far has no weights yet; in the end it is 0 / 0, as in PyTorch.
            const vec<S> none = broadcast<S>(-static_cast<S>(INFINITY));
            const vec<S> base = next[v] == none ? broadcast<S>(0) : next[v];
            scale[v] = vector_exp2<S>(top[v] - base);
            top[v] = next[v];
            next[v] = base;
        }
        vec<S> sum[V] = {};
        int64_t j = 0;
        for (; j + kAtOnce <= count; j += kAtOnce) weigh<kAtOnce>(s + j * L, next, sum);
        for (; j < count; ++j) weigh<1>(s + j * L, next, sum);
        for (int v = 0; v < V; ++v) total[v] = total[v] * scale[v] + sum[v];
        lane_product<Lies::by_column>(z.rows, values + j0 * z.stride, z.stride, s, count,
                                      [&](int64_t r, int v, vec<S> x) {
                                          S* entry = o + r * L + v * W;
                                          store<S>(entry, load(entry) * scale[v] + x);
                                      });
    }
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

template <class T>
void run(const Forward<T>& p, const Weights<number_t<T>>& w, Range range, number_t<T>* memory) {
    using S = number_t<T>;
    const Sizes<S>& z = p.z;
    constexpr int64_t L = kLanes<S>;
    Pieces<S> pieces{memory};
    S* keys = pieces.take(z.keys * z.stride);
    S* values = p.c ? pieces.take(z.keys * z.stride) : keys;
    S *rows = pieces.take(z.tokens), *y = pieces.take(z.tokens), *a = pieces.take(z.lanes);
    S *q = pieces.take(z.lanes), *o = pieces.take(z.lanes), *s = pieces.take(z.block);
    S lse[L];
    int64_t image = -1;
    for (int64_t t = range.begin; t < range.end; ++t) {
        const Tile tile(z, t);
        if (tile.image != image) {
            image = tile.image;
            load_keys(z, keys, p.b + image * z.M * z.D, p.scale + z.D, p.shift + z.D);
            if (p.c)
                load_keys(z, values, p.c + image * z.M * z.D, p.scale + 2 * z.D, p.shift + 2 * z.D);
        }
        const int64_t first = image * z.N + tile.first;
        load_affine(rows, p.a + first * z.D, tile.count, L, z.D, z.stride, p.scale, p.shift);
        to_lanes(z, a, rows);
        for (int64_t i = 0; i < L; ++i)
            memcpy(y + i * z.stride, w.bo, static_cast<size_t>(z.stride) * sizeof(S));
        for (int64_t h = 0; h < z.heads; ++h) {
            make_queries(z, q, a, w.wq + h * z.matrix, w.bq + h * z.stride);
            attend(z, o, p.lse ? lse : nullptr, q, keys, values, s);
            product<Lies::by_column>(L, z.stride, o, L, w.wo + h * z.matrix, z.stride, z.D,
                                     [&](int64_t r, int64_t i, vec<S> x) {
                                         S* entry = y + r * z.stride + i;
                                         store<S>(entry, load(entry) + x);
                                     });
            if (!p.lse) continue;
            memcpy(p.lse + (image * z.heads + h) * z.N + tile.first, lse,
                   static_cast<size_t>(tile.count) * sizeof(S));
            to_rows(z, rows, o);
            for (int64_t i = 0; i < tile.count; ++i)
                store_row(p.o + ((first + i) * z.heads + h) * z.D, rows + i * z.stride, z.D);
        }
        write(p, tile, y, rows);
    }
}

template <class T> int forward(const Forward<T>& p, const Weights<number_t<T>>& w, int threads) {
    using S = number_t<T>;
    const Sizes<S>& z = p.z;
    const int64_t each =
        (p.c ? 2 : 1) * z.keys * z.stride + 2 * z.tokens + 3 * z.lanes + z.block + 8 * 64;
    Scratch<S> memory(each * threads);
    if (!memory.data) return EQCVT_NO_MEMORY;
    parallel(threads,
             [&](int i, int n) { run(p, w, Range(z.B * z.tiles, i, n), memory.data + i * each); });
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
    const auto run_as = [&](auto number) {
        using T = decltype(number);
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
        return forward(p, w, z.useful_threads(threads));
    };
    if (dtype == EQCVT_F32) return run_as(float());
    if (dtype == EQCVT_F64) return run_as(double());
    if (dtype == EQCVT_BF16) return run_as(bf16());
    return EQCVT_BAD_DTYPE;
}
