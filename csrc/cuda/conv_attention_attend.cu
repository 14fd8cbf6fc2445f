// Attention in the latent (weight-folded) form, forward.
//
// A block owns kRows queries of one image. For each head it makes its queries from a, streams all
// keys and values past them with a running maximum (Dao, "FlashAttention-2", arXiv:2307.08691),
// and adds the head's share of the output; scores and queries never leave the chip. Per query and
// head 2 M D products and M exponentials; memory: a, y, once each, keys h times from the second
// level cache. Sums are float, over keys in ascending order within a lane.
#include "../conv_attention.h"
#include "conv_attention.cuh"

namespace {

template <class T> struct Attend {
    const T *a, *keys, *values; // keys, values: normalised [B, Mp, DP]; values == keys if shared
    const T* residual;          // may be null
    const float *scale, *shift; // [P, D]
    const T *wq, *wo;           // [h, DP, DP] as [to][from]
    const float *bq, *bo;
    Dropout dropout;
    T *y, *o; // o and lse may be null
    float* lse;
    int64_t N, M, Mp;
    int D, heads;
};

template <class T, int DP> __global__ void __launch_bounds__(Shape<T, DP, false>::kThreads)
    attend_kernel(Attend<T> p) {
    using S = Shape<T, DP, false>;
    constexpr int MT = S::MT, kStride = S::kStride, kStage = S::kLoad * kStride;
    const bool separate = p.values != p.keys;
    T* keys = reinterpret_cast<T*>(shared_memory()); // [2][kLoad][kStride]
    T* values = separate ? keys + 2 * kStage : keys;
    T* weights = values + 2 * kStage;
    T* rows = weights + S::kWeights; // [kRows][kStride]
    T* scratch = rows + S::kRows * kStride;
    const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4;
    T* wide = scratch + warp * (Left<T, MT, DP>::kScratch + Left<T, MT, S::kTile>::kScratch);
    T* narrow = wide + Left<T, MT, DP>::kScratch;

    const int64_t blocks = ceil_div(p.N, S::kRows), batch = blockIdx.x / blocks;
    const int64_t first = blockIdx.x % blocks * S::kRows, mine = first + warp * 16 * MT;
    const T* a = p.a + (batch * p.N + first) * p.D;
    for (int i = threadIdx.x; i < S::kRows * DP; i += S::kThreads) {
        const int r = i / DP, d = i % DP;
        const bool inside = first + r < p.N && d < p.D;
        const float x = inside ? fmaf(to_float(a[r * p.D + d]), p.scale[d], p.shift[d]) : 0.0f;
        rows[r * kStride + d] = from_float<T>(x);
    }

    Sums<MT, DP> y;
    y.zero();
    for (int head = 0; head < p.heads; ++head) {
        Left<T, MT, DP> left;
        Sums<MT, DP> o;
        o.zero();
        __syncthreads();
        left.load(rows + warp * 16 * MT * kStride, kStride);
        multiply_weights<DP, S::kThreads>(o, left, p.wq + head * DP * DP, weights);
        o.each([&](float& x, int, int c) { x += c < p.D ? p.bq[head * p.D + c] : 0.0f; });
        left.from(o, wide);
        o.zero();

        float highest[MT][2], total[MT][2];
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            highest[m][0] = highest[m][1] = -INFINITY;
            total[m][0] = total[m][1] = 0;
        }
        const auto fetch = [&](int64_t tile) {
            const int64_t offset = (batch * p.Mp + tile * S::kLoad) * DP;
            const int stage = tile % 2 * kStage;
            load_tile<S::kLoad, DP, S::kThreads>(keys + stage, p.keys + offset);
            if (separate) load_tile<S::kLoad, DP, S::kThreads>(values + stage, p.values + offset);
        };
        // A branch of its own for the last tile: all others do without comparisons.
        const auto step = [&](int offset, int64_t left_over, auto padded) {
            Sums<MT, S::kTile> s;
            s.zero();
            multiply<NK, S::kTile>(s, left, keys + offset, kStride);
            if (decltype(padded)::value) {
                s.each([&](float& x, int, int c) { x = c < left_over ? x : -INFINITY; });
            }
#pragma unroll
            for (int m = 0; m < MT; ++m) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float top = highest[m][half];
#pragma unroll
                    for (int n = 0; n < S::kTile / 8; ++n) {
                        top = fmaxf(top, fmaxf(s.v[m][n][2 * half], s.v[m][n][2 * half + 1]));
                    }
                    top = warp_max<4>(top);
                    // A row of -inf so far has sum 0: nothing to correct, nothing to add.
                    const float base = top == -INFINITY ? 0 : top * kLog2E;
                    const float before = fast_exp2(fmaf(highest[m][half], kLog2E, -base));
                    highest[m][half] = top;
                    float sum = 0;
#pragma unroll
                    for (int n = 0; n < S::kTile / 8; ++n) {
#pragma unroll
                        for (int i = 2 * half; i < 2 * half + 2; ++i) {
                            s.v[m][n][i] = fast_exp2(fmaf(s.v[m][n][i], kLog2E, -base));
                            sum += s.v[m][n][i];
                        }
                    }
                    total[m][half] = total[m][half] * before + sum;
#pragma unroll
                    for (int n = 0; n < DP / 8; ++n) {
                        o.v[m][n][2 * half] *= before;
                        o.v[m][n][2 * half + 1] *= before;
                    }
                }
            }
            Left<T, MT, S::kTile> weight;
            weight.from(s, narrow);
            multiply<KN, DP>(o, weight, values + offset, kStride);
        };
        const int64_t tiles = ceil_div(p.M, S::kLoad);
        fetch(0);
        copies_begun();
        for (int64_t tile = 0; tile < tiles; ++tile) {
            if (tile + 1 < tiles) fetch(tile + 1);
            copies_begun();
            copies_done<1>();
            __syncthreads();
            for (int part = 0; part < S::kLoad; part += S::kTile) {
                const int offset = tile % 2 * kStage + part * kStride;
                const int64_t left_over = p.M - tile * S::kLoad - part;
                if (left_over >= S::kTile) {
                    step(offset, left_over, std::false_type());
                } else if (left_over > 0) {
                    step(offset, left_over, std::true_type());
                }
            }
            __syncthreads();
        }
        copies_done<0>();

