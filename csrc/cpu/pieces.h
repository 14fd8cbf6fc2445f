// One allocation handed out in pieces.
#pragma once

#include <stdint.h>

#include "simd.h"

namespace {

// Hands out pieces of memory, each aligned to whole vectors; or only counts, without memory.
template <class T> struct Pieces {
    T* base;
    int64_t used = 0;
    explicit Pieces(T* base_) : base(base_) {}
    T* take(int64_t count) {
        T* piece = base ? base + used : nullptr;
        used += round_up(count, 64 / static_cast<int64_t>(sizeof(T)));
        return piece;
    }
};

// The memory, in numbers, of an object that takes pieces.
template <class Object, class T, class... Sizes> inline int64_t size_of(const Sizes&... sizes) {
    Pieces<T> pieces(nullptr);
    Object object(pieces, sizes...);
    (void)object;
    return pieces.used;
}

} // namespace
