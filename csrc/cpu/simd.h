// Vectors of the widest registers of the instruction set a file is compiled for.
//
// Each cpu/<op>.cpp is compiled once per instruction set, with EQCVT_ISA as its name. The vectors
// are those of GCC and Clang.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "../eqcvt.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#ifndef EQCVT_ISA
#define EQCVT_ISA portable
#endif
#define EQCVT_JOIN2(a, b) a##b
#define EQCVT_JOIN(a, b) EQCVT_JOIN2(a, b)
// Heads the definition of a launcher: int EQCVT_KERNEL(lift_apply)(...)
#define EQCVT_KERNEL(name) EQCVT_JOIN(eqcvt_cpu_##name##_, EQCVT_ISA)

#define EQCVT_INLINE inline __attribute__((always_inline))
#define EQCVT_RESTRICT __restrict__
#if defined(__AVX512F__) || defined(EQCVT_EMULATE_MATRIX_UNIT)
#define EQCVT_VECTOR_BYTES 64
#elif defined(__AVX__)
#define EQCVT_VECTOR_BYTES 32
#else
#define EQCVT_VECTOR_BYTES 16
#endif

namespace {

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct bf16 {
    uint16_t bits;
};

// A number that the compiler knows, as an argument.
template <int N> struct count_of {
    static constexpr int value = N;
};

// The number behind a stored type, and the type of parameters and sums beside it.
template <class T> struct number {
    using type = T;
};
template <> struct number<bf16> {
    using type = float;
};
template <class T> using number_t = typename number<T>::type;

template <class T> struct lanes;
template <> struct lanes<float> {
    typedef float vec __attribute__((vector_size(EQCVT_VECTOR_BYTES)));
    typedef int32_t ints __attribute__((vector_size(EQCVT_VECTOR_BYTES)));
    typedef uint16_t half __attribute__((vector_size(EQCVT_VECTOR_BYTES / 2)));
    static constexpr int count = EQCVT_VECTOR_BYTES / 4;
};
template <> struct lanes<double> {
    typedef double vec __attribute__((vector_size(EQCVT_VECTOR_BYTES)));
    typedef int64_t ints __attribute__((vector_size(EQCVT_VECTOR_BYTES)));
    static constexpr int count = EQCVT_VECTOR_BYTES / 8;
};

// vec<T>: a vector of T = float or double; ints<T>: integers of the same width; width<T>: lanes.
template <class T> using vec = typename lanes<T>::vec;
template <class T> using ints = typename lanes<T>::ints;
template <class T> constexpr int width = lanes<T>::count;

template <class T> EQCVT_INLINE vec<T> broadcast(T s) { return s - vec<T>{}; }

template <class T> EQCVT_INLINE vec<T> load(const T* p) {
    vec<T> v;
    memcpy(&v, p, sizeof v);
    return v;
}

template <class T> EQCVT_INLINE void store(T* p, vec<T> v) { memcpy(p, &v, sizeof v); }

// Holds a vector in a register: the compiler forgets where it is from, and does not load it again.
template <class V> EQCVT_INLINE void hold(V& v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#elif defined(__SSE2__) && EQCVT_VECTOR_BYTES < 64
    asm("" : "+x"(v));
#else
    (void)v;
#endif
}

template <class T> EQCVT_INLINE ints<T> as_ints(vec<T> v) {
    ints<T> i;
    memcpy(&i, &v, sizeof i);
    return i;
}

template <class T> EQCVT_INLINE vec<T> as_floats(ints<T> i) {
    vec<T> v;
    memcpy(&v, &i, sizeof v);
    return v;
}

EQCVT_INLINE float to_number(float x) { return x; }
EQCVT_INLINE double to_number(double x) { return x; }
EQCVT_INLINE float to_number(bf16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

EQCVT_INLINE void from_number(float* p, float x) { *p = x; }
EQCVT_INLINE void from_number(double* p, double x) { *p = x; }
// To the nearest, ties to even; NaN stays NaN.
EQCVT_INLINE void from_number(bf16* p, float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x)
        p->bits = static_cast<uint16_t>((bits >> 16) | 0x40);
    else
        p->bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Loads and stores of activations, as numbers.
EQCVT_INLINE vec<float> load_numbers(const float* p) { return load(p); }
EQCVT_INLINE vec<double> load_numbers(const double* p) { return load(p); }
EQCVT_INLINE void store_numbers(float* p, vec<float> v) { store(p, v); }
EQCVT_INLINE void store_numbers(double* p, vec<double> v) { store(p, v); }
EQCVT_INLINE vec<float> load_numbers(const bf16* p) {
    lanes<float>::half h;
    memcpy(&h, p, sizeof h);
    return as_floats<float>(__builtin_convertvector(h, ints<float>) << 16);
}
EQCVT_INLINE void store_numbers(bf16* p, vec<float> v) {
#if defined(__AVX512BF16__)
    const __m256bh h = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
    memcpy(p, &h, sizeof h);
#else
    ints<float> i = as_ints<float>(v);
    ints<float> rounded = (i + 0x7fff + ((i >> 16) & 1)) >> 16;
    ints<float> nan = (i >> 16) | 0x40;
    lanes<float>::half h = __builtin_convertvector(v == v ? rounded : nan, lanes<float>::half);
    memcpy(p, &h, sizeof h);
#endif
}

// The sum of the lanes: halves are added until one lane is left.
template <class T, class V> EQCVT_INLINE T sum(V v) {
    if constexpr (sizeof v == 2 * sizeof(T)) {
        T lane[2];
        memcpy(lane, &v, sizeof lane);
        return lane[0] + lane[1];
    } else {
        typedef T half __attribute__((vector_size(sizeof v / 2)));
        half part[2];
        memcpy(part, &v, sizeof v);
        return sum<T>(part[0] + part[1]);
    }
}

// f(zero of the type of activations), for the code of that type.
template <class Function> inline int with_dtype(int dtype, const Function& f) {
    if (dtype == EQCVT_F32) return f(float{});
    if (dtype == EQCVT_F64) return f(double{});
    if (dtype == EQCVT_BF16) return f(bf16{});
    return EQCVT_BAD_DTYPE;
}

} // namespace
