// Products of bfloat16 matrices on the matrix unit of x86 processors (AMX), summed in float32.
//
// C[r][c] (+)= sum over k of A[r][k] B[k][c], by tiles of 16 rows. A lies by rows. B lies in pairs:
// entries k and k + 1 of a column are neighbours, and a row of pairs holds all columns; two rows of
// float32 become one row of pairs by interleaving them. Subnormal numbers count as zero.
//
// EQCVT_MATRIX_UNIT is defined with EQCVT_USE_MATRIX_UNIT, in the variant for such processors (that
// the compiler may use the unit says nothing: -march=native says so to every variant), and with
// EQCVT_EMULATE_MATRIX_UNIT, when plain C++ takes its place for tests on other processors.
#pragma once

#include "exp.h"

#if defined(EQCVT_USE_MATRIX_UNIT) || defined(EQCVT_EMULATE_MATRIX_UNIT)
#define EQCVT_MATRIX_UNIT 1

namespace {

constexpr int64_t kTileRows = 16, kTileColumns = 16, kTileDepth = 32; // of a product of two tiles

#if defined(EQCVT_USE_MATRIX_UNIT)

// What is in memory when a tile is loaded from it has to be told to the compiler: GCC's intrinsics
// do not say that they read memory.
EQCVT_INLINE void written(const void* memory) { asm volatile("" : : "r"(memory) : "memory"); }

// The unit's registers, for the thread that makes it and as long as it lives: eight tiles of 16
// rows of 64 bytes.
struct MatrixUnit {
    MatrixUnit() {
        alignas(64) uint8_t configuration[64] = {1};
        for (int tile = 0; tile < 8; ++tile) {
            configuration[16 + 2 * tile] = 64;
            configuration[48 + tile] = kTileRows;
        }
        written(configuration);
        _tile_loadconfig(configuration);
        written(configuration); // whose place is not used again before
    }
    ~MatrixUnit() { _tile_release(); }
    MatrixUnit(const MatrixUnit&) = delete;
    MatrixUnit& operator=(const MatrixUnit&) = delete;
};

// V tiles of C, one beside the other: C = A B, or with `add` C += A B. Strides are in entries;
// `depth` is a multiple of kTileDepth.
template <int V> EQCVT_INLINE void multiply_tiles(const bf16* a, int64_t a_stride, const bf16* b,
                                                  int64_t b_stride, int64_t depth, float* c,
                                                  int64_t c_stride, bool add) {
    static_assert(V >= 1 && V <= 3, "tiles 0 to 2 hold C, 3 holds A, 4 to 6 hold B");
    const size_t a_bytes = static_cast<size_t>(a_stride) * sizeof *a;
    const size_t b_bytes = static_cast<size_t>(b_stride) * sizeof *b;
    const size_t c_bytes = static_cast<size_t>(c_stride) * sizeof *c;
    written(b);
    if (add) {
        _tile_loadd(0, c, c_bytes);
        if (V > 1) _tile_loadd(1, c + kTileColumns, c_bytes);
        if (V > 2) _tile_loadd(2, c + 2 * kTileColumns, c_bytes);
    } else {
        _tile_zero(0);
        if (V > 1) _tile_zero(1);
        if (V > 2) _tile_zero(2);
    }
    for (int64_t k = 0; k < depth; k += kTileDepth) {
        const bf16* pairs = b + k / 2 * b_stride;
        _tile_loadd(3, a + k, a_bytes);
        _tile_loadd(4, pairs, b_bytes);
        _tile_dpbf16ps(0, 3, 4);
        if (V > 1) {
            _tile_loadd(5, pairs + 2 * kTileColumns, b_bytes);
            _tile_dpbf16ps(1, 3, 5);
        }
        if (V > 2) {
            _tile_loadd(6, pairs + 4 * kTileColumns, b_bytes);
            _tile_dpbf16ps(2, 3, 6);
        }
    }
    _tile_stored(0, c, c_bytes);
    if (V > 1) _tile_stored(1, c + kTileColumns, c_bytes);
    if (V > 2) _tile_stored(2, c + 2 * kTileColumns, c_bytes);
}

typedef __m512i bf16s; // 32 of them

EQCVT_INLINE void store(bf16* to, bf16s x) { _mm512_storeu_si512(to, x); }

// Two vectors, one behind the other.
EQCVT_INLINE bf16s rounded(vec<float> a, vec<float> b) {
    return reinterpret_cast<__m512i>(
        _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(a)));
}

