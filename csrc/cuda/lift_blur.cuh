// The separable blur of planes in shared memory, in place, one axis after the other.
//
// Sums are in fp32; what is written back between the axes has the planes' type. KB is the number of
// taps, known to the compiler, with a step of 1; KB = 0 takes any number and step. A plane has
// `pitch` values to a row, an even number.
#pragma once

#include "lift_conv.cuh"

namespace {

// Planes' rows of one length start on different banks.
inline int blur_pitch(int columns) { return static_cast<int>(columns + (columns % 4 ? 0 : 2)); }

// Down the columns: row y of `rows` (a multiple of kBlurRows) from rows y step .. y step + taps
// - 1. A thread owns two columns of a plane, so that nobody else reads what it overwrites.
constexpr int kBlurRows = 4;
template <class T, int KB> __device__ void blur_columns(T* planes, int count, int plane, int pitch,
                                                        int columns, int rows, const float* line,
                                                        int kb, int step) {
    const int taps = KB ? KB : kb;
    if (KB) step = 1;
    float weight[KB ? KB : 1];
    for (int t = 0; t < KB; ++t) weight[t] = line[t];
    for (int task = threadIdx.x; task < count * (columns / 2); task += kThreads) {
        T* column = planes + task / (columns / 2) * plane + task % (columns / 2) * 2;
        for (int y = 0; y < rows; y += kBlurRows) {
            float2 sum[kBlurRows];
#pragma unroll
            for (int e = 0; e < kBlurRows; ++e) sum[e] = make_float2(0, 0);
#pragma unroll
            for (int t = 0; t < taps; ++t) {
                const float w = KB ? weight[KB ? t : 0] : line[t];
#pragma unroll
                for (int e = 0; e < kBlurRows; ++e) {
                    const float2 v = load_pair(column + ((y + e) * step + t) * pitch);
                    sum[e].x = fmaf(w, v.x, sum[e].x);
                    sum[e].y = fmaf(w, v.y, sum[e].y);
                }
            }
#pragma unroll
            for (int e = 0; e < kBlurRows; ++e) {
                store_pair(column + (y + e) * pitch, sum[e].x, sum[e].y);
            }
        }
    }
}

// Along the rows: column x of `columns` (even) from columns x step .. x step + taps - 1. A thread
// owns a row of a plane.
template <class T, int KB> __device__ void blur_rows(T* planes, int count, int plane, int pitch,
                                                     int columns, int rows, const float* line,
                                                     int kb, int step) {
    float weight[KB ? KB : 1];
    for (int t = 0; t < KB; ++t) weight[t] = line[t];
    for (int task = threadIdx.x; task < count * rows; task += kThreads) {
        T* row = planes + task / rows * plane + task % rows * pitch;
        if constexpr (KB != 0) {
            float v[KB + 1]; // the window of two results
#pragma unroll
            for (int t = 0; t < KB - 1; t += 2) {
                const float2 pair = load_pair(row + t);
                v[t] = pair.x;
                v[t + 1] = pair.y;
            }
#pragma unroll 2
            for (int x = 0; x < columns; x += 2) {
                const float2 pair = load_pair(row + x + KB - 1);
                v[KB - 1] = pair.x;
                v[KB] = pair.y;
                float even = 0, odd = 0;
#pragma unroll
                for (int t = 0; t < KB; ++t) {
                    even = fmaf(weight[t], v[t], even);
                    odd = fmaf(weight[t], v[t + 1], odd);
                }
                store_pair(row + x, even, odd);
#pragma unroll
                for (int t = 0; t < KB - 1; ++t) v[t] = v[t + 2];
            }
        } else {
            for (int x = 0; x < columns; ++x) {
                float sum = 0;
                for (int t = 0; t < kb; ++t) sum = fmaf(line[t], to_float(row[x * step + t]), sum);
                row[x] = from_float<T>(sum);
            }
        }
    }
}

} // namespace
