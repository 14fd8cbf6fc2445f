// Rows of channels: tokens as stored to and from numbers in rows of whole vectors.
#pragma once

#include "simd.h"

namespace {

// to[i] = the D entries at from + i * from_stride, zeros behind them up to `stride`; then rows of
// zeros from `count` up to `padded`.
template <class T, class S> inline void load_rows(S* to, const T* from, int64_t count,
                                                  int64_t padded, int64_t D, int64_t from_stride,
                                                  int64_t stride) {
    for (int64_t i = 0; i < count; ++i) {
        S* row = to + i * stride;
        const T* entry = from + i * from_stride;
        int64_t d = 0;
        for (; d + width<S> <= D; d += width<S>) store<S>(row + d, load_numbers(entry + d));
        for (; d < D; ++d) row[d] = to_number(entry[d]);
        for (; d < stride; ++d) row[d] = 0;
    }
    for (int64_t i = count * stride; i < padded * stride; ++i) to[i] = 0;
}

template <class T, class S> EQCVT_INLINE void store_row(T* to, const S* row, int64_t D) {
    int64_t d = 0;
    for (; d + width<S> <= D; d += width<S>) store_numbers(to + d, load(row + d));
    for (; d < D; ++d) from_number(to + d, row[d]);
}

} // namespace
