// Attention in the latent (weight-folded) form, backward, in five steps without atomics:
//
// 1. queries_kernel   q = a' wq + bq, do = dt wo^T with dt = dropout(dy), delta = sum_d do o
// 2. keys_kernel      a block owns keys of one image and head and streams the queries past them:
//                     p = exp(s - lse), ds = p (do . c' - delta); db' += ds^T q, dc' += p^T do
// 3. scores_kernel    a block owns queries and streams the keys: dq = ds b', over the place of q;
//                     da = scale sum_h dq wq^T
// 4. outer_kernel     a^T dq and o^T dt with the column sums of dq and dt: all of the gradients of
//                     wq, bq, scale[0], shift[0], wo, bo follow from them in weights_kernel
// 5. tokens_kernel    db = scale[1] sum_h db', and the sums for scale[1], shift[1]; the same for c
//
// Per query and head: 7 M D products and 2 M exponentials. Sums over queries, keys and blocks run
// in an order that depends on the sizes alone.
#include "../conv_attention.h"
#include "conv_attention.cuh"
#include "conv_attention_sums.cuh"

namespace {

template <class T> struct Backward {
    const T *dy, *a, *o;
    const float *scale, *shift, *bq, *lse;
    const T *keys, *values;  // [B, Mp, DP], values == keys if shared
    const T *wq_t, *wq, *wo; // [h, DP, DP]; wq_t is wq transposed
    Dropout dropout;
    T *q, *dout;            // [B, h, Np, DP]; q becomes dq
    T* dt;                  // [B, Np, DP]
    float *lse2, *delta;    // [B, h, Np]: lse in units of log 2
    float *dkeys, *dvalues; // [h, B, Mp, DP]; the same if shared
    T* da;
    int64_t B, N, M, Np, Mp;
    int D, heads;
};

template <class T, int DP> __global__ void __launch_bounds__(Shape<T, DP, true>::kThreads)
    queries_kernel(Backward<T> p) {
    using S = Shape<T, DP, true>;
    constexpr int MT = S::MT, kStride = S::kStride;
    T* weights = reinterpret_cast<T*>(shared_memory());
    T* a_rows = weights + S::kWeights; // [kRows][kStride]
    T* dt_rows = a_rows + S::kRows * kStride;
    const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
    const int64_t blocks = ceil_div(p.N, S::kRows), batch = blockIdx.x / blocks;
    const int64_t first = blockIdx.x % blocks * S::kRows, mine = first + warp * 16 * MT;

    for (int i = threadIdx.x; i < S::kRows * DP / 4; i += S::kThreads) {
        const int r = i / (DP / 4), d = i % (DP / 4) * 4;
        const int64_t at = (batch * p.N + first + r) * p.D + d;
        float keep[4];
        if (first + r < p.N && d < p.D) p.dropout.four(keep, at);
        for (int j = 0; j < 4; ++j) {
            const bool inside = first + r < p.N && d + j < p.D;
            const float x =
                inside ? fmaf(to_float(p.a[at + j]), p.scale[d + j], p.shift[d + j]) : 0;
            const T dt = from_float<T>(inside ? to_float(p.dy[at + j]) * keep[j] : 0);
            a_rows[r * kStride + d + j] = from_float<T>(x);
            dt_rows[r * kStride + d + j] = dt;
            p.dt[(batch * p.Np + first + r) * DP + d + j] = dt;
        }
    }
    __syncthreads();
    Left<T, MT, DP> a, dt;
    a.load(a_rows + warp * 16 * MT * kStride, kStride);
    dt.load(dt_rows + warp * 16 * MT * kStride, kStride);

    for (int head = 0; head < p.heads; ++head) {
        const int64_t part = (batch * p.heads + head) * p.Np + mine;
        Sums<MT, DP> x;
        x.zero();
        multiply_weights<DP, S::kThreads>(x, a, p.wq_t + head * DP * DP, weights);
        x.each_pair([&](float x0, float x1, int r, int c) {
            const bool inside = mine + r < p.N;
            x0 = inside && c < p.D ? x0 + p.bq[head * p.D + c] : 0.0f;
            x1 = inside && c + 1 < p.D ? x1 + p.bq[head * p.D + c + 1] : 0.0f;
            store_pair(p.q + (part + r) * DP, c, DP, x0, x1);
        });
        x.zero();
        multiply_weights<DP, S::kThreads>(x, dt, p.wo + head * DP * DP, weights);
        x.each_pair([&](float x0, float x1, int r, int c) {
            store_pair(p.dout + (part + r) * DP, c, DP, x0, x1);
        });
#pragma unroll
        for (int m = 0; m < MT; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int64_t row = mine + 16 * m + g + 8 * half;
                const T* o = p.o + ((batch * p.N + row) * p.heads + head) * p.D;
                float delta = 0;
#pragma unroll
                for (int n = 0; n < DP / 8; ++n) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const int c = 8 * n + 2 * t + i;
                        if (row < p.N && c < p.D) {
                            delta += rounded<T>(x.v[m][n][2 * half + i]) * to_float(o[c]);
                        }
                    }
                }
                delta = warp_sum<4>(delta);
                if (t == 0) {
                    const int64_t at = part + 16 * m + g + 8 * half;
                    const int64_t lse = (batch * p.heads + head) * p.N + row;
                    p.delta[at] = delta;
                    // Padding has no share: its q, do and delta are 0.
                    p.lse2[at] = row < p.N ? p.lse[lse] * kLog2E : 0;
                }
            }
        }
    }
}

