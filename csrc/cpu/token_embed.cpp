// Token embedding, a row of tokens at a time: nothing but images and tokens goes to memory.
//
// The image rows under a row of tokens are copied, with the zeros around them, so that the entry of
// a patch is a fixed offset from its token's place; the convolution is then a product with channels
// as the lanes of vectors, and so is the gradient of the filters.
//
// The gradient of x has the tokens of a row as lanes. An entry (i, j) of a patch lies in the row
// stride r + i and the column stride (q + j / stride) + j % stride, so with columns kept apart by
// their remainder, all the j of one remainder add up in place, shifted by j / stride. Rows wait in
// a ring until no later row of tokens reaches them. A thread makes the gradients of its tokens of
// the rows before its first again, so that every row of x has one owner.
#include "../token_embed.h"

#include "layer_norm.h"
#include "matmul.h"
#include "parallel.h"
#include "sums.h"
#include "tile.h"

namespace {

struct Shape {
    int64_t B, C, H, W, D, k, stride, padding;
    int64_t H1, W1, taps, d;      // taps: entries of a patch; d: stride of rows of D entries
    int64_t tile, line;           // tokens of a row in whole blocks; image columns under them
    int64_t phases, rows, margin; // of the gradient of x: remainders, rows (c, i), zeros in front
    int64_t reach, wide, ring;    // columns per remainder; the same in whole vectors; ring's rows
};

template <class T> Shape make_shape(int64_t B, int64_t C, int64_t H, int64_t W, int64_t D,
                                    int64_t k, int64_t stride, int64_t padding) {
    Shape s = {};
    s.B = B, s.C = C, s.H = H, s.W = W, s.D = D, s.k = k, s.stride = stride, s.padding = padding;
    s.H1 = (H + 2 * padding - k) / stride + 1;
    s.W1 = (W + 2 * padding - k) / stride + 1;
    s.taps = C * k * k;
    s.d = padded<T>(D);
    s.tile = round_up(s.W1, kBlockRows);
    s.line = (s.tile - 1) * stride + k;
    s.phases = stride < k ? stride : k;
    s.rows = round_up(C * k, kBlockRows);
    s.margin = round_up((k - 1) / stride, width<T>);
    s.reach = s.W1 + (k - 1) / stride;
    s.wide = round_up(s.reach, width<T>);
    s.ring = stride > k ? stride : k;
    return s;
}

template <class T> struct Parameters {
    const T *filters, *bias, *norm_weight, *norm_bias;
};

// The parameters in padded rows: filters [taps, D], and by_column [k, D, (C, k)] for the gradient
// of x; `offset` is where the entries of a patch lie in the copied rows.
template <class T> struct Packed {
    T *filters, *bias, *gamma, *beta, *zeros, *by_column;
    Packed(Pieces<T>& pieces, const Shape& s)
        : filters(pieces.take(s.taps * s.d)), bias(pieces.take(s.d)), gamma(pieces.take(s.d)),
          beta(pieces.take(s.d)), zeros(pieces.take(s.wide)),
          by_column(pieces.take(s.k * s.D * s.rows)) {}
    void set(const Parameters<T>& p, const Shape& s) const {
        pack(filters, s.taps, s.d, p.filters, s.D, s.taps, true);
        pack(bias, 1, s.d, p.bias, 1, s.D, false);
        pack(gamma, 1, s.d, p.norm_weight, 1, s.D, false);
        pack(beta, 1, s.d, p.norm_bias, 1, s.D, false);
        fill(zeros, s.wide, T(0));
        fill(by_column, s.k * s.D * s.rows, T(0));
        for (int64_t d = 0; d < s.D; ++d)
            for (int64_t ci = 0; ci < s.C * s.k; ++ci)
                for (int64_t j = 0; j < s.k; ++j)
                    by_column[(j * s.D + d) * s.rows + ci] =
                        p.filters[(d * s.C * s.k + ci) * s.k + j];
    }
};

inline void set_offsets(int64_t* offset, const Shape& s) {
    for (int64_t tap = 0; tap < round_up(s.taps, kBlockRows); ++tap)
        offset[tap] = tap < s.taps ? tap / s.k * s.line + tap % s.k : 0;
}

// What one thread works on.
template <class T> struct Tile {
    T *image, *tokens, *rstd;
    Tile(Pieces<T>& pieces, const Shape& s)
        : image(pieces.take(s.C * s.k * s.line)), tokens(pieces.take(s.tile * s.d)),
          rstd(pieces.take(s.tile)) {}

    // The rows of x [C, H, W] under row r of tokens; columns outside x are 0 from the beginning.
    template <class Stored> void copy(const Stored* x, int64_t r, const Shape& s) const {
        const int64_t columns = s.W < s.line - s.padding ? s.W : s.line - s.padding;
        for (int64_t c = 0; c < s.C; ++c)
            for (int64_t i = 0; i < s.k; ++i) {
                const int64_t row = r * s.stride + i - s.padding;
                T* to = image + (c * s.k + i) * s.line + s.padding;
                if (row < 0 || row >= s.H)
                    fill(to, columns, T(0));
                else
                    load_rows(to, x + (c * s.H + row) * s.W, 1, 1, columns, s.W, columns);
            }
    }

    // The normalised row r of tokens of x.
    template <class Stored> void embed(const Stored* x, int64_t r, const Packed<T>& p,
                                       const int64_t* offset, const Shape& s, T eps) const {
        copy(x, r, s);
        matmul(s.W1, s.d, s.taps, Patches<T>{image, s.stride, offset}, p.filters, s.d,
               Start<T>{p.bias, 0}, tokens, s.d);
        normalise(tokens, rstd, s.d, s.W1, s.D, eps);
    }
};

// The rows of the gradient of x that are not complete.
template <class T> struct Ring {
    T *across, *sums, *rows, *line;
    Ring(Pieces<T>& pieces, const Shape& s)
        : across(pieces.take(s.D * (s.margin + s.wide))),
          sums(pieces.take(s.phases * s.rows * s.wide)),
          rows(pieces.take(s.ring * s.C * s.phases * s.wide)),
          line(pieces.take((s.wide + 1) * s.stride + s.padding + s.W)) {}

    T* row(int64_t y, int64_t c, int64_t phase, const Shape& s) const {
        return rows + ((y % s.ring * s.C + c) * s.phases + phase) * s.wide;
    }

    void clear(const Shape& s) const { fill(rows, s.ring * s.C * s.phases * s.wide, T(0)); }

    // Adds what the gradient [W1, D] of row r of tokens, before the norm, gives to x.
    void add(const T* dtokens, int64_t r, const Packed<T>& p, const Shape& s) const {
        const int64_t stride = s.margin + s.wide;
        for (int64_t d = 0; d < s.D; ++d)
            for (int64_t q = 0; q < s.W1; ++q)
                across[d * stride + s.margin + q] = dtokens[q * s.d + d];
        for (int64_t j = 0; j < s.k; ++j) {
            T* sum = sums + j % s.stride * s.rows * s.wide;
            const Start<T> start = j < s.stride ? Start<T>{p.zeros, 0} : Start<T>{sum, s.wide};
            matmul(s.C * s.k, s.wide, s.D, ByColumns<T>{p.by_column + j * s.D * s.rows, s.rows},
                   across + s.margin - j / s.stride, stride, start, sum, s.wide);
        }
        for (int64_t phase = 0; phase < s.phases; ++phase)
            for (int64_t c = 0; c < s.C; ++c)
                for (int64_t i = 0; i < s.k; ++i)
                    add_rows(row(r * s.stride + i, c, phase, s),
                             sums + (phase * s.rows + c * s.k + i) * s.wide, s.wide, 1);
    }

    // Brings the columns of a row into their order; those without an entry stay 0.
    void interleave(const T* row, const Shape& s) const {
        if (s.stride == 2 && s.phases == 2) { // a loop that compilers make vectors of
            for (int64_t q = 0; q < s.reach; ++q)
                line[2 * q] = row[q], line[2 * q + 1] = row[s.wide + q];
            return;
        }
        for (int64_t phase = 0; phase < s.phases; ++phase)
            for (int64_t q = 0; q < s.reach; ++q)
                line[q * s.stride + phase] = row[phase * s.wide + q];
    }

    // Empties the rows that row r of tokens was the last to reach, into the image's gradient dx
    // where it is given.
    template <class Stored> void finish(Stored* dx, int64_t r, const Shape& s) const {
        const int64_t begin = r * s.stride;
        const int64_t end = r + 1 < s.H1 ? begin + s.stride : s.H + s.padding;
        for (int64_t y = begin; y < end; ++y) {
            const bool reached = y < begin + s.k,
                       inside = dx && y >= s.padding && y < s.padding + s.H;
            for (int64_t c = 0; c < s.C; ++c) {
                if (!inside && !reached) continue;
                if (inside) {
                    if (reached)
                        interleave(row(y, c, 0, s), s);
                    else
                        fill(line, s.padding + s.W, T(0));
                    store_row(dx + (c * s.H + y - s.padding) * s.W, line + s.padding, s.W);
                }
                if (reached) fill(row(y, c, 0, s), s.phases * s.wide, T(0));
            }
        }
    }
};

template <class Stored, class T = number_t<Stored>>
int forward(const Stored* x, const Parameters<T>& parameters, const Shape& s, T eps, Stored* y,
            int threads) {
    threads = useful_threads(threads, s.B * s.H1);
    const int64_t shared = size_of<Packed<T>, T>(s), each = size_of<Tile<T>, T>(s);
    Scratch<T> memory(shared + threads * each);
    Scratch<int64_t> offset(round_up(s.taps, kBlockRows));
    if (!memory.data || !offset.data) return EQCVT_NO_MEMORY;
    Pieces<T> pieces(memory.data);
    const Packed<T> p(pieces, s);
    p.set(parameters, s);
    set_offsets(offset.data, s);

    parallel(threads, [&](int thread, int n) {
        Pieces<T> mine(memory.data + shared + thread * each);
        fill(mine.base, each, T(0));
        const Tile<T> t(mine, s);
        const Range range(s.B * s.H1, thread, n);
        for (int64_t row = range.begin; row < range.end; ++row) {
            t.embed(x + row / s.H1 * s.C * s.H * s.W, row % s.H1, p, offset.data, s, eps);
            affine(t.tokens, t.tokens, p.gamma, p.beta, s.d, s.W1);
            for (int64_t q = 0; q < s.W1; ++q)
                store_row(y + (row * s.W1 + q) * s.D, t.tokens + q * s.d, s.D);
        }
    });
    return EQCVT_OK;
}

template <class T> struct Gradients {
    T *filters, *bias, *norm_weight, *norm_bias;
};

// Where the gradients of the parameters lie in a thread's sums.
struct Layout {
    int64_t filters, bias, gamma, beta, size;
    explicit Layout(const Shape& s) {
        filters = 0; // [taps, D]
        bias = round_up(s.taps, kBlockRows) * s.d;
        gamma = bias + s.d;
        beta = gamma + s.d;
        size = round_up(beta + s.d, 16);
    }
};

template <class Stored, class T = number_t<Stored>>
int backward(const Stored* dy, const Stored* x, const Parameters<T>& parameters, const Shape& s,
             T eps, Stored* dx, const Gradients<T>& gradients, int threads) {
    threads = useful_threads(threads, s.B * s.H1);
    const Layout at(s);
    const int64_t shared = size_of<Packed<T>, T>(s), tile = size_of<Tile<T>, T>(s);
    const int64_t ring = dx ? size_of<Ring<T>, T>(s) : 0, dtokens = s.tile * s.d;
    const int64_t each = at.size + tile + round_up(dtokens, 16) + ring;
    Scratch<T> memory(shared + threads * each);
    Scratch<double> totals(threads * at.size);
    Scratch<int64_t> offset(round_up(s.taps, kBlockRows));
    if (!memory.data || !totals.data || !offset.data) return EQCVT_NO_MEMORY;
    Pieces<T> pieces(memory.data);
    const Packed<T> p(pieces, s);
    p.set(parameters, s);
    set_offsets(offset.data, s);

    parallel(threads, [&](int thread, int n) {
        T* part = memory.data + shared + thread * each;
        fill(part, each, T(0));
        Sums<T> sums(part, totals.data + thread * at.size, at.size);
        Pieces<T> mine(part + at.size);
        const Tile<T> t(mine, s);
        T* d = mine.take(dtokens);
        const Ring<T> waiting(mine, s);
        const Range range(s.B * s.H1, thread, n);
        for (int64_t first = range.begin; first < range.end;) {
            const int64_t image = first / s.H1, begin = first % s.H1;
            const int64_t next = (image + 1) * s.H1, last = next < range.end ? next : range.end;
            const Stored* x_image = x + image * s.C * s.H * s.W;
            Stored* dx_image = dx ? dx + image * s.C * s.H * s.W : nullptr;
            const int64_t before = dx ? (s.k - 1) / s.stride : 0;
            if (dx) waiting.clear(s);
            for (int64_t r = begin > before ? begin - before : 0; r < last - image * s.H1; ++r) {
                const bool owned = r >= begin;
                t.embed(x_image, r, p, offset.data, s, eps);
                load_rows(d, dy + (image * s.H1 + r) * s.W1 * s.D, s.W1, s.W1, s.D, s.D, s.d);
                if (owned) {
                    add_products(part + at.gamma, d, t.tokens, s.d, s.W1);
                    add_rows(part + at.beta, d, s.d, s.W1);
                }
                normalise_backward(d, t.tokens, t.rstd, p.gamma, s.d, s.W1, s.D);
                if (owned) {
                    add_rows(part + at.bias, d, s.d, s.W1);
                    matmul(s.taps, s.d, s.W1, PatchesByColumns<T>{t.image, s.stride, offset.data},
                           d, s.d, Start<T>{part + at.filters, s.d}, part + at.filters, s.d);
                    sums.added(s.W1);
                }
                if (!dx) continue;
                waiting.add(d, r, p, s);
                waiting.finish(owned ? dx_image : nullptr, r, s);
            }
            first = last;
        }
        sums.flush();
    });

    const auto collect = [&](T* to, int64_t columns, int64_t begin, int64_t column) {
        reduce(to, s.D, columns, totals.data + begin, 1, column, at.size, threads);
    };
    collect(gradients.filters, s.taps, at.filters, s.d);
    collect(gradients.bias, 1, at.bias, 0);
    collect(gradients.norm_weight, 1, at.gamma, 0);
    collect(gradients.norm_bias, 1, at.beta, 0);
    return EQCVT_OK;
}

bool valid(int64_t B, int64_t C, int64_t H, int64_t W, int64_t D, int64_t k, int64_t stride,
           int64_t padding) {
    return B >= 0 && C > 0 && D > 0 && k > 0 && stride > 0 && padding >= 0 && H > 0 && W > 0 &&
           H + 2 * padding >= k && W + 2 * padding >= k;
}

} // namespace

