// A stand-in for CUDA on the host, for tests: g++ -x c++ -DEQCVT_EMULATE -include emulate.h
// file.cu.
//
// Blocks run one after another. The threads of a block are fibers that run, one at a time, up to
// the next barrier or warp-wide instruction, where they wait for each other as on the device. What
// that shows:
// - a missing barrier: emulate_order() changes the order of the fibers and blocks, and with it the
//   result of a kernel that depends on it (the order is fixed otherwise);
// - a barrier or warp-wide instruction that not all threads reach: the process ends with a message;
// - shared memory that is read before it is written: every block finds it full of NaN;
// - shared memory past its end: it is allocated to the byte, for AddressSanitizer;
// - an asynchronous copy that is not waited for, or that overwrites what is still read: its bytes
//   arrive at the wait, or in odd orders at once;
// - a misaligned vector access: by -fsanitize=alignment;
// - a race, of shared or global memory: by ThreadSanitizer, for which each thread of a block is a
//   thread, ordered with others by launches, barriers and nothing else (not by a shuffle).
// What it cannot show: speed, bank conflicts, the rounding of the device's own exp2, rsqrt and
// matrix unit, and by ThreadSanitizer most races between blocks, whose threads are the same ones:
// for these there are the orders.
#pragma once

#include <limits.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef __SANITIZE_THREAD__
// For functions that end, or go on, as another thread than they began as.
#define EMULATE_UNSEEN __attribute__((no_sanitize("thread")))
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* at);
void __tsan_release(void* at);
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
}
#else
#define EMULATE_UNSEEN
#endif

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct uint3 {
    unsigned x, y, z;
};
struct dim3 : uint3 {
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
};

#define EMULATE_VECTORS(name, type)                                                                \
    struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                       \
    struct alignas(4 * sizeof(type)) name##4 { type x, y, z, w; };                                 \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                               \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATE_VECTORS(float, float)
EMULATE_VECTORS(int, int)
EMULATE_VECTORS(uint, uint32_t)
#undef EMULATE_VECTORS

// Functions of the device.

using std::max;
using std::min;

inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) {
    return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}
inline float rsqrtf(float x) { return static_cast<float>(1 / sqrt(static_cast<double>(x))); }
template <class T> inline T __ldg(const T* p) { return *p; }

// The 16-bit types: nearest, ties to even; every NaN becomes the device's one NaN.
struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
    return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const uint32_t bits = __float_as_uint(x);
    if (x != x) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline float __half2float(__half x) {
    _Float16 value;
    memcpy(&value, &x, sizeof value);
    return static_cast<float>(value);
}
inline __half __float2half_rn(float x) {
    if (x != x) return {0x7fff};
    const _Float16 value = static_cast<_Float16>(x);
    __half half;
    memcpy(&half, &value, sizeof half);
    return half;
}

