// The steerable block on the CPU, see lift_* in tests/ops/primitives.py.
//
// u = bank * x is made anew wherever it is needed, a few rows of it at a time, by the micro-kernels
// of lift_conv.h (F G C k^2 products per pixel, near the peak of the processor).
#include "../lift.h"

#include "lift_blur.h"
#include "lift_gram.h"

namespace {

// Mean and sum of squared deviations of `count` numbers.
struct Moments {
    double count, mean, square;

    // Chan's rule for the moments of two sets together.
    void add(const Moments& other) {
        if (other.count == 0) return;
        double total = count + other.count, step = other.mean - mean;
        square += other.square + step * step * (count * other.count / total);
        mean = mean * (count / total) + other.mean * (other.count / total); // of infinity, too
        count = total;
    }
};

template <class A> int moments(const Conv& c, const A* x, const number_t<A>* bank,
                               const number_t<A>* mask, number_t<A>* mean, number_t<A>* variance,
                               number_t<A>* ux, number_t<A>* ones_x, int threads) {
    using T = number_t<A>;
    bool finite = false;
    if (c.B > 0 && gram_is_cheap(c, ux != nullptr)) {
        int status = gram_moments(c, x, bank, mask, mean, variance, ux, ones_x, threads, finite);
        if (status != EQCVT_OK || finite) return status;
    }
    threads = useful_threads(threads, c.B * c.H1);
    Scratch<Moments> parts(threads * c.F);
    Scratch<double> sums(ux ? c.filters * c.taps : 0), ones(ones_x ? c.taps : 0);
    if (!parts.data || !sums.data || !ones.data) return EQCVT_NO_MEMORY;
    for (int64_t at = 0; at < threads * c.F; ++at) parts[at] = {0, 0, 0};
    const ints<T> tail = tail_mask<T>(c.W1);

    auto add = [&](int thread, const Band<T>& band) {
        const int64_t rows = band.end - band.begin;
        const double n = static_cast<double>(rows * c.W1);
        for (int64_t f = 0; f < smaller(band.filters, c.filters - band.first); ++f) {
            vec<T> total{};
            for (int64_t r = 0; r < rows; ++r) {
                T* row = band.maps.at(f, r);
                T* last = row + (c.vectors - 1) * width<T>;
                store(last, masked<T>(load(last), tail));
                for (int64_t v = 0; v < c.vectors; ++v) total += load(row + v * width<T>);
            }
            // Deviations from the mean, whose rounding they show too: neither the mean nor the
            // variance loses digits.
            const T mean = static_cast<T>(sum<T>(total) / n);
            const T near = mean - mean == 0 ? mean : T(0);
            vec<T> rest{}, square{};
            for (int64_t r = 0; r < rows; ++r) {
                const T* row = band.maps.at(f, r);
                for (int64_t v = 0; v < c.vectors; ++v) {
                    vec<T> step = load(row + v * width<T>) - broadcast(near);
                    if (v == c.vectors - 1) step = masked<T>(step, tail);
                    rest += step;
                    square += step * step;
                }
            }
            const double left = sum<T>(rest);
            parts[thread * c.F + (band.first + f) / c.G].add(
                {n, near + left / n, sum<T>(square) - left * (left / n)});
        }
    };
    int status =
        banded_pass<A>(c, x, bank, mask, static_cast<const T*>(nullptr), ux ? sums.data : nullptr,
                       ones_x ? ones.data : nullptr, static_cast<A*>(nullptr), threads, add);
    if (status != EQCVT_OK) return status;
    for (int64_t field = 0; field < c.F; ++field) {
        Moments all = {0, 0, 0};
        for (int thread = 0; thread < threads; ++thread) all.add(parts[thread * c.F + field]);
        mean[field] = static_cast<T>(all.mean);
        variance[field] = static_cast<T>(all.count > 0 ? all.square / all.count : 0);
    }
    for (int64_t at = 0; ux && at < c.filters * c.taps; ++at) ux[at] = static_cast<T>(sums[at]);
    for (int64_t at = 0; ones_x && at < c.taps; ++at) ones_x[at] = static_cast<T>(ones[at]);
    return EQCVT_OK;
}

template <class A> int moments_input(const Conv& c, const A* x, const number_t<A>* bank,
                                     const number_t<A>* mask, const number_t<A>* c1,
                                     const number_t<A>* c2, A* dx, int threads) {
    using T = number_t<A>;
    const ints<T> tail = tail_mask<T>(c.W1);
    auto gradient = [&](int, const Band<T>& band) {
        for (int64_t f = 0; f < smaller(band.filters, c.filters - band.first); ++f) {
            const int64_t field = (band.first + f) / c.G;
            const vec<T> a = broadcast(c1[field]), b = broadcast(c2[field]);
            for (int64_t r = 0; r < band.end - band.begin; ++r) {
                T* row = band.maps.at(f, r);
                for (int64_t v = 0; v < c.vectors; ++v) {
                    vec<T> d = a + b * load(row + v * width<T>);
                    store(row + v * width<T>, v == c.vectors - 1 ? masked<T>(d, tail) : d);
                }
            }
        }
    };
    return banded_pass<A>(c, x, bank, mask, static_cast<const T*>(nullptr), nullptr, nullptr, dx,
                          threads, gradient);
}

template <class A> int apply(const Conv& c, const A* x, const number_t<A>* bank,
                             const number_t<A>* mask, const number_t<A>* scale,
                             const number_t<A>* shift, const Blur<number_t<A>>& blur, A* y,
                             uint8_t* arg, int threads) {
    using T = number_t<A>;
    const int64_t lanes = width<T>, row = c.vectors * lanes + round_up(blur.size, lanes);
    const int64_t group = c.in_group(0), filter = blur.dense * lanes;
    const int64_t image_size = c.C * c.plane, ring_size = blur.size * group * filter;
    const int64_t size = image_size + group * row + ring_size;
    threads = useful_threads(threads, c.B * blur.H3);
    Scratch<T> memory(threads * size), weight(c.packed_filters * c.taps);
    Scratch<int64_t> offset(c.taps);
    Scratch<const T*> slots(threads * blur.size);
    if (!memory.data || !weight.data || !offset.data || !slots.data) return EQCVT_NO_MEMORY;
    tap_offsets(c, offset.data);
    pack(c.filters, c.taps, weight.data,
         [&](int64_t f, int64_t tap) { return bank[f * c.taps + tap]; });

    parallel(threads, [&](int thread, int n) {
        T* padded = memory.data + thread * size;
        T *maps = padded + image_size, *ring = maps + group * row;
        const T** from = slots.data + thread * blur.size;
        memset(padded, 0, static_cast<size_t>(size) * sizeof(T));

        auto segment = [&](int64_t image, int64_t first, int64_t begin, int64_t end) {
            const int64_t packed = c.in_group(first);
            const int64_t count = smaller(packed, c.filters - first);
            for (int64_t r = begin * blur.stride; r < (end - 1) * blur.stride + blur.size; ++r) {
                if (r % blur.stride >= blur.size) continue; // between two rows of the output
                convolve_row(padded + r * c.stride * c.row, offset.data, c.taps,
                             weight.data + first * c.taps, packed, c.vectors,
                             [&](int64_t f, int64_t v, vec<T> u) {
                                 int64_t field = smaller(first + f, c.filters - 1) / c.G;
                                 vec<T> z = broadcast(scale[field]) * u + broadcast(shift[field]);
                                 store(maps + f * row + v * lanes, z < vec<T>{} ? vec<T>{} : z);
                             });
                T* slot = ring + r % blur.size * group * filter;
                blur_along(blur, false, maps, row, count, blur.dense, slot, filter);
                for (int64_t f = 0; blur.stride > 1 && f < count; ++f)
                    for (int64_t q = 1; q < blur.W3; ++q)
                        slot[f * filter + q] = slot[f * filter + q * blur.stride];
                const int64_t top = r - blur.size + 1;
                if (top < begin * blur.stride || top % blur.stride) continue;
                for (int64_t t = 0; t < blur.size; ++t)
                    from[t] = ring + (top + t) % blur.size * group * filter;
                const int64_t at_once = arg ? c.G : 1;
                for (int64_t f = 0; f < count; f += at_once) {
                    const int64_t map =
                        arg ? image * c.F + (first + f) / c.G : image * c.filters + first + f;
                    const int64_t at = (map * blur.H3 + top / blur.stride) * blur.W3;
                    with_size(blur.size, [&](auto constant) {
                        pool_rows<decltype(constant)::value>(blur, from, f * filter, filter,
                                                             at_once, y + at,
                                                             arg ? arg + at : nullptr);
                    });
                }
            }
        };
        each_segment(c.B, blur.H3, thread, n, [&](int64_t image, int64_t begin, int64_t end) {
            pad(c, x + image * c.C * c.H * c.W, mask, padded);
            for (int64_t first = 0; first < c.filters; first += c.group)
                segment(image, first, begin, end);
        });
    });
    return EQCVT_OK;
}

template <class A>
int apply_backward(const Conv& c, const A* dy, const uint8_t* arg, const A* x,
                   const number_t<A>* bank, const number_t<A>* mask, const number_t<A>* scale,
                   const number_t<A>* shift, const Blur<number_t<A>>& blur, number_t<A>* dbank,
                   number_t<A>* dscale, number_t<A>* dshift, A* dx, int threads) {
    using T = number_t<A>;
    const int64_t lanes = width<T>, row = c.vectors * lanes, lead = blur.size - 1;
    threads = useful_threads(threads, c.B * (dx ? c.H : c.H1));
    // Rows of dy that a band of maps reaches; rows of one group with zeros between and around the
    // numbers of dy; and rows of zeros where there is no dy.
    const int64_t reached = (BAND + blur.size - 2) / blur.stride + 1, group = c.in_group(0);
    const int64_t wide = round_up(lead, lanes) + row, spread_size = reached * group * row;
    const int64_t size = spread_size + group * wide + group * row;
    Scratch<T> memory(threads * size);
    Scratch<const T*> starts(threads * BAND * blur.size);
    Scratch<double> sums(c.filters * c.taps);
    Scratch<AffineSums> parts(threads * c.F);
    if (!memory.data || !starts.data || !sums.data || !parts.data) return EQCVT_NO_MEMORY;
    memset(memory.data, 0, static_cast<size_t>(threads * size) * sizeof(T));
    for (int64_t at = 0; at < threads * c.F; ++at) parts[at] = {0, 0};
    const ints<T> tail = tail_mask<T>(c.W1);

    auto gradient = [&](int thread, const Band<T>& band) {
        T* spread = memory.data + thread * size; // [row of dy, filter, column]
        T *lines = spread + spread_size, *zeros = lines + group * wide;
        const T** start = starts.data + thread * BAND * blur.size; // [row of the band, weight]
        const int64_t low = ceil_div(larger(0, band.begin - lead), blur.stride);
        const int64_t high = smaller(blur.H3, (band.end - 1) / blur.stride + 1);
        const int64_t count = smaller(band.filters, c.filters - band.first);
        for (int64_t r = low; r < high; ++r) {
            const int64_t step = arg ? c.G : 1;
            for (int64_t f = 0; f < count; f += step) {
                const int64_t map = arg ? band.image * c.F + (band.first + f) / c.G
                                        : band.image * c.filters + band.first + f;
                const int64_t at = (map * blur.H3 + r) * blur.W3;
                put_winners(blur, dy + at, arg ? arg + at : nullptr, step, lines + f * wide + lead,
                            wide);
            }
            blur_along(blur, true, lines, wide, count, c.vectors, spread + (r - low) * group * row,
                       row);
        }
        for (int64_t r = band.begin; r < band.end; ++r) {
            for (int64_t t = 0; t < blur.size; ++t) {
                const int64_t from = r - t, r3 = from / blur.stride;
                const bool none = from < 0 || from % blur.stride || r3 >= blur.H3;
                start[(r - band.begin) * blur.size + t] =
                    none ? zeros : spread + (r3 - low) * group * row;
            }
        }
        for (int64_t f = 0; f < count; ++f) {
            const int64_t field = (band.first + f) / c.G;
            const Turned<T> rows = {band.maps.at(f, 0),
                                    band.maps.row,
                                    band.end - band.begin,
                                    band.own_begin - band.begin,
                                    band.own_end - band.begin,
                                    start,
                                    f * row,
                                    c.vectors,
                                    tail};
            with_size(blur.size, [&](auto constant) {
                AffineSums some =
                    turn_rows<decltype(constant)::value>(blur, rows, scale[field], shift[field]);
                parts[thread * c.F + field].d += some.d;
                parts[thread * c.F + field].du += some.du;
            });
        }
    };
    int status = banded_pass<A>(c, x, bank, mask, scale, sums.data, nullptr, dx, threads, gradient);
    if (status != EQCVT_OK) return status;
    for (int64_t field = 0; field < c.F; ++field) {
        AffineSums all = {0, 0};
        for (int thread = 0; thread < threads; ++thread) {
            all.d += parts[thread * c.F + field].d;
            all.du += parts[thread * c.F + field].du;
        }
        dscale[field] = static_cast<T>(all.du);
        dshift[field] = static_cast<T>(all.d);
        for (int64_t at = field * c.G * c.taps; at < (field + 1) * c.G * c.taps; ++at)
            dbank[at] = static_cast<T>(scale[field] * sums[at]);
    }
    return EQCVT_OK;
}

template <class T> const T* in(const void* p) { return static_cast<const T*>(p); }
template <class T> T* out(void* p) { return static_cast<T*>(p); }

// Calls f(zero of the type of activations, Conv) for a dtype and sizes that can be served.
template <class Function> int with_conv(int dtype, int64_t B, int64_t C, int64_t H, int64_t W,
                                        int64_t F, int64_t G, int64_t k, int64_t stride,
                                        int64_t padding, const Function& f) {
    if (B < 0 || C < 1 || F < 1 || G < 1 || G > 16 || k < 1 || stride < 1 || padding < 0 ||
        H + 2 * padding < k || W + 2 * padding < k)
        return EQCVT_BAD_SIZE;
    return with_dtype(dtype, [&](auto zero) {
        const int64_t lanes = width<number_t<decltype(zero)>>;
        return f(zero, Conv(lanes, B, C, H, W, F, G, k, stride, padding));
    });
}

} // namespace

