#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace {

// Helpers that sleep until there is a task. They are detached and the pool is never destroyed, so
// that neither the interpreter's end nor a fork waits for them.
class Pool {
  public:
    void run(int threads, void (*task)(void*, int, int), void* context) {
        std::lock_guard<std::mutex> turn(turn_);
        int helpers = grow(threads - 1);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            task_ = task, context_ = context, threads_ = threads;
            helpers_ = left_ = helpers;
            ++generation_;
        }
        wake_.notify_all();
        // Where the system gave fewer helpers than asked for, this thread does their share, so that
        // the partition of the work, and with it the rounding, is that of `threads`.
        for (int i = helpers; i < threads; ++i) task(context, i, threads);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return left_ == 0; });
    }

  private:
    int grow(int wanted) {
        while (started_ < wanted) {
            try {
                std::thread(&Pool::help, this, started_, generation_).detach();
            } catch (const std::system_error&) {
                break;
            }
            ++started_;
        }
        return wanted < started_ ? wanted : started_;
    }

    void help(int index, uint64_t seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return generation_ != seen; });
            seen = generation_;
            if (index >= helpers_) continue;
            auto task = task_;
            auto context = context_;
            int threads = threads_;
            lock.unlock();
            task(context, index, threads);
            lock.lock();
            if (--left_ == 0) done_.notify_one();
        }
    }

    std::mutex turn_, mutex_;
    std::condition_variable wake_, done_;
    void (*task_)(void*, int, int) = nullptr;
    void* context_ = nullptr;
    int threads_ = 0, helpers_ = 0, left_ = 0, started_ = 0;
    uint64_t generation_ = 0;
};

Pool* pool = nullptr;
std::mutex* pool_mutex = new std::mutex;

Pool& the_pool() {
    std::lock_guard<std::mutex> lock(*pool_mutex);
    if (!pool) {
        pool = new Pool;
        // A forked child has none of the helpers, and locks in whatever state they were.
        static bool registered = false;
        if (!registered) {
            pthread_atfork(nullptr, nullptr, [] {
                pool = nullptr;
                pool_mutex = new std::mutex;
            });
            registered = true;
        }
    }
    return *pool;
}

// What GCC compiles `#pragma omp parallel` to, which LLVM's and Intel's runtimes have too.
struct OpenMP {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
    int (*thread)() = nullptr;
    int (*threads)() = nullptr;
};
OpenMP openmp;

// Takes subnormal numbers for zero in this thread until its end. The tail of a soft mask and that
// of a softmax are full of them, and each costs an Intel processor some hundred cycles.
class FlushSubnormals {
  public:
#if defined(__SSE2__)
    FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
    ~FlushSubnormals() { _mm_setcsr(before_); }

  private:
    unsigned before_;
#elif defined(__aarch64__)
    FlushSubnormals() {
        asm volatile("mrs %0, fpcr" : "=r"(before_));
        asm volatile("msr fpcr, %0" ::"r"(before_ | (uint64_t(1) << 24)));
    }
    ~FlushSubnormals() { asm volatile("msr fpcr, %0" ::"r"(before_)); }

  private:
    uint64_t before_;
#else
    FlushSubnormals() {}
#endif
};

struct Team {
    void (*task)(void*, int, int);
    void* context;
    int threads;
};

void call(void* data, int i, int threads) {
    FlushSubnormals flush;
    const Team& team = *static_cast<const Team*>(data);
    team.task(team.context, i, threads);
}

// With fewer threads than asked for, each does the work of several, so that the partition of the
// work, and with it the rounding, stays.
void work(void* data) {
    const Team& team = *static_cast<const Team*>(data);
    for (int i = openmp.thread(); i < team.threads; i += openmp.threads())
        call(data, i, team.threads);
}

} // namespace

EQCVT_API int eqcvt_share_openmp(const char* path) {
    void* library = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
    if (!library) return 0;
    OpenMP found;
    // A handle's symbols are those of what the library was linked with, too.
    *reinterpret_cast<void**>(&found.parallel) = dlsym(library, "GOMP_parallel");
    *reinterpret_cast<void**>(&found.thread) = dlsym(library, "omp_get_thread_num");
    *reinterpret_cast<void**>(&found.threads) = dlsym(library, "omp_get_num_threads");
    dlclose(library);
    if (!found.parallel || !found.thread || !found.threads) return 0;
    // A forked child has none of the runtime's threads, and would wait for them.
    if (!openmp.parallel) pthread_atfork(nullptr, nullptr, [] { openmp = OpenMP(); });
    openmp = found;
    return 1;
}

EQCVT_API void eqcvt_parallel(int threads, void (*task)(void*, int, int), void* context) {
    Team team{task, context, threads};
    if (threads <= 1) {
        call(&team, 0, 1);
    } else if (openmp.parallel) {
        openmp.parallel(work, &team, static_cast<unsigned>(threads), 0);
    } else {
        the_pool().run(threads, call, &team);
    }
}

EQCVT_API void* eqcvt_allocate(size_t bytes) {
    constexpr size_t alignment = 64;
    size_t size = (bytes + alignment - 1) / alignment * alignment;
    if (size < bytes) return nullptr;
    return std::aligned_alloc(alignment, size ? size : alignment);
}

EQCVT_API void eqcvt_free(void* memory) { std::free(memory); }
