// Exponentials of vectors.
//
// x = n + f with n an integer and |f| <= 1/2: 2^f is a polynomial of least relative error, and 2^n
// is made in the exponent's bits. Adding 1.5 * 2^(mantissa bits) + bias to x rounds it to n and
// leaves n + bias in the low bits of the sum.
#pragma once

#include "simd.h"

namespace {

template <class T> struct exponent;
template <> struct exponent<float> {
    static constexpr float bias = 127, round = 12582912;
    static constexpr int mantissa = 23;
    static constexpr float c[] = {1.f,
                                  0.69314720575218624f,
                                  0.24022646888362567f,
                                  0.055503287444208425f,
                                  0.0096184891001880135f,
                                  0.001339994441335691f,
                                  0.00015345800633336210f};
};
template <> struct exponent<double> {
    static constexpr double bias = 1023, round = 6755399441055744;
    static constexpr int mantissa = 52;
    static constexpr double c[] = {1.,
                                   0.69314718055994533,
                                   0.24022650695910156,
                                   0.055504108664819920,
                                   0.0096181291075883032,
                                   0.0013333558146790239,
                                   0.00015403530462555888,
                                   0.000015252733489772619,
                                   1.3215433068203980e-6,
                                   1.0178198078075183e-7,
                                   7.0741094522928012e-9,
                                   4.4352788969802145e-10};
};

// At least `low`; NaN stays NaN.
template <class T> EQCVT_INLINE vec<T> at_least(vec<T> low, vec<T> x) {
    hold(low); // GCC would turn the comparison round, and no longer find its one instruction
    return low > x ? low : x;
}

// x[g] = 2^x[g] * 2^n, with n + bias in the low bits of `rounded`, for G vectors at once: the sums
// of one wait for each other, those of several do not.
template <class T, int G>
EQCVT_INLINE void scaled_power(vec<T> (&x)[G], const vec<T> (&rounded)[G]) {
    using E = exponent<T>;
    constexpr int degree = static_cast<int>(sizeof E::c / sizeof E::c[0]) - 1;
    vec<T> p[G];
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) p[g] = x[g] * E::c[degree] + E::c[degree - 1];
#pragma GCC unroll 16
    for (int i = degree - 2; i >= 0; --i)
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) p[g] = p[g] * x[g] + E::c[i];
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) x[g] = p[g] * as_floats<T>(as_ints<T>(rounded[g]) << E::mantissa);
}

// x[g] = 2^x[g] for x <= 127 (1023), to within 1 ulp; 0 below the smallest normal number. NaN stays
// NaN.
template <class T, int G> EQCVT_INLINE void vector_exp2(vec<T> (&x)[G]) {
    using E = exponent<T>;
    const vec<T> low = broadcast<T>(-E::bias);
    vec<T> rounded[G];
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) x[g] = at_least<T>(low, x[g]);
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) rounded[g] = x[g] + (E::round + E::bias);
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) x[g] -= rounded[g] - (E::round + E::bias);
    scaled_power<T>(x, rounded);
}

template <class T> EQCVT_INLINE vec<T> vector_exp2(vec<T> x) {
    vec<T> one[1] = {x};
    vector_exp2<T>(one);
    return one[0];
}

} // namespace
