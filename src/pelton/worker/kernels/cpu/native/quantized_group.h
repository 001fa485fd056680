// The scale of a group of activations in 8 bits.
#pragma once

#include <algorithm>
#include <cmath>
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

// Rounded up to four bits, so that it is nobody's business in which order the squares were summed up.
inline float outlier_limit(float sum_of_squares, int num_values) {
    constexpr uint32_t kBelow = 0x7ffff;
    const float limit = kOutlierRatio * std::sqrt(sum_of_squares / static_cast<float>(num_values));
    return bits_to_float((float_to_bits(limit) + kBelow) & ~kBelow);
}

// The scale of a whole row whose outliers have longer codes. Where those are so large that they hide the size of the
// others, these are asked for theirs: squares_below(limit) sums up the squares of values of at most that size. Rows of
// too large or too small a sum have no outliers.
template <typename SquaresBelow>
GroupScale scale_of_row(uint32_t largest, float sum_of_squares, int num_values, const SquaresBelow& squares_below) {
    constexpr float kMostSteps = 256.0f;  // longer codes have 16 bits
    if (!(sum_of_squares >= 0x1p-80f && std::isfinite(sum_of_squares))) return scale_of_group(largest);
    const float size = bits_to_float(largest);
    float limit = outlier_limit(sum_of_squares, num_values);
    if (size > 2.0f * limit) limit = std::max(outlier_limit(squares_below(limit), num_values), size / kMostSteps);
    return scale_of_group(float_to_bits(std::min(size, limit)));
}

// `code` of a row's value becomes what fits 8 bits; where that is not all of it, the row gets an outlier.
inline int8_t shorten(int code, int input, const ByteRows& rows, int row) {
    constexpr int kMost = 127;
    if (std::abs(code) <= kMost) return static_cast<int8_t>(code);
    const int high = (code + (code < 0 ? -kMost : kMost)) / Outlier::kHighStep;
    Outlier& outlier = rows.outliers_of(row)[rows.num_outliers[row]++];
    outlier = {input, {}};
    outlier.codes[input % 4] = static_cast<int8_t>(high);
    return static_cast<int8_t>(code - Outlier::kHighStep * high);
}

inline void set_empty_group(const GroupScale& scale, int group, int8_t* values, float* scales, int32_t* sums) {
    std::memset(values, 0, kGroup);
    scales[group] = scale.scale;
    sums[2 * group] = sums[2 * group + 1] = 0;
}

}  // namespace pelton
