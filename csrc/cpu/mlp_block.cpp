// The MLP block, a tile of tokens at a time: nothing but the tokens themselves goes to memory.
//
// Channels are the lanes of vectors. With n = LN(x), u = W1 n + b1 and h = GELU(u), the backward
// pass makes n, u and h of a tile again; its five products (u, the gradient of h, those of W1 and
// W2, and that of n) run on tiles that stay in the nearest caches.
#include "../mlp_block.h"

#include "erf.h"
#include "layer_norm.h"
#include "matmul.h"
#include "parallel.h"
#include "philox.h"
#include "sums.h"
#include "tile.h"

namespace {

constexpr int64_t kTile = 48; // tokens, a multiple of kBlockRows

enum Stream : uint32_t { HIDDEN = 1, OUTPUT = 2 };

struct Shape {
    int64_t count, D, E, d, e; // d and e: strides of rows of D and of E entries
};

struct Dropout {
    double dropout;
    uint64_t seed;
    Dropout(double dropout_, const void* seed_) : dropout(dropout_), seed(0) {
        if (dropout > 0) memcpy(&seed, seed_, sizeof seed);
    }
    // The factors of `rows` tokens' `channels` entries, in rows `channels` apart; without dropout
    // they stay the ones that tiles begin with.
    template <class T>
    void factors(T* to, int64_t token, int64_t rows, int64_t channels, Stream stream) const {
        if (dropout > 0) keep_factors(to, seed, token * channels, rows * channels, stream, dropout);
    }
};

template <class T> struct Parameters {
    const T *norm_weight, *norm_bias, *w1, *b1, *w2, *b2;
};

// The parameters in padded rows: w1 [E, D], w2 [D, E], and transposed.
template <class T> struct Packed {
    T *gamma, *beta, *b1, *b2, *zeros, *w1, *w1t, *w2, *w2t;
    Packed(Pieces<T>& pieces, const Shape& s)
        : gamma(pieces.take(s.d)), beta(pieces.take(s.d)), b1(pieces.take(s.e)),
          b2(pieces.take(s.d)), zeros(pieces.take(s.d > s.e ? s.d : s.e)),
          w1(pieces.take(s.E * s.d)), w1t(pieces.take(s.D * s.e)), w2(pieces.take(s.D * s.e)),
          w2t(pieces.take(s.E * s.d)) {}
    void set(const Parameters<T>& p, const Shape& s) const {
        pack(gamma, 1, s.d, p.norm_weight, 1, s.D, false);
        pack(beta, 1, s.d, p.norm_bias, 1, s.D, false);
        pack(b1, 1, s.e, p.b1, 1, s.E, false);
        pack(b2, 1, s.d, p.b2, 1, s.D, false);
        fill(zeros, s.d > s.e ? s.d : s.e, T(0));
        pack(w1, s.E, s.d, p.w1, s.E, s.D, false);
        pack(w1t, s.D, s.e, p.w1, s.E, s.D, true);
        pack(w2, s.D, s.e, p.w2, s.D, s.E, false);
        pack(w2t, s.E, s.d, p.w2, s.D, s.E, true);
    }
};

// What one thread works on.
template <class T> struct Tile {
    T *x, *normal, *tokens, *rstd, *hidden, *factor;
    Tile(Pieces<T>& pieces, const Shape& s)
        : x(pieces.take(kTile * s.d)), normal(pieces.take(kTile * s.d)),
          tokens(pieces.take(kTile * s.d)), rstd(pieces.take(kTile)),
          hidden(pieces.take(kTile * s.e)),
          factor(pieces.take(kTile * (s.D > s.E ? s.D : s.E) + width<T>)) {}

    // From x to W1 LN(x) + b1, in `hidden`.
    void up(const Packed<T>& p, const Shape& s, int64_t rows, T eps) const {
        memcpy(normal, x, static_cast<size_t>(rows * s.d) * sizeof(T));
        normalise(normal, rstd, s.d, rows, s.D, eps);
        affine(tokens, normal, p.gamma, p.beta, s.d, rows);
        matmul(rows, s.e, s.D, ByRows<T>{tokens, s.d}, p.w1t, s.e, Start<T>{p.b1, 0}, hidden, s.e);
    }
};

// What the backward pass has besides.
template <class T> struct BackwardTile : Tile<T> {
    T *dy, *dropped, *dtokens, *dhidden;
    BackwardTile(Pieces<T>& pieces, const Shape& s)
        : Tile<T>(pieces, s), dy(pieces.take(kTile * s.d)), dropped(pieces.take(kTile * s.d)),
          dtokens(pieces.take(kTile * s.d)), dhidden(pieces.take(kTile * s.e)) {}
};

// x = GELU(x) * factor.
template <class T>
inline void activate(T* x, const T* factor, int64_t rows, int64_t columns, int64_t stride) {
    for (int64_t i = 0; i < rows; ++i, x += stride, factor += columns)
        for (int64_t j = 0; j < columns; j += width<T>) {
            const vec<T> u = load(x + j);
            store<T>(x + j, u * normal<T>(u).cdf * load(factor + j));
        }
}

// The same, and d becomes the gradient of x from that of GELU(x) * factor.
template <class T> inline void activate_backward(T* x, T* d, const T* factor, int64_t rows,
                                                 int64_t columns, int64_t stride) {
    for (int64_t i = 0; i < rows; ++i, x += stride, d += stride, factor += columns)
        for (int64_t j = 0; j < columns; j += width<T>) {
            const vec<T> u = load(x + j), f = load(factor + j);
            const Normal<T> n = normal<T>(u);
            store<T>(x + j, u * n.cdf * f);
            store<T>(d + j, load(d + j) * f * (n.cdf + u * n.pdf));
        }
}

// to = x * factor.
template <class T> inline void multiply(T* to, const T* x, const T* factor, int64_t rows,
                                        int64_t columns, int64_t stride) {
    for (int64_t i = 0; i < rows; ++i, x += stride, to += stride, factor += columns)
        for (int64_t j = 0; j < columns; j += width<T>)
            store<T>(to + j, load(x + j) * load(factor + j));
}

// The sum of a and b, which ends in a, as activations.
template <class Stored, class T>
inline void write_sum(Stored* to, T* a, const T* b, int64_t rows, int64_t columns, int64_t stride) {
    for (int64_t i = 0; i < rows; ++i, a += stride, b += stride, to += columns) {
        for (int64_t j = 0; j < columns; j += width<T>) store<T>(a + j, load(a + j) + load(b + j));
        store_row(to, a, columns);
    }
}

template <class Stored, class T = number_t<Stored>>
int forward(const Stored* x, const Parameters<T>& parameters, const Dropout& dropout,
            const Shape& s, T eps, Stored* y, int threads) {
    threads = useful_threads(threads, s.count / kTile + 1);
    const int64_t shared = size_of<Packed<T>, T>(s), each = size_of<Tile<T>, T>(s);
    Scratch<T> memory(shared + threads * each);
    if (!memory.data) return EQCVT_NO_MEMORY;
    Pieces<T> pieces(memory.data);
    const Packed<T> p(pieces, s);
    p.set(parameters, s);

    parallel(threads, [&](int thread, int n) {
        Pieces<T> mine(memory.data + shared + thread * each);
        fill(mine.base, each, T(1));
        const Tile<T> t(mine, s);
        const Range range(s.count, thread, n);
        for (int64_t token = range.begin; token < range.end; token += kTile) {
            const int64_t left = range.end - token, rows = left < kTile ? left : kTile;
            load_rows(t.x, x + token * s.D, rows, rows, s.D, s.D, s.d);
            t.up(p, s, rows, eps);
            dropout.factors(t.factor, token, rows, s.E, HIDDEN);
            activate(t.hidden, t.factor, rows, s.E, s.e);
            matmul(rows, s.d, s.E, ByRows<T>{t.hidden, s.e}, p.w2t, s.d, Start<T>{p.b2, 0},
                   t.tokens, s.d);
            dropout.factors(t.factor, token, rows, s.D, OUTPUT);
            multiply(t.tokens, t.tokens, t.factor, rows, s.D, s.d);
            write_sum(y + token * s.D, t.x, t.tokens, rows, s.D, s.d);
        }
    });
    return EQCVT_OK;
}

template <class T> struct Gradients {
    T *norm_weight, *norm_bias, *w1, *b1, *w2, *b2;
};

// Where the gradients of the parameters lie in a thread's sums.
struct Layout {
    int64_t w1, w2, b1, b2, gamma, beta, size;
    explicit Layout(const Shape& s) {
        w1 = 0;
        w2 = w1 + round_up(s.E, kBlockRows) * s.d;
        b1 = w2 + round_up(s.D, kBlockRows) * s.e;
        b2 = b1 + s.e;
        gamma = b2 + s.d;
        beta = gamma + s.d;
        size = round_up(beta + s.d, 16);
    }
};

template <class Stored, class T = number_t<Stored>>
int backward(const Stored* dy, const Stored* x, const Parameters<T>& parameters,
             const Dropout& dropout, const Shape& s, T eps, Stored* dx,
             const Gradients<T>& gradients, int threads) {
    threads = useful_threads(threads, s.count / kTile + 1);
    const Layout at(s);
    const int64_t shared = size_of<Packed<T>, T>(s);
    const int64_t each = size_of<BackwardTile<T>, T>(s) + at.size;
    Scratch<T> memory(shared + threads * each);
    Scratch<double> totals(threads * at.size);
    if (!memory.data || !totals.data) return EQCVT_NO_MEMORY;
    Pieces<T> pieces(memory.data);
    const Packed<T> p(pieces, s);
    p.set(parameters, s);

    parallel(threads, [&](int thread, int n) {
        T* part = memory.data + shared + thread * each;
        Sums<T> sums(part, totals.data + thread * at.size, at.size);
        Pieces<T> mine(part + at.size);
        fill(mine.base, each - at.size, T(1));
        const BackwardTile<T> t(mine, s);
        const Start<T> zero = {p.zeros, 0};
        const Range range(s.count, thread, n);
        for (int64_t token = range.begin; token < range.end; token += kTile) {
            const int64_t left = range.end - token, rows = left < kTile ? left : kTile;
            load_rows(t.x, x + token * s.D, rows, rows, s.D, s.D, s.d);
            t.up(p, s, rows, eps);
            load_rows(t.dy, dy + token * s.D, rows, rows, s.D, s.D, s.d);
            dropout.factors(t.factor, token, rows, s.D, OUTPUT);
            multiply(t.dropped, t.dy, t.factor, rows, s.D, s.d);
            matmul(rows, s.e, s.D, ByRows<T>{t.dropped, s.d}, p.w2, s.e, zero, t.dhidden, s.e);
            dropout.factors(t.factor, token, rows, s.E, HIDDEN);
            activate_backward(t.hidden, t.dhidden, t.factor, rows, s.E, s.e);
            matmul(rows, s.d, s.E, ByRows<T>{t.dhidden, s.e}, p.w1, s.d, zero, t.dtokens, s.d);

            matmul(s.D, s.e, rows, ByColumns<T>{t.dropped, s.d}, t.hidden, s.e,
                   Start<T>{part + at.w2, s.e}, part + at.w2, s.e);
            matmul(s.E, s.d, rows, ByColumns<T>{t.dhidden, s.e}, t.tokens, s.d,
                   Start<T>{part + at.w1, s.d}, part + at.w1, s.d);
            add_rows(part + at.b2, t.dropped, s.d, rows);
            add_rows(part + at.b1, t.dhidden, s.e, rows);
            add_rows(part + at.beta, t.dtokens, s.d, rows);
            add_products(part + at.gamma, t.dtokens, t.normal, s.d, rows);
            sums.added(rows);

            normalise_backward(t.dtokens, t.normal, t.rstd, p.gamma, s.d, rows, s.D);
            write_sum(dx + token * s.D, t.dtokens, t.dy, rows, s.D, s.d);
        }
        sums.flush();
    });

    const auto collect = [&](T* to, int64_t rows, int64_t columns, int64_t begin, int64_t stride) {
        reduce(to, rows, columns, totals.data + begin, stride, 1, at.size, threads);
    };
    collect(gradients.norm_weight, 1, s.D, at.gamma, s.d);
    collect(gradients.norm_bias, 1, s.D, at.beta, s.d);
    collect(gradients.w1, s.E, s.D, at.w1, s.d);
    collect(gradients.b1, 1, s.E, at.b1, s.e);
    collect(gradients.w2, s.D, s.E, at.w2, s.e);
    collect(gradients.b2, 1, s.D, at.b2, s.d);
    return EQCVT_OK;
}

bool valid(int64_t B, int64_t N, int64_t D, int64_t E) {
    return B >= 0 && N >= 0 && D > 0 && E > 0;
}

template <class T> Shape make_shape(int64_t B, int64_t N, int64_t D, int64_t E) {
    return {B * N, D, E, padded<T>(D), padded<T>(E)};
}

} // namespace