namespace emulate {

// What ThreadSanitizer is told. An `acquire` of a place comes after all that came before each
// `release` of it; the emulator's own memory, touched while an `Ignored` lives, is not watched.
namespace tsan {
#ifdef __SANITIZE_THREAD__
constexpr unsigned kNoOrder = 1; // a switch of fibers orders nothing
inline void acquire(void* at) { __tsan_acquire(at); }
inline void release(void* at) { __tsan_release(at); }
inline void* self() { return __tsan_get_current_fiber(); }
inline void* create() { return __tsan_create_fiber(0); }
EMULATE_UNSEEN inline void enter(void* fiber) { __tsan_switch_to_fiber(fiber, kNoOrder); }
struct Ignored {
    Ignored() { __tsan_ignore_thread_begin(); }
    ~Ignored() { __tsan_ignore_thread_end(); }
};
#else
inline void acquire(void*) {}
inline void release(void*) {}
inline void* self() { return nullptr; }
inline void* create() { return nullptr; }
inline void enter(void*) {}
struct Ignored {
    Ignored() {}
};
#endif
} // namespace tsan

// What a fiber waits for. Lanes of a warp must wait for the same thing.
enum Wait { RUNNING, BLOCK, SYNCWARP, SHUFFLE, MMA, MATRICES, ENDED };

struct Copy {
    void* to;
    const void* from;
};

struct Fiber {
    ucontext_t context;
    unsigned char* stack;
    uint3 thread;
    int index;
    Wait wait;
    unsigned exchanges, barriers, warp_barriers;
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups;
};

constexpr int kWarp = 32, kSlot = 32;
constexpr size_t kStack = 512 * 1024, kGuard = 4096;

struct Block {
    dim3 grid, threads;
    uint3 index;
    std::vector<Fiber> fibers;
    std::vector<std::array<std::array<unsigned char, kWarp * kSlot>, 2>> slots; // of each warp
    std::unique_ptr<unsigned char[]> shared;
    std::unique_ptr<int64_t[]> barriers; // two in turn of the block, and of each warp
    std::function<void()> body;
    Fiber* current;
    ucontext_t scheduler;
    void* scheduler_thread;
    std::vector<void*> fiber_threads;
    char launched, done; // places that order the threads of tsan
    const void* scheduler_stack;
    size_t scheduler_stack_size;
};

inline Block block;
inline int order; // 0: as numbered, 1: backwards, else: shuffled with this seed; odd: early copies

[[noreturn]] inline void fail(const char* what) {
    const uint3 t = block.current ? block.current->thread : uint3{};
    fprintf(stderr, "emulated CUDA: %s (block %u %u %u, thread %u %u %u)\n", what, block.index.x,
            block.index.y, block.index.z, t.x, t.y, t.z);
    abort();
}

// Leaves the fiber until the scheduler has let it go on.
EMULATE_UNSEEN inline void wait(Wait what) {
    Fiber* self = block.current;
    self->wait = what;
#ifdef __SANITIZE_ADDRESS__
    void* saved = nullptr;
    __sanitizer_start_switch_fiber(what == ENDED ? nullptr : &saved, block.scheduler_stack,
                                   block.scheduler_stack_size);
#endif
    tsan::enter(block.scheduler_thread);
    swapcontext(&self->context, &block.scheduler);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(saved, nullptr, nullptr);
#endif
}

// As wait(): for the threads of __syncthreads() or __syncwarp() memory is in order too.
inline void barrier(Wait what) {
    Fiber* self = block.current;
    const int of_warp = 2 + 2 * (self->index / kWarp);
    int64_t* place = &block.barriers[what == BLOCK ? self->barriers++ & 1
                                                   : of_warp + (self->warp_barriers++ & 1)];
    tsan::release(place);
    wait(what);
    tsan::acquire(place);
}

EMULATE_UNSEEN inline void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_stack_size);
#endif
    tsan::acquire(&block.launched);
    block.body();
    tsan::release(&block.done);
    if (!block.current->open.empty() || !block.current->groups.empty()) {
        fail("a thread ended before its asynchronous copies");
    }
    wait(ENDED);
}

inline void resume(Fiber& fiber) {
    block.current = &fiber;
#ifdef __SANITIZE_ADDRESS__
    void* saved = nullptr;
    __sanitizer_start_switch_fiber(&saved, fiber.stack, kStack);
#endif
    tsan::enter(block.fiber_threads[fiber.index]);
    swapcontext(&block.scheduler, &fiber.context);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(saved, nullptr, nullptr);
#endif
    block.current = nullptr;
}

// Lets go of the fibers [begin, end) if all wait for the same thing, not the block.
inline bool release(int begin, int end, bool whole_block) {
    const Wait what = block.fibers[begin].wait;
    if (what == RUNNING || what == ENDED || (what == BLOCK) != whole_block) return false;
    for (int i = begin; i < end; ++i) {
        if (block.fibers[i].wait != what) return false;
    }
    for (int i = begin; i < end; ++i) block.fibers[i].wait = RUNNING;
    return true;
}

