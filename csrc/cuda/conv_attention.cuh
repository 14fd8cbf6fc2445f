// What the attention kernels share: the shapes of their tiles and the padded copies of operands.
#pragma once

#include <type_traits>

#include "product.cuh"

namespace {

// A block of kThreads owns kRows rows (queries or keys) and streams the other side past them: kLoad
// rows at a time into shared memory, two such tiles in turn, of which it takes kTile at once.
template <class T, int DP, bool BACKWARD> struct Shape {
    static constexpr bool kFloat = std::is_same<T, float>::value;
    static constexpr int MT = DP <= 32 ? 2 : 1;
    static constexpr int kWarps = kFloat && DP == 128 ? 2 : 4;
    static constexpr int kThreads = kWarps * kWarp;
    static constexpr int kRows = kWarps * 16 * MT;
    static constexpr int kTile = kFloat && DP == 128                 ? 16
                                 : (kFloat || BACKWARD || DP == 128) ? 32
                                                                     : 64;
    static constexpr int kLoad = kFloat ? kTile : (DP == 128 ? 32 : 64);
    static constexpr int kStride = DP + kPad<T>;
    static constexpr int kWeights = (DP < 32 ? DP : 32) * kStride; // buffer of multiply_weights
};

// Tokens are padded to a multiple of this, a multiple of every kRows and kLoad.
constexpr int kTokens = 128;

// Calls f with the width that D channels are padded to.
template <class Function> int with_width(int64_t D, const Function& f) {
    if (D < 1 || D > 128) return EQCVT_BAD_SIZE;
    if (D <= 16) return f(std::integral_constant<int, 16>());
    if (D <= 32) return f(std::integral_constant<int, 32>());
    if (D <= 64) return f(std::integral_constant<int, 64>());
    return f(std::integral_constant<int, 128>());
}

// out[b][r][d] = in[b][r][d] * scale[d] + shift[d], or in[b][d][r] if transposed, without scale:
// as it is; zero in the padding. in is [B, rows, D], out [B, padded, DP].
template <class In, class T>
__global__ void pad_kernel(const In* in, const float* scale, const float* shift, T* out, int64_t B,
                           int64_t rows, int D, int64_t padded, int DP, bool transposed) {
    const int64_t count = B * padded * DP, step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
         i += step) {
        const int d = static_cast<int>(i % DP);
        const int64_t r = i / DP % padded, b = i / DP / padded;
        float x = 0;
        if (r < rows && d < D) {
            x = to_float(in[b * rows * D + (transposed ? d * rows + r : r * D + d)]);
            if (scale) x = fmaf(x, scale[d], shift[d]);
        }
        out[i] = from_float<T>(x);
    }
}

template <class In, class T> int pad(const In* in, const float* scale, const float* shift, T* out,
                                     int64_t B, int64_t rows, int64_t D, int64_t padded, int DP,
                                     bool transposed, void* stream) {
    constexpr int kThreads = 256;
    const int64_t blocks = ceil_div(B * padded * DP, kThreads * 8);
    return launch(pad_kernel<In, T>, Grid(blocks < 65536 ? blocks : 65536), kThreads, 0, stream, in,
                  scale, shift, out, B, rows, static_cast<int>(D), padded, DP, transposed);
}

} // namespace
