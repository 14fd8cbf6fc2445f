// What every launcher shares: the codes of data types and of errors.
//
// A launcher is a C function that knows neither torch nor Python: raw pointers, sizes, and either
// a number of threads (cpu/) or a workspace and a stream (cuda/). Its shapes are those of the
// function of the same name in tests/ops/primitives.py; all tensors are contiguous, in the order
// written there.
#pragma once

#include <stdint.h>

#if defined(EQCVT_API) // given on the command line, to load one file alone
#else
#define EQCVT_API extern "C" __attribute__((visibility("hidden")))
#endif

// Activations have one of these types; parameters and statistics are float64 beside float64
// activations and float32 beside all others.
enum eqcvt_dtype { EQCVT_F32 = 0, EQCVT_F64 = 1, EQCVT_BF16 = 2, EQCVT_F16 = 3 };

// Results of launchers; a positive value is a cudaError_t.
enum eqcvt_status { EQCVT_OK = 0, EQCVT_NO_MEMORY = -1, EQCVT_BAD_DTYPE = -2, EQCVT_BAD_SIZE = -3 };

// Declares a launcher: the CPU's in the variants that one source is compiled to, of which
// bindings.cpp picks the widest that the processor runs, and CUDA's.
#define EQCVT_LAUNCHER(name, ...)                                                                  \
    EQCVT_API int eqcvt_cpu_##name##_portable(__VA_ARGS__, int threads);                           \
    EQCVT_API int eqcvt_cpu_##name##_avx2(__VA_ARGS__, int threads);                               \
    EQCVT_API int eqcvt_cpu_##name##_avx512(__VA_ARGS__, int threads);                             \
    EQCVT_API int eqcvt_cpu_##name##_amx(__VA_ARGS__, int threads);                                \
    EQCVT_API int eqcvt_cuda_##name(__VA_ARGS__, void* workspace, int64_t* workspace_bytes,        \
                                    void* stream)
