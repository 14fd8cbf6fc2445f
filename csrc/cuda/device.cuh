// What every CUDA source shares: types and their conversion, sums over warps, the matrix unit,
// asynchronous copies, the dropout generator, launches.
//
// The sources are plain CUDA C++ for sm_80 and newer. tests/native/cuda_emulator/emulate.h stands
// in for the CUDA headers where EQCVT_EMULATE is defined, so that g++ compiles and runs the same
// sources; all PTX is therefore in this file, each instruction beside its stand-in.
#pragma once

#include <stdint.h>

#include <cmath>

#ifndef EQCVT_EMULATE
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include "../eqcvt.h"

namespace {

constexpr int kWarp = 32;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Types. Activations are float, __nv_bfloat16 or __half; arithmetic is in float.

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <class T> __device__ inline T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}
template <> __device__ inline __half from_float<__half>(float x) { return __float2half_rn(x); }

// x as it reads back after a store in T.
template <class T> __device__ inline float rounded(float x) { return to_float(from_float<T>(x)); }

// V values that are moved with one access; the address is a multiple of their size.
template <class T, int V> struct alignas(sizeof(T) * V) Pack {
    T value[V];
};

// Two 16-bit values as the halves of a register, the first in the low half.
template <class T> __device__ inline uint32_t pack2(float low, float high) {
    static_assert(sizeof(T) == 2, "two values to a register");
    const Pack<T, 2> pair = {{from_float<T>(low), from_float<T>(high)}};
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}

// Calls f with a value of the type that `dtype` names.
template <class Function> int with_dtype(int dtype, const Function& f) {
    switch (dtype) {
    case EQCVT_F32:
        return f(float());
    case EQCVT_BF16:
        return f(__nv_bfloat16());
    case EQCVT_F16:
        return f(__half());
    default:
        return EQCVT_BAD_DTYPE;
    }
}

