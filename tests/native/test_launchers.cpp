// Calls every CPU launcher with random shapes, for a build with sanitizers: each tensor lies in
// memory of its exact size, so that an access beyond it is seen. Results have to be written whole,
// finite, and the same in a second call.
#include <sanitizer/common_interface_defs.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "conv_attention.h"
#include "cpu/simd.h"
#include "lift.h"
#include "mlp_block.h"
#include "token_embed.h"

namespace {

std::mt19937_64 generator;
std::string current; // the case that runs, for the report of a failure

int64_t between(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(generator);
}
bool maybe() { return between(0, 1); }
int64_t one_of(std::vector<int64_t> values) {
    return values[static_cast<size_t>(between(0, static_cast<int64_t>(values.size()) - 1))];
}

void fail(const std::string& why) {
    std::fprintf(stderr, "%s\ncase: %s\n", why.c_str(), current.c_str());
    std::abort();
}

constexpr int BYTES = -1; // as a dtype: uint8

struct Tensor {
    int dtype;
    int64_t count;
    size_t size;
    std::unique_ptr<char, void (*)(void*)> memory;

    static int64_t width(int dtype) {
        return dtype == BYTES ? 1 : dtype == EQCVT_F64 ? 8 : dtype == EQCVT_BF16 ? 2 : 4;
    }
    Tensor(int type, int64_t n)
        : dtype(type), count(n), size(static_cast<size_t>(n * width(type))),
          memory(static_cast<char*>(std::malloc(size)), std::free) {
        clear();
    }
    // NaN in every floating type.
    void clear() { std::memset(memory.get(), 0xff, size); }
    double get(int64_t i) const {
        const void* p = memory.get() + i * width(dtype);
        if (dtype == BYTES) return *static_cast<const uint8_t*>(p);
        if (dtype == EQCVT_F64) return *static_cast<const double*>(p);
        if (dtype == EQCVT_BF16) return to_number(*static_cast<const bf16*>(p));
        return *static_cast<const float*>(p);
    }
    void set(int64_t i, double value) {
        void* p = memory.get() + i * width(dtype);
        if (dtype == EQCVT_F64)
            *static_cast<double*>(p) = value;
        else if (dtype == EQCVT_BF16)
            from_number(static_cast<bf16*>(p), static_cast<float>(value));
        else
            *static_cast<float*>(p) = static_cast<float>(value);
    }
};

// The tensors of one case, in the dtype of activations or in that of parameters.
struct Case {
    int dtype = static_cast<int>(one_of({EQCVT_F32, EQCVT_F64, EQCVT_BF16}));
    int parameters = dtype == EQCVT_F64 ? EQCVT_F64 : EQCVT_F32;
    std::vector<std::unique_ptr<Tensor>> inputs, outputs;

    const void* random(int type, int64_t count) {
        inputs.emplace_back(new Tensor(type, count));
        std::normal_distribution<double> normal;
        for (int64_t i = 0; i < count; ++i) inputs.back()->set(i, normal(generator) / 2);
        return inputs.back()->memory.get();
    }
    const void* x(int64_t count) { return random(dtype, count); }
    const void* p(int64_t count) { return random(parameters, count); }
    const void* seed() {
        inputs.emplace_back(new Tensor(EQCVT_F64, 1));
        return inputs.back()->memory.get();
    }
    void* out(int type, int64_t count) {
        outputs.emplace_back(new Tensor(type, count));
        return outputs.back()->memory.get();
    }
    void* y(int64_t count) { return out(dtype, count); }
    void* s(int64_t count) { return out(parameters, count); }