template <class T, int DP> constexpr int64_t queries_shared() {
    using S = Shape<T, DP, true>;
    return sizeof(T) * (S::kWeights + 2 * S::kRows * S::kStride);
}

template <class T, int DP, bool SEPARATE>
__global__ void __launch_bounds__(Shape<T, DP, true>::kThreads) keys_kernel(Backward<T> p) {
    using S = Shape<T, DP, true>;
    constexpr int MT = S::MT, kStride = S::kStride, kStage = S::kLoad * kStride;
    float* lse2 = reinterpret_cast<float*>(shared_memory()); // [2][kLoad]
    float* delta = lse2 + 2 * S::kLoad;
    T* q = reinterpret_cast<T*>(delta + 2 * S::kLoad); // [2][kLoad][kStride]
    T* dout = q + 2 * kStage;
    T* key_rows = dout + 2 * kStage; // [kRows][kStride]
    T* value_rows = SEPARATE ? key_rows + S::kRows * kStride : key_rows;
    const int warp = threadIdx.x / kWarp, head = blockIdx.y;
    T* scratch = value_rows + S::kRows * kStride + warp * Left<T, MT, S::kTile>::kScratch;
    const int64_t blocks = ceil_div(p.M, S::kRows), batch = blockIdx.x / blocks;
    const int64_t first = batch * p.Mp + blockIdx.x % blocks * S::kRows;
    const int64_t queries = (batch * p.heads + head) * p.Np;

    const auto fetch = [&](int64_t tile) {
        const int64_t from = queries + tile * S::kLoad;
        const int stage = tile % 2;
        load_tile<S::kLoad, DP, S::kThreads>(q + stage * kStage, p.q + from * DP);
        load_tile<S::kLoad, DP, S::kThreads>(dout + stage * kStage, p.dout + from * DP);
        if (threadIdx.x < S::kLoad / 4) {
            copy_async(lse2 + stage * S::kLoad + 4 * threadIdx.x, p.lse2 + from + 4 * threadIdx.x);
            copy_async(delta + stage * S::kLoad + 4 * threadIdx.x,
                       p.delta + from + 4 * threadIdx.x);
        }
    };
    load_tile<S::kRows, DP, S::kThreads>(key_rows, p.keys + first * DP);
    if (SEPARATE) load_tile<S::kRows, DP, S::kThreads>(value_rows, p.values + first * DP);
    const int64_t tiles = ceil_div(p.N, S::kLoad);
    copies_begun();
    fetch(0);
    copies_begun();
    copies_done<1>();
    __syncthreads();

    Left<T, MT, DP> key, value;
    key.load(key_rows + warp * 16 * MT * kStride, kStride);
    if (SEPARATE) value.load(value_rows + warp * 16 * MT * kStride, kStride);
    Sums<MT, DP> dkey, dvalue;
    dkey.zero();
    if (SEPARATE) dvalue.zero();
    for (int64_t tile = 0; tile < tiles; ++tile) {
        if (tile + 1 < tiles) fetch(tile + 1);
        copies_begun();
        copies_done<1>();
        __syncthreads();
        for (int part = 0; part < S::kLoad; part += S::kTile) {
            const int column = tile % 2 * S::kLoad + part, offset = column * kStride;
            Sums<MT, S::kTile> s, ds; // [key][query]
            Left<T, MT, S::kTile> weight;
            s.zero();
            multiply<NK, S::kTile>(s, key, q + offset, kStride);
            ds.zero();
            multiply<NK, S::kTile>(ds, SEPARATE ? value : key, dout + offset, kStride);
            s.each(
                [&](float& x, int, int c) { x = fast_exp2(fmaf(x, kLog2E, -lse2[column + c])); });
            weight.from(s, scratch);
            multiply<KN, DP>(SEPARATE ? dvalue : dkey, weight, dout + offset, kStride);
#pragma unroll
            for (int m = 0; m < MT; ++m) {
#pragma unroll
                for (int n = 0; n < S::kTile / 8; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int c = column + 8 * n + threadIdx.x % 4 * 2 + i % 2;
                        ds.v[m][n][i] = s.v[m][n][i] * (ds.v[m][n][i] - delta[c]);
                    }
                }
            }
            weight.from(ds, scratch);
            multiply<KN, DP>(dkey, weight, q + offset, kStride);
        }
        __syncthreads();
    }
    copies_done<0>();

    const int64_t out = (head * p.B * p.Mp + first + warp * 16 * MT) * DP;
    dkey.each_pair(
        [&](float x, float y, int r, int c) { store_pair(p.dkeys + out + r * DP, c, DP, x, y); });
    if (SEPARATE) {
        dvalue.each_pair([&](float x, float y, int r, int c) {
            store_pair(p.dvalues + out + r * DP, c, DP, x, y);
        });
    }
}