inline void run_block(std::mt19937& random) {
    const int count = static_cast<int>(block.fibers.size());
    std::vector<int> turn(count);
    for (int i = 0; i < count; ++i) turn[i] = order == 1 ? count - 1 - i : i;
    for (bool progress = true; progress;) {
        if (order > 1) std::shuffle(turn.begin(), turn.end(), random);
        for (int i : turn) {
            if (block.fibers[i].wait == RUNNING) resume(block.fibers[i]);
        }
        progress = release(0, count, true);
        for (int i = 0; i < count; i += kWarp) progress |= release(i, i + kWarp, false);
    }
    for (const Fiber& fiber : block.fibers) {
        if (fiber.wait != ENDED) fail("threads wait for each other at different places");
    }
}

inline void prepare(Fiber& fiber, int index, uint3 thread, unsigned char* memory) {
    mprotect(memory, kGuard, PROT_NONE); // the end of the stack
    fiber.stack = memory + kGuard;
    fiber.index = index;
    fiber.thread = thread;
    fiber.wait = RUNNING;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
}

// Runs `body` once for every thread of every block.
inline void run(dim3 grid, dim3 threads, int64_t shared, std::function<void()> body) {
    const tsan::Ignored ignored;
    const int count = static_cast<int>(threads.x * threads.y * threads.z);
    if (count % kWarp != 0 || count > 1024) fail("a block is 1 to 32 whole warps here");
    if (shared > 227 * 1024) fail("more shared memory than any device has");
    static unsigned char* stacks =
        static_cast<unsigned char*>(mmap(nullptr, 1024 * (kStack + kGuard), PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    std::mt19937 random(static_cast<unsigned>(order));
    const int64_t blocks = static_cast<int64_t>(grid.x) * grid.y * grid.z;
    block.grid = grid;
    block.threads = threads;
    block.body = std::move(body);
    block.scheduler_thread = tsan::self();
    while (static_cast<int>(block.fiber_threads.size()) < count) {
        block.fiber_threads.push_back(tsan::create());
    }
    tsan::release(&block.launched);
    for (int64_t n = 0; n < blocks; ++n) {
        const int64_t i = order == 0 ? n : blocks - 1 - n;
        block.index = {static_cast<unsigned>(i % grid.x),
                       static_cast<unsigned>(i / grid.x % grid.y),
                       static_cast<unsigned>(i / grid.x / grid.y)};
        block.slots.resize(count / kWarp);
        block.shared.reset(new unsigned char[shared]);
        memset(block.shared.get(), 0xff, shared);
        block.barriers.reset(new int64_t[2 + 2 * (count / kWarp)]);
        block.fibers.assign(count, Fiber());
        for (int j = 0; j < count; ++j) {
            const unsigned u = static_cast<unsigned>(j);
            const uint3 thread = {u % threads.x, u / threads.x % threads.y,
                                  u / threads.x / threads.y};
            prepare(block.fibers[j], j, thread, stacks + j * (kStack + kGuard));
        }
        run_block(random);
    }
    block.shared.reset();
    block.barriers.reset();
    tsan::acquire(&block.done);
}

inline unsigned char* shared_memory() { return block.shared.get(); }
inline int lane() { return block.current->index % kWarp; }

// Shows a value to the other lanes; returns those of all lanes. Two buffers in turn: no lane can be
// more than one exchange ahead of another.
template <class V> const V* exchange(const V& mine, Wait what) {
    static_assert(sizeof(V) <= kSlot, "a value fits its slot");
    const tsan::Ignored ignored;
    Fiber* self = block.current;
    V* values =
        reinterpret_cast<V*>(block.slots[self->index / kWarp][self->exchanges++ & 1].data());
    memcpy(&values[lane()], &mine, sizeof(V));
    wait(what);
    return values;
}

// D = A B + D for mma.m16n8k16: the layout is that of the PTX ISA, "Matrix Fragments for
// mma.m16n8k16 with floating point type"; sums in float, k ascending.
template <class T> float as_float(uint32_t pair, int half);
template <> inline float as_float<__nv_bfloat16>(uint32_t pair, int half) {
    return __bfloat162float({static_cast<uint16_t>(pair >> (16 * half))});
}
template <> inline float as_float<__half>(uint32_t pair, int half) {
    return __half2float({static_cast<uint16_t>(pair >> (16 * half))});
}
template <class T> void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    struct Operands {
        uint32_t a[4], b[2];
    };
    const Operands* lanes = exchange(Operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, MMA);
    const int g = lane() / 4, t = lane() % 4;
    for (int i = 0; i < 4; ++i) {
        const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
        for (int k = 0; k < 16; ++k) {
            const uint32_t left = lanes[row % 8 * 4 + k % 8 / 2].a[row / 8 + 2 * (k / 8)];
            const uint32_t right = lanes[column * 4 + k % 8 / 2].b[k / 8];
            d[i] += as_float<T>(left, k % 2) * as_float<T>(right, k % 2);
        }
    }
}

// Each lane reads the row whose address it gives, when it comes: lanes that have yet to write to it
// are not waited for.
template <bool TRANSPOSED> void load_matrices(uint32_t (&r)[4], const void* row) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("ldmatrix: misaligned row");
    const auto mine = *static_cast<const std::array<uint16_t, 8>*>(row);
    const auto* rows = exchange(mine, MATRICES);
    const int g = lane() / 4, t = lane() % 4;
    for (int i = 0; i < 4; ++i) {
        const uint32_t low = TRANSPOSED ? rows[8 * i + 2 * t][g] : rows[8 * i + g][2 * t];
        const uint32_t high = TRANSPOSED ? rows[8 * i + 2 * t + 1][g] : rows[8 * i + g][2 * t + 1];
        r[i] = low | high << 16;
    }
}

