// Depthwise projections of channels-last images, their batch statistics, and the backward pass.
//
// The lanes of vectors are channels. A thread goes down the rows of its share of the images and
// keeps the few rows that a filter covers as numbers with zeros around them, so that no loop meets
// an edge. Queries, keys and values, or all gradients, are made on the way: the image is read once,
// and its layer norm, if it has one, exists in those rows only.
#include "../conv_attention.h"

#include "conv_attention_window.h"
#include "parallel.h"
#include "sums.h"

namespace {

// Filters [D, kk, kk] to [kk, kk, stride], zeros beyond D; turned by 180 degrees if asked.
template <class S> void load_filters(const Shape& z, S* to, const S* filters, bool turned) {
    const int64_t taps = z.kk * z.kk;
    for (int64_t i = 0; i < z.taps(); ++i) to[i] = 0;
    for (int64_t d = 0; d < z.D; ++d)
        for (int64_t i = 0; i < taps; ++i)
            to[(turned ? taps - 1 - i : i) * z.stride + d] = filters[d * taps + i];
}

// to[x] = sum over the filter of rows[i][x * step + j] filter[i][j], for `count` positions.
template <int KK, class S> void correlate(const Shape& z, S* to, const S* const* rows,
                                          const S* filter, int64_t count, int64_t step) {
    const int64_t kk = KK ? KK : z.kk;
    for (int64_t d = 0; d < z.stride; d += width<S>) {
        vec<S> weight[KK ? KK * KK : 1];
        for (int i = 0; i < KK * KK; ++i) weight[i] = load(filter + i * z.stride + d);
        for (int64_t x = 0; x < count; ++x) {
            vec<S> sum = {};
            for (int64_t i = 0; i < kk; ++i)
                for (int64_t j = 0; j < kk; ++j) {
                    const int64_t tap = i * kk + j;
                    const vec<S> w = KK ? weight[KK ? tap : 0] : load(filter + tap * z.stride + d);
                    sum += load(rows[i] + (x * step + j) * z.stride + d) * w;
                }
            store<S>(to + x * z.stride + d, sum);
        }
    }
}

template <class S> void correlate(const Shape& z, S* to, const S* const* rows, const S* filter,
                                  int64_t count, int64_t step) {
    if (z.kk == 3)
        correlate<3>(z, to, rows, filter, count, step);
    else
        correlate<0>(z, to, rows, filter, count, step);
}

// to[x * step + j] += g[x] filter[j]: what a row of a strided projection's gradient gives back.
template <class S>
void spread(const Shape& z, S* to, const S* g, const S* filter, int64_t count, int64_t step) {
    for (int64_t j = 0; j < z.kk; ++j)
        for (int64_t d = 0; d < z.stride; d += width<S>) {
            const vec<S> weight = load(filter + j * z.stride + d);
            for (int64_t x = 0; x < count; ++x) {
                S* entry = to + (x * step + j) * z.stride + d;
                store<S>(entry, load(entry) + load(g + x * z.stride + d) * weight);
            }
        }
}

// total[j] += sum over x of g[x] row[x * step + j], J columns j of the filter at once.
template <int J, class S> void add_taps(const Shape& z, double* total, const S* g, const S* row,
                                        int64_t count, int64_t step) {
    for (int64_t j0 = 0; j0 < z.kk; j0 += J)
        for (int64_t d = 0; d < z.stride; d += width<S>) {
            vec<S> sum[J] = {};
            for (int64_t x = 0; x < count; ++x) {
                const vec<S> entry = load(g + x * z.stride + d);
                for (int j = 0; j < J; ++j)
                    sum[j] += entry * load(row + (x * step + j0 + j) * z.stride + d);
            }
            for (int j = 0; j < J; ++j) {
                S lane[width<S>];
                store<S>(lane, sum[j]);
                for (int l = 0; l < width<S>; ++l) total[(j0 + j) * z.stride + d + l] += lane[l];
            }
        }
}

template <class S> void add_taps(const Shape& z, double* total, const S* g, const S* row,
                                 int64_t count, int64_t step) {
    if (z.kk % 3 == 0)
        add_taps<3>(z, total, g, row, count, step);
    else if (z.kk % 5 == 0)
        add_taps<5>(z, total, g, row, count, step);
    else
        add_taps<1>(z, total, g, row, count, step);
}

// Mean and sum of squared deviations of each channel, by Chan's rule for joining parts.
struct Moments {
    double count;
    double *mean, *squares;

