// The convolution under the steerable block: geometry, the padded image, and two micro-kernels, one
// for u = bank * x and one for its gradient by the bank. Lanes are output columns in both.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace {

// Accumulators of the micro-kernels, FILTERS x VECTORS and FILTERS x TAPS, fill the registers.
#if EQCVT_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int FILTERS = 8, VECTORS = 3, TAPS = 3;
#elif EQCVT_VECTOR_BYTES == 32
constexpr int FILTERS = 4, VECTORS = 3, TAPS = 3;
#else
constexpr int FILTERS = 4, VECTORS = 2, TAPS = 2;
#endif
// Filters are packed in blocks of this many, the last one of 4 or 8.
constexpr int BLOCK = 8;
// Taps that are summed in one go.
constexpr int64_t CHUNK = 64;

EQCVT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
EQCVT_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
EQCVT_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sizes of one call. The padded image of one channel has `rows` rows; its columns are sorted by
// their remainder modulo the stride, `phase` numbers for each, so that a strided convolution reads
// consecutive numbers too. A tap is one (c, i, j) of a filter.
struct Conv {
    int64_t B, C, H, W, F, G, k, stride, padding;
    int64_t filters, packed_filters, group, taps, H1, W1, vectors, phase, row, plane;

    // Lanes of a vector decide about the length of rows.
    Conv(int64_t lanes_, int64_t B_, int64_t C_, int64_t H_, int64_t W_, int64_t F_, int64_t G_,
         int64_t k_, int64_t stride_, int64_t padding_)
        : B(B_), C(C_), H(H_), W(W_), F(F_), G(G_), k(k_), stride(stride_), padding(padding_) {
        filters = F * G;
        packed_filters = round_up(filters, 4);
        // The fewest whole fields that fill blocks: a multiple of G and of BLOCK.
        group = G;
        while (group % BLOCK) group += G;
        taps = C * k * k;
        H1 = (H + 2 * padding - k) / stride + 1;
        W1 = (W + 2 * padding - k) / stride + 1;
        vectors = ceil_div(W1, lanes_);
        int64_t read = vectors * lanes_ + (k - 1) / stride;
        phase = round_up(larger(read, ceil_div(W + 2 * padding, stride)), lanes_);
        row = stride * phase;
        plane = (H + 2 * padding) * row;
    }

    // Filters of the group of fields that begins with this filter, rounded up as they are packed.
    int64_t in_group(int64_t first) const { return smaller(group, packed_filters - first); }
};

// Writes one image times the mask inside the borders of `out`, which are zero already.
template <class A, class T> void pad(const Conv& c, const A* x, const T* mask, T* out) {
    for (int64_t channel = 0; channel < c.C; ++channel) {
        for (int64_t h = 0; h < c.H; ++h) {
            const A* EQCVT_RESTRICT from = x + (channel * c.H + h) * c.W;
            const T* EQCVT_RESTRICT factor = mask ? mask + h * c.W : nullptr;
            for (int64_t part = 0; part < c.stride; ++part) {
                int64_t first = ceil_div(larger(c.padding - part, 0), c.stride);
                int64_t column = first * c.stride + part - c.padding;
                T* EQCVT_RESTRICT to =
                    out + channel * c.plane + (h + c.padding) * c.row + part * c.phase + first;
                if (c.stride == 1 && factor) {
                    for (int64_t w = 0; w < c.W; ++w) to[w] = to_number(from[w]) * factor[w];
                } else {
                    for (int64_t w = column; w < c.W; w += c.stride, ++to)
                        *to = factor ? to_number(from[w]) * factor[w] : to_number(from[w]);
                }
            }
        }
    }
}

// Where each tap reads in the padded image, from where the output row and column begin.
inline void tap_offsets(const Conv& c, int64_t* offset) {
    for (int64_t channel = 0; channel < c.C; ++channel)
        for (int64_t i = 0; i < c.k; ++i)
            for (int64_t j = 0; j < c.k; ++j)
                *offset++ = channel * c.plane + i * c.row + j % c.stride * c.phase + j / c.stride;
}

