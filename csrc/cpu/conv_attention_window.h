// The rows of a channels-last image that a filter covers, as numbers with zeros around them, made
// on the way down: of the image, with its layer norm if it has one, or of a projection's gradient.
#pragma once

#include "layer_norm.h"
#include "rows.h"

namespace {

constexpr int64_t kMaxFilter = 31;

struct Shape {
    int64_t B, D, H, W, kk, kv_stride, stride, P; // `stride` is that of channels: D, padded
    int64_t pad() const { return kk / 2; }
    int64_t step(int side) const { return side == 0 ? 1 : kv_stride; }
    int64_t height(int side) const { return (H - 1) / step(side) + 1; }
    int64_t width(int side) const { return (W - 1) / step(side) + 1; }
    int64_t tokens(int side) const { return height(side) * width(side); }
    int64_t taps() const { return kk * kk * stride; } // of one projection
};

// The layer norm in front of the filters: gamma and beta [stride], zeros beyond D; null for none.
template <class S> struct Norm {
    S *gamma = nullptr, *beta = nullptr;
    S eps = 0;

    void set(const Shape& z, S* memory, const S* weight, const S* bias, double eps_) {
        if (!weight) return;
        gamma = memory, beta = memory + z.stride, eps = static_cast<S>(eps_);
        for (int64_t d = 0; d < z.stride; ++d) {
            gamma[d] = d < z.D ? weight[d] : 0;
            beta[d] = d < z.D ? bias[d] : 0;
        }
    }
};

// The rows around a position in an image [height, width, D], each [width + 2 pad, stride].
template <class T> struct Window {
    using S = number_t<T>;
    const T* images;
    int64_t height, width, D, stride, pad, slots;
    S* memory; // a row of zeros, then the slots
    // If `raw` is given, each entry g is the gradient g + shift + slope * (raw - mean).
    const T* raw = nullptr;
    const S *shift = nullptr, *slope = nullptr, *mean = nullptr;
    // If `rstd` [width] is given, each row is normalised.
    Norm<S> norm;
    S* rstd = nullptr;
    int64_t image = -1;
    int64_t held[kMaxFilter]{};

    int64_t length() const { return (width + 2 * pad) * stride; }
    static int64_t size(const Shape& z, int side) {
        return (z.kk + 1) * (z.width(side) + 2 * z.pad()) * z.stride;
    }
    Window(const Shape& z, int side, const T* images_, S* memory_)
        : images(images_), height(z.height(side)), width(z.width(side)), D(z.D), stride(z.stride),
          pad(z.pad()), slots(z.kk), memory(memory_) {
        memset(memory, 0, static_cast<size_t>(size(z, side)) * sizeof(S));
    }
    void go_to(int64_t i) {
        if (i == image) return;
        image = i;
        for (int64_t slot = 0; slot < slots; ++slot) held[slot] = -1;
    }
    const S* row(int64_t y) {
        if (y < 0 || y >= height) return memory;
        const int64_t slot = y % slots;
        S* to = memory + (slot + 1) * length();
        if (held[slot] != y) {
            held[slot] = y;
            const int64_t from = (image * height + y) * width * D;
            load_rows(to + pad * stride, images + from, width, width, D, D, stride);
            if (raw) correct(to + pad * stride, raw + from);
            if (rstd) {
                S* tokens = to + pad * stride;
                normalise(tokens, rstd, stride, width, D, norm.eps);
                affine(tokens, tokens, norm.gamma, norm.beta, stride, width);
            }
        }
        return to;
    }
    void correct(S* to, const T* values) const {
        for (int64_t x = 0; x < width; ++x) {
            int64_t d = 0;
            for (; d + ::width<S> <= D; d += ::width<S>) {
                S* entry = to + x * stride + d;
                const vec<S> centred = load_numbers(values + x * D + d) - load(mean + d);
                store<S>(entry, load(entry) + load(shift + d) + load(slope + d) * centred);
            }
            for (; d < D; ++d)
                to[x * stride + d] +=
                    shift[d] + slope[d] * (to_number(values[x * D + d]) - mean[d]);
        }
    }
};

} // namespace
