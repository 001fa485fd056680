// Weights on their way from memory, where one thread reads a long stream of them.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace pelton::avx512 {

// Into the second level early, which has places for many lines under way, and from there into the first, which has few.
// The hardware's own prefetch stops at pages.
constexpr int kSecondLevelAhead = 10240;
constexpr int kFirstLevelAhead = 1536;

// For a line of the stream: fetches what follows it.
inline void prefetch_stream(const uint8_t* line) {
    const auto* at = reinterpret_cast<const char*>(line);
    _mm_prefetch(at + kFirstLevelAhead, _MM_HINT_T0);
    _mm_prefetch(at + kSecondLevelAhead, _MM_HINT_T1);
}

}  // namespace pelton::avx512