int EQCVT_KERNEL(mlp_block_forward)(int dtype, const void* x, const void* norm_weight,
                                    const void* norm_bias, const void* w1, const void* b1,
                                    const void* w2, const void* b2, const void* seed, int64_t B,
                                    int64_t N, int64_t D, int64_t E, double dropout, double eps,
                                    void* y, int threads) {
    if (!valid(B, N, D, E)) return EQCVT_BAD_SIZE;
    return with_dtype(dtype, [&](auto zero) {
        using Stored = decltype(zero);
        using T = number_t<Stored>;
        const Parameters<T> parameters = {
            static_cast<const T*>(norm_weight), static_cast<const T*>(norm_bias),
            static_cast<const T*>(w1),          static_cast<const T*>(b1),
            static_cast<const T*>(w2),          static_cast<const T*>(b2)};
        return forward(static_cast<const Stored*>(x), parameters, Dropout(dropout, seed),
                       make_shape<T>(B, N, D, E), static_cast<T>(eps), static_cast<Stored*>(y),
                       threads);
    });
}

int EQCVT_KERNEL(mlp_block_backward)(int dtype, const void* dy, const void* x,
                                     const void* norm_weight, const void* norm_bias, const void* w1,
                                     const void* b1, const void* w2, const void* b2,
                                     const void* seed, int64_t B, int64_t N, int64_t D, int64_t E,
                                     double dropout, double eps, void* dx, void* dnorm_weight,
                                     void* dnorm_bias, void* dw1, void* db1, void* dw2, void* db2,
                                     int threads) {
    if (!valid(B, N, D, E)) return EQCVT_BAD_SIZE;
    return with_dtype(dtype, [&](auto zero) {
        using Stored = decltype(zero);
        using T = number_t<Stored>;
        const Parameters<T> parameters = {
            static_cast<const T*>(norm_weight), static_cast<const T*>(norm_bias),
            static_cast<const T*>(w1),          static_cast<const T*>(b1),
            static_cast<const T*>(w2),          static_cast<const T*>(b2)};
        const Gradients<T> gradients = {static_cast<T*>(dnorm_weight), static_cast<T*>(dnorm_bias),
                                        static_cast<T*>(dw1),          static_cast<T*>(db1),
                                        static_cast<T*>(dw2),          static_cast<T*>(db2)};
        return backward(static_cast<const Stored*>(dy), static_cast<const Stored*>(x), parameters,
                        Dropout(dropout, seed), make_shape<T>(B, N, D, E), static_cast<T>(eps),
                        static_cast<Stored*>(dx), gradients, threads);
    });
}