    void join(int64_t D, double n, const double* other_mean, const double* other_squares) {
        if (n == 0) return;
        const double total = count + n;
        for (int64_t d = 0; d < D; ++d) {
            const double step = other_mean[d] - mean[d];
            mean[d] += step * (n / total);
            squares[d] += other_squares[d] + step * step * (count * n / total);
        }
        count = total;
    }
};

// Adds a row of tokens, as stored: sums in S around its first token.
template <class T>
void add_row(Moments& moments, const T* tokens, int64_t count, int64_t D, double* scratch) {
    using S = number_t<T>;
    double *mean = scratch, *squares = scratch + D;
    const auto finish = [&](int64_t d, S centre, S sum, S square) {
        const double offset = static_cast<double>(sum) / static_cast<double>(count);
        mean[d] = static_cast<double>(centre) + offset;
        squares[d] = static_cast<double>(square) - static_cast<double>(sum) * offset;
    };
    int64_t d = 0;
    for (; d + width<S> <= D; d += width<S>) {
        const vec<S> centre = load_numbers(tokens + d);
        vec<S> sum = {}, square = {};
        for (int64_t x = 0; x < count; ++x) {
            const vec<S> u = load_numbers(tokens + x * D + d) - centre;
            sum += u;
            square += u * u;
        }
        S lane[3][width<S>];
        store<S>(lane[0], centre);
        store<S>(lane[1], sum);
        store<S>(lane[2], square);
        for (int l = 0; l < width<S>; ++l) finish(d + l, lane[0][l], lane[1][l], lane[2][l]);
    }
    for (; d < D; ++d) {
        const S centre = to_number(tokens[d]);
        S sum = 0, square = 0;
        for (int64_t x = 0; x < count; ++x) {
            const S u = to_number(tokens[x * D + d]) - centre;
            sum += u;
            square += u * u;
        }
        finish(d, centre, sum, square);
    }
    moments.join(D, static_cast<double>(count), mean, squares);
}

template <class T> struct Project {
    using S = number_t<T>;
    Shape z;
    const T* x;
    const S* filters[3];
    const S *norm_weight, *norm_bias; // or null
    double eps;
    T* out[3];
    S *mean, *variance; // [P, D], or null
};

// Rows begin .. end of all images together; the moments of side i begin at i * 2 D.
template <class T> void project_rows(const Project<T>& p, const number_t<T>* filters,
                                     const Norm<number_t<T>>& norm, number_t<T>* memory,
                                     double* moments, double* counts, Range range) {
    using S = number_t<T>;
    const Shape& z = p.z;
    Window<T> window(z, 0, p.x, memory);
    S* to = memory + Window<T>::size(z, 0);
    window.norm = norm;
    window.rstd = norm.gamma ? to + z.W * z.stride : nullptr;
    double* scratch = moments + 6 * z.D;
    Moments sides[3];
    for (int i = 0; i < 3; ++i) sides[i] = {0, moments + i * 2 * z.D, moments + (i * 2 + 1) * z.D};
    for (int64_t i = 0; i < 6 * z.D; ++i) moments[i] = 0;
    for (int64_t t = range.begin; t < range.end; ++t) {
        const int64_t image = t / z.H, y = t % z.H;
        window.go_to(image);
        const S* rows[kMaxFilter];
        for (int64_t i = 0; i < z.kk; ++i) rows[i] = window.row(y + i - z.pad());
        for (int side = 0; side < z.P; ++side) {
            const int64_t step = z.step(side), W = z.width(side);
            if (y % step) continue;
            correlate(z, to, rows, filters + side * z.taps(), W, step);
            T* tokens = p.out[side] + (image * z.tokens(side) + y / step * W) * z.D;
            for (int64_t x = 0; x < W; ++x) store_row(tokens + x * z.D, to + x * z.stride, z.D);
            if (p.mean) add_row(sides[side], tokens, W, z.D, scratch);
        }
    }
    for (int i = 0; i < 3; ++i) counts[i] = sides[i].count;
}

template <class T> int project(const Project<T>& p, int threads) {
    using S = number_t<T>;
    const Shape& z = p.z;
    const int64_t each = round_up(Window<T>::size(z, 0) + z.W * (z.stride + 1), 64);
    Scratch<S> filters(z.P * z.taps() + 2 * z.stride), memory(each * threads);
    Scratch<double> moments((8 * z.D + 3) * threads);
    if (!filters.data || !memory.data || !moments.data) return EQCVT_NO_MEMORY;
    Norm<S> norm;
    norm.set(z, filters.data + z.P * z.taps(), p.norm_weight, p.norm_bias, p.eps);
    for (int side = 0; side < z.P; ++side)
        load_filters(z, filters.data + side * z.taps(), p.filters[side], false);
    double* counts = moments.data + 8 * z.D * threads;
    parallel(threads, [&](int i, int n) {
        project_rows(p, filters.data, norm, memory.data + i * each, moments.data + 8 * z.D * i,
                     counts + 3 * i, Range(z.B * z.H, i, n));
    });
    if (!p.mean) return EQCVT_OK;
    for (int side = 0; side < z.P; ++side) {
        double* of_first = moments.data + side * 2 * z.D;
        Moments all{counts[side], of_first, of_first + z.D};
        for (int i = 1; i < threads; ++i) {
            const double* other = of_first + 8 * z.D * i;
            all.join(z.D, counts[3 * i + side], other, other + z.D);
        }
        const double n = all.count > 0 ? all.count : 1;
        for (int64_t d = 0; d < z.D; ++d) {
            p.mean[side * z.D + d] = static_cast<S>(all.mean[d]);
            p.variance[side * z.D + d] = static_cast<S>(all.squares[d] / n);
        }
    }
    return EQCVT_OK;
}

template <class T> struct ProjectBackward {
    using S = number_t<T>;
    Shape z;
    const T *x, *gradients[3], *raw[3];
    const S *filters[3], *norm_weight, *norm_bias;
    double eps;
    const S *dmean, *dvariance, *mean;
    T* dx;
    S *dfilters[3], *dnorm_weight, *dnorm_bias;
};

// Memory of a thread, in S.
template <class T> int64_t backward_size(const Shape& z) {
    return round_up(2 * Window<T>::size(z, 0) + 2 * Window<T>::size(z, 1) +
                        (z.W + 2 * z.pad()) * z.stride + z.W * (z.stride + 1) + 2 * z.stride,
                    64);
}

// `statistics` holds shift and slope, see Window, of each side; `totals` the gradients of the
// filters, then of gamma and beta.
template <class T> void backward_rows(const ProjectBackward<T>& p, const number_t<T>* filters,
                                      const Norm<number_t<T>>& norm, const number_t<T>* statistics,
                                      number_t<T>* memory, double* totals, Range range) {
    using S = number_t<T>;
    const Shape& z = p.z;
    const int64_t pad = z.pad();
    Window<T> image(z, 0, p.x, memory);
    memory += Window<T>::size(z, 0);
    Window<T> sides[3] = {
        {z, 0, p.gradients[0], memory},
        {z, 1, p.gradients[1], memory + Window<T>::size(z, 0)},
        {z, 1, p.gradients[2], memory + Window<T>::size(z, 0) + Window<T>::size(z, 1)}};
    for (int side = 0; side < z.P && statistics; ++side) {
        sides[side].raw = p.raw[side];
        sides[side].shift = statistics + 2 * side * z.D;
        sides[side].slope = statistics + (2 * side + 1) * z.D;
        sides[side].mean = p.mean + side * z.D;
    }
    S* dx = memory + Window<T>::size(z, 0) + 2 * Window<T>::size(z, 1); // with the padding
    for (int64_t i = 0; i < (z.W + 2 * pad) * z.stride; ++i) dx[i] = 0;
    for (int64_t i = 0; i < z.P * z.taps(); ++i) totals[i] = 0;
    S* unit = dx + (z.W + 2 * pad) * z.stride; // a row of x, normalised
    S* rstd = unit + z.W * z.stride;
    image.norm = norm;
    image.rstd = norm.gamma ? rstd : nullptr;
    Sums<S> sums(rstd + z.W, totals + z.P * z.taps(), 2 * z.stride);
    for (int64_t t = range.begin; t < range.end; ++t) {
        const int64_t y = t % z.H;
        image.go_to(t / z.H);
        const S* rows[kMaxFilter];
        for (int side = 0; side < z.P; ++side) {
            Window<T>& gradient = sides[side];
            gradient.go_to(t / z.H);
            const int64_t step = z.step(side);
            if (side == 0) { // stride 1: dx = the gradient correlated with the turned filter
                for (int64_t i = 0; i < z.kk; ++i) rows[i] = gradient.row(y + i - pad);
                correlate(z, dx + pad * z.stride, rows, filters, z.W, 1);
            }
            for (int64_t i = 0; i < z.kk; ++i) {
                const int64_t centre = y + pad - i;
                if (side > 0 && centre % step == 0 && centre >= 0 &&
                    centre / step < gradient.height)
                    spread(z, dx, gradient.row(centre / step) + pad * z.stride,
                           filters + side * z.taps() + i * z.kk * z.stride, gradient.width, step);
                if (y % step == 0)
                    add_taps(z, totals + side * z.taps() + i * z.kk * z.stride,
                             gradient.row(y / step) + pad * z.stride, image.row(y + i - pad),
                             gradient.width, step);
            }
        }
        if (norm.gamma) {
            S* d = dx + pad * z.stride;
            load_rows(unit, p.x + t * z.W * z.D, z.W, z.W, z.D, z.D, z.stride);
            normalise(unit, rstd, z.stride, z.W, z.D, norm.eps);
            add_products(sums.part, d, unit, z.stride, z.W);
            add_rows(sums.part + z.stride, d, z.stride, z.W);
            sums.added(z.W);
            normalise_backward(d, unit, rstd, norm.gamma, z.stride, z.W, z.D);
        }
        for (int64_t x = 0; x < z.W; ++x)
            store_row(p.dx + (t * z.W + x) * z.D, dx + (x + pad) * z.stride, z.D);
    }
    sums.flush();
}

template <class T> int project_backward(const ProjectBackward<T>& p, int threads) {
    using S = number_t<T>;
    const Shape& z = p.z;
    const int64_t each = backward_size<T>(z), sums = z.P * z.taps() + 2 * z.stride;
    Scratch<S> filters(sums), memory(each * threads), statistics(6 * z.D);
    Scratch<double> totals(sums * threads);
    if (!filters.data || !memory.data || !statistics.data || !totals.data) return EQCVT_NO_MEMORY;
    Norm<S> norm;
    norm.set(z, filters.data + z.P * z.taps(), p.norm_weight, p.norm_bias, p.eps);
    for (int side = 0; side < z.P; ++side) {
        load_filters(z, filters.data + side * z.taps(), p.filters[side], side == 0);
        if (!p.dmean) continue;
        const double n = static_cast<double>(z.B * z.tokens(side));
        for (int64_t d = 0; d < z.D; ++d) {
            statistics[2 * side * z.D + d] = static_cast<S>(p.dmean[side * z.D + d] / n);
            statistics[(2 * side + 1) * z.D + d] =
                static_cast<S>(2 * p.dvariance[side * z.D + d] / n);
        }
    }
    parallel(threads, [&](int i, int n) {
        backward_rows(p, filters.data, norm, p.dmean ? statistics.data : nullptr,
                      memory.data + i * each, totals.data + i * sums, Range(z.B * z.H, i, n));
    });
    for (int side = 0; side < z.P; ++side)
        reduce(p.dfilters[side], z.D, z.kk * z.kk, totals.data + side * z.taps(), 1, z.stride, sums,
               threads);
    if (norm.gamma) {
        const double* total = totals.data + z.P * z.taps();
        reduce(p.dnorm_weight, 1, z.D, total, 0, 1, sums, threads);
        reduce(p.dnorm_bias, 1, z.D, total + z.stride, 0, 1, sums, threads);
    }
    return EQCVT_OK;
}

template <class S> Shape make_shape(int64_t B, int64_t D, int64_t H, int64_t W, int64_t kk,
                                    int64_t kv_stride, bool separate) {
    return {B, D, H, W, kk, kv_stride, round_up(D, width<S>), separate ? 3 : 2};
}

bool unsupported(int64_t B, int64_t D, int64_t H, int64_t W, int64_t kk, int64_t kv_stride) {
    return B < 0 || D < 1 || H < 1 || W < 1 || kv_stride < 1 || kk % 2 != 1 || kk > kMaxFilter;
}

} // namespace

