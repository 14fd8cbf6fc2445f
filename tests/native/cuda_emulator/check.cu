// Kernels that do, or forget, what the emulator is there to check.
#include "../../../csrc/cuda/device.cuh"

namespace {

// C[16][8] += A[16][16] B, with B given as rows of k or (TRANSPOSED) as rows of columns.
template <class T>
__global__ void product_kernel(const T* a, const T* b, float* c, int rows_are_columns) {
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    T* tile = reinterpret_cast<T*>(shared_memory());
    for (int i = lane; i < 32; i += 32) copy_async(tile + 8 * i, a + 8 * i);
    for (int i = lane; i < 16; i += 32) copy_async(tile + 256 + 8 * i, b + 8 * i);
    copies_begun();
    copies_done<0>();
    __syncwarp();
    uint32_t left[4], right[4];
    load_matrices<false>(left, tile + (lane % 16) * 16 + lane / 16 * 8);
    if (rows_are_columns) {
        load_matrices<false>(right, tile + 256 + lane % 8 * 16 + lane / 8 % 2 * 8);
    } else {
        load_matrices<true>(right, tile + 256 + lane % 16 * 8);
    }
    float d[4];
    for (int i = 0; i < 4; ++i) d[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
    mma<T>(d, left, {right[0], right[1]});
    for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

// Turns the 64 values of each block around; `barrier` says which barrier is forgotten. 3: those of
// each half, for which a warp's barrier is enough, and 4: a shuffle instead is not.
__global__ void reverse_kernel(float* x, int barrier) {
    float* shared = reinterpret_cast<float*>(shared_memory());
    shared[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
    if (barrier == 0) __syncthreads();
    if (barrier == 1 && threadIdx.x < 32) __syncthreads();
    if (barrier == 3) __syncwarp();
    if (barrier == 4) __shfl_sync(~0u, 0, 0);
    const unsigned last = barrier < 3 ? 63 : 31 + threadIdx.x / 32 * 64;
    x[blockIdx.x * 64 + threadIdx.x] = shared[last - threadIdx.x];
}

__global__ void words_kernel(Dropout dropout, int64_t start, float* out) {
    float factors[4];
    dropout.four(factors, start + 4 * threadIdx.x);
    for (int j = 0; j < 4; ++j) out[4 * threadIdx.x + j] = factors[j];
}

} // namespace

EQCVT_API int check_product(int dtype, const void* a, const void* b, void* c, int rows) {
    if (dtype == EQCVT_BF16) {
        using T = __nv_bfloat16;
        return launch(product_kernel<T>, 1, 32, 768, nullptr, static_cast<const T*>(a),
                      static_cast<const T*>(b), static_cast<float*>(c), rows);
    }
    using T = __half;
    return launch(product_kernel<T>, 1, 32, 768, nullptr, static_cast<const T*>(a),
                  static_cast<const T*>(b), static_cast<float*>(c), rows);
}

EQCVT_API int check_reverse(void* x, int barrier, int shared_bytes) {
    return launch(reverse_kernel, 2, 64, shared_bytes, nullptr, static_cast<float*>(x), barrier);
}

EQCVT_API int check_words(const void* seed, double p, int stream, int64_t start, void* out) {
    return launch(words_kernel, 1, 32, 0, nullptr, Dropout::of(seed, p, stream), start,
                  static_cast<float*>(out));
}

EQCVT_API int check_sums(const void* partials, int64_t rows, int64_t columns, void* out) {
    return sum_partials(static_cast<const float*>(partials), rows, columns,
                        static_cast<float*>(out), nullptr);
}