int EQCVT_KERNEL(lift_moments)(int dtype, const void* x, const void* bank, const void* mask,
                               int64_t B, int64_t C, int64_t H, int64_t W, int64_t F, int64_t G,
                               int64_t k, int64_t stride, int64_t padding, int correlate,
                               void* mean, void* variance, void* ux, void* ones_x, int threads) {
    return with_conv(dtype, B, C, H, W, F, G, k, stride, padding, [&](auto zero, const Conv& c) {
        using A = decltype(zero);
        using T = number_t<A>;
        return moments<A>(c, in<A>(x), in<T>(bank), in<T>(mask), out<T>(mean), out<T>(variance),
                          correlate ? out<T>(ux) : nullptr, correlate ? out<T>(ones_x) : nullptr,
                          threads);
    });
}

int EQCVT_KERNEL(lift_moments_input)(int dtype, const void* x, const void* bank, const void* mask,
                                     const void* c1, const void* c2, int64_t B, int64_t C,
                                     int64_t H, int64_t W, int64_t F, int64_t G, int64_t k,
                                     int64_t stride, int64_t padding, void* dx, int threads) {
    return with_conv(dtype, B, C, H, W, F, G, k, stride, padding, [&](auto zero, const Conv& c) {
        using A = decltype(zero);
        using T = number_t<A>;
        return moments_input<A>(c, in<A>(x), in<T>(bank), in<T>(mask), in<T>(c1), in<T>(c2),
                                out<A>(dx), threads);
    });
}

