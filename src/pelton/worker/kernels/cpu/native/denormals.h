// Denormal floats count as zero while kernels run: arithmetic on them takes a hundred cycles and more, and
// probabilities far from the maximum would be full of them.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pelton {

class FlushDenormals {
public:
#if defined(__x86_64__)
    FlushDenormals() : before_(_mm_getcsr()) {
        if ((before_ & kBits) != kBits) _mm_setcsr(before_ | kBits);
    }
    ~FlushDenormals() {
        if ((before_ & kBits) != kBits) _mm_setcsr(before_);
    }
#elif defined(__aarch64__)
    FlushDenormals() {
        asm volatile("mrs %0, fpcr" : "=r"(before_));
        asm volatile("msr fpcr, %0" ::"r"(before_ | kBits));
    }
    ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(before_)); }
#else
    FlushDenormals() = default;
#endif
    FlushDenormals(const FlushDenormals&) = delete;
    FlushDenormals& operator=(const FlushDenormals&) = delete;

private:
#if defined(__x86_64__)
    static constexpr uint32_t kBits = 0x8040;  // results, operands
    uint32_t before_;
#elif defined(__aarch64__)
    static constexpr uint64_t kBits = 1u << 24;
    uint64_t before_;
#endif
};

}  // namespace pelton
