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

// 4 * kLanes bytes: `value` where the bit of that number is set, else 0.
inline Bytes spread_bits(const uint8_t* bits, uint8_t value) {
#if defined(__AVX512BW__)
    return bits_as<Bytes>(_mm512_maskz_set1_epi8(load<uint64_t>(bits), static_cast<char>(value)));
#elif defined(__AVX2__)
    const __m256i bytes = _mm256_shuffle_epi8(
        _mm256_set1_epi32(load<int32_t>(bits)),
        _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
    const __m256i selected = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, selected), selected);
    return bits_as<Bytes>(_mm256_and_si256(set, _mm256_set1_epi8(static_cast<char>(value))));
#elif defined(__x86_64__)
    __m128i bytes = _mm_cvtsi32_si128(load<uint16_t>(bits));
    bytes = _mm_unpacklo_epi8(bytes, bytes);
    bytes = _mm_unpacklo_epi16(bytes, bytes);
    bytes = _mm_unpacklo_epi32(bytes, bytes);
    const __m128i selected = _mm_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
    const __m128i set = _mm_cmpeq_epi8(_mm_and_si128(bytes, selected), selected);
    return bits_as<Bytes>(_mm_and_si128(set, _mm_set1_epi8(static_cast<char>(value))));
#elif defined(__aarch64__)
    const uint8x16_t bytes = vcombine_u8(vdup_n_u8(bits[0]), vdup_n_u8(bits[1]));
    const uint8x16_t selected = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
    return bits_as<Bytes>(vandq_u8(vtstq_u8(bytes, selected), vdupq_n_u8(value)));
#else
    Bytes result;
    for (int i = 0; i < 4 * kLanes; ++i) result[i] = (bits[i / 8] >> (i % 8)) & 1 ? value : 0;
    return result;
#endif
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
            for (int plane = 0; plane < kTraits.bits - 4; ++plane) {
                const uint8_t* bits = group + kTraits.low_bytes() + plane * 128 + (2 * pair + half) * 16 + at / 8;
                first |= spread_bits(bits, static_cast<uint8_t>(16 << plane));
                second |= spread_bits(bits + 8, static_cast<uint8_t>(16 << plane));
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
    Floats in_units(Floats multiples, int first_unit) const {
        if constexpr (!kTraits.has_units()) return multiples;
        return multiples * load_factors<ScaleType::F16>(units, first_unit);
    }
};

}  // namespace pelton::PELTON_ISA
