// The scale of a group of activations in 8 bits.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "float16.h"
#include "packed_matrix.h"

namespace pelton {

struct GroupScale {
    float scale;
    float inverse;  // 0: every value is taken for 0
};

// `largest`: the largest bits of a group's absolute values, which order as the values do, then infinity,
// then NaN. A group with either has the scale NaN, so that its row does not end in numbers that look like an
// answer. Groups so small that a reciprocal overflows count as zeros.
inline GroupScale scale_of_group(uint32_t largest) {
    const float size = bits_to_float(largest);
    if (largest >= 0x7f800000) return {std::numeric_limits<float>::quiet_NaN(), 0.0f};
    if (size < 0x1p-110f) return {0.0f, 0.0f};
    return {size / 127.0f, 127.0f / size};
}

// A row with one scale wants a rest where its largest value is so many times its root mean square.
constexpr float kRestRatio = 20.0f;

inline bool wants_rest(const GroupScale& scale, float sum_of_squares, int num_values) {
    const float largest = 127.0f * scale.scale;
    return largest * largest > kRestRatio * kRestRatio * sum_of_squares / static_cast<float>(num_values);
}

inline void set_empty_group(const GroupScale& scale, int group, int8_t* values, float* scales, int32_t* sums) {
    std::memset(values, 0, kGroup);
    scales[group] = scale.scale;
    sums[2 * group] = sums[2 * group + 1] = 0;
}

}  // namespace pelton
