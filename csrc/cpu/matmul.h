// Products of small matrices, c[i, :] = start[i, :] + sum over k of a(i, k) b[k, :].
//
// The columns of b and c are the lanes of vectors, the entries of a are broadcast. A block of c
// stays in registers over all k; what a(i, k) is says a view, below, so that convolutions and
// transposed matrices need no copies.
#pragma once

#include "simd.h"

namespace {

// Rows of a block; with its at most 3 vectors a row, one row of b and one entry of a they fill the
// 32 registers of AVX-512, or the 16 of other instruction sets.
#if defined(__AVX512F__)
constexpr int64_t kBlockRows = 8;
#else
constexpr int64_t kBlockRows = 4;
#endif

// a(i, k) = data[i * stride + k].
template <class T> struct ByRows {
    const T* data;
    int64_t stride;
    EQCVT_INLINE ByRows from(int64_t i) const { return {data + i * stride, stride}; }
    EQCVT_INLINE T operator()(int i, int64_t k) const { return data[i * stride + k]; }
};

// a(i, k) = data[k * stride + i].
template <class T> struct ByColumns {
    const T* data;
    int64_t stride;
    EQCVT_INLINE ByColumns from(int64_t i) const { return {data + i, stride}; }
    EQCVT_INLINE T operator()(int i, int64_t k) const { return data[k * stride + i]; }
};

// a(i, k) = data[i * stride + offset[k]]: entry k of the patch of pixel i.
template <class T> struct Patches {
    const T* data;
    int64_t stride;
    const int64_t* offset;
    EQCVT_INLINE Patches from(int64_t i) const { return {data + i * stride, stride, offset}; }
    EQCVT_INLINE T operator()(int i, int64_t k) const { return data[i * stride + offset[k]]; }
};

// The transpose of Patches.
template <class T> struct PatchesByColumns {
    const T* data;
    int64_t stride;
    const int64_t* offset;
    EQCVT_INLINE PatchesByColumns from(int64_t i) const { return {data, stride, offset + i}; }
    EQCVT_INLINE T operator()(int i, int64_t k) const { return data[k * stride + offset[i]]; }
};

// What a product is added to, when it is complete: rows `stride` apart, 0 for the same row
// everywhere.
template <class T> struct Start {
    const T* data;
    int64_t stride;
};

template <int V, class T, class A>
inline void multiply_block(int64_t depth, A a, const T* EQCVT_RESTRICT b, int64_t b_stride,
                           Start<T> start, T* c, int64_t c_stride) {
    constexpr int R = static_cast<int>(kBlockRows), W = width<T>;
    vec<T> sum[R][V] = {};
    for (int64_t k = 0; k < depth; ++k) {
        vec<T> row[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) row[v] = load(b + k * b_stride + v * W);
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
            const vec<T> factor = broadcast(a(i, k));
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sum[i][v] += factor * row[v];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            const vec<T> from = load(start.data + i * start.stride + v * W);
            store<T>(c + i * c_stride + v * W, from + sum[i][v]);
        }
}

// `columns` must be a multiple of the width of a vector; `rows` is rounded up to whole blocks, so
// c, and what a and start refer to, must have memory for them.
template <class T, class A> inline void matmul(int64_t rows, int64_t columns, int64_t depth, A a,
                                               const T* b, int64_t b_stride, Start<T> start, T* c,
                                               int64_t c_stride) {
    constexpr int64_t W = width<T>;
    for (int64_t j = 0; j < columns;) {
        const int64_t left = (columns - j) / W;
        // 4 = 2 + 2: a single vector a row has too few sums to hide the latency of an addition.
        const int64_t vectors = left == 3 || left > 4 ? 3 : left > 1 ? 2 : 1;
        for (int64_t i = 0; i < rows; i += kBlockRows) {
            const Start<T> from = {start.data + i * start.stride + j, start.stride};
            T* to = c + i * c_stride + j;
            if (vectors == 3)
                multiply_block<3>(depth, a.from(i), b + j, b_stride, from, to, c_stride);
            else if (vectors == 2)
                multiply_block<2>(depth, a.from(i), b + j, b_stride, from, to, c_stride);
            else
                multiply_block<1>(depth, a.from(i), b + j, b_stride, from, to, c_stride);
        }
        j += vectors * W;
    }
}

// The matrix [rows, columns], or with `transposed` its transpose, in `padded_rows` rows `stride`
// apart, with zeros around it.
template <class T> inline void pack(T* EQCVT_RESTRICT to, int64_t padded_rows, int64_t stride,
                                    const T* from, int64_t rows, int64_t columns, bool transposed) {
    for (int64_t i = 0; i < padded_rows * stride; ++i) to[i] = 0;
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j)
            to[transposed ? j * stride + i : i * stride + j] = from[i * columns + j];
}

} // namespace
