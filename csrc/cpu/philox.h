// Factors of dropout: 0, or one over what is kept, from a counter-based generator that every
// backend shares.
//
// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) makes four
// words of a key and a counter, which are eight numbers of 16 bits, lowest first. The key is the
// seed; the counter is (i >> 3, stream) for the linear index i of an entry, which takes number
// i & 7. So the mask can be made again, and in any order.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <cmath>

#include "simd.h"

namespace {

// 64-bit lanes that hold one 32-bit word each, in the lower half; the upper half is not kept clean.
typedef uint64_t words __attribute__((vector_size(EQCVT_VECTOR_BYTES)));
constexpr int kWords = static_cast<int>(sizeof(words) / sizeof(uint64_t));

// The products of the lower halves. The compilers find the instruction for it only by its name.
EQCVT_INLINE words multiply_low(words a, words b) {
#if defined(__AVX512F__)
    return reinterpret_cast<words>( // masked by nothing: GCC warns about the plain one
        _mm512_maskz_mul_epu32(0xFF, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
    return reinterpret_cast<words>(
        _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__) && EQCVT_VECTOR_BYTES == 16
    return reinterpret_cast<words>(
        _mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
    return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// The four words of each block in `blocks`.
EQCVT_INLINE void philox(words word[4], words blocks, uint64_t seed, uint32_t stream) {
    const words m0 = words{} + 0xD2511F53u, m1 = words{} + 0xCD9E8D57u;
    words c0 = blocks, c1 = blocks >> 32, c2 = words{} + stream, c3 = words{};
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        words a = multiply_low(c0, m0), b = multiply_low(c2, m1);
        c0 = (b >> 32) ^ c1 ^ (words{} + k0);
        c1 = b;
        c2 = (a >> 32) ^ c3 ^ (words{} + k1);
        c3 = a;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    word[0] = c0;
    word[1] = c1;
    word[2] = c2;
    word[3] = c3;
}

// The bits of `kept` where a number, the lower 16 bits, is at least `threshold`, else of 0.
EQCVT_INLINE words keep_bits(words number, uint64_t threshold, uint64_t kept) {
    // The sign of the difference tells; no instruction set lacks the shift.
    words dropped = words{} - (((number & 0xFFFFu) - threshold) >> 63);
    return ~dropped & kept;
}

EQCVT_INLINE void store_factors(float* out, const words word[4], uint64_t threshold, float kept) {
    uint32_t bits;
    memcpy(&bits, &kept, sizeof bits);
    for (int w = 0; w < 4; ++w) {
        const words pair =
            keep_bits(word[w], threshold, bits) | (keep_bits(word[w] >> 16, threshold, bits) << 32);
        uint64_t lane[kWords];
        memcpy(lane, &pair, sizeof lane);
        for (int l = 0; l < kWords; ++l) memcpy(out + 8 * l + 2 * w, &lane[l], 8);
    }
}

EQCVT_INLINE void store_factors(double* out, const words word[4], uint64_t threshold, double kept) {
    uint64_t bits;
    memcpy(&bits, &kept, sizeof bits);
    for (int i = 0; i < 8; ++i) {
        const words f = keep_bits(word[i / 2] >> (i % 2 * 16), threshold, bits);
        double lane[kWords];
        memcpy(lane, &f, sizeof lane);
        for (int l = 0; l < kWords; ++l) out[8 * l + i] = lane[l];
    }
}

// out[i] = the factor of entry `first` + i, for 0 <= i < count; T is float or double. The
// probability is rounded to 1 / 65536, and the factor is one over what that keeps.
template <class T> inline void keep_factors(T* out, uint64_t seed, int64_t first, int64_t count,
                                            uint32_t stream, double dropout) {
    constexpr int64_t entries = 8 * kWords;
    const auto threshold = static_cast<uint64_t>(std::nearbyint(dropout * 65536));
    const T kept = threshold < 65536 ? static_cast<T>(65536.0 / (65536 - threshold)) : T(0);
    const int64_t lead = first & 7;
    uint64_t block[kWords];
    for (int l = 0; l < kWords; ++l) block[l] = static_cast<uint64_t>(first >> 3) + l;
    words blocks, word[4];
    memcpy(&blocks, block, sizeof blocks);
    for (int64_t start = -lead; start < count; start += entries, blocks += kWords) {
        philox(word, blocks, seed, stream);
        const int64_t skip = start < 0 ? -start : 0;
        const int64_t end = count - start < entries ? count - start : entries;
        if (skip == 0 && end == entries) {
            store_factors(out + start, word, threshold, kept);
        } else if (end > skip) {
            T factor[entries];
            store_factors(factor, word, threshold, kept);
            memcpy(out + start + skip, factor + skip, static_cast<size_t>(end - skip) * sizeof(T));
        }
    }
}

} // namespace
