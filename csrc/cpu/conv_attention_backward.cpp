// Backward pass of attention, in the notation of conv_attention.cpp and with t = dropout'(dy):
//
//   do_h = t wo_h^T, p = 2^(s - lse), dp = do_h c'^T, ds = p (dp - delta), delta = <do_h, o_h>,
//   dq_h = ds b', db' = ds^T q_h, dc' = p^T do_h (into db' where values are keys), da' = dq_h
//   wq_h^T.
//
// A tile of queries meets the keys in blocks, as in the forward pass: five multiply-adds per score
// and channel. A thread owns a run of tiles, so the gradient of an image's keys is summed by one
// thread, or where a run ends inside an image by its neighbours, whose parts are added in order.
#include "../conv_attention.h"

#include "conv_attention_products.h"

namespace {

// Where a thread's sums of each parameter's gradient begin.
template <class S> struct Gradients {
    int64_t wq, wo, bq, bo, scale, shift, size; // wq is [h][e][d], scale and shift are [side][d]
    explicit Gradients(const Sizes<S>& z)
        : wq(0), wo(z.heads * z.matrix), bq(2 * z.heads * z.matrix), bo(bq + z.heads * z.stride),
          scale(bo + z.stride), shift(scale + 3 * z.stride), size(shift + 3 * z.stride) {}
    int64_t vectors() const { return bq; } // from here on: sums over tokens one by one
};

template <class T> struct Backward {
    using S = number_t<T>;
    Sizes<S> z;
    Gradients<S> at;
    const T *dy, *a, *b, *c;
    const S *scale, *shift;
    const T* o;
    const S* lse;
    uint64_t seed;
    double dropout;
    T *da, *db, *dc;
};

// One thread's memory.
template <class S> struct Space {
    S *dkeys[2], *dvalues[2]; // of the image a run begins in, and of the later ones
    S *a_rows, *t_rows, *q_rows, *do_rows, *o_rows, *da_rows; // [query][channel]
    S *a, *t, *q, *dout, *dq;                                 // [channel][query]
    S* sums;                                                  // of a tile or some of them
    double* totals;                                           // of the run

    Space(Pieces<S>& pieces, const Sizes<S>& z, bool separate, int64_t sums_size) {
        for (int i = 0; i < 2; ++i) {
            dkeys[i] = pieces.take(z.keys * z.stride);
            dvalues[i] = separate ? pieces.take(z.keys * z.stride) : dkeys[i];
        }
        S** rows[] = {&a_rows, &t_rows, &q_rows, &do_rows, &o_rows, &da_rows};
        for (S** piece : rows) *piece = pieces.take(z.tokens);
        S** lanes[] = {&a, &t, &q, &dout, &dq};
        for (S** piece : lanes) *piece = pieces.take(z.lanes);
        constexpr int64_t each = sizeof(double) / sizeof(S);
        sums = pieces.take(sums_size);
        totals = reinterpret_cast<double*>(pieces.take(each * sums_size));
        for (int64_t i = 0; sums && i < sums_size; ++i) sums[i] = 0, totals[i] = 0;
    }
    // Sums of at most some dozen terms in S become part of those in double.
    void flush(int64_t begin, int64_t end) const {
        for (int64_t i = begin; i < end; ++i) {
            totals[i] += sums[i];
            sums[i] = 0;
        }
    }
};

// The scores of K keys become weights, and the gradients of the weights those of the scores.
template <int K, class S, class Products>
EQCVT_INLINE void weigh(Products& products, int64_t j, const vec<S> (&base)[kVectors<S>],
                        const vec<S> (&mean)[kVectors<S>]) {
    constexpr int V = kVectors<S>;
    const int64_t at = j * kLanes<S>;
    vec<S> x[K * V], g[K * V];
#pragma GCC unroll 8
    for (int i = 0; i < K * V; ++i) x[i] = load(products.p + at + i * width<S>) - base[i % V];
    Products::exp2(x);
#pragma GCC unroll 8
    for (int i = 0; i < K * V; ++i)
        g[i] = x[i] * (load(products.ds + at + i * width<S>) - mean[i % V]);
    products.template put<K>(j, x, g);
}

// The same where these are all keys. Then the weights are made to sum to 1, and delta is the mean
// of the very numbers it is taken from: beside the gradient of a softmax over few keys, the
// roundings of o and lse are large.
template <class S, class Products>
void weigh_all(Products& products, int64_t keys, const vec<S> (&base)[kVectors<S>]) {
    constexpr int V = kVectors<S>, W = width<S>;
    constexpr int64_t L = kLanes<S>;
    vec<S> mean[V] = {}, total[V] = {};
    for (int64_t j = 0; j < keys; ++j)
        for (int v = 0; v < V; ++v) {
            S* p = products.p + j * L + v * W;
            const vec<S> weight = vector_exp2<S>(load(p) - base[v]);
            store<S>(p, weight);
            mean[v] += weight * load(products.ds + j * L + v * W);
            total[v] += weight;
        }
    for (int v = 0; v < V; ++v)
        mean[v] = keys == 1 ? load(products.ds + v * W) : mean[v] / total[v];
    const auto put = [&](auto count, int64_t j) {
        constexpr int K = decltype(count)::value;
        vec<S> x[K * V], g[K * V];
        for (int i = 0; i < K * V; ++i) {
            x[i] = load(products.p + j * L + i * W) / total[i % V];
            g[i] = x[i] * (load(products.ds + j * L + i * W) - mean[i % V]);
        }
        products.template put<K>(j, x, g);
    };
    int64_t j = 0;
    constexpr int K = Products::kAtOnce;
    for (; j + K <= keys; j += K) put(count_of<K>(), j);
    for (; j < keys; ++j) put(count_of<1>(), j);
}

// The gradients of one head's queries, and of the keys and values by the queries of a tile.
template <class S, class Products> void attend_backward(const Sizes<S>& z, Products& products,
                                                        const Head<S>& head, const S* lse,
                                                        const S* delta) {
    constexpr int V = kVectors<S>, W = width<S>, K = Products::kAtOnce;
    vec<S> base[V], mean[V];
    for (int v = 0; v < V; ++v) {
        base[v] = load(lse + v * W);
        mean[v] = load(delta + v * W);
    }
    for (int64_t i = 0; i < z.lanes; ++i) head.dq[i] = 0;
    products.begin(head);
    for (int64_t j0 = 0; j0 < z.M; j0 += Products::kBlock) {
        const int64_t left = z.M - j0, keys = left < Products::kBlock ? left : Products::kBlock;
        products.scores(j0, keys);
        if (z.M <= Products::kBlock) {
            weigh_all<S>(products, keys, base);
        } else {
            int64_t j = 0;
            for (; j + K <= keys; j += K) weigh<K, S>(products, j, base, mean);
            for (; j < keys; ++j) weigh<1, S>(products, j, base, mean);
        }
        products.add(j0, keys);
    }
    products.end();
}

// With t' = t * scale + shift and the rows of its gradient: writes the gradient of t, and adds to
// those of scale and shift.
template <class T, class S> void affine_backward(T* to, const S* rows, const T* from, int64_t count,
                                                 int64_t D, int64_t stride, const S* scale,
                                                 S* dscale, S* dshift) {
    for (int64_t i = 0; i < count; ++i) {
        const S* row = rows + i * stride;
        int64_t d = 0;
        for (; d + width<S> <= D; d += width<S>) {
            const vec<S> g = load(row + d);
            store<S>(dscale + d, load(dscale + d) + g * load_numbers(from + i * D + d));
            store<S>(dshift + d, load(dshift + d) + g);
            store_numbers(to + i * D + d, g * load(scale + d));
        }
        for (; d < D; ++d) {
            dscale[d] += row[d] * to_number(from[i * D + d]);
            dshift[d] += row[d];
            from_number(to + i * D + d, row[d] * scale[d]);
        }
    }
}

// From the summed gradients of normalised keys j0 .. j1 to those of b and c.
template <class T> void finish_keys(const Backward<T>& p, const Space<number_t<T>>& m,
                                    int64_t image, int64_t j0, int64_t j1, const number_t<T>* dkeys,
                                    const number_t<T>* dvalues) {
    using S = number_t<T>;
    const Sizes<S>& z = p.z;
    constexpr int64_t run = 64; // of keys whose sums are made in S
    const auto finish = [&](int side, T* to, const T* raw, const S* rows, int64_t j) {
        const int64_t from = (image * z.M + j) * z.D, left = j1 - j;
        affine_backward(to + from, rows + j * z.stride, raw + from, left < run ? left : run, z.D,
                        z.stride, p.scale + side * z.D, m.sums + p.at.scale + side * z.stride,
                        m.sums + p.at.shift + side * z.stride);
    };
    for (int64_t j = j0; j < j1; j += run) {
        finish(1, p.db, p.b, dkeys, j);
        if (p.c) finish(2, p.dc, p.c, dvalues, j);
        m.flush(p.at.scale, p.at.size);
    }
}

// What a tile needs before its heads: normalised a, and the gradient behind the dropout.
template <class T>
void load_tile(const Backward<T>& p, const Space<number_t<T>>& m, const Tile& tile) {
    using S = number_t<T>;
    const Sizes<S>& z = p.z;
    constexpr int64_t L = kLanes<S>;
    const int64_t first = (tile.image * z.N + tile.first) * z.D;
    load_affine(m.a_rows, p.a + first, tile.count, L, z.D, z.stride, p.scale, p.shift);
    to_lanes(z, m.a, m.a_rows);
    load_rows(m.t_rows, p.dy + first, tile.count, L, z.D, z.D, z.stride);
    if (p.dropout > 0) {
        keep_factors(m.da_rows, p.seed, first, tile.count * z.D, 0, p.dropout);
        for (int64_t i = 0; i < tile.count; ++i)
            for (int64_t d = 0; d < z.D; ++d) m.t_rows[i * z.stride + d] *= m.da_rows[i * z.D + d];
    }
    to_lanes(z, m.t, m.t_rows);
    S* dbo = m.sums + p.at.bo;
    for (int64_t i = 0; i < tile.count; ++i)
        for (int64_t d = 0; d < z.stride; ++d) dbo[d] += m.t_rows[i * z.stride + d];
    for (int64_t i = 0; i < z.tokens; ++i) m.da_rows[i] = 0;
}

template <class T> void run_head(const Backward<T>& p, const Space<number_t<T>>& m,
                                 const Weights<number_t<T>>& w, const Tile& tile, int64_t h,
                                 int slot, typename products_of<T>::backward& products) {
    using S = number_t<T>;
    const Sizes<S>& z = p.z;
    constexpr int64_t L = kLanes<S>;
    const S *wq = w.wq + h * z.matrix, *wo_turned = w.wo_turned + h * z.matrix;
    const S* bq = w.bq + h * z.stride;
    make_queries(z, m.q, m.a, wq, bq);
    product<Lies::by_row>(L, z.stride, m.a_rows, z.stride, wq, z.stride, z.D,
                          [&](int64_t r, int64_t i, vec<S> x) {
                              store<S>(m.q_rows + r * z.stride + i, x + load(bq + i));
                          });
    lane_product<Lies::by_column>(
        z.rows, wo_turned, z.stride, m.t, z.D,
        [&](int64_t r, int v, vec<S> x) { store<S>(m.dout + r * L + v * width<S>, x); });
    product<Lies::by_row>(
        L, z.stride, m.t_rows, z.stride, wo_turned, z.stride, z.D,
        [&](int64_t r, int64_t i, vec<S> x) { store<S>(m.do_rows + r * z.stride + i, x); });
    const int64_t first = tile.image * z.N + tile.first;
    load_rows(m.o_rows, p.o + (first * z.heads + h) * z.D, tile.count, L, z.D, z.heads * z.D,
              z.stride);
    S lse[L], delta[L];
    const S* saved = p.lse + (tile.image * z.heads + h) * z.N + tile.first;
    for (int64_t i = 0; i < L; ++i) {
        vec<S> dot = {};
        for (int64_t d = 0; d < z.stride; d += width<S>)
            dot += load(m.do_rows + i * z.stride + d) * load(m.o_rows + i * z.stride + d);
        delta[i] = sum<S>(dot);
        // Lanes without a query get no weight.
        lse[i] = i < tile.count ? saved[i] * static_cast<S>(kLog2E) : static_cast<S>(INFINITY);
    }
    const Head<S> head{tile.count, m.q,  m.dout,        m.q_rows,
                       m.do_rows,  m.dq, m.dkeys[slot], m.dvalues[slot]};
    attend_backward(z, products, head, lse, delta);
    for (int64_t e = 0; e < z.rows; ++e) {
        S* row = m.dq + e * L;
        for (int64_t i = tile.count; i < L; ++i) row[i] = 0;
        vec<S> total = {};
        for (int64_t i = 0; i < L; i += width<S>) total += load(row + i);
        m.sums[p.at.bq + h * z.stride + e] += sum<S>(total);
    }
    add_product<Lies::by_row>(z, m.sums + p.at.wq + h * z.matrix, z.rows, m.dq, L, m.a_rows,
                              tile.count);
    add_product<Lies::by_column>(z, m.sums + p.at.wo + h * z.matrix, z.rows, m.o_rows, z.stride,
                                 m.t_rows, tile.count);
    add_product<Lies::by_column>(z, m.da_rows, L, m.dq, L, w.wq_turned + h * z.matrix, z.D);
}

// A run of tiles. Images that end inside of it, or begin it and end it, are finished here.
template <class T> void run(const Backward<T>& p, const Weights<number_t<T>>& w,
                            const Space<number_t<T>>& m,
                            typename products_of<T>::backward& products, Range range) {
    using S = number_t<T>;
    const Sizes<S>& z = p.z;
    [[maybe_unused]] const typename products_of<T>::unit unit{};
    int64_t image = -1;
    int slot = 0;
    for (int64_t t = range.begin; t < range.end; ++t) {
        const Tile tile(z, t);
        if (tile.image != image) {
            image = tile.image;
            slot = t > image * z.tiles ? 0 : 1;
            products.load_image(p.b + image * z.M * z.D, p.c ? p.c + image * z.M * z.D : nullptr,
                                p.scale, p.shift);
            const size_t bytes = static_cast<size_t>(z.keys * z.stride) * sizeof(S);
            memset(m.dkeys[slot], 0, bytes);
            memset(m.dvalues[slot], 0, bytes);
        }
        load_tile(p, m, tile);
        for (int64_t h = 0; h < z.heads; ++h) run_head(p, m, w, tile, h, slot, products);
        const int64_t first = (image * z.N + tile.first) * z.D;
        affine_backward(p.da + first, m.da_rows, p.a + first, tile.count, z.D, z.stride, p.scale,
                        m.sums + p.at.scale, m.sums + p.at.shift);
        const bool last = t + 1 == (image + 1) * z.tiles;
        if (last && slot == 1) finish_keys(p, m, image, 0, z.M, m.dkeys[1], m.dvalues[1]);
        m.flush(p.at.vectors(), p.at.size);
        if (t % 16 == 15) m.flush(0, p.at.vectors());
    }
    m.flush(0, p.at.size);
}

// The i-th of n shares of the keys of images that several runs met.
template <class T>
void finish_shared(const Backward<T>& p, const Space<number_t<T>>* spaces, int i, int n) {
    using S = number_t<T>;
    const Sizes<S>& z = p.z;
    const Range rows(z.M, i, n);
    const auto add = [&](S* to, const S* from) {
        for (int64_t e = rows.begin * z.stride; e < rows.end * z.stride; ++e) to[e] += from[e];
    };
    for (int t = 0; t < n; ++t) { // t is the run in which an image begins, and does not end
        const Range run(z.B * z.tiles, t, n);
        const int64_t image = (run.end - 1) / z.tiles;
        if (run.begin == run.end || run.begin > image * z.tiles || run.end == (image + 1) * z.tiles)
            continue;
        const Space<S>& m = spaces[t];
        for (int next = t + 1; next < n; ++next) {
            const Range later(z.B * z.tiles, next, n);
            if (later.begin >= (image + 1) * z.tiles) break;
            add(m.dkeys[1], spaces[next].dkeys[0]);
            if (p.c) add(m.dvalues[1], spaces[next].dvalues[0]);
        }
        finish_keys(p, spaces[i], image, rows.begin, rows.end, m.dkeys[1], m.dvalues[1]);
    }
}

// to[i][j] = the sum over threads, in order, of their total at[i * row + j * column].
template <class S> void reduce(S* to, int64_t rows, int64_t columns, int64_t at, int64_t row,
                               int64_t column, const Space<S>* spaces, int threads) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) {
            double sum = 0;
            for (int t = 0; t < threads; ++t) sum += spaces[t].totals[at + i * row + j * column];
            to[i * columns + j] = static_cast<S>(sum);
        }
}