template <class T, int DP> constexpr int64_t keys_shared(bool separate) {
    using S = Shape<T, DP, true>;
    return sizeof(float) * 4 * S::kLoad +
           sizeof(T) * (4 * S::kLoad * S::kStride + (separate ? 2 : 1) * S::kRows * S::kStride +
                        S::kWarps * Left<T, S::MT, S::kTile>::kScratch);
}

template <class T, int DP> __global__ void __launch_bounds__(Shape<T, DP, true>::kThreads)
    scores_kernel(Backward<T> p) {
    using S = Shape<T, DP, true>;
    constexpr int MT = S::MT, kStride = S::kStride, kStage = S::kLoad * kStride;
    const bool separate = p.values != p.keys;
    T* keys = reinterpret_cast<T*>(shared_memory()); // [2][kLoad][kStride]
    T* values = separate ? keys + 2 * kStage : keys;
    T* weights = values + 2 * kStage;
    T* q_rows = weights + S::kWeights; // [kRows][kStride]
    T* dout_rows = q_rows + S::kRows * kStride;
    const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4;
    T* scratch = dout_rows + S::kRows * kStride + warp * Left<T, MT, S::kTile>::kScratch;
    const int64_t blocks = ceil_div(p.N, S::kRows), batch = blockIdx.x / blocks;
    const int64_t first = blockIdx.x % blocks * S::kRows, mine = first + warp * 16 * MT;

    Sums<MT, DP> da;
    da.zero();
    for (int head = 0; head < p.heads; ++head) {
        const int64_t queries = (batch * p.heads + head) * p.Np;
        const auto fetch = [&](int64_t tile) {
            const int64_t offset = (batch * p.Mp + tile * S::kLoad) * DP;
            const int stage = tile % 2 * kStage;
            load_tile<S::kLoad, DP, S::kThreads>(keys + stage, p.keys + offset);
            if (separate) load_tile<S::kLoad, DP, S::kThreads>(values + stage, p.values + offset);
        };
        const int64_t tiles = ceil_div(p.M, S::kLoad);
        __syncthreads(); // all warps are done with the rows of the head before
        load_tile<S::kRows, DP, S::kThreads>(q_rows, p.q + (queries + first) * DP);
        load_tile<S::kRows, DP, S::kThreads>(dout_rows, p.dout + (queries + first) * DP);
        copies_begun();
        fetch(0);
        copies_begun();
        copies_done<1>();
        __syncthreads();
        Left<T, MT, DP> q, dout;
        q.load(q_rows + warp * 16 * MT * kStride, kStride);
        dout.load(dout_rows + warp * 16 * MT * kStride, kStride);
        float lse2[MT][2], delta[MT][2];
#pragma unroll
        for (int i = 0; i < 2 * MT; ++i) {
            lse2[i / 2][i % 2] = p.lse2[queries + mine + g + 8 * i];
            delta[i / 2][i % 2] = p.delta[queries + mine + g + 8 * i];
        }

        Sums<MT, DP> dq;
        dq.zero();
        const auto step = [&](int offset, int64_t left_over, auto padded) {
            Sums<MT, S::kTile> s, ds;
            s.zero();
            multiply<NK, S::kTile>(s, q, keys + offset, kStride);
            ds.zero();
            multiply<NK, S::kTile>(ds, dout, values + offset, kStride);
#pragma unroll
            for (int m = 0; m < MT; ++m) {
#pragma unroll
                for (int n = 0; n < S::kTile / 8; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float x = fmaf(s.v[m][n][i], kLog2E, -lse2[m][i / 2]);
                        ds.v[m][n][i] = fast_exp2(x) * (ds.v[m][n][i] - delta[m][i / 2]);
                    }
                }
            }
            if (decltype(padded)::value) { // scores of padding may overflow
                ds.each([&](float& x, int, int c) { x = c < left_over ? x : 0; });
            }
            Left<T, MT, S::kTile> weight;
            weight.from(ds, scratch);
            multiply<KN, DP>(dq, weight, keys + offset, kStride);
        };
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

        dq.each_pair([&](float x, float y, int r, int c) {
            store_pair(p.q + (queries + mine + r) * DP, c, DP, x, y);
            store_pair(q_rows + (warp * 16 * MT + r) * kStride, c, DP, x, y);
        });
        __syncwarp();
        q.load(q_rows + warp * 16 * MT * kStride, kStride);
        multiply_weights<DP, S::kThreads>(da, q, p.wq + head * DP * DP, weights);
    }
    da.each_pair([&](float x, float y, int r, int c) {
        if (mine + r >= p.N || c >= p.D) return;
        const float next = c + 1 < p.D ? p.scale[c + 1] : 0;
        store_pair(p.da + (batch * p.N + mine + r) * p.D, c, p.D, x * p.scale[c], y * next);
    });
}

