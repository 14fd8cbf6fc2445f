// Layer normalisation of the rows of a tile (tile.h).
#pragma once

#include "tile.h"

namespace {

// 1 in those lanes of a row's last vector that belong to the row, 0 in the others.
template <class T> inline vec<T> last_lanes(int64_t columns) {
    constexpr int W = width<T>;
    T lane[W];
    for (int i = 0; i < W; ++i) lane[i] = i <= (columns - 1) % W ? T(1) : T(0);
    return load(lane);
}

// x becomes (x - mean) / sqrt(variance + eps), the latter's inverse rstd[row].
template <class T>
inline void normalise(T* x, T* rstd, int64_t stride, int64_t rows, int64_t columns, T eps) {
    constexpr int W = width<T>;
    const int64_t end = round_up(columns, W);
    const vec<T> last = last_lanes<T>(columns);
    const T count = static_cast<T>(columns);
    for (int64_t i = 0; i < rows; ++i) {
        T* row = x + i * stride;
        vec<T> total = {};
        for (int64_t j = 0; j < end; j += W) total += load(row + j);
        const T mean = sum<T>(total) / count;
        vec<T> squares = {};
        for (int64_t j = 0; j < end; j += W) {
            vec<T> centred = load(row + j) - mean;
            if (j + W == end) centred = last != 0 ? centred : vec<T>{};
            store<T>(row + j, centred);
            squares += centred * centred;
        }
        rstd[i] = sum<T>(squares) / count;
    }
    // Apart from the sums, so that the roots of several rows are under way at once.
    for (int64_t i = 0; i < rows; ++i) rstd[i] = 1 / sqrt(rstd[i] + eps);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < end; j += W)
            store<T>(x + i * stride + j, load(x + i * stride + j) * rstd[i]);
}

// to = x * scale + shift.
template <class T> inline void affine(T* to, const T* x, const T* scale, const T* shift,
                                      int64_t stride, int64_t rows) {
    constexpr int W = width<T>;
    for (int64_t i = 0; i < rows; ++i, x += stride, to += stride)
        for (int64_t j = 0; j < stride; j += W)
            store<T>(to + j, load(x + j) * load(scale + j) + load(shift + j));
}

// From the gradient d of affine(normalise(x)) that of x, in its place; y is normalise(x).
template <class T> inline void normalise_backward(T* d, const T* y, const T* rstd, const T* scale,
                                                  int64_t stride, int64_t rows, int64_t columns) {
    constexpr int W = width<T>;
    const int64_t end = round_up(columns, W);
    const vec<T> last = last_lanes<T>(columns);
    const T count = static_cast<T>(columns);
    for (int64_t i = 0; i < rows; ++i, d += stride, y += stride) {
        vec<T> total = {}, along = {};
        for (int64_t j = 0; j < end; j += W) {
            vec<T> g = load(d + j) * load(scale + j);
            if (j + W == end) g = last != 0 ? g : vec<T>{};
            store(d + j, g);
            total += g;
            along += g * load(y + j);
        }
        const T mean = sum<T>(total) / count, slope = sum<T>(along) / count;
        for (int64_t j = 0; j < end; j += W)
            store<T>(d + j, (load(d + j) - mean - load(y + j) * slope) * rstd[i]);
    }
}

} // namespace