template <class S> struct Results {
    S *scale, *shift, *wq, *bq, *wo, *bo;
};

template <class T> int backward(const Backward<T>& p, const Weights<number_t<T>>& w,
                                const Results<number_t<T>>& to, int threads) {
    using S = number_t<T>;
    const Sizes<S>& z = p.z;
    const Gradients<S>& at = p.at;
    const bool separate = p.c != nullptr;
    using Products = typename products_of<T>::backward;
    const int64_t each =
        size_of<Space<S>, S>(z, separate, at.size) + size_of<Products, S>(z, separate);
    Scratch<S> memory(each * threads);
    Scratch<Space<S>> spaces(threads);
    if (!memory.data || !spaces.data) return EQCVT_NO_MEMORY;
    parallel(threads, [&](int i, int n) {
        Pieces<S> pieces(memory.data + i * each);
        spaces[i] = Space<S>(pieces, z, separate, at.size);
        Products products(pieces, z, separate);
        run(p, w, spaces[i], products, Range(z.B * z.tiles, i, n));
    });
    if (threads > 1) parallel(threads, [&](int i, int n) { finish_shared(p, spaces.data, i, n); });
    const int64_t D = z.D, sides = separate ? 3 : 2;
    for (int64_t h = 0; h < z.heads; ++h) {
        reduce(to.wq + h * D * D, D, D, at.wq + h * z.matrix, 1, z.stride, spaces.data, threads);
        reduce(to.wo + h * D * D, D, D, at.wo + h * z.matrix, z.stride, 1, spaces.data, threads);
    }
    reduce(to.bq, z.heads, D, at.bq, z.stride, 1, spaces.data, threads);
    reduce(to.bo, 1, D, at.bo, 0, 1, spaces.data, threads);
    reduce(to.scale, sides, D, at.scale, z.stride, 1, spaces.data, threads);
    reduce(to.shift, sides, D, at.shift, z.stride, 1, spaces.data, threads);
    return EQCVT_OK;
}

} // namespace