int EQCVT_KERNEL(lift_apply)(int dtype, const void* x, const void* bank, const void* mask,
                             const void* scale, const void* shift, const void* blur, int64_t B,
                             int64_t C, int64_t H, int64_t W, int64_t F, int64_t G, int64_t k,
                             int64_t kb, int64_t stride, int64_t padding, int64_t blur_stride,
                             int pool, void* y, void* arg, int threads) {
    return with_conv(dtype, B, C, H, W, F, G, k, stride, padding, [&](auto zero, const Conv& c) {
        using A = decltype(zero);
        using T = number_t<A>;
        if (blur && !fits(c, kb, blur_stride)) return int(EQCVT_BAD_SIZE);
        const Blur<T> b(c, in<T>(blur), kb, blur_stride);
        return apply<A>(c, in<A>(x), in<T>(bank), in<T>(mask), in<T>(scale), in<T>(shift), b,
                        out<A>(y), pool ? out<uint8_t>(arg) : nullptr, threads);
    });
}

int EQCVT_KERNEL(lift_apply_backward)(int dtype, const void* dy, const void* arg, const void* x,
                                      const void* bank, const void* mask, const void* scale,
                                      const void* shift, const void* blur, int64_t B, int64_t C,
                                      int64_t H, int64_t W, int64_t F, int64_t G, int64_t k,
                                      int64_t kb, int64_t stride, int64_t padding,
                                      int64_t blur_stride, int pool, int input_gradient,
                                      void* dbank, void* dscale, void* dshift, void* dx,
                                      int threads) {
    return with_conv(dtype, B, C, H, W, F, G, k, stride, padding, [&](auto zero, const Conv& c) {
        using A = decltype(zero);
        using T = number_t<A>;
        if (blur && !fits(c, kb, blur_stride)) return int(EQCVT_BAD_SIZE);
        const Blur<T> b(c, in<T>(blur), kb, blur_stride);
        return apply_backward<A>(c, in<A>(dy), pool ? in<uint8_t>(arg) : nullptr, in<A>(x),
                                 in<T>(bank), in<T>(mask), in<T>(scale), in<T>(shift), b,
                                 out<T>(dbank), out<T>(dscale), out<T>(dshift),
                                 input_gradient ? out<A>(dx) : nullptr, threads);
    });
}