#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float sum = warp_sum<4>(total[m][half]), inverse = 1 / sum;
#pragma unroll
                for (int n = 0; n < DP / 8; ++n) {
                    o.v[m][n][2 * half] *= inverse;
                    o.v[m][n][2 * half + 1] *= inverse;
                }
                const int64_t row = mine + 16 * m + g + 8 * half;
                if (p.lse && row < p.N && threadIdx.x % 4 == 0) {
                    p.lse[(batch * p.heads + head) * p.N + row] = highest[m][half] + logf(sum);
                }
            }
        }
        if (p.o) {
            o.each_pair([&](float x, float y, int r, int c) {
                if (mine + r >= p.N) return;
                store_pair(p.o + ((batch * p.N + mine + r) * p.heads + head) * p.D, c, p.D, x, y);
            });
        }
        left.from(o, wide);
        multiply_weights<DP, S::kThreads>(y, left, p.wo + head * DP * DP, weights);
    }

    y.each([&](float& x, int, int c) { x += c < p.D ? p.bo[c] : 0.0f; });
    drop(y, p.dropout, batch * p.N + mine, p.D, 0);
    y.each_pair([&](float x0, float x1, int r, int c) {
        if (mine + r >= p.N || c >= p.D) return;
        const int64_t row = (batch * p.N + mine + r) * p.D;
        if (p.residual) {
            x0 += to_float(p.residual[row + c]);
            if (c + 1 < p.D) x1 += to_float(p.residual[row + c + 1]);
        }
        store_pair(p.y + row, c, p.D, x0, x1);
    });
}

template <class T, int DP> constexpr int64_t attend_shared(bool separate) {
    using S = Shape<T, DP, false>;
    return sizeof(T) *
           (2 * (separate ? 2 : 1) * S::kLoad * S::kStride + S::kWeights + S::kRows * S::kStride +
            S::kWarps * (Left<T, S::MT, DP>::kScratch + Left<T, S::MT, S::kTile>::kScratch));
}

} // namespace

EQCVT_API int eqcvt_cuda_conv_attention_attend(int dtype, const void* a, const void* b,
                                               const void* c, const void* residual,
                                               const void* scale, const void* shift, const void* wq,
                                               const void* bq, const void* wo, const void* bo,
                                               const void* seed, int64_t B, int64_t N, int64_t M,
                                               int64_t D, int64_t heads, int save, double dropout,
                                               void* y, void* o, void* lse, void* workspace,
                                               int64_t* workspace_bytes, void* stream) {
    return with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        return with_width(D, [&](auto width) -> int {
            constexpr int DP = decltype(width)::value;
            using S = Shape<T, DP, false>;
            const int64_t Mp = round_up(M, kTokens);
            Workspace space(workspace);
            T* keys = space.take<T>(B * Mp * DP);
            T* values = c ? space.take<T>(B * Mp * DP) : keys;
            T* wq_t = space.take<T>(heads * DP * DP);
            T* wo_t = space.take<T>(heads * DP * DP);
            if (workspace_bytes) {
                *workspace_bytes = space.used;
                return EQCVT_OK;
            }
            const float* scales = static_cast<const float*>(scale);
            const float* shifts = static_cast<const float*>(shift);
            EQCVT_TRY(pad(static_cast<const T*>(b), scales + D, shifts + D, keys, B, M, D, Mp, DP,
                          false, stream));
            if (c) {
                EQCVT_TRY(pad(static_cast<const T*>(c), scales + 2 * D, shifts + 2 * D, values, B,
                              M, D, Mp, DP, false, stream));
            }
            const float* none = nullptr;
            EQCVT_TRY(pad(static_cast<const float*>(wq), none, none, wq_t, heads, D, D, DP, DP,
                          true, stream));
            EQCVT_TRY(pad(static_cast<const float*>(wo), none, none, wo_t, heads, D, D, DP, DP,
                          true, stream));
            const Attend<T> p = {static_cast<const T*>(a),
                                 keys,
                                 values,
                                 static_cast<const T*>(residual),
                                 scales,
                                 shifts,
                                 wq_t,
                                 wo_t,
                                 static_cast<const float*>(bq),
                                 static_cast<const float*>(bo),
                                 Dropout::of(seed, dropout, 0),
                                 static_cast<T*>(y),
                                 save ? static_cast<T*>(o) : nullptr,
                                 save ? static_cast<float*>(lse) : nullptr,
                                 N,
                                 M,
                                 Mp,
                                 static_cast<int>(D),
                                 static_cast<int>(heads)};
            return launch(attend_kernel<T, DP>, Grid(B * ceil_div(N, S::kRows)), S::kThreads,
                          attend_shared<T, DP>(c != nullptr), stream, p);
        });
    });
}
