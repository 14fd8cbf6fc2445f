// The normal distribution, for the exact GELU x * cdf(x) and its derivative cdf(x) + x * pdf(x).
//
// With y = |x|, the tail beyond y is exp(-y^2 / 2) M(y), and M (Mills' ratio, over sqrt(2 pi))
// falls smoothly from 1/2 as 1 / y. So M = 1/2 + w R(w) with w = (y / 4) / (1 + y / 4) and a
// polynomial R of low degree, which interpolates at the Chebyshev nodes of 0 <= y <= 6 (9),
// computed in 50 digits. One exponential serves both functions, and the tail is small without
// cancellation.
#pragma once

#include "exp.h"
#include "simd.h"

namespace {

template <class T> struct mills;
template <> struct mills<float> { // to 2e-9
    static constexpr float r[] = {
        -1.595769f,  2.4042277f,  -2.1064284f,  0.87051415f,
        0.11385878f, -0.2368134f, 0.019005971f, 0.032850523f,
    };
};
template <> struct mills<double> { // to 7e-18
    static constexpr double r[] = {
        -1.5957691216057306,  2.4042308783942175,     -2.1065377701615606,    0.871924932205985,
        0.105159327715345,    -0.20908763523808882,   -0.024383384325688977,  0.053941503145715795,
        0.018348684569661013, -0.012580392485962492,  -0.0055217926859061975, -0.012244734998303483,
        0.027714647674634725, -0.03517336221015415,   0.03992999360497667,    -0.030057987594794677,
        0.012087957675676218, -0.0019816773055920576,
    };
};

template <class T> struct Normal {
    vec<T> cdf, pdf;
};

// NaN gives NaN; the cdf at minus and plus infinity is exactly 0 and 1, the pdf 0.
template <class T> EQCVT_INLINE Normal<T> normal(vec<T> x) {
    constexpr int terms = sizeof mills<T>::r / sizeof(T);
    constexpr T far = sizeof(T) == 4 ? 20 : 40; // the exponential is 0 here
    vec<T> y = x < 0 ? -x : x;
    y = y > far ? broadcast(far) : y;
    const vec<T> quarter = T(0.25) * y;
    const vec<T> w = quarter / (T(1) + quarter);
    vec<T> m = broadcast(mills<T>::r[terms - 1]);
#pragma GCC unroll 32
    for (int i = terms - 2; i >= 0; --i) m = m * w + mills<T>::r[i];
    m = m * w + T(0.5);
    const vec<T> bell = vector_exp2<T>(y * y * T(-0.72134752044448170368)); // log2(e) / 2
    const vec<T> tail = bell * m;
    return {x < 0 ? tail : T(1) - tail, T(0.39894228040143267794) * bell};
}

} // namespace