template <class T, int DP> constexpr int64_t scores_shared(bool separate) {
    using S = Shape<T, DP, true>;
    return sizeof(T) * (2 * (separate ? 2 : 1) * S::kLoad * S::kStride + S::kWeights +
                        2 * S::kRows * S::kStride + S::kWarps * Left<T, S::MT, S::kTile>::kScratch);
}

int64_t at_most(int64_t x, int64_t limit) { return x < limit ? x : limit; }

} // namespace

EQCVT_API int eqcvt_cuda_conv_attention_attend_backward(
    int dtype, const void* dy, const void* a, const void* b, const void* c, const void* scale,
    const void* shift, const void* wq, const void* bq, const void* wo, const void* bo,
    const void* seed, const void* o, const void* lse, int64_t B, int64_t N, int64_t M, int64_t D,
    int64_t heads, double dropout, void* da, void* db, void* dc, void* dscale, void* dshift,
    void* dwq, void* dbq, void* dwo, void* dbo, void* workspace, int64_t* workspace_bytes,
    void* stream) {
    (void)bo;
    return with_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        return with_width(D, [&](auto width) -> int {
            constexpr int DP = decltype(width)::value;
            using S = Shape<T, DP, true>;
            using O = OuterShape<T, DP>;
            const int64_t Np = round_up(N, kTokens), Mp = round_up(M, kTokens);
            // As many blocks as keep a device busy while their partial sums stay below 16 MiB.
            const int64_t outer_blocks =
                at_most(B * ceil_div(N, O::kRows),
                        at_most(512, 16 + (int64_t(1) << 22) / (heads * O::kColumns)));
            const int64_t token_blocks = at_most(ceil_div(B * M, 64), 512);
            const int h = static_cast<int>(heads);
            const float* scales = static_cast<const float*>(scale);
            const float* shifts = static_cast<const float*>(shift);

            Workspace space(workspace);
            Backward<T> p = {};
            T* keys = space.take<T>(B * Mp * DP);
            T* values = c ? space.take<T>(B * Mp * DP) : keys;
            T* wq_t = space.take<T>(heads * DP * DP);
            T* wq_p = space.take<T>(heads * DP * DP);
            T* wo_p = space.take<T>(heads * DP * DP);
            p.q = space.take<T>(B * heads * Np * DP);
            p.dout = space.take<T>(B * heads * Np * DP);
            p.dt = space.take<T>(B * Np * DP);
            p.lse2 = space.take<float>(B * heads * Np);
            p.delta = space.take<float>(B * heads * Np);
            p.dkeys = space.take<float>(heads * B * Mp * DP);
            p.dvalues = c ? space.take<float>(heads * B * Mp * DP) : p.dkeys;
            float* partials = space.take<float>(outer_blocks * heads * O::kColumns);
            float* query_sums = space.take<float>(heads * O::kColumns);
            float* out_sums = space.take<float>(heads * O::kColumns);
            float* token_partials = space.take<float>(2 * token_blocks * D);
            if (workspace_bytes) {
                *workspace_bytes = space.used;
                return EQCVT_OK;
            }

            const float* none = nullptr;
            EQCVT_TRY(pad(static_cast<const T*>(b), scales + D, shifts + D, keys, B, M, D, Mp, DP,
                          false, stream));
            if (c) {
                EQCVT_TRY(pad(static_cast<const T*>(c), scales + 2 * D, shifts + 2 * D, values, B,
                              M, D, Mp, DP, false, stream));
            }
            const float* wq_given = static_cast<const float*>(wq);
            EQCVT_TRY(pad(wq_given, none, none, wq_t, heads, D, D, DP, DP, true, stream));
            EQCVT_TRY(pad(wq_given, none, none, wq_p, heads, D, D, DP, DP, false, stream));
            EQCVT_TRY(pad(static_cast<const float*>(wo), none, none, wo_p, heads, D, D, DP, DP,
                          false, stream));
            p.dy = static_cast<const T*>(dy), p.a = static_cast<const T*>(a);
            p.o = static_cast<const T*>(o), p.lse = static_cast<const float*>(lse);
            p.scale = scales, p.shift = shifts, p.bq = static_cast<const float*>(bq);
            p.keys = keys, p.values = values;
            p.wq_t = wq_t, p.wq = wq_p, p.wo = wo_p;
            p.dropout = Dropout::of(seed, dropout, 0);
            p.da = static_cast<T*>(da);
            p.B = B, p.N = N, p.M = M, p.Np = Np, p.Mp = Mp;
            p.D = static_cast<int>(D), p.heads = h;

            const Grid queries(B * ceil_div(N, S::kRows));
            const Grid key_blocks(B * ceil_div(M, S::kRows), static_cast<unsigned>(h));
            EQCVT_TRY(launch(queries_kernel<T, DP>, queries, S::kThreads, queries_shared<T, DP>(),
                             stream, p));
            EQCVT_TRY(launch(c ? keys_kernel<T, DP, true> : keys_kernel<T, DP, false>, key_blocks,
                             S::kThreads, keys_shared<T, DP>(c != nullptr), stream, p));
            EQCVT_TRY(launch(scores_kernel<T, DP>, queries, S::kThreads,
                             scores_shared<T, DP>(c != nullptr), stream, p));

            const Grid outer_grid(outer_blocks, static_cast<unsigned>(h));
            const Outer<T> query = {p.a, p.q, D, 0, heads * Np * DP, Np * DP, partials, B, N, p.D};
            EQCVT_TRY(
                launch(outer_kernel<T, DP>, outer_grid, O::kThreads, O::kShared, stream, query));
            EQCVT_TRY(
                sum_partials(partials, outer_blocks, heads * O::kColumns, query_sums, stream));
            const Outer<T> out = {p.o, p.dt, heads * D, D, Np * DP, 0, partials, B, N, p.D};
            EQCVT_TRY(
                launch(outer_kernel<T, DP>, outer_grid, O::kThreads, O::kShared, stream, out));
            EQCVT_TRY(sum_partials(partials, outer_blocks, heads * O::kColumns, out_sums, stream));
            float* dscales = static_cast<float*>(dscale);
            float* dshifts = static_cast<float*>(dshift);
            const Weights weights = {scales,
                                     shifts,
                                     wq_given,
                                     query_sums,
                                     out_sums,
                                     dscales,
                                     dshifts,
                                     static_cast<float*>(dwq),
                                     static_cast<float*>(dbq),
                                     static_cast<float*>(dwo),
                                     static_cast<float*>(dbo),
                                     p.D,
                                     DP,
                                     h};
            EQCVT_TRY(launch(weights_kernel, Grid(D), kWarp, 0, stream, weights));

            const Tokens<T> key = {p.dkeys,
                                   static_cast<const T*>(b),
                                   scales + D,
                                   static_cast<T*>(db),
                                   token_partials,
                                   B,
                                   M,
                                   Mp,
                                   p.D,
                                   h};
            EQCVT_TRY((finish_tokens<T, DP>(key, token_blocks, dscales + D, dshifts + D, stream)));
            if (!c) return EQCVT_OK;
            const Tokens<T> value = {p.dvalues,
                                     static_cast<const T*>(c),
                                     scales + 2 * D,
                                     static_cast<T*>(dc),
                                     token_partials,
                                     B,
                                     M,
                                     Mp,
                                     p.D,
                                     h};
            return finish_tokens<T, DP>(value, token_blocks, dscales + 2 * D, dshifts + 2 * D,
                                        stream);
        });
    });
}
