// Products of four unsigned and four signed bytes, with AVX-512 VNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace pelton::avx512 {

inline __m512i load_four(const int8_t* values) {
    int32_t four;
    std::memcpy(&four, values, 4);
    return _mm512_set1_epi32(four);
}

// Four inputs of 16 outputs times four values of a row.
inline void add_dot(__m512i& sum, __m512i codes, const int8_t* values) {
    sum = _mm512_dpbusd_epi32(sum, codes, load_four(values));
}

// The same of both halves of a panel.
inline void add_dots(__m512i (&sum)[2], const __m512i (&codes)[2], const int8_t* values) {
    const __m512i own = load_four(values);
    sum[0] = _mm512_dpbusd_epi32(sum[0], codes[0], own);
    sum[1] = _mm512_dpbusd_epi32(sum[1], codes[1], own);
}

}  // namespace pelton::avx512