// Packs value(filter, tap) as [block][tap][filter of the block], with zeros after the last filter.
template <class T, class Value>
void pack(int64_t filters, int64_t taps, T* out, const Value& value) {
    for (int64_t first = 0; first < filters; first += BLOCK) {
        int64_t count = smaller(BLOCK, round_up(filters, 4) - first);
        for (int64_t tap = 0; tap < taps; ++tap)
            for (int64_t f = first; f < first + count; ++f)
                *out++ = f < filters ? value(f, tap) : T(0);
    }
}

// put(f, v, value): the sum over taps of weight[tap][f] * x[offset[tap] + v-th vector]. Sums of
// CHUNK taps are added up in their turn: rounding grows with the square root of both counts.
template <class T, int NF, int NV, class Put>
EQCVT_INLINE void convolve_block(const T* x, const int64_t* offset, int64_t taps, const T* weight,
                                 int64_t weights, const Put& put) {
    vec<T> total[NF][NV] = {};
    for (int64_t tap = 0; tap < taps;) {
        vec<T> acc[NF][NV] = {};
        for (int64_t end = smaller(taps, tap + CHUNK); tap < end; ++tap, weight += weights) {
            const T* from = x + offset[tap];
            vec<T> in[NV];
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) in[v] = load(from + v * width<T>);
#pragma GCC unroll 8
            for (int f = 0; f < NF; ++f) {
                vec<T> w = broadcast(weight[f]);
#pragma GCC unroll 8
                for (int v = 0; v < NV; ++v) acc[f][v] += in[v] * w;
            }
        }
#pragma GCC unroll 8
        for (int f = 0; f < NF; ++f)
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) total[f][v] += acc[f][v];
    }
#pragma GCC unroll 8
    for (int f = 0; f < NF; ++f)
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) put(f, v, total[f][v]);
}

template <class T, int NF, class Put>
EQCVT_INLINE void convolve_filters(const T* x, const int64_t* offset, int64_t taps, const T* weight,
                                   int64_t weights, int64_t vectors, int64_t first,
                                   const Put& put) {
    int64_t v0 = 0;
    auto from = [&](int f, int v, vec<T> value) { put(first + f, v0 + v, value); };
    for (; v0 + VECTORS <= vectors; v0 += VECTORS)
        convolve_block<T, NF, VECTORS>(x + v0 * width<T>, offset, taps, weight, weights, from);
    if (vectors - v0 == 2)
        convolve_block<T, NF, 2>(x + v0 * width<T>, offset, taps, weight, weights, from);
    else if (vectors - v0 == 1)
        convolve_block<T, NF, 1>(x + v0 * width<T>, offset, taps, weight, weights, from);
}

// Calls put(f, v, value) with the v-th vector of an output row, for `filters` packed filters.
template <class T, class Put> void convolve_row(const T* x, const int64_t* offset, int64_t taps,
                                                const T* weight, int64_t filters, int64_t vectors,
                                                const Put& put) {
    for (int64_t f = 0; f < filters; f += BLOCK) {
        const T* w = weight + f * taps;
        if (filters - f < BLOCK) {
            convolve_filters<T, 4>(x, offset, taps, w, 4, vectors, f, put);
        } else {
            for (int part = 0; part < BLOCK; part += FILTERS)
                convolve_filters<T, FILTERS>(x, offset, taps, w + part, BLOCK, vectors, f + part,
                                             put);
        }
    }
}

// Rows of several filters: row r of filter f begins at data + f * filter + r * row.
template <class T> struct Rows {
    T* data;
    int64_t filter, row;
    T* at(int64_t f, int64_t r) const { return data + f * filter + r * row; }
};

// Has all bits set in the lanes of the last vector of n numbers that hold one.
template <class T> inline ints<T> tail_mask(int64_t n) {
    int64_t used = n - (ceil_div(n, width<T>) - 1) * width<T>;
    ints<T> mask{};
    memset(&mask, 0xff, static_cast<size_t>(used) * sizeof(T));
    return mask;
}

template <class T> EQCVT_INLINE vec<T> masked(vec<T> v, ints<T> mask) {
    return as_floats<T>(as_ints<T>(v) & mask);
}

