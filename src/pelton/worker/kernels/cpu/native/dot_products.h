// Exact integer products of weights (unsigned, 4 to 8 bits) and activations (signed, -127 to 127), four
// inputs to a lane: what the instruction sets below AVX-512 differ in.
//
// A `Dot<bits>` sums up one row's products with kLanes outputs over a group or half of one. `add` takes
// weights of two consecutive k4 and the row's four activations of each.
#pragma once

#include "packed_matrix.h"
#include "vector.h"

namespace pelton::PELTON_ISA {

inline int32_t load_four(const int8_t* x) { return load<int32_t>(x); }

#if defined(__AVXVNNI__)

constexpr bool kSignedWeights = false;

template <int kBits>
struct Dot {
    static constexpr int kTileRows = 4;  // sums and codes of more do not fit 16 registers
    __m256i total = _mm256_setzero_si256();

    void add(Bytes first, const int8_t* x, Bytes second) {
        total = _mm256_dpbusd_avx_epi32(total, bits_as<__m256i>(first), _mm256_set1_epi32(load_four(x)));
        total = _mm256_dpbusd_avx_epi32(total, bits_as<__m256i>(second), _mm256_set1_epi32(load_four(x + 4)));
    }
    Ints sum() const { return bits_as<Ints>(total); }
};

#elif defined(__AVX2__)

constexpr bool kSignedWeights = true;  // those of 8 bits

// vpmaddubsw adds two products in 16 bits, and saturates: every sum below stays under 2^15.
inline __m256i multiply_pairs(Bytes weights, const int8_t* x) {
    return _mm256_maddubs_epi16(bits_as<__m256i>(weights), _mm256_set1_epi32(load_four(x)));
}

// 5 and 6 bits: 4 products in 16 bits, 4 * 63 * 127.
template <int kBits>
struct Dot {
    static constexpr int kTileRows = 4;
    __m256i total = _mm256_setzero_si256();

    void add(Bytes first, const int8_t* x, Bytes second) {
        const __m256i pairs = _mm256_add_epi16(multiply_pairs(first, x), multiply_pairs(second, x + 4));
        total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    Ints sum() const { return bits_as<Ints>(total); }
};

// A whole group in 16 bits: 16 products, 16 * 15 * 127.
template <>
struct Dot<4> {
    static constexpr int kTileRows = 6;
    __m256i pairs = _mm256_setzero_si256();

    void add(Bytes first, const int8_t* x, Bytes second) {
        pairs = _mm256_add_epi16(pairs, multiply_pairs(first, x));
        pairs = _mm256_add_epi16(pairs, multiply_pairs(second, x + 4));
    }
    Ints sum() const { return bits_as<Ints>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1))); }
};

// 8 bits, shifted down by 128: sizes of weights times activations with the weights' signs, 2 * 128 * 127.
template <>
struct Dot<8> {
    static constexpr int kTileRows = 6;
    __m256i total = _mm256_setzero_si256();

    void add(Bytes first, const int8_t* x, Bytes second) {
        add_four(bits_as<__m256i>(first ^ 128), x);
        add_four(bits_as<__m256i>(second ^ 128), x + 4);
    }
    void add_four(__m256i weights, const int8_t* x) {
        const __m256i activations = _mm256_sign_epi8(_mm256_set1_epi32(load_four(x)), weights);
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), activations);
        total = _mm256_add_epi32(total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    Ints sum() const { return bits_as<Ints>(total); }
};

#elif defined(__aarch64__)

// Signed times signed: up to 6 bits are positive all the same, 8 bits are shifted down by 128.
constexpr bool kSignedWeights = true;

template <int kBits>
struct Dot {
    static constexpr int kTileRows = 6;
    int32x4_t total = vdupq_n_s32(0);

    static int8x16_t centred(Bytes weights) {
        return bits_as<int8x16_t>(kBits == 8 ? weights ^ 128 : weights);
    }

    void add(Bytes first, const int8_t* x, Bytes second) {
        add_four(centred(first), vreinterpretq_s8_s32(vdupq_n_s32(load_four(x))));
        add_four(centred(second), vreinterpretq_s8_s32(vdupq_n_s32(load_four(x + 4))));
    }

    void add_four(int8x16_t weights, int8x16_t x) {
#if defined(__ARM_FEATURE_DOTPROD)
        total = vdotq_s32(total, weights, x);
#else
        // Two products of at most 128 * 127 in 16 bits.
        const int16x8_t low = vmull_s8(vget_low_s8(weights), vget_low_s8(x));
        total = vpadalq_s16(total, vpaddq_s16(low, vmull_high_s8(weights, x)));
#endif
    }
    Ints sum() const { return bits_as<Ints>(total); }
};

#elif defined(__x86_64__)

constexpr bool kSignedWeights = false;

// SSE2, which every x86-64 has: products in 16 bits.
template <int kBits>
struct Dot {
    static constexpr int kTileRows = 4;
    __m128i total = _mm_setzero_si128();

    void add(Bytes first, const int8_t* x, Bytes second) {
        add_four(bits_as<__m128i>(first), x);
        add_four(bits_as<__m128i>(second), x + 4);
    }
    void add_four(__m128i weights, const int8_t* x) {
        const __m128i bytes = _mm_set1_epi32(load_four(x));
        const __m128i activations = _mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
        const __m128i zero = _mm_setzero_si128();
        const Floats low = bits_as<Floats>(_mm_madd_epi16(_mm_unpacklo_epi8(weights, zero), activations));
        const Floats high = bits_as<Floats>(_mm_madd_epi16(_mm_unpackhi_epi8(weights, zero), activations));
        const __m128i even = bits_as<__m128i>(_mm_shuffle_ps(low, high, 0x88));
        const __m128i odd = bits_as<__m128i>(_mm_shuffle_ps(low, high, 0xdd));
        total = _mm_add_epi32(total, _mm_add_epi32(even, odd));
    }
    Ints sum() const { return bits_as<Ints>(total); }
};

#else

constexpr bool kSignedWeights = false;

template <int kBits>
struct Dot {
    static constexpr int kTileRows = 4;
    Ints total = {};

    void add(Bytes first, const int8_t* x, Bytes second) {
        int8_t activations[8];
        std::memcpy(activations, x, 8);
        for (int lane = 0; lane < kLanes; ++lane) {
            for (int i = 0; i < 4; ++i) {
                total[lane] += first[4 * lane + i] * activations[i] + second[4 * lane + i] * activations[4 + i];
            }
        }
    }
    Ints sum() const { return total; }
};

#endif

}  // namespace pelton::PELTON_ISA
