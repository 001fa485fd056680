// AVX-512 with VNNI and BF16 (Zen 4 and 5, Sapphire Rapids and later).

#define PELTON_ISA avx512

#include <immintrin.h>

#include <cmath>

#include "activation_avx512.h"
#include "attention_avx512.h"
#include "channel_panels_avx512.h"
#include "dense_tiles.h"
#include "kernel_table.h"
#include "linear_avx512.h"
#include "lora_rows.h"
#include "rounding_rows.h"
#include "sampling_rows.h"

namespace pelton {

namespace avx512 {

__mmask16 tail(int index, int size) {
    return size - index >= 16 ? 0xffff : static_cast<__mmask16>((1u << (size - index)) - 1);
}

void rms_norm_row(const float* x, float* residual, const float* weight, int size, float eps, float* out) {
    __m512 squares = _mm512_setzero_ps();
    for (int i = 0; i < size; i += 16) {
        const __mmask16 mask = tail(i, size);
        __m512 value = _mm512_maskz_loadu_ps(mask, x + i);
        if (residual != nullptr) {
            value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, residual + i));
            _mm512_mask_storeu_ps(residual + i, mask, value);
        }
        squares = _mm512_fmadd_ps(value, value, squares);
    }
    const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / static_cast<float>(size) + eps));
    const float* from = residual != nullptr ? residual : x;
    for (int i = 0; i < size; i += 16) {
        const __mmask16 mask = tail(i, size);
        const __m512 value = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, from + i), scale);
        _mm512_mask_storeu_ps(out + i, mask, _mm512_mul_ps(value, _mm512_maskz_loadu_ps(mask, weight + i)));
    }
}

void silu_mul_row(const float* gate_up, int size, float* out) {
    for (int i = 0; i < size; i += 16) {
        const __mmask16 mask = tail(i, size);
        const __m512 gate = _mm512_maskz_loadu_ps(mask, gate_up + i);
        const __m512 up = _mm512_maskz_loadu_ps(mask, gate_up + size + i);
        _mm512_mask_storeu_ps(out + i, mask, silu_mul(gate, up));
    }
}

void gelu_tanh_mul_row(const float* gate_up, int size, float* out) {
    for (int i = 0; i < size; i += 16) {
        const __mmask16 mask = tail(i, size);
        const __m512 gate = _mm512_maskz_loadu_ps(mask, gate_up + i);
        const __m512 up = _mm512_maskz_loadu_ps(mask, gate_up + size + i);
        _mm512_mask_storeu_ps(out + i, mask, gelu_tanh_mul(gate, up));
    }
}

void rotate_head(float* head, const float* cos, const float* sin, int half) {
    for (int i = 0; i < half; i += 16) {
        const __mmask16 mask = tail(i, half);
        const __m512 a = _mm512_maskz_loadu_ps(mask, head + i), b = _mm512_maskz_loadu_ps(mask, head + half + i);
        const __m512 c = _mm512_maskz_loadu_ps(mask, cos + i), s = _mm512_maskz_loadu_ps(mask, sin + i);
        _mm512_mask_storeu_ps(head + i, mask, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
        _mm512_mask_storeu_ps(head + half + i, mask, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
    }
}

void store_kv(const float* from, int size, KVType kv_type, void* to) {
    for (int i = 0; i < size; i += 16) {
        const __mmask16 mask = tail(i, size);
        const __m512 value = _mm512_maskz_loadu_ps(mask, from + i);
        if (kv_type == KVType::F32) {
            _mm512_mask_storeu_ps(static_cast<float*>(to) + i, mask, value);
        } else {
            _mm256_mask_storeu_epi16(static_cast<uint16_t*>(to) + i, mask,
                                     reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
        }
    }
}

// Half the instructions of the plain one.
float block_maxima_512(const float* x, int64_t size, float* maxima) {
    __mmask16 has_nan = 0;
    __m512 greatest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    int64_t start = 0;
    for (; start + kSampleBlock <= size; start += kSampleBlock) {
        __m512 best = _mm512_loadu_ps(x + start);
        has_nan |= _mm512_cmp_ps_mask(best, best, _CMP_UNORD_Q);
        for (int i = 16; i < kSampleBlock; i += 16) {
            const __m512 value = _mm512_loadu_ps(x + start + i);
            has_nan |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
            best = _mm512_max_ps(best, value);
        }
        greatest = _mm512_max_ps(greatest, best);
        maxima[start / kSampleBlock] = _mm512_reduce_max_ps(best);
    }
    if (has_nan) return std::numeric_limits<float>::quiet_NaN();
    const float result = _mm512_reduce_max_ps(greatest);
    if (start == size) return result;
    const float rest = block_maxima(x + start, size - start, maxima + start / kSampleBlock);
    return std::isnan(rest) ? rest : std::max(rest, result);
}

void softcap_row(float* x, int64_t size, float cap) {
    const __m512 wide_cap = _mm512_set1_ps(cap);
    for (int64_t i = 0; i < size; i += 16) {
        const __mmask16 mask = size - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (size - i)) - 1);
        const __m512 value = _mm512_div_ps(_mm512_maskz_loadu_ps(mask, x + i), wide_cap);
        _mm512_mask_storeu_ps(x + i, mask, _mm512_mul_ps(wide_cap, tanh_of(value)));
    }
}

}  // namespace avx512

const KernelTable& avx512_kernels() {
    using namespace avx512;
    static const ColumnKernels columns = {avx512::can_attend, store_head,   attend,
                                          attend_chunk,       merge_chunks, RowSums::part_floats,
                                          HeadRows<FloatWords>::scratch_floats};
    static const KernelTable table = {"avx512",          quantize_row, linear_panel, dense_panel,      rms_norm_row,
                                      silu_mul_row,      gelu_tanh_mul_row, rotate_head, store_kv,    avx2_kernels().attend_head,
                                      softcap_row,       block_maxima_512, block_weights, num_above,  mask_row,
                                      lora_shrink,       lora_expand,
                                      quantize_channel_row, channel_panels, round_channel_row,
                                      gated_channel_panels, quantize_paired_row, &columns};
    return table;
}

}  // namespace pelton
