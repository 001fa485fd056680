// Passes over a whole row of logits, compiled once per instruction set: included by the source that defines
// PELTON_ISA. Loops have fixed lengths so that compilers vectorize; all instruction sets give the same bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "float16.h"
#include "kernel_table.h"
#include "sampling_weight.h"

namespace pelton::PELTON_ISA {

// A float as an integer of the same order; its own inverse. NaN lie beyond the infinities.
inline int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

// Of `count` floats: the greatest as an ordered integer, and the greatest magnitude's bits. Integers, because
// compilers do not reorder float comparisons.
inline void find_greatest(const float* x, int count, int32_t& greatest, int32_t& magnitude) {
    int32_t best = std::numeric_limits<int32_t>::min(), largest = 0;
    for (int i = 0; i < count; ++i) {
        const auto bits = static_cast<int32_t>(float_to_bits(x[i]));
        best = std::max(best, ordered(bits));
        largest = std::max(largest, bits & 0x7fffffff);
    }
    greatest = best;
    magnitude = std::max(magnitude, largest);
}

// maxima [ceil(size / 64)] of each block of 64. Returns the greatest; NaN where any value is.
inline float block_maxima(const float* x, int64_t size, float* maxima) {
    int32_t greatest = std::numeric_limits<int32_t>::min(), magnitude = 0;
    for (int64_t start = 0; start < size; start += kSampleBlock) {
        int32_t best;
        if (start + kSampleBlock <= size) {
            find_greatest(x + start, kSampleBlock, best, magnitude);
        } else {
            find_greatest(x + start, static_cast<int>(size - start), best, magnitude);
        }
        maxima[start / kSampleBlock] = bits_to_float(static_cast<uint32_t>(ordered(best)));
        greatest = std::max(greatest, best);
    }
    if (magnitude > 0x7f800000) return std::numeric_limits<float>::quiet_NaN();
    return bits_to_float(static_cast<uint32_t>(ordered(greatest)));
}

// weights [ceil(size / 64)]: the sum of each block's.
inline void block_weights(const float* x, int64_t size, float greatest, float inverse_temperature, int64_t* weights) {
    int64_t start = 0;
    for (; start + kSampleBlock <= size; start += kSampleBlock) {
        int64_t sum = 0;
        for (int i = 0; i < kSampleBlock; ++i) sum += weight_of(x[start + i], greatest, inverse_temperature);
        weights[start / kSampleBlock] = sum;
    }
    if (start < size) {
        int64_t sum = 0;
        for (int64_t i = start; i < size; ++i) sum += weight_of(x[i], greatest, inverse_temperature);
        weights[start / kSampleBlock] = sum;
    }
}

// How many come before `index` in order of value, equal ones in order of index.
inline int64_t num_above(const float* x, int64_t size, int64_t index) {
    const float value = x[index];
    int32_t count = 0;
    for (int64_t i = 0; i < index; ++i) count += x[i] >= value;
    for (int64_t i = index + 1; i < size; ++i) count += x[i] > value;
    return count;
}

// -inf where bit i % 32 of word i / 32 is clear.
inline void mask_row(float* x, int64_t size, const uint32_t* words) {
    const float lowest = -std::numeric_limits<float>::infinity();
    for (int64_t start = 0; start < size; start += 32) {
        const uint32_t word = words[start / 32];
        if (word == ~uint32_t{0}) continue;
        if (start + 32 <= size) {
            for (int i = 0; i < 32; ++i) x[start + i] = (word >> i) & 1 ? x[start + i] : lowest;
        } else {
            for (int i = 0; i < size - start; ++i) x[start + i] = (word >> i) & 1 ? x[start + i] : lowest;
        }
    }
}

}  // namespace pelton::PELTON_ISA