int EQCVT_KERNEL(token_embed_forward)(int dtype, const void* x, const void* filters,
                                      const void* bias, const void* norm_weight,
                                      const void* norm_bias, int64_t B, int64_t C, int64_t H,
                                      int64_t W, int64_t D, int64_t k, int64_t stride,
                                      int64_t padding, double eps, void* y, int threads) {
    if (!valid(B, C, H, W, D, k, stride, padding)) return EQCVT_BAD_SIZE;
    return with_dtype(dtype, [&](auto zero) {
        using Stored = decltype(zero);
        using T = number_t<Stored>;
        const Parameters<T> parameters = {
            static_cast<const T*>(filters), static_cast<const T*>(bias),
            static_cast<const T*>(norm_weight), static_cast<const T*>(norm_bias)};
        return forward(static_cast<const Stored*>(x), parameters,
                       make_shape<T>(B, C, H, W, D, k, stride, padding), static_cast<T>(eps),
                       static_cast<Stored*>(y), threads);
    });
}

int EQCVT_KERNEL(token_embed_backward)(int dtype, const void* dy, const void* x,
                                       const void* filters, const void* bias,
                                       const void* norm_weight, const void* norm_bias, int64_t B,
                                       int64_t C, int64_t H, int64_t W, int64_t D, int64_t k,
                                       int64_t stride, int64_t padding, double eps, void* dx,
                                       void* dfilters, void* dbias, void* dnorm_weight,
                                       void* dnorm_bias, int threads) {
    if (!valid(B, C, H, W, D, k, stride, padding)) return EQCVT_BAD_SIZE;
    return with_dtype(dtype, [&](auto zero) {
        using Stored = decltype(zero);
        using T = number_t<Stored>;
        const Parameters<T> parameters = {
            static_cast<const T*>(filters), static_cast<const T*>(bias),
            static_cast<const T*>(norm_weight), static_cast<const T*>(norm_bias)};
        const Gradients<T> gradients = {static_cast<T*>(dfilters), static_cast<T*>(dbias),
                                        static_cast<T*>(dnorm_weight), static_cast<T*>(dnorm_bias)};
        return backward(static_cast<const Stored*>(dy), static_cast<const Stored*>(x), parameters,
                        make_shape<T>(B, C, H, W, D, k, stride, padding), static_cast<T>(eps),
                        static_cast<Stored*>(dx), gradients, threads);
    });
}
