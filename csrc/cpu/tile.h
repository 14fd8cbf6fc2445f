// Tiles: some rows of tokens in a thread's own memory, as numbers.
//
// A row has `columns` entries, and is followed by others to a whole number of vectors, `stride`;
// those are 0 when a row has been read and garbage later on, so they are left out of sums along it.
#pragma once

#include "matmul.h"
#include "pieces.h"
#include "rows.h"
#include "simd.h"

namespace {

// The stride of rows: whole vectors, and whole blocks of rows when a tile is read as columns.
template <class T> constexpr int64_t padded(int64_t columns) {
    return round_up(columns, width<T> > kBlockRows ? width<T> : kBlockRows);
}

template <class T> inline void fill(T* to, int64_t count, T value) {
    for (int64_t i = 0; i < count; ++i) to[i] = value;
}

// sums[j] += the sum over rows of entry(i, j), a vector: in short runs, so that rounding adds up
// over few terms.
template <class T, class Entry>
EQCVT_INLINE void add_entries(T* sums, int64_t columns, int64_t rows, const Entry& entry) {
    constexpr int64_t run = 16;
    for (int64_t j = 0; j < columns; j += width<T>) {
        vec<T> total = {};
        for (int64_t begin = 0; begin < rows; begin += run) {
            const int64_t end = begin + run < rows ? begin + run : rows;
            vec<T> part = {};
            for (int64_t i = begin; i < end; ++i) part += entry(i, j);
            total += part;
        }
        store<T>(sums + j, load(sums + j) + total);
    }
}

// sums[j] += the sum over rows of x.
template <class T> inline void add_rows(T* sums, const T* x, int64_t stride, int64_t rows) {
    add_entries(sums, stride, rows, [=](int64_t i, int64_t j) { return load(x + i * stride + j); });
}

// The same of the products of x and y.
template <class T>
inline void add_products(T* sums, const T* x, const T* y, int64_t stride, int64_t rows) {
    add_entries(sums, stride, rows, [=](int64_t i, int64_t j) {
        return load(x + i * stride + j) * load(y + i * stride + j);
    });
}

} // namespace