int EQCVT_KERNEL(conv_attention_attend_backward)(
    int dtype, const void* dy, const void* a, const void* b, const void* c, const void* scale,
    const void* shift, const void* wq, const void* bq, const void* wo, const void* bo,
    const void* seed, const void* o, const void* lse, int64_t B, int64_t N, int64_t M, int64_t D,
    int64_t heads, double dropout, void* da, void* db, void* dc, void* dscale, void* dshift,
    void* dwq, void* dbq, void* dwo, void* dbo, int threads) {
    if (B < 0 || N < 1 || M < 1 || D < 1 || heads < 1) return EQCVT_BAD_SIZE;
    return with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        using S = number_t<T>;
        const Sizes<S> z{B, N, M, D, heads};
        uint64_t key;
        memcpy(&key, seed, sizeof key);
        const Backward<T> p{z,
                            Gradients<S>(z),
                            static_cast<const T*>(dy),
                            static_cast<const T*>(a),
                            static_cast<const T*>(b),
                            static_cast<const T*>(c),
                            static_cast<const S*>(scale),
                            static_cast<const S*>(shift),
                            static_cast<const T*>(o),
                            static_cast<const S*>(lse),
                            key,
                            dropout,
                            static_cast<T*>(da),
                            static_cast<T*>(db),
                            static_cast<T*>(dc)};
        const Results<S> to{static_cast<S*>(dscale), static_cast<S*>(dshift), static_cast<S*>(dwq),
                            static_cast<S*>(dbq),    static_cast<S*>(dwo),    static_cast<S*>(dbo)};
        Scratch<S> memory(Weights<S>::size(z, true));
        if (!memory.data) return static_cast<int>(EQCVT_NO_MEMORY);
        const Weights<S> w(z, memory.data, static_cast<const S*>(wq), static_cast<const S*>(bq),
                           static_cast<const S*>(wo), static_cast<const S*>(bo), true);
        return backward(p, w, to, useful_threads(threads, z.B * z.tiles));
    });
}
