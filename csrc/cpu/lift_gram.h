// Moments of u = bank * x without making u: all of them follow from the Gram matrix of the patches,
//   R[(c, i, j), (c', i', j')] = sum over batch and positions p of x[c, p + (i, j)] x[c', p + (i',
//   j')],
// as bank R bank (sum of u^2) and R bank (u * x). For one displacement (i' - i, j' - j) the entries
// are sums of one product of two images over k^2 windows that differ at the borders only, so R
// costs about 2 k^2 products per pixel and pair of channels where u and u * x cost 2 k^2 F G per
// channel.
//
// It is summed in float64, of x minus a shift near its mean: no digits are lost in E[u^2] - E[u]^2.
#pragma once

#include "lift_bands.h"

namespace {

// Displacements along a row that share the loads of one of the two images.
constexpr int SHIFTS = 7;

inline bool gram_is_cheap(const Conv& c, bool correlate) {
    return c.stride == 1 && c.C <= 4 && 3 * c.C <= c.filters / (correlate ? 1 : 2) && c.H1 >= c.k &&
           c.W1 >= c.k;
}

// One padded image of float64, less the shift of each channel, with slack beside each row.
struct Shifted {
    int64_t left, vectors, row, plane;
    explicit Shifted(const Conv& c)
        : left(round_up(c.k - 1, width<double>)),
          vectors(ceil_div(c.W + 2 * c.padding, width<double>)),
          row(left + round_up(vectors * width<double> + c.k + SHIFTS, width<double>)),
          plane((c.H + 2 * c.padding) * row) {}

    template <class A, class T>
    void fill(const Conv& c, const A* x, const T* mask, const double* shift, double* out) const {
        for (int64_t channel = 0; channel < c.C; ++channel) {
            double* to = out + channel * plane;
            for (int64_t at = 0; at < plane; ++at) to[at] = -shift[channel];
            for (int64_t h = 0; h < c.H; ++h) {
                const A* EQCVT_RESTRICT from = x + (channel * c.H + h) * c.W;
                const T* EQCVT_RESTRICT factor = mask ? mask + h * c.W : nullptr;
                double* EQCVT_RESTRICT line = to + (h + c.padding) * row + left + c.padding;
                if (factor)
                    for (int64_t w = 0; w < c.W; ++w)
                        line[w] =
                            static_cast<double>(to_number(from[w]) * factor[w]) - shift[channel];
                else
                    for (int64_t w = 0; w < c.W; ++w)
                        line[w] = static_cast<double>(to_number(from[w])) - shift[channel];
            }
        }
    }
};

// out[s][q] = sum over rows of a[q] * b[q + s].
inline void row_products(const double* a, const double* b, int64_t row, int64_t rows,
                         int64_t vectors, double* out) {
    for (int64_t v = 0; v < vectors; ++v, a += width<double>, b += width<double>) {
        vec<double> acc[SHIFTS] = {};
        const double *p = a, *q = b;
        for (int64_t r = 0; r < rows; ++r, p += row, q += row) {
            vec<double> value = load(p);
#pragma GCC unroll 8
            for (int s = 0; s < SHIFTS; ++s) acc[s] += value * load(q + s);
        }
#pragma GCC unroll 8
        for (int s = 0; s < SHIFTS; ++s) store(out + (s * vectors + v) * width<double>, acc[s]);
    }
}

// Adds the sums over windows. Lines are the borders' rows above, all rows that are in every window,
// and the borders' rows below: window i is lines i .. i + count - 1.
struct Windows {
    const Conv& c;
    const Shifted& image;
    double *lines, *line; // [2 k - 1, SHIFTS, columns], [columns]
    double* R;            // [C, k, k, C, k, k]

    void products(const double* a, const double* b, int64_t di, int64_t dj) const {
        const int64_t count = c.k - (di < 0 ? -di : di), top = larger(0, -di);
        for (int64_t e = 0; e < 2 * count - 1; ++e) {
            int64_t r = e < count ? top + e : top + c.H1 + e - count;
            int64_t rows = e == count - 1 ? c.H1 - count + 1 : 1;
            row_products(a + r * image.row, b + (r + di) * image.row + dj, image.row, rows,
                         image.vectors, lines + e * SHIFTS * image.vectors * width<double>);
        }
    }