// Sums over a warp, the same in all lanes; the order of the additions is fixed.
template <int WIDTH = kWarp> __device__ inline float warp_sum(float x) {
    for (int step = WIDTH / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

// Largest value over WIDTH neighbouring lanes; a NaN loses against a number.
template <int WIDTH = kWarp> __device__ inline float warp_max(float x) {
    for (int step = WIDTH / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

// 2^x to about 2 ulp; -inf gives 0.
__device__ inline float fast_exp2(float x) {
#ifdef EQCVT_EMULATE
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// The shared memory that the launch asked for, filled by the caller of launch().
__device__ inline unsigned char* shared_memory() {
#ifdef EQCVT_EMULATE
    return emulate::shared_memory();
#else
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
#endif
}

// d += a b for a 16x16 and b 16x8, spread over the warp as the PTX ISA says for
// mma.m16n8k16 with .f16 / .bf16 operands. With g = lane / 4 and t = lane % 4:
//   a[0] = A[g][2t, 2t+1], a[1] = A[g+8][..], a[2] = A[g][2t+8, 2t+9], a[3] = A[g+8][..];
//   b[0] = B[2t, 2t+1][g], b[1] = B[2t+8, 2t+9][g];
//   d[0..1] = D[g][2t, 2t+1], d[2..3] = D[g+8][2t, 2t+1].
template <class T>
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

// Four 8x8 matrices of 16-bit values; lane 8 i + r names row r of matrix i, which is 16 bytes of
// shared memory on a multiple of 16. r[i] is then row g, columns 2t and 2t+1 of matrix i, or with
// TRANSPOSED rows 2t and 2t+1 of column g.
template <bool TRANSPOSED> __device__ inline void load_matrices(uint32_t (&r)[4], const void* row);

#ifdef EQCVT_EMULATE
template <class T>
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    emulate::mma<T>(d, a, b);
}
template <bool TRANSPOSED> __device__ inline void load_matrices(uint32_t (&r)[4], const void* row) {
    emulate::load_matrices<TRANSPOSED>(r, row);
}
#else
#define EQCVT_MMA(T, name)                                                                         \
    template <>                                                                                    \
    __device__ inline void mma<T>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name ".f32 "                \
                     "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                       \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                              \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));          \
    }
EQCVT_MMA(__nv_bfloat16, "bf16")
EQCVT_MMA(__half, "f16")
#undef EQCVT_MMA

template <bool TRANSPOSED> __device__ inline void load_matrices(uint32_t (&r)[4], const void* row) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    if (TRANSPOSED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
    }
}
#endif

// Copies 16 bytes from global to shared memory, both on multiples of 16, behind the thread's back.
// copies_begun() closes a group; copies_done<N>() waits until at most the last N groups of this
// thread are under way. Other threads see the bytes after a barrier behind that.
__device__ inline void copy_async(void* shared, const void* global) {
#ifdef EQCVT_EMULATE
    emulate::copy_async(shared, global);
#else
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global)
                 : "memory");
#endif
}
__device__ inline void copies_begun() {
#ifdef EQCVT_EMULATE
    emulate::copies_begun();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int N> __device__ inline void copies_done() {
#ifdef EQCVT_EMULATE
    emulate::copies_done(N);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
__device__ inline uint4 philox(uint64_t seed, uint64_t block, uint32_t stream) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    uint4 c =
        make_uint4(static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), stream, 0);
    for (int round = 0; round < 10; ++round) {
        const uint32_t low0 = 0xD2511F53u * c.x, high0 = __umulhi(0xD2511F53u, c.x);
        const uint32_t low1 = 0xCD9E8D57u * c.z, high1 = __umulhi(0xCD9E8D57u, c.z);
        c = make_uint4(high1 ^ c.y ^ key0, low1, high0 ^ c.w ^ key1, low0);
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return c;
}

// The factor of entry i of a contiguous tensor under dropout: 0, or one over what is kept of a
// probability rounded to 1 / 65536. Entry i takes number i & 7 of the eight of 16 bits, lowest
// first, in the words of block i >> 3.
struct Dropout {
    const int64_t* seed;
    uint32_t stream, threshold;
    float factor;

    // The host's side; with p = 0 the generator is not run.
    static Dropout of(const void* seed, double p, uint32_t stream) {
        const double threshold = std::nearbyint(p * 65536);
        return {static_cast<const int64_t*>(seed), stream, static_cast<uint32_t>(threshold),
                threshold < 65536 ? static_cast<float>(65536 / (65536 - threshold)) : 0.0f};
    }
    __device__ bool off() const { return factor == 1.0f; }
    __device__ uint4 words(int64_t block) const {
        return philox(static_cast<uint64_t>(*seed), static_cast<uint64_t>(block), stream);
    }
    // Those of the entries of the lower and of the upper half of a word.
    __device__ float low(uint32_t word) const {
        return (word & 0xFFFF) >= threshold ? factor : 0.0f;
    }
    __device__ float high(uint32_t word) const { return word >> 16 >= threshold ? factor : 0.0f; }
    __device__ float choose(const uint4& words, int64_t i) const {
        const uint32_t first = i & 2 ? words.y : words.x, second = i & 2 ? words.w : words.z;
        const uint32_t word = i & 4 ? second : first;
        return i & 1 ? high(word) : low(word);
    }
    __device__ float operator()(int64_t i) const { return off() ? 1.0f : choose(words(i >> 3), i); }
    // The factors of entries i to i + 3.
    __device__ void four(float (&factors)[4], int64_t i) const {
        if (!off() && (i & 3) == 0) {
            const uint4 w = words(i >> 3);
            for (int j = 0; j < 4; ++j) factors[j] = choose(w, i + j);
        } else {
            for (int j = 0; j < 4; ++j) factors[j] = (*this)(i + j);
        }
    }
};

// Adds up partial sums: out[j] = sum over i of partials[i][j], in a fixed order and in double.
// One block owns 32 columns; its eight warps take every eighth row.
constexpr int kSumThreads = 256;
template <class Out> __global__ void sum_partials_kernel(const float* partials, int64_t rows,
                                                         int64_t columns, Out* out) {
    double* strand = reinterpret_cast<double*>(shared_memory()); // [8][32]
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int64_t column = blockIdx.x * static_cast<int64_t>(kWarp) + lane;
    double sum = 0;
    if (column < columns) {
        for (int64_t i = warp; i < rows; i += kSumThreads / kWarp) {
            sum += partials[i * columns + column];
        }
    }
    strand[threadIdx.x] = sum;
    __syncthreads();
    if (warp == 0 && column < columns) {
        for (int i = 1; i < kSumThreads / kWarp; ++i) sum += strand[i * kWarp + lane];
        out[column] = static_cast<Out>(sum);
    }
}

// Launches.

#ifndef EQCVT_EMULATE
// An error as a status, no longer the thread's last one: the next launch would report it again.
inline int failed(cudaError_t error) {
    cudaGetLastError();
    return static_cast<int>(error);
}
#endif

// What the host asks of the device: `shared` bytes are the most that a block may have.
struct Device {
    int64_t multiprocessors, shared;
};

inline int current_device(Device& device) {
#ifdef EQCVT_EMULATE
    const char* shared = getenv("EQCVT_EMULATE_SHARED");
    device = {1, shared ? atoi(shared) : 227 * 1024};
    return EQCVT_OK;
#else
    int id, count, shared;
    cudaError_t error = cudaGetDevice(&id);
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, id);
    }
    if (error == cudaSuccess) {
        error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
    }
    if (error != cudaSuccess) return failed(error);
    device = {count, shared};
    return EQCVT_OK;
#endif
}