// Entries FROM .. FROM + 16 of two rows, in pairs.
template <int FROM> EQCVT_INLINE bf16s paired(bf16s even, bf16s odd) {
    alignas(64) static constexpr uint16_t order[2][32] = {
        {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
        {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
         24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
    return _mm512_permutex2var_epi16(even, _mm512_load_si512(order[FROM / 16]), odd);
}

// Two rows of 16, one behind the other, in pairs.
EQCVT_INLINE bf16s paired(bf16s rows) {
    alignas(64) static constexpr uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                       21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                       11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(order), rows);
}

// 2^x[g] to within 3e-6 of it, for what becomes bfloat16: 2^floor(x) p(x - floor(x)).
template <int G> EQCVT_INLINE void rough_exp2(vec<float> (&x)[G]) {
    constexpr float c[] = {1.0000026226043701f, 0.6930038332939148f, 0.2414427548646927f,
                           0.052011460065841675f, 0.013534167781472206f};
    vec<float> f[G], p[G];
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g)
        f[g] = reinterpret_cast<vec<float>>(
            _mm512_reduce_ps(reinterpret_cast<__m512>(x[g]), _MM_FROUND_FLOOR));
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) p[g] = f[g] * c[4] + c[3];
#pragma GCC unroll 8
    for (int i = 2; i >= 0; --i)
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) p[g] = p[g] * f[g] + c[i];
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g)
        x[g] = reinterpret_cast<vec<float>>(_mm512_maskz_scalef_ps(static_cast<__mmask16>(-1),
                                                                   reinterpret_cast<__m512>(p[g]),
                                                                   reinterpret_cast<__m512>(x[g])));
}

#else

using MatrixUnit = char;

template <int V> inline void multiply_tiles(const bf16* a, int64_t a_stride, const bf16* b,
                                            int64_t b_stride, int64_t depth, float* c,
                                            int64_t c_stride, bool add) {
    for (int64_t r = 0; r < kTileRows; ++r)
        for (int64_t i = 0; i < V * kTileColumns; ++i) {
            float sum = add ? c[r * c_stride + i] : 0;
            for (int64_t k = 0; k < depth; ++k)
                sum +=
                    to_number(a[r * a_stride + k]) * to_number(b[k / 2 * b_stride + 2 * i + k % 2]);
            c[r * c_stride + i] = sum;
        }
}

struct bf16s {
    bf16 entry[32];
};

inline void store(bf16* to, bf16s x) { memcpy(to, &x, sizeof x); }

inline bf16s rounded(vec<float> a, vec<float> b) {
    bf16s x;
    store_numbers(x.entry, a);
    store_numbers(x.entry + 16, b);
    return x;
}

template <int FROM> inline bf16s paired(bf16s even, bf16s odd) {
    bf16s x;
    for (int i = 0; i < 16; ++i) {
        x.entry[2 * i] = even.entry[FROM + i];
        x.entry[2 * i + 1] = odd.entry[FROM + i];
    }
    return x;
}

inline bf16s paired(bf16s rows) {
    bf16s x;
    for (int i = 0; i < 32; ++i) x.entry[i] = rows.entry[i / 2 + i % 2 * 16];
    return x;
}

template <int G> inline void rough_exp2(vec<float> (&x)[G]) { vector_exp2<float>(x); }

#endif

// Two rows of 16 numbers as one row of pairs.
EQCVT_INLINE void store_pairs(bf16* to, vec<float> even, vec<float> odd) {
    store(to, paired(rounded(even, odd)));
}

} // namespace
#endif
