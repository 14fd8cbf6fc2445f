// Calls parallel() from several threads at once, for a build with the thread sanitizer.
#include <cstdio>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

int main() {
    constexpr int callers = 4, rounds = 200;
    std::vector<long> sums(callers, 0);
    std::vector<std::thread> threads;
    for (int caller = 0; caller < callers; ++caller)
        threads.emplace_back([caller, &sums] {
            for (int round = 0; round < rounds; ++round) {
                int n = 1 + (caller + round) % 5;
                std::vector<long> parts(static_cast<size_t>(n), 0);
                parallel(n, [&](int i, int threads) {
                    Range range(1000, i, threads);
                    for (int64_t j = range.begin; j < range.end; ++j)
                        parts[static_cast<size_t>(i)] += j;
                });
                for (long part : parts) sums[static_cast<size_t>(caller)] += part;
            }
        });
    for (auto& thread : threads) thread.join();
    for (long sum : sums)
        if (sum != rounds * 999L * 1000 / 2) {
            std::fprintf(stderr, "a sum is %ld\n", sum);
            return 1;
        }
}