// acc[f][t] += d[f] * tap[t] at one vector of a row. The numbers of d after the last column are
// zero; those of x are masked there, or an infinity of another column would come in as NaN.
template <class T, int NF, int NT, bool LAST>
EQCVT_INLINE void correlate_vector(const T* d, int64_t filter, const T* const (&tap)[NT],
                                   int64_t at, ints<T> tail, vec<T> (&acc)[NF][NT]) {
    vec<T> in[NT];
#pragma GCC unroll 8
    for (int t = 0; t < NT; ++t) {
        in[t] = load(tap[t] + at);
        if (LAST) in[t] = masked<T>(in[t], tail);
    }
#pragma GCC unroll 8
    for (int f = 0; f < NF; ++f) {
        vec<T> g = load(d + f * filter + at);
        hold(g);
#pragma GCC unroll 8
        for (int t = 0; t < NT; ++t) acc[f][t] += g * in[t];
    }
}

// acc[f][t] = sum over rows and columns of d[f] * x[offset[t]].
template <class T, int NF, int NT, class Put>
EQCVT_INLINE void correlate_block(const Rows<T>& d, const T* x, int64_t x_row,
                                  const int64_t* offset, int64_t rows, int64_t vectors,
                                  ints<T> tail, const Put& put) {
    vec<T> acc[NF][NT] = {};
    const T* tap[NT];
    for (int t = 0; t < NT; ++t) tap[t] = x + offset[t];
    const int64_t last = (vectors - 1) * width<T>;
    for (int64_t r = 0; r < rows; ++r) {
        const T* from = d.at(0, r);
        for (int64_t at = 0; at < last; at += width<T>)
            correlate_vector<T, NF, NT, false>(from, d.filter, tap, at, tail, acc);
        correlate_vector<T, NF, NT, true>(from, d.filter, tap, last, tail, acc);
        for (int t = 0; t < NT; ++t) tap[t] += x_row;
    }
#pragma GCC unroll 8
    for (int f = 0; f < NF; ++f)
#pragma GCC unroll 8
        for (int t = 0; t < NT; ++t) put(f, t, acc[f][t]);
}

// Calls put(f, tap, sum) with the lanes' sums over rows of d[f] * x, for each filter and tap.
template <class T, class Put> void correlate_rows(const Rows<T>& d, const T* x, int64_t x_row,
                                                  const int64_t* offset, int64_t taps,
                                                  int64_t filters, int64_t rows, int64_t vectors,
                                                  ints<T> tail, const Put& put) {
    for (int64_t f0 = 0; f0 < filters;) {
        Rows<T> some = {d.at(f0, 0), d.filter, d.row};
        bool full = filters - f0 >= FILTERS;
        for (int64_t t0 = 0; t0 < taps;) {
            auto to = [&](int f, int t, vec<T> value) { put(f0 + f, t0 + t, value); };
            bool many = taps - t0 >= TAPS;
            if (full && many)
                correlate_block<T, FILTERS, TAPS>(some, x, x_row, offset + t0, rows, vectors, tail,
                                                  to);
            else if (full)
                correlate_block<T, FILTERS, 1>(some, x, x_row, offset + t0, rows, vectors, tail,
                                               to);
            else if (many)
                correlate_block<T, 4, TAPS>(some, x, x_row, offset + t0, rows, vectors, tail, to);
            else
                correlate_block<T, 4, 1>(some, x, x_row, offset + t0, rows, vectors, tail, to);
            t0 += many ? TAPS : 1;
        }
        f0 += full ? FILTERS : 4;
    }
}

// The sum of x over rows and columns.
template <class T>
double window_sum(const T* x, int64_t x_row, int64_t rows, int64_t vectors, ints<T> tail) {
    double total = 0;
    for (int64_t r = 0; r < rows; ++r, x += x_row) {
        vec<T> acc = masked<T>(load(x + (vectors - 1) * width<T>), tail);
        for (int64_t v = 0; v < vectors - 1; ++v) acc += load(x + v * width<T>);
        total += sum<T>(acc);
    }
    return total;
}

} // namespace
