// The blur of the steerable block, one row at a time: along the row, then down the rows together
// with the maximum over the group, and the same backwards.
#pragma once

#include "lift_conv.h"

// Keeps an inner loop in a function of its own, with all registers to itself.
#define EQCVT_OUTLINE __attribute__((noinline))

namespace {

template <class T> constexpr T ONE = 1;

// The blur: `size` weights along each axis, for maps H3 x W3. None is a single weight of one.
template <class T> struct Blur {
    const T* weight;
    int64_t size, stride, H3, W3;
    int64_t vectors, dense; // of an output row, and of the same row at stride 1

    Blur(const Conv& c, const T* weight_, int64_t size_, int64_t stride_)
        : weight(weight_ ? weight_ : &ONE<T>), size(weight_ ? size_ : 1),
          stride(weight_ ? stride_ : 1), H3((c.H1 - size) / stride + 1),
          W3((c.W1 - size) / stride + 1), vectors(ceil_div(W3, width<T>)),
          dense(ceil_div(c.W1 - size + 1, width<T>)) {}
};

inline bool fits(const Conv& c, int64_t blur, int64_t blur_stride) {
    return blur > 0 && blur % 2 && blur_stride > 0 && c.H1 >= blur && c.W1 >= blur;
}

// Calls f with the size as a constant where it is a usual one, and with 0 where it is not: then
// what stands in registers otherwise is read from memory.
template <class Function> EQCVT_INLINE void with_size(int64_t size, const Function& f) {
    if (size == 1)
        f(count_of<1>());
    else if (size == 3)
        f(count_of<3>());
    else if (size == 5)
        f(count_of<5>());
    else
        f(count_of<0>());
}

// The weighted sum of `size` vectors, forwards or backwards.
template <class T, int SIZE> struct Weights {
    vec<T> weight[SIZE];
    Weights(const Blur<T>& blur, bool backwards) {
        for (int t = 0; t < SIZE; ++t)
            weight[t] = broadcast(blur.weight[backwards ? SIZE - 1 - t : t]);
    }
    template <class From> EQCVT_INLINE vec<T> operator()(const From& from) const {
        vec<T> acc = weight[0] * from(0);
#pragma GCC unroll 8
        for (int t = 1; t < SIZE; ++t) acc += weight[t] * from(t);
        return acc;
    }
};

template <class T> struct Weights<T, 0> {
    const T* weight;
    int64_t size, step;
    Weights(const Blur<T>& blur, bool backwards)
        : weight(blur.weight + (backwards ? blur.size - 1 : 0)), size(blur.size),
          step(backwards ? -1 : 1) {}
    template <class From> EQCVT_INLINE vec<T> operator()(const From& from) const {
        vec<T> acc = broadcast(weight[0]) * from(0);
        for (int64_t t = 1; t < size; ++t) acc += broadcast(weight[t * step]) * from(t);
        return acc;
    }
};

// Where rows begin: copies that the compiler can keep in registers.
template <class T, int SIZE> struct Starts {
    const T* row[SIZE];
    EQCVT_INLINE Starts(const T* const* rows, int64_t offset) {
#pragma GCC unroll 8
        for (int t = 0; t < SIZE; ++t) row[t] = rows[t] + offset;
    }
    EQCVT_INLINE const T* operator[](int64_t t) const { return row[t]; }
};

template <class T> struct Starts<T, 0> {
    const T* const* rows;
    int64_t offset;
    EQCVT_INLINE Starts(const T* const* rows_, int64_t offset_) : rows(rows_), offset(offset_) {}
    EQCVT_INLINE const T* operator[](int64_t t) const { return rows[t] + offset; }
};

// to[q] = sum over t of weight[t] * from[q + t] for several rows, or, backwards, with weights from
// the last to the first.
template <class T> void blur_along(const Blur<T>& blur, bool backwards, const T* from,
                                   int64_t from_row, int64_t rows, int64_t vectors, T* to,
                                   int64_t to_row) {
    with_size(blur.size, [&](auto size) {
        const Weights<T, decltype(size)::value> weights(blur, backwards);
        for (int64_t r = 0; r < rows; ++r, from += from_row, to += to_row)
            for (int64_t at = 0; at < vectors * width<T>; at += width<T>)
                store(to + at, weights([&](int64_t t) { return load(from + at + t); }));
    });
}

// Group elements, a byte each in memory.
template <class T> struct labels;
template <> struct labels<float> {
    typedef uint8_t bytes __attribute__((vector_size(EQCVT_VECTOR_BYTES / 4)));
};
template <> struct labels<double> {
    typedef uint8_t bytes __attribute__((vector_size(EQCVT_VECTOR_BYTES / 8)));
};

template <class T> EQCVT_INLINE ints<T> load_labels(const uint8_t* p) {
    typename labels<T>::bytes bytes;
    memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(bytes, ints<T>);
}

template <class T> EQCVT_INLINE void store_labels(uint8_t* p, ints<T> label) {
    auto bytes = __builtin_convertvector(label, typename labels<T>::bytes);
    memcpy(p, &bytes, sizeof bytes);
}

EQCVT_INLINE ints<float> label_of(float, int64_t g) {
    return ints<float>{} + static_cast<int32_t>(g);
}
EQCVT_INLINE ints<double> label_of(double, int64_t g) { return ints<double>{} + g; }

// One row of y and of arg (null without pool) of a field: the largest of G blurred rows, `filter`
// apart from `first` on, and which.
template <int SIZE, class A, class T>
EQCVT_OUTLINE void pool_rows(const Blur<T>& blur, const T* const* rows, int64_t first,
                             int64_t filter, int64_t G, A* y, uint8_t* arg) {
    const Weights<T, SIZE> weights(blur, false);
    const Starts<T, SIZE> start(rows, 0);
    for (int64_t q = 0; q < blur.W3; q += width<T>) {
        int64_t at = first + q;
        vec<T> best = weights([&](int64_t t) { return load(start[t] + at); });
        ints<T> which{};
        for (int64_t g = 1; g < G; ++g) {
            at += filter;
            vec<T> w = weights([&](int64_t t) { return load(start[t] + at); });
            // The first of equals wins, and the first NaN.
            ints<T> wins = ((w > best) | (w != w)) & (best == best);
            best = wins ? w : best;
            which = wins ? label_of(T(), g) : which;
        }
        if (q + width<T> <= blur.W3) {
            store_numbers(y + q, best);
            if (arg) store_labels<T>(arg + q, which);
            continue;
        }
        T number[width<T>];
        uint8_t label[width<T>];
        store(number, best);
        store_labels<T>(label, which);
        for (int64_t lane = 0; q + lane < blur.W3; ++lane) {
            from_number(y + q + lane, number[lane]);
            if (arg) arg[q + lane] = label[lane];
        }
    }
}

// Puts a row of dy where its pixels were: to[q * blur.stride] of each of G filters, `row` apart, is
// dy[q] where that filter won, else 0.
template <class A, class T> void put_winners(const Blur<T>& blur, const A* dy, const uint8_t* arg,
                                             int64_t G, T* to, int64_t row) {
    int64_t q = 0;
    for (; blur.stride == 1 && q + width<T> <= blur.W3; q += width<T>) {
        const vec<T> d = load_numbers(dy + q);
        const ints<T> winner = arg ? load_labels<T>(arg + q) : ints<T>{};
        for (int64_t g = 0; g < G; ++g)
            store(to + g * row + q, winner == label_of(T(), g) ? d : vec<T>{});
    }
    for (; q < blur.W3; ++q)
        for (int64_t g = 0; g < G; ++g)
            to[g * row + q * blur.stride] = !arg || arg[q] == g ? to_number(dy[q]) : T(0);
}

// Sums over the pixels of one filter: of the gradient d by z = scale * u + shift, and of d * u.
struct AffineSums {
    double d, du;
};

// The rows of one filter that a gradient comes from and goes to. For row r, the blurred gradient is
// the weighted sum of the rows rows[r * size + t] + offset.
template <class T> struct Turned {
    T* maps;
    int64_t maps_row, count, own_begin, own_end; // rows, and those of them that are summed over
    const T* const* rows;
    int64_t offset, vectors;
    ints<T> tail;
};

// Turns rows u of one filter into the gradient by z, through the blur and ReLU.
template <int SIZE, class T>
EQCVT_OUTLINE AffineSums turn_rows(const Blur<T>& blur, const Turned<T>& some, T scale, T shift) {
    const Weights<T, SIZE> weights(blur, false);
    vec<T> sum_d{}, sum_du{};
    for (int64_t r = 0; r < some.count; ++r) {
        const Starts<T, SIZE> start(some.rows + r * blur.size, some.offset);
        T* maps = some.maps + r * some.maps_row;
        vec<T> row_d{}, row_du{};
        for (int64_t v = 0; v < some.vectors; ++v) {
            const int64_t at = v * width<T>;
            vec<T> d = weights([&](int64_t t) { return load(start[t] + at); });
            vec<T> u = load(maps + at);
            // The gradient of ReLU, which lets that of NaN pass.
            d = broadcast(scale) * u + broadcast(shift) <= vec<T>{} ? vec<T>{} : d;
            if (v == some.vectors - 1) {
                d = masked<T>(d, some.tail);
                u = masked<T>(u, some.tail);
            }
            store(maps + at, d);
            row_d += d;
            row_du += d * u;
        }
        if (r < some.own_begin || r >= some.own_end) continue;
        sum_d += row_d;
        sum_du += row_du;
    }
    return {sum<T>(sum_d), sum<T>(sum_du)};
}

} // namespace
