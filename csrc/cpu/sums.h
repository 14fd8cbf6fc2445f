// Gradients of parameters: sums over all tokens, of which each thread makes its part.
#pragma once

#include "simd.h"

namespace {

// One thread's sums of `size` entries. `part` takes some hundred terms in T and is then moved into
// `total`, so that the number of tokens costs no accuracy.
template <class T> struct Sums {
    static constexpr int64_t terms = 1024;
    T* part;
    double* total;
    int64_t size, pending = 0;

    Sums(T* part_, double* total_, int64_t size_) : part(part_), total(total_), size(size_) {
        for (int64_t i = 0; i < size; ++i) part[i] = 0, total[i] = 0;
    }
    // Call after `count` more terms have been added to `part`.
    void added(int64_t count) {
        pending += count;
        if (pending >= terms) flush();
    }
    void flush() {
        for (int64_t i = 0; i < size; ++i) total[i] += part[i], part[i] = 0;
        pending = 0;
    }
};

// to[i, j] = the sum over threads of total[i * row + j * column], in order; the totals of a thread
// are `size` behind those of the one before.
template <class T> inline void reduce(T* to, int64_t rows, int64_t columns, const double* total,
                                      int64_t row, int64_t column, int64_t size, int threads) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) {
            double sum = 0;
            for (int t = 0; t < threads; ++t) sum += total[t * size + i * row + j * column];
            to[i * columns + j] = static_cast<T>(sum);
        }
}

} // namespace
