// Powers of two, as softmax wants them.
#pragma once

#include <immintrin.h>

namespace pelton::avx512 {

constexpr float kLog2E = 1.44269504f;

// 2^x for x <= 0, to about 1 ulp; exactly 1 at 0, and 2^-126 where it would be less.
inline __m512 exp2_negative(__m512 x) {
    const __m512 magic = _mm512_set1_ps(0x1.8p23f);  // adding it leaves a whole number in the low bits
    x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);  // in this order a NaN stays one
    const __m512 shifted = _mm512_add_ps(x, magic);
    const __m512 r = _mm512_sub_ps(x, _mm512_sub_ps(shifted, magic));
    __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(1.32647151e-3f), _mm512_set1_ps(9.67151277e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.55073377e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.40222421e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.93146978e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(shifted), 23)));
}

}  // namespace pelton::avx512