int EQCVT_KERNEL(conv_attention_project)(int dtype, const void* x, const void* q, const void* k,
                                         const void* v, const void* norm_weight,
                                         const void* norm_bias, int64_t B, int64_t D, int64_t H,
                                         int64_t W, int64_t kk, int64_t kv_stride, int moments,
                                         double eps, void* a, void* b, void* c, void* mean,
                                         void* variance, int threads) {
    if (unsupported(B, D, H, W, kk, kv_stride)) return EQCVT_BAD_SIZE;
    return with_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        using S = number_t<T>;
        const Shape z = make_shape<S>(B, D, H, W, kk, kv_stride, v != nullptr);
        const Project<T> p{
            z,
            static_cast<const T*>(x),
            {static_cast<const S*>(q), static_cast<const S*>(k), static_cast<const S*>(v)},
            static_cast<const S*>(norm_weight),
            static_cast<const S*>(norm_bias),
            eps,
            {static_cast<T*>(a), static_cast<T*>(b), static_cast<T*>(c)},
            moments ? static_cast<S*>(mean) : nullptr,
            moments ? static_cast<S*>(variance) : nullptr};
        return project(p, useful_threads(threads, z.B * z.H));
    });
}

int EQCVT_KERNEL(conv_attention_project_backward)(
    int dtype, const void* da, const void* db, const void* dc, const void* dmean,
    const void* dvariance, const void* a, const void* b, const void* c, const void* mean,
    const void* x, const void* q, const void* k, const void* v, const void* norm_weight,
    const void* norm_bias, int64_t B, int64_t D, int64_t H, int64_t W, int64_t kk,
    int64_t kv_stride, double eps, void* dx, void* dq, void* dk, void* dv, void* dnorm_weight,
    void* dnorm_bias, int threads) {
    if (unsupported(B, D, H, W, kk, kv_stride)) return EQCVT_BAD_SIZE;
    return with_dtype(dtype, [&](auto number) {
        using T = decltype(number);
        using S = number_t<T>;
        const Shape z = make_shape<S>(B, D, H, W, kk, kv_stride, v != nullptr);
        const ProjectBackward<T> p{
            z,
            static_cast<const T*>(x),
            {static_cast<const T*>(da), static_cast<const T*>(db), static_cast<const T*>(dc)},
            {static_cast<const T*>(a), static_cast<const T*>(b), static_cast<const T*>(c)},
            {static_cast<const S*>(q), static_cast<const S*>(k), static_cast<const S*>(v)},
            static_cast<const S*>(norm_weight),
            static_cast<const S*>(norm_bias),
            eps,
            static_cast<const S*>(dmean),
            static_cast<const S*>(dvariance),
            static_cast<const S*>(mean),
            static_cast<T*>(dx),
            {static_cast<S*>(dq), static_cast<S*>(dk), static_cast<S*>(dv)},
            static_cast<S*>(dnorm_weight),
            static_cast<S*>(dnorm_bias)};
        return project_backward(p, useful_threads(threads, z.B * z.H));
    });
}
