// Small matrix products that stay in registers: C[r][lanes] = sum over k of A(r, k) B[k][lanes].
//
// A block of kRows<T> rows by some vectors of C is held while k runs; each step loads the vectors
// of B once and broadcasts one number of A per row. So a step has more multiply-adds than twice its
// loads, which is what keeps both multipliers of a core busy.
#pragma once

#include "simd.h"

namespace {

#if defined(__AVX512F__) || defined(EQCVT_EMULATE_MATRIX_UNIT) // 32 registers
template <class T> constexpr int kRows = 8;
template <class T> constexpr int kVectors = 3;
#elif defined(__AVX__) // 16
template <class T> constexpr int kRows = 4;
template <class T> constexpr int kVectors = 3;
#else                  // 16, and a product needs one of them before it is added
template <class T> constexpr int kRows = 4;
template <class T> constexpr int kVectors = 2;
#endif

// Lanes of the widest block, a multiple of kRows<T>.
template <class T> constexpr int kLanes = kVectors<T> * width<T>;

// How A lies in memory: A(r, k) is a[r * stride + k], or a[k * stride + r].
enum class Lies { by_row, by_column };

// Calls use(r, v, C[r][v]) with r and v known to the compiler.
template <Lies LIES, int V, class T, class Use>
EQCVT_INLINE void product_block(const T* a, int64_t stride, const T* b, int64_t b_stride,
                                int64_t depth, const Use& use) {
    constexpr int R = kRows<T>;
    vec<T> c[R][V] = {};
    for (int64_t k = 0; k < depth; ++k) {
        vec<T> row[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) row[v] = load(b + k * b_stride + v * width<T>);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const T s = LIES == Lies::by_row ? a[r * stride + k] : a[k * stride + r];
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) c[r][v] += s * row[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) use(r, v, c[r][v]);
}

// Calls use(r, v, C[r][v]) for `rows` rows, a multiple of kRows<T>, of kLanes<T> lanes; v is known
// to the compiler.
template <Lies LIES, class T, class Use> EQCVT_INLINE void
lane_product(int64_t rows, const T* a, int64_t stride, const T* b, int64_t depth, const Use& use) {
    for (int64_t r0 = 0; r0 < rows; r0 += kRows<T>)
        product_block<LIES, kVectors<T>>(a + r0 * (LIES == Lies::by_row ? stride : 1), stride, b,
                                         kLanes<T>, depth,
                                         [&](int r, int v, vec<T> x) { use(r0 + r, v, x); });
}

// Calls use(r, i, C[r][i .. i + width)) for `rows` rows, a multiple of kRows<T>, and `columns`
// columns, a multiple of width<T>.
template <Lies LIES, class T, class Use>
EQCVT_INLINE void product(int64_t rows, int64_t columns, const T* a, int64_t stride, const T* b,
                          int64_t b_stride, int64_t depth, const Use& use) {
    constexpr int W = width<T>;
    for (int64_t r0 = 0; r0 < rows; r0 += kRows<T>) {
        const T* a0 = a + r0 * (LIES == Lies::by_row ? stride : 1);
        for (int64_t i0 = 0; i0 < columns;) {
            const auto shifted = [&](int r, int v, vec<T> x) { use(r0 + r, i0 + v * W, x); };
            const int64_t left = (columns - i0) / W;
            // 4 is 2 + 2, not 3 + 1: one vector has too few sums to hide an addition's latency.
            if (left >= 3 && left != 4) {
                product_block<LIES, 3>(a0, stride, b + i0, b_stride, depth, shifted);
                i0 += 3 * W;
            } else if (left >= 2) {
                product_block<LIES, 2>(a0, stride, b + i0, b_stride, depth, shifted);
                i0 += 2 * W;
            } else {
                product_block<LIES, 1>(a0, stride, b + i0, b_stride, depth, shifted);
                i0 += W;
            }
        }
    }
}

} // namespace
