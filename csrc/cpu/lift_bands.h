// Passes over u = bank * x that go through each image in bands of rows: the maps of a band are made
// anew, turned into gradients (or left as they are), correlated with x, and convolved back to x.
#pragma once

#include "lift_conv.h"

namespace {

constexpr int64_t BAND = 16;
// Bytes of maps that are correlated at once, to stay in the first cache together with x.
constexpr int64_t NEAR = 32 << 10;
// Bytes up to which a thread keeps a vector of partial sums for each number of the bank.
constexpr int64_t FAR = 1 << 20;

// Calls f(image, begin, end) for the rows of each image that are thread i's of n.
template <class Function>
void each_segment(int64_t images, int64_t rows, int i, int n, const Function& f) {
    Range range(images * rows, i, n);
    while (range.begin < range.end) {
        int64_t image = range.begin / rows, begin = range.begin % rows;
        int64_t end = smaller(rows, begin + range.end - range.begin);
        f(image, begin, end);
        range.begin += end - begin;
    }
}

// The band of maps that `change` turns: rows [begin, end) of the output, of which [own_begin,
// own_end) are this thread's to sum over.
template <class T> struct Band {
    int64_t image, first, filters; // the maps are those of filters first .. first + filters - 1
    int64_t begin, end, own_begin, own_end;
    Rows<T> maps; // row 0 is `begin`
};

// The convolution back from maps to x, one ordinary convolution for each remainder (a, b) of a
// padded pixel's row and column modulo the stride: only taps (a + stride * i, b + stride * j) reach
// those pixels.
template <class T> struct Transposed {
    const Conv& c;
    int64_t reach, left, vectors, channels; // rows above a pixel's own that taps read; zeros left
    Scratch<int64_t> offset;
    Scratch<T> weight;

    Transposed(const Conv& c_, bool wanted)
        : c(c_), reach((c_.k - 1) / c_.stride), left(wanted ? round_up(reach, width<T>) : 0),
          vectors(wanted ? ceil_div(ceil_div(c_.W + 2 * c_.padding, c_.stride), width<T>) : 0),
          channels(round_up(c_.C, 4)), offset(wanted ? c_.filters * c_.k * c_.k : 0),
          weight(wanted ? channels * c_.filters * c_.k * c_.k : 0) {}

    // Length of a row of maps, with zeros to the left of it and to its right.
    int64_t row() const { return left + larger(vectors, c.vectors) * width<T>; }

    int64_t along(int64_t a) const { return a < c.k ? (c.k - 1 - a) / c.stride + 1 : 0; }

    // factor [F], or null for ones, multiplies the maps of each field.
    void prepare(const T* bank, const T* factor, const Rows<T>& maps) {
        int64_t at = 0;
        for (int64_t a = 0; a < c.stride; ++a) {
            for (int64_t b = 0; b < c.stride; ++b) {
                int64_t rows = along(a), columns = along(b), each = rows * columns;
                int64_t taps = c.filters * each;
                for (int64_t t = 0; t < taps; ++t)
                    offset[at + t] =
                        t / each * maps.filter - t % each / columns * maps.row - t % each % columns;
                pack(c.C, taps, weight.data + at * channels, [&](int64_t channel, int64_t t) {
                    int64_t filter = t / each, i = a + t % each / columns * c.stride;
                    int64_t j = b + t % each % columns * c.stride;
                    T w = bank[((filter * c.C + channel) * c.k + i) * c.k + j];
                    return factor ? w * factor[filter / c.G] : w;
                });
                at += taps;
            }
        }
    }

    // Writes row y of dx; `maps` points at the row of maps that the pixels' tap (a, b) reads, and
    // `line` holds one row of all channels.
    template <class A> void put_row(const T* maps, int64_t y, const T* mask, T* line, A* dx) const {
        const int64_t a = (y + c.padding) % c.stride, length = vectors * width<T>;
        int64_t at = 0;
        for (int64_t before = 0; before < a; ++before)
            for (int64_t b = 0; b < c.stride; ++b) at += c.filters * along(before) * along(b);
        for (int64_t b = 0; b < c.stride; ++b) {
            int64_t taps = c.filters * along(a) * along(b);
            convolve_row(maps + left, offset.data + at, taps, weight.data + at * channels, channels,
                         vectors, [&](int64_t channel, int64_t v, vec<T> value) {
                             store(line + channel * length + v * width<T>, value);
                         });
            at += taps;
            int64_t first = ceil_div(larger(c.padding - b, 0), c.stride);
            for (int64_t channel = 0; channel < c.C; ++channel) {
                const T* from = line + channel * length + first;
                A* to = dx + (channel * c.H + y) * c.W;
                const T* factor = mask ? mask + y * c.W : nullptr;
                for (int64_t x = first * c.stride + b - c.padding; x < c.W; x += c.stride, ++from)
                    from_number(to + x, factor ? *from * factor[x] : *from);
            }
        }
    }
};

// What one thread works in.
template <class T> struct Local {
    T *image, *maps, *line;
    T* partial; // [F, G, C, k, k] vectors of sums over this image, or null
    double *total, *ones;

    void add(const Conv& c, int64_t filter, int64_t tap, vec<T> value) const {
        if (filter >= c.filters) return;
        int64_t at = filter * c.taps + tap;
        if (partial)
            store(partial + at * width<T>, load(partial + at * width<T>) + value);
        else
            total[at] += sum<T>(value);
    }

    void end_image(const Conv& c) const {
        for (int64_t at = 0; at < c.filters * c.taps; ++at)
            total[at] += sum<T>(load(partial + at * width<T>));
        memset(partial, 0, static_cast<size_t>(c.filters * c.taps) * sizeof(vec<T>));
    }
};

// One pass. change(thread, band) turns the maps u of a band in place, zeros after the last column.
// Then, where the outputs are not null,
//   dbank [F, G, C, k, k] = sum over batch, rows and columns of maps * x,
//   ones [C, k, k] = the same with maps of ones,
//   dx = mask * transposed convolution of factor [F] * maps with the bank.
// Threads share rows of x (for dx) or of the maps. For dx, each makes the maps that its rows need
// beyond its own once more.
template <class A, class T, class Change>
int banded_pass(const Conv& c, const A* x, const T* bank, const T* mask, const T* factor,
                double* dbank, double* ones, A* dx, int threads, const Change& change) {
    const int64_t shared = dx ? c.H : c.H1;
    threads = useful_threads(threads, c.B * shared);
    Transposed<T> back(c, dx != nullptr);
    const int64_t reach = dx ? back.reach : 0, row = back.row(), lanes = width<T>;
    const int64_t image_size = c.C * c.plane, maps_filter = (reach + BAND) * row;
    const int64_t maps_size = (dx ? c.packed_filters : c.in_group(0)) * maps_filter;
    const int64_t line_size = dx ? back.channels * back.vectors * lanes : 0;
    const int64_t sums = dbank ? c.filters * c.taps : 0;
    const bool vectors = dbank && sums * static_cast<int64_t>(sizeof(vec<T>)) <= FAR;
    const int64_t partial_size = vectors ? sums * lanes : 0, total_size = sums + c.taps;

    const int64_t size = image_size + maps_size + line_size + partial_size;
    Scratch<T> memory(threads * size), weight(c.packed_filters * c.taps);
    Scratch<double> totals(threads * total_size);
    Scratch<int64_t> offset(c.taps);
    if (!memory.data || !weight.data || !totals.data || !offset.data || !back.offset.data ||
        !back.weight.data)
        return EQCVT_NO_MEMORY;
    memset(totals.data, 0, static_cast<size_t>(threads * total_size) * sizeof(double));
    tap_offsets(c, offset.data);
    pack(c.filters, c.taps, weight.data,
         [&](int64_t filter, int64_t tap) { return bank[filter * c.taps + tap]; });
    if (dx) back.prepare(bank, factor, Rows<T>{nullptr, maps_filter, row});
    const ints<T> tail = tail_mask<T>(c.W1);

    parallel(threads, [&](int thread, int n) {
        Local<T> my;
        my.image = memory.data + thread * size;
        my.maps = my.image + image_size;
        my.line = my.maps + maps_size;
        my.partial = vectors ? my.line + line_size : nullptr;
        my.total = totals.data + thread * total_size;
        my.ones = my.total + sums;
        memset(my.image, 0, static_cast<size_t>(size) * sizeof(T));

        each_segment(c.B, shared, thread, n, [&](int64_t image, int64_t begin, int64_t end) {
            pad(c, x + image * c.C * c.H * c.W, mask, my.image);
            int64_t own_begin = begin, own_end = end, low = begin, high = end;
            if (dx) {
                own_begin = c.H1 * begin / c.H, own_end = c.H1 * end / c.H;
                low = smaller(own_begin, (begin + c.padding) / c.stride - reach);
                high = larger(own_end, (end - 1 + c.padding) / c.stride + 1);
            }
            for (int64_t r = low; r < high; r += BAND) {
                const int64_t after = smaller(high, r + BAND);
                Band<T> band;
                band.image = image;
                band.begin = larger(r, 0), band.end = smaller(after, c.H1);
                band.own_begin = larger(band.begin, own_begin);
                band.own_end = larger(band.own_begin, smaller(band.end, own_end));
                if (dx && (r < 0 || after > c.H1))
                    for (int64_t f = 0; f < c.filters; ++f)
                        memset(my.maps + f * maps_filter + reach * row, 0,
                               static_cast<size_t>(BAND * row) * sizeof(T));
                const int64_t rows = band.own_end - band.own_begin;
                const T* own = my.image + band.own_begin * c.stride * c.row;
                for (int64_t first = 0; first < c.filters && band.begin < band.end;
                     first += c.group) {
                    band.first = first, band.filters = c.in_group(first);
                    T* data = my.maps + (reach + band.begin - r) * row + back.left;
                    band.maps = {dx ? data + first * maps_filter : data, maps_filter, row};
                    for (int64_t at = band.begin; at < band.end; ++at)
                        convolve_row(my.image + at * c.stride * c.row, offset.data, c.taps,
                                     weight.data + first * c.taps, band.filters, c.vectors,
                                     [&](int64_t f, int64_t v, vec<T> value) {
                                         store(band.maps.at(f, at - band.begin) + v * lanes, value);
                                     });
                    change(thread, band);
                    if (!dbank) continue;
                    const int64_t bytes = FILTERS * row * static_cast<int64_t>(sizeof(T));
                    const int64_t parts = smaller(rows, ceil_div(rows * bytes, NEAR));
                    const int64_t step = ceil_div(rows, larger(1, parts));
                    for (int64_t at = 0; at < rows; at += step) {
                        Rows<T> some = band.maps;
                        some.data = some.at(0, band.own_begin - band.begin + at);
                        correlate_rows(some, own + at * c.stride * c.row, c.stride * c.row,
                                       offset.data, c.taps, band.filters, smaller(step, rows - at),
                                       c.vectors, tail, [&](int64_t f, int64_t tap, vec<T> value) {
                                           my.add(c, first + f, tap, value);
                                       });
                    }
                }
                for (int64_t tap = 0; ones && tap < c.taps; ++tap)
                    my.ones[tap] +=
                        window_sum(own + offset[tap], c.stride * c.row, rows, c.vectors, tail);
                if (!dx) continue;
                const int64_t y_end = smaller(end, after * c.stride - c.padding);
                for (int64_t y = larger(begin, r * c.stride - c.padding); y < y_end; ++y)
                    back.put_row(my.maps + (reach + (y + c.padding) / c.stride - r) * row, y, mask,
                                 my.line, dx + image * c.C * c.H * c.W);
                for (int64_t f = 0; f < c.filters; ++f) {
                    T* maps = my.maps + f * maps_filter;
                    memmove(maps, maps + (after - r) * row,
                            static_cast<size_t>(reach * row) * sizeof(T));
                }
            }
            if (my.partial) my.end_image(c);
        });
    });
    for (int64_t at = 0; at < total_size; ++at) {
        double* to = at < sums ? dbank + at : ones ? ones + at - sums : nullptr;
        if (!to) break;
        *to = 0;
        for (int thread = 0; thread < threads; ++thread) *to += totals[thread * total_size + at];
    }
    return EQCVT_OK;
}

} // namespace