    // Runs a launcher with one and with several threads, the latter twice.
    bool run(const std::function<int(int)>& launch) {
        std::vector<std::string> before;
        for (int threads : {1, 3, 3}) {
            for (auto& output : outputs) output->clear();
            int status = launch(threads);
            if (status == EQCVT_BAD_SIZE) return false;
            if (status) fail("status " + std::to_string(status));
            std::vector<std::string> now;
            for (auto& output : outputs) {
                for (int64_t i = 0; i < output->count; ++i) {
                    double value = output->get(i);
                    if (!std::isfinite(value) || (output->dtype == BYTES && value > 16))
                        fail("output " + std::to_string(now.size()) + " has " +
                             std::to_string(value) + " at " + std::to_string(i));
                }
                now.emplace_back(output->memory.get(), output->size);
            }
            if (threads == 3 && !before.empty() && now != before) fail("two calls differ");
            if (threads == 3) before = now;
        }
        // What was written is read by the next launcher.
        for (auto& output : outputs) inputs.push_back(std::move(output));
        outputs.clear();
        return true;
    }
};

void name(const char* op, const Case& it, std::vector<int64_t> sizes) {
    current = std::string(op) + ", dtype " + std::to_string(it.dtype) + ", sizes";
    for (int64_t size : sizes) current += " " + std::to_string(size);
}

bool lift() {
    Case it;
    int d = it.dtype;
    int64_t B = between(0, 3), C = between(1, 5), F = between(1, 7),
            G = one_of({1, 2, 3, 4, 8, 16});
    int64_t k = one_of({3, 5, 7, 9, 11}), stride = between(1, 3), padding = between(0, k / 2);
    int64_t kb = one_of({1, 3, 5}), blur_stride = kb == 1 ? 1 : between(1, 2);
    int64_t least = (kb - 1) * stride + k - 2 * padding; // of the image
    int64_t H = between(least < 1 ? 1 : least, least + 14),
            W = between(least < 1 ? 1 : least, least + 40);
    bool pool = maybe(), wanted = maybe(), correlate = maybe();
    name("lift", it, {B, C, H, W, F, G, k, kb, stride, padding, blur_stride, pool, wanted});
    int64_t H1 = (H + 2 * padding - k) / stride + 1, W1 = (W + 2 * padding - k) / stride + 1;
    int64_t points = B * F * ((H1 - kb) / blur_stride + 1) * ((W1 - kb) / blur_stride + 1);
    const void *x = it.x(B * C * H * W), *bank = it.p(F * G * C * k * k);
    const void *mask = maybe() ? it.p(H * W) : nullptr, *blur = kb > 1 ? it.p(kb) : nullptr;
    const void *scale = it.p(F), *shift = it.p(F);

    void *mean = it.s(F), *variance = it.s(F), *dx = nullptr;
    void* ux = correlate ? it.s(F * G * C * k * k) : nullptr;
    void* ones = correlate ? it.s(C * k * k) : nullptr;
    bool ok = it.run([&](int threads) {
        return EQCVT_KERNEL(lift_moments)(d, x, bank, mask, B, C, H, W, F, G, k, stride, padding,
                                          correlate, mean, variance, ux, ones, threads);
    });
    dx = it.y(B * C * H * W);
    ok = ok && it.run([&](int threads) {
        return EQCVT_KERNEL(lift_moments_input)(d, x, bank, mask, scale, shift, B, C, H, W, F, G, k,
                                                stride, padding, dx, threads);
    });
    void *y = it.y(points * (pool ? 1 : G)), *arg = pool ? it.out(BYTES, points) : nullptr;
    ok = ok && it.run([&](int threads) {
        return EQCVT_KERNEL(lift_apply)(d, x, bank, mask, scale, shift, blur, B, C, H, W, F, G, k,
                                        kb, stride, padding, blur_stride, pool, y, arg, threads);
    });
    if (!ok) return false;
    const void* dy = it.x(points * (pool ? 1 : G));
    void *dbank = it.s(F * G * C * k * k), *dscale = it.s(F), *dshift = it.s(F);
    dx = wanted ? it.y(B * C * H * W) : nullptr;
    return it.run([&](int threads) {
        return EQCVT_KERNEL(lift_apply_backward)(d, dy, arg, x, bank, mask, scale, shift, blur, B,
                                                 C, H, W, F, G, k, kb, stride, padding, blur_stride,
                                                 pool, wanted, dbank, dscale, dshift, dx, threads);
    });
}

bool project() {
    Case it;
    int d = it.dtype;
    int64_t B = between(0, 3), D = one_of({1, 7, 16, 24, 32, 33}), H = between(1, 9);
    int64_t W = between(1, 19), kk = one_of({1, 3, 5}), s = between(1, 3);
    bool values = maybe(), moments = maybe(), norm = maybe();
    name("conv_attention_project", it, {B, D, H, W, kk, s, values, moments, norm});
    int64_t N = H * W, M = ((H - 1) / s + 1) * ((W - 1) / s + 1), P = values ? 3 : 2;
    const void *x = it.x(B * N * D), *q = it.p(D * kk * kk), *k = it.p(D * kk * kk);
    const void* v = values ? it.p(D * kk * kk) : nullptr;
    const void *weight = norm ? it.p(D) : nullptr, *bias = norm ? it.p(D) : nullptr;
    double eps = 1e-5;
    void *a = it.y(B * N * D), *b = it.y(B * M * D), *c = values ? it.y(B * M * D) : nullptr;
    void *mean = moments ? it.s(P * D) : nullptr, *variance = moments ? it.s(P * D) : nullptr;
    if (!it.run([&](int threads) {
            return EQCVT_KERNEL(conv_attention_project)(d, x, q, k, v, weight, bias, B, D, H, W, kk,
                                                        s, moments, eps, a, b, c, mean, variance,
                                                        threads);
        }))
        return false;
    const void *da = it.x(B * N * D), *db = it.x(B * M * D),
               *dc = values ? it.x(B * M * D) : nullptr;
    const void *dmean = moments ? it.p(P * D) : nullptr,
               *dvariance = moments ? it.p(P * D) : nullptr;
    void *dx = it.y(B * N * D), *dq = it.s(D * kk * kk), *dk = it.s(D * kk * kk);
    void* dv = values ? it.s(D * kk * kk) : nullptr;
    void *dweight = norm ? it.s(D) : nullptr, *dbias = norm ? it.s(D) : nullptr;
    return it.run([&](int threads) {
        return EQCVT_KERNEL(conv_attention_project_backward)(
            d, da, db, dc, dmean, dvariance, a, b, c, mean, x, q, k, v, weight, bias, B, D, H, W,
            kk, s, eps, dx, dq, dk, dv, dweight, dbias, threads);
    });
}

bool attend() {
    Case it;
    int d = it.dtype;
    int64_t B = between(0, 3), N = between(1, 70), M = between(1, 70), h = between(1, 4);
    int64_t D = one_of({1, 7, 16, 24, 32, 33, 64});
    bool values = maybe(), save = maybe();
    double dropout = maybe() ? 0.3 : 0;
    name("conv_attention_attend", it, {B, N, M, D, h, values, save, dropout > 0});
    const void *a = it.x(B * N * D), *b = it.x(B * M * D), *c = values ? it.x(B * M * D) : nullptr;
    const void* residual = maybe() ? it.x(B * N * D) : nullptr;
    int64_t P = values ? 3 : 2;
    const void *scale = it.p(P * D), *shift = it.p(P * D), *wq = it.p(h * D * D), *bq = it.p(h * D);
    const void *wo = it.p(h * D * D), *bo = it.p(D), *seed = it.seed();
    void *y = it.y(B * N * D), *o = save ? it.y(B * N * h * D) : nullptr;
    void* lse = save ? it.s(B * h * N) : nullptr;
    if (!it.run([&](int threads) {
            return EQCVT_KERNEL(conv_attention_attend)(d, a, b, c, residual, scale, shift, wq, bq,
                                                       wo, bo, seed, B, N, M, D, h, save, dropout,
                                                       y, o, lse, threads);
        }))
        return false;
    if (!save) return true;
    const void* dy = it.x(B * N * D);
    void *da = it.y(B * N * D), *db = it.y(B * M * D), *dc = values ? it.y(B * M * D) : nullptr;
    void *dscale = it.s(P * D), *dshift = it.s(P * D), *dwq = it.s(h * D * D), *dbq = it.s(h * D);
    void *dwo = it.s(h * D * D), *dbo = it.s(D);
    return it.run([&](int threads) {
        return EQCVT_KERNEL(conv_attention_attend_backward)(
            d, dy, a, b, c, scale, shift, wq, bq, wo, bo, seed, o, lse, B, N, M, D, h, dropout, da,
            db, dc, dscale, dshift, dwq, dbq, dwo, dbo, threads);
    });
}

bool mlp_block() {
    Case it;
    int d = it.dtype;
    int64_t B = between(0, 3), N = between(1, 70), D = one_of({1, 7, 16, 32, 33, 64});
    int64_t E = one_of({1, 9, 32, 64, 65});
    double dropout = maybe() ? 0.3 : 0, eps = 1e-5;
    name("mlp_block", it, {B, N, D, E, dropout > 0});
    const void *x = it.x(B * N * D), *weight = it.p(D), *bias = it.p(D), *w1 = it.p(E * D);
    const void *b1 = it.p(E), *w2 = it.p(D * E), *b2 = it.p(D), *seed = it.seed();
    void* y = it.y(B * N * D);
    if (!it.run([&](int threads) {
            return EQCVT_KERNEL(mlp_block_forward)(d, x, weight, bias, w1, b1, w2, b2, seed, B, N,
                                                   D, E, dropout, eps, y, threads);
        }))
        return false;
    const void* dy = it.x(B * N * D);
    void *dx = it.y(B * N * D), *dweight = it.s(D), *dbias = it.s(D), *dw1 = it.s(E * D);
    void *db1 = it.s(E), *dw2 = it.s(D * E), *db2 = it.s(D);
    return it.run([&](int threads) {
        return EQCVT_KERNEL(mlp_block_backward)(d, dy, x, weight, bias, w1, b1, w2, b2, seed, B, N,
                                                D, E, dropout, eps, dx, dweight, dbias, dw1, db1,
                                                dw2, db2, threads);
    });
}

bool token_embed() {
    Case it;
    int d = it.dtype;
    int64_t B = between(0, 3), C = between(1, 11), D = one_of({1, 7, 16, 32, 33, 64});
    int64_t k = one_of({1, 3, 5, 7}), stride = between(1, 4), padding = between(0, k / 2);
    int64_t H = between(k, k + 9), W = between(k, k + 30);
    bool wanted = maybe();
    double eps = 1e-5;
    name("token_embed", it, {B, C, H, W, D, k, stride, padding, wanted});
    int64_t H1 = (H + 2 * padding - k) / stride + 1, W1 = (W + 2 * padding - k) / stride + 1;
    const void *x = it.x(B * C * H * W), *filters = it.p(D * C * k * k), *bias = it.p(D);
    const void *weight = it.p(D), *shift = it.p(D);
    void* y = it.y(B * H1 * W1 * D);
    if (!it.run([&](int threads) {
            return EQCVT_KERNEL(token_embed_forward)(d, x, filters, bias, weight, shift, B, C, H, W,
                                                     D, k, stride, padding, eps, y, threads);
        }))
        return false;
    const void* dy = it.x(B * H1 * W1 * D);
    void *dx = wanted ? it.y(B * C * H * W) : nullptr, *dfilters = it.s(D * C * k * k);
    void *dbias = it.s(D), *dweight = it.s(D), *dshift = it.s(D);
    return it.run([&](int threads) {
        return EQCVT_KERNEL(token_embed_backward)(d, dy, x, filters, bias, weight, shift, B, C, H,
                                                  W, D, k, stride, padding, eps, dx, dfilters,
                                                  dbias, dweight, dshift, threads);
    });
}

} // namespace

// Arguments: the seed, the number of cases of each op.
int main(int, char** arguments) {
    __sanitizer_set_death_callback([] { std::fprintf(stderr, "case: %s\n", current.c_str()); });
    generator.seed(std::strtoull(arguments[1], nullptr, 10));
    int64_t cases = std::strtoll(arguments[2], nullptr, 10), refused = 0;
    for (int64_t i = 0; i < cases; ++i)
        for (auto op : {lift, project, attend, mlp_block, token_embed}) refused += !op();
    std::printf("%lld of %lld cases were refused for their size\n", static_cast<long long>(refused),
                static_cast<long long>(5 * cases));
}
