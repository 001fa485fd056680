// The weight of a token: exp((logit - greatest) / temperature) as an integer. worker/sampling/weights.py in C++,
// bit for bit: no product and sum may be fused (-ffp-contract=off).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace pelton {

constexpr int kSampleBlock = 64;  // tokens whose maximum and weight are kept together
constexpr int64_t kWeightOne = int64_t{1} << 39;

// Its own copy in each source: they are compiled for different instruction sets.
[[gnu::always_inline]] static inline int64_t weight_of(float logit, float greatest, float inverse_temperature) {
    const float scaled = (logit - greatest) * inverse_temperature;
    // At least -40. As integers, since compilers make a branch of a float comparison; `scaled` is not positive.
    uint32_t bits;
    std::memcpy(&bits, &scaled, 4);
    bits = std::min(bits & 0x7fffffffu, 0x42200000u) | 0x80000000u;
    float x;
    std::memcpy(&x, &bits, 4);
    // Adding 1.5 * 2**23 rounds to an integer, to even on a tie, and leaves it in the low bits.
    const float shifted = x * 1.44269504f + 12582912.0f;
    const float n = shifted - 12582912.0f;
    const float r = x - n * 0.693359375f - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const float y = p * (r * r) + (r + 1.0f);
    // Unsigned: AVX2 shifts 64 bits by a variable only so.
    const uint64_t mantissa = static_cast<uint64_t>(static_cast<uint32_t>(static_cast<int32_t>(y * 16777216.0f))) << 15;
    std::memcpy(&bits, &shifted, 4);
    return static_cast<int64_t>(mantissa >> static_cast<uint64_t>(0x4b400000 - bits));
}

}  // namespace pelton