    // Adds to R[channel, i, j, other, i + di, j + dj] for all i and j, where the products of this
    // displacement are the s-th of those in `lines`.
    void add(int64_t channel, int64_t other, int64_t di, int64_t dj, int64_t s) const {
        const int64_t count = c.k - (di < 0 ? -di : di), top = larger(0, -di);
        const int64_t across = c.k - (dj < 0 ? -dj : dj), left = larger(0, -dj);
        const int64_t columns = image.vectors * width<double>, size = c.taps;
        for (int64_t i = 0; i < count; ++i) {
            for (int64_t q = 0; q < columns; q += width<double>) {
                vec<double> acc{};
                for (int64_t e = i; e < i + count; ++e)
                    acc += load(lines + (e * SHIFTS + s) * columns + q);
                store(line + q, acc);
            }
            const double* inner = line + left + across - 1;
            const int64_t length = c.W1 - across + 1;
            vec<double> acc{};
            int64_t q = 0;
            for (; q + width<double> <= length; q += width<double>) acc += load(inner + q);
            double middle = sum<double>(acc);
            for (; q < length; ++q) middle += inner[q];
            for (int64_t j = 0; j < across; ++j) {
                double total = middle;
                for (int64_t e = j; e < across - 1; ++e) total += line[left + e];
                for (int64_t e = 0; e < j; ++e) total += line[left + c.W1 + e];
                int64_t from = (channel * c.k + top + i) * c.k + left + j;
                int64_t to = (other * c.k + top + i + di) * c.k + left + j + dj;
                R[from * size + to] += total;
                if (from != to) R[to * size + from] += total;
            }
        }
    }