inline void copy_async(void* to, const void* from) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 != 0) {
        fail("cp.async: misaligned address");
    }
    if (order % 2 == 1) memcpy(to, from, 16);
    block.current->open.push_back({to, from});
}
inline void copies_begun() {
    block.current->groups.push_back(std::move(block.current->open));
    block.current->open.clear();
}
inline void copies_done(int left) {
    auto& groups = block.current->groups;
    while (static_cast<int>(groups.size()) > left) {
        for (const Copy& copy : groups.front()) {
            if (order % 2 == 0) memcpy(copy.to, copy.from, 16);
        }
        groups.erase(groups.begin());
    }
}

inline void whole_warp(unsigned mask) {
    if (mask != ~0u) fail("a warp-wide instruction of part of a warp");
}

} // namespace emulate

#define threadIdx (emulate::block.current->thread)
#define blockIdx (emulate::block.index)
#define blockDim (emulate::block.threads)
#define gridDim (emulate::block.grid)

inline void __syncthreads() { emulate::barrier(emulate::BLOCK); }
inline void __syncwarp(unsigned mask = ~0u) {
    emulate::whole_warp(mask);
    emulate::barrier(emulate::SYNCWARP);
}
template <class V> V __shfl_sync(unsigned mask, V value, int source) {
    emulate::whole_warp(mask);
    return emulate::exchange(value, emulate::SHUFFLE)[source & 31];
}
template <class V> V __shfl_xor_sync(unsigned mask, V value, int step) {
    emulate::whole_warp(mask);
    return emulate::exchange(value, emulate::SHUFFLE)[emulate::lane() ^ step];
}
template <class V> V __shfl_down_sync(unsigned mask, V value, int step) {
    emulate::whole_warp(mask);
    const int source = emulate::lane() + step;
    return emulate::exchange(value, emulate::SHUFFLE)[source < 32 ? source : emulate::lane()];
}

// The order in which fibers and blocks run from now on; see `order`.
extern "C" __attribute__((visibility("default"), weak)) void emulate_order(int order) {
    emulate::order = order;
}
