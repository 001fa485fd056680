// Groups of packed weights, read half a panel (16 outputs) at a time.
#pragma once

#include "packed_matrix.h"
#include "vector.h"

namespace pelton::PELTON_ISA {

constexpr int kHalf = 16;
constexpr int kHalfVectors = kHalf / kLanes;
constexpr int kVectorBytes = 4 * kLanes;

template <ScaleType kType>
inline Floats load_factors(const uint8_t* p, int index) {
    if constexpr (kType == ScaleType::F32) {
        return load<Floats>(p + 4 * index);
    } else if constexpr (kType == ScaleType::I8) {
        typedef int8_t Narrow __attribute__((vector_size(kLanes)));
        return to_floats(__builtin_convertvector(load<Narrow>(p + index), Ints));
    } else {
#if defined(__AVX512F__)
        return _mm512_cvtph_ps(load<__m256i>(p + 2 * index));
#elif defined(__F16C__)
        return _mm256_cvtph_ps(load<__m128i>(p + 2 * index));
#elif defined(__aarch64__)
        return vcvt_f32_f16(load<float16x4_t>(p + 2 * index));
#else
        Floats scales;
        for (int i = 0; i < kLanes; ++i) scales[i] = half_to_float(load<uint16_t>(p + 2 * (index + i)));
        return scales;
#endif
    }
}

// Groups as they lie in the packed matrix.
template <Format kFormat>
struct PackedGroups {
    static constexpr FormatTraits kTraits = traits_of(kFormat);
    static constexpr int kAhead = 4 * kTraits.group_bytes();
    const uint8_t* group;
    const uint8_t* units;
    int left_in_block = kBlockGroups;

    explicit PackedGroups(const uint8_t* panel) : group(panel + kTraits.unit_bytes()), units(panel) {}
    void next() {
        group += kTraits.group_bytes();
        if (kTraits.has_units() && --left_in_block == 0) {
            units = group;
            group += kTraits.unit_bytes();
            left_in_block = kBlockGroups;
        }
        for (int line = 0; line < kTraits.group_bytes(); line += 64) __builtin_prefetch(group + kAhead + line);
    }

    void load_pair(int pair, int half, int vector, Bytes& first, Bytes& second) const {
        const int at = vector * kVectorBytes;
        if constexpr (kTraits.bits == 8) {
            first = load<Bytes>(group + (4 * pair + half) * 64 + at);
            second = load<Bytes>(group + (4 * pair + 2 + half) * 64 + at);
        } else {
            const Bytes nibbles = load<Bytes>(group + (2 * pair + half) * 64 + at);
            first = nibbles & 15;
            second = nibbles >> 4;
            if constexpr (kTraits.bits > 4) {
                first |= high_bits(2 * pair, half, at);
                second |= high_bits(2 * pair + 1, half, at);
            }
        }
    }
    Floats scale(int sub, int half, int vector) const {
        const int column = half * kHalf + vector * kLanes;
        return in_units(load_factors<kTraits.scale_type>(scales(), sub * kPanel + column), column);
    }
    Floats minimum(int half, int vector) const {
        const int column = half * kHalf + vector * kLanes;
        return in_units(load_factors<kTraits.scale_type>(scales() + kTraits.scale_bytes(), column), kPanel + column);
    }
    const uint8_t* scales() const { return group + kTraits.low_bytes() + kTraits.high_bytes(); }

private:
    // Those of k4, where they are in a code.
    Bytes high_bits(int k4, int half, int at) const {
        constexpr uint32_t kMask = 0x01010101u * (((1 << kTraits.num_high_bits()) - 1) << 4);
        const Words planes = load<Words>(group + kTraits.high_offset(k4, half) + at);
        return bits_as<Bytes>(planes >> kTraits.high_position(k4) << 4 & kMask);
    }
    Floats in_units(Floats multiples, int first_unit) const {
        if constexpr (!kTraits.has_units()) return multiples;
        return multiples * load_factors<ScaleType::F16>(units, first_unit);
    }
};

}  // namespace pelton::PELTON_ISA