    // All displacements with this distance of rows between two channels.
    void add_row(const double* x, int64_t channel, int64_t other, int64_t di) const {
        const double* a = x + channel * image.plane + image.left;
        const double* b = x + other * image.plane + image.left;
        int64_t dj = channel == other && di == 0 ? 0 : 1 - c.k; // the rest by symmetry
        for (; dj < c.k; dj += SHIFTS) {
            products(a, b, di, dj);
            for (int64_t s = 0; s < SHIFTS && dj + s < c.k; ++s) add(channel, other, di, dj + s, s);
        }
    }
};

// Adds the sums of one channel over the windows: ones[i, j] += sum over p of x[p + (i, j)].
inline void add_ones(const Conv& c, const Shifted& image, const double* x, double* ones) {
    for (int64_t r = 0; r < c.H + 2 * c.padding; ++r, x += image.row) {
        const double* line = x + image.left;
        vec<double> acc{};
        int64_t q = c.k - 1;
        for (; q + width<double> <= c.W1; q += width<double>) acc += load(line + q);
        double middle = sum<double>(acc);
        for (; q < c.W1; ++q) middle += line[q];
        for (int64_t j = 0; j < c.k; ++j) {
            double total = middle;
            for (int64_t e = j; e < c.k - 1; ++e) total += line[e];
            for (int64_t e = 0; e < j; ++e) total += line[c.W1 + e];
            for (int64_t i = larger(0, r - c.H1 + 1); i <= smaller(r, c.k - 1); ++i)
                ones[i * c.k + j] += total;
        }
    }
}

// Sums over images of the Gram matrix [taps, taps] and of the windows [taps], for x less `shift`.
// Threads share the rows of displacements of all images.
template <class A, class T> int gram_sums(const Conv& c, const A* x, const T* mask,
                                          const double* shift, double* R, double* ones,
                                          int threads) {
    const Shifted image(c);
    const int64_t tasks = c.C * c.k + c.C * (c.C - 1) / 2 * (2 * c.k - 1);
    const int64_t entries = c.taps * c.taps, columns = image.vectors * width<double>;
    const int64_t lines = (2 * c.k - 1) * SHIFTS * columns;
    const int64_t size = round_up(c.C * image.plane + lines + columns + entries + c.taps, 8);
    threads = useful_threads(threads, c.B * tasks);
    Scratch<double> memory(threads * size);
    if (!memory.data) return EQCVT_NO_MEMORY;

    parallel(threads, [&](int thread, int n) {
        double* mine = memory.data + thread * size;
        memset(mine, 0, static_cast<size_t>(size) * sizeof(double));
        double* my_lines = mine + c.C * image.plane;
        double* my_R = my_lines + lines + columns;
        const Windows windows = {c, image, my_lines, my_lines + lines, my_R};
        each_segment(c.B, tasks, thread, n, [&](int64_t b, int64_t begin, int64_t end) {
            image.fill(c, x + b * c.C * c.H * c.W, mask, shift, mine);
            int64_t task = 0;
            for (int64_t channel = 0; channel < c.C; ++channel) {
                if (task >= begin && task < end)
                    add_ones(c, image, mine + channel * image.plane,
                             my_R + entries + channel * c.k * c.k);
                for (int64_t other = channel; other < c.C; ++other)
                    for (int64_t di = other == channel ? 0 : 1 - c.k; di < c.k; ++di, ++task)
                        if (task >= begin && task < end) windows.add_row(mine, channel, other, di);
            }
        });
    });
    for (int64_t at = 0; at < entries + c.taps; ++at) {
        double total = 0;
        for (int thread = 0; thread < threads; ++thread)
            total += memory[thread * size + c.C * image.plane + lines + columns + at];
        (at < entries ? R[at] : ones[at - entries]) = total;
    }
    return EQCVT_OK;
}

// The outputs of lift_moments; `finite` tells whether all pixels were (if not, nothing is written).
template <class A, class T> int gram_moments(const Conv& c, const A* x, const T* bank,
                                             const T* mask, T* mean, T* variance, T* ux, T* ones_x,
                                             int threads, bool& finite) {
    const int64_t taps = c.taps, area = c.k * c.k;
    Scratch<double> memory(taps * taps + 3 * taps + c.C);
    if (!memory.data) return EQCVT_NO_MEMORY;
    double *R = memory.data, *ones = R + taps * taps, *product = ones + taps;
    double *w = product + taps, *shift = w + taps;
    for (int64_t channel = 0; channel < c.C; ++channel) {
        double total =
            0; // some rows of one image are enough: any shift is right, a near one better
        int64_t count = 0;
        for (int64_t h = 0; h < c.H; h += 8, count += c.W)
            for (int64_t q = 0; q < c.W; ++q) {
                T value = to_number(x[(channel * c.H + h) * c.W + q]);
                total += mask ? value * mask[h * c.W + q] : value;
            }
        shift[channel] = total / static_cast<double>(count);
    }
    int status = gram_sums(c, x, mask, shift, R, ones, threads);
    if (status != EQCVT_OK) return status;
    finite = true;
    for (int64_t t = 0; t < taps; ++t) finite = finite && ones[t] - ones[t] == 0;
    if (!finite) return EQCVT_OK;

    const double n = static_cast<double>(c.B * c.H1 * c.W1);
    for (int64_t field = 0; field < c.F; ++field) {
        double group_mean = 0, group_square = 0, within = 0;
        for (int64_t f = field * c.G; f < (field + 1) * c.G; ++f) {
            double sum_u = 0, sum_uu = 0, constant = 0; // of u less `constant`
            for (int64_t t = 0; t < taps; ++t) {
                w[t] = bank[f * taps + t];
                product[t] = 0;
            }
            for (int64_t channel = 0; channel < c.C; ++channel) {
                double all = 0; // a filter's sum is small beside its products with the shift
                for (int64_t t = 0; t < area; ++t) all += w[channel * area + t];
                constant += all * shift[channel];
            }
            for (int64_t s = 0; s < taps; ++s)
                for (int64_t t = 0; t < taps; ++t) product[t] += w[s] * R[s * taps + t];
            for (int64_t t = 0; t < taps; ++t) {
                sum_u += w[t] * ones[t];
                sum_uu += w[t] * product[t];
            }
            for (int64_t t = 0; ux && t < taps; ++t)
                ux[f * taps + t] = static_cast<T>(product[t] + constant * ones[t] +
                                                  shift[t / area] * (sum_u + n * constant));
            double spread = sum_uu / n - sum_u / n * (sum_u / n), u = sum_u / n + constant;
            within += spread > 0 ? spread : 0;
            // Welford's update over the group.
            double count = static_cast<double>(f - field * c.G + 1), step = u - group_mean;
            group_mean += step / count;
            group_square += step * (u - group_mean);
        }
        mean[field] = static_cast<T>(group_mean);
        variance[field] = static_cast<T>((within + group_square) / static_cast<double>(c.G));
    }
    for (int64_t t = 0; ones_x && t < taps; ++t)
        ones_x[t] = static_cast<T>(ones[t] + n * shift[t / area]);
    return EQCVT_OK;
}

} // namespace
