// Threads and scratch memory of the CPU kernels.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../eqcvt.h"

// Calls task(context, i, threads) for i = 0 .. threads - 1 at once and returns when all have, on
// the threads of eqcvt_share_openmp's library, else on helpers of our own; a forked child has
// helpers of its own too. `threads` < 1 counts as 1. A task must not throw and must not call
// eqcvt_parallel. Subnormal numbers are zero in it, as operands and as results.
EQCVT_API void eqcvt_parallel(int threads, void (*task)(void*, int, int), void* context);

// Takes the threads of the OpenMP runtime that the loaded library at `path` uses, and returns 1; or
// returns 0 if there is none. That runtime's threads spin for milliseconds after each of the
// library's loops, and threads of our own would have to share the cores with them.
EQCVT_API int eqcvt_share_openmp(const char* path);

// Aligned memory, or null.
EQCVT_API void* eqcvt_allocate(size_t bytes);
EQCVT_API void eqcvt_free(void* memory);

namespace {

// f(i, threads) on each thread.
template <class Function> inline void parallel(int threads, const Function& f) {
    eqcvt_parallel(
        threads,
        [](void* context, int i, int n) { (*static_cast<const Function*>(context))(i, n); },
        const_cast<void*>(static_cast<const void*>(&f)));
}

// The i-th of n equal parts of [0, count).
struct Range {
    int64_t begin, end;
    Range(int64_t count, int64_t i, int64_t n) : begin(count * i / n), end(count * (i + 1) / n) {}
};

// Of `threads`, at least one, no more than there are tasks.
inline int useful_threads(int threads, int64_t tasks) {
    if (threads <= 1 || tasks <= 1) return 1;
    return threads < tasks ? threads : static_cast<int>(tasks);
}

// Scratch memory aligned to 64 bytes, not initialised; `data` is null where there was none left.
template <class T> struct Scratch {
    T* data;
    explicit Scratch(int64_t count)
        : data(static_cast<T*>(eqcvt_allocate(static_cast<size_t>(count) * sizeof(T)))) {}
    ~Scratch() { eqcvt_free(data); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    T& operator[](int64_t i) { return data[i]; }
    const T& operator[](int64_t i) const { return data[i]; }
};

} // namespace