struct Grid {
    int64_t x;
    unsigned y, z;
    Grid(int64_t x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Runs a kernel on the stream and returns a status; an empty grid is no work. Neither allocates nor
// waits, so a stream under capture is fine.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), Grid grid, int threads, int64_t shared, void* stream,
           Arguments... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return EQCVT_OK;
    if (grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) return EQCVT_BAD_SIZE;
    const dim3 blocks(static_cast<unsigned>(grid.x), grid.y, grid.z);
#ifdef EQCVT_EMULATE
    (void)stream;
    emulate::run(blocks, threads, shared, [=] { kernel(static_cast<Parameters>(arguments)...); });
    return EQCVT_OK;
#else
    if (shared > 48 * 1024) {
        // The limit is the kernel's, not the launch's: threads that set the same cannot lower
        // another's.
        Device device;
        const int status = current_device(device);
        if (status != EQCVT_OK) return status;
        if (shared > device.shared) return EQCVT_BAD_SIZE;
        const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                       cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       static_cast<int>(device.shared));
        if (error != cudaSuccess) return failed(error);
    }
    kernel<<<blocks, threads, shared, static_cast<cudaStream_t>(stream)>>>(
        static_cast<Parameters>(arguments)...);
    return static_cast<int>(cudaGetLastError());
#endif
}

template <class Out>
int sum_partials(const float* partials, int64_t rows, int64_t columns, Out* out, void* stream) {
    return launch(sum_partials_kernel<Out>, Grid(ceil_div(columns, kWarp)), kSumThreads,
                  kSumThreads * sizeof(double), stream, partials, rows, columns, out);
}

// Hands out parts of the workspace, each on a multiple of 256 bytes. With a null base it only
// counts, which is how a launcher says what it needs.
struct Workspace {
    unsigned char* base;
    int64_t used = 0;

    explicit Workspace(void* base) : base(static_cast<unsigned char*>(base)) {}
    template <class T> T* take(int64_t count) {
        T* part = base ? reinterpret_cast<T*>(base + used) : nullptr;
        used += round_up(count * static_cast<int64_t>(sizeof(T)), 256);
        return part;
    }
};

} // namespace

// Ends the launcher with the status of a step that failed.
#define EQCVT_TRY(step)                                                                            \
    do {                                                                                           \
        const int eqcvt_status_ = (step);                                                          \
        if (eqcvt_status_ != EQCVT_OK) return eqcvt_status_;                                       \
    } while (0)
