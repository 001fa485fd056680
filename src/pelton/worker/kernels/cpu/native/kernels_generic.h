// Kernels in plain C++, compiled once for any processor and once for AVX2. Included by one source file
// each, which defines PELTON_ISA (a namespace) first. Loops have fixed lengths so that compilers vectorize.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "dense_generic.h"
#include "float16.h"
#include "kernel_table.h"
#include "quantized_group.h"
#include "sampling_rows.h"

namespace pelton::PELTON_ISA {

constexpr int kLanes = 16;

// Sums in kLanes strands, folded in one order.
inline float fold(const float (&strands)[kLanes]) {
    float part[kLanes];
    std::memcpy(part, strands, sizeof(part));
    for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) part[i] += part[i + width];
    }
    return part[0];
}

inline void quantize_row(const float* x, int num_inputs, int8_t* values, float* scales, int32_t* sums) {
    for (int group = 0; group < num_inputs / kGroup; ++group, x += kGroup, values += kGroup) {
        uint32_t largest = 0;
        for (int i = 0; i < kGroup; ++i) largest = std::max(largest, float_to_bits(x[i]) & 0x7fffffff);
        const GroupScale group_scale = scale_of_group(largest);
        if (group_scale.inverse == 0.0f) {
            set_empty_group(group_scale, group, values, scales, sums);
            continue;
        }
        int32_t sum[2] = {0, 0};
        for (int i = 0; i < kGroup; ++i) {
            const int q = static_cast<int>(std::nearbyint(x[i] * group_scale.inverse));
            values[i] = static_cast<int8_t>(q);
            sum[i / 16] += q;
        }
        scales[group] = group_scale.scale;
        sums[2 * group] = sum[0];
        sums[2 * group + 1] = sum[1];
    }
}

inline void unpack_group(const FormatTraits& traits, const uint8_t* group, uint8_t* values, float* floats) {
    if (traits.bits == 8) {
        std::memcpy(values, group, 1024);
    } else {
        for (int pair = 0; pair < 4; ++pair) {
            for (int half = 0; half < 2; ++half) {
                const uint8_t* from = group + (2 * pair + half) * 64;
                uint8_t* first = values + (4 * pair + half) * 64;
                uint8_t* second = values + (4 * pair + 2 + half) * 64;
                for (int i = 0; i < 64; ++i) {
                    first[i] = from[i] & 15;
                    second[i] = from[i] >> 4;
                }
                for (int plane = 0; plane < traits.bits - 4; ++plane) {
                    const uint8_t* bits = group + traits.low_bytes() + plane * 128 + (2 * pair + half) * 16;
                    for (int i = 0; i < 64; ++i) {
                        first[i] |= static_cast<uint8_t>(((bits[i / 8] >> (i % 8)) & 1) << (4 + plane));
                        second[i] |= static_cast<uint8_t>(((bits[8 + i / 8] >> (i % 8)) & 1) << (4 + plane));
                    }
                }
            }
        }
    }
    const uint8_t* scales = group + traits.low_bytes() + traits.high_bytes();
    const int count = traits.subgroups * kPanel * (traits.has_min ? 2 : 1);
    for (int i = 0; i < count; ++i) {
        if (traits.f16_scales) {
            uint16_t bits;
            std::memcpy(&bits, scales + 2 * i, 2);
            floats[i] = half_to_float(bits);
        } else {
            std::memcpy(floats + i, scales + 4 * i, 4);
        }
    }
}

inline void linear_panel(const PackedMatrix& matrix, int panel, const QuantizedRows& rows, const float* bias, float* out,
                         int64_t ld_out, uint8_t* scratch) {
    const FormatTraits traits = traits_of(matrix.format);
    const int num_groups = matrix.num_groups();
    const int num_floats = traits.subgroups * kPanel * (traits.has_min ? 2 : 1);
    const int k4_per_sub = 8 / traits.subgroups;
    auto* floats = reinterpret_cast<float*>(scratch + 1024 * static_cast<size_t>(num_groups));
    for (int group = 0; group < num_groups; ++group) {
        unpack_group(traits, matrix.panel(panel) + static_cast<size_t>(group) * traits.group_bytes(),
                     scratch + 1024 * static_cast<size_t>(group), floats + static_cast<size_t>(group) * num_floats);
    }
    const int first_column = panel * kPanel;
    const int num_columns = std::min(kPanel, matrix.num_outputs - first_column);
    for (int row = 0; row < rows.num_rows; ++row) {
        const int8_t* x = rows.values + static_cast<size_t>(row) * rows.num_inputs;
        const float* scales = rows.scales + static_cast<size_t>(row) * num_groups;
        const int32_t* sums = rows.sums + static_cast<size_t>(row) * num_groups * 2;
        float total[kPanel] = {};
        for (int group = 0; group < num_groups; ++group) {
            const uint8_t* weights = scratch + 1024 * static_cast<size_t>(group);
            const float* scale = floats + static_cast<size_t>(group) * num_floats;
            for (int sub = 0; sub < traits.subgroups; ++sub) {
                const int own = traits.subgroups == 2 ? sums[2 * group + sub] : sums[2 * group] + sums[2 * group + 1];
                int32_t dot[kPanel];
                for (int c = 0; c < kPanel; ++c) dot[c] = -traits.zero_point * own;
                for (int k4 = sub * k4_per_sub; k4 < (sub + 1) * k4_per_sub; ++k4) {
                    const int8_t* a = x + group * kGroup + 4 * k4;
                    const uint8_t* w = weights + k4 * 128;
                    for (int c = 0; c < kPanel; ++c) {
                        dot[c] += w[4 * c] * a[0] + w[4 * c + 1] * a[1] + w[4 * c + 2] * a[2] + w[4 * c + 3] * a[3];
                    }
                }
                for (int c = 0; c < kPanel; ++c) {
                    total[c] += static_cast<float>(dot[c]) * (scale[sub * kPanel + c] * scales[group]);
                }
            }
            if (traits.has_min) {
                const float part = scales[group] * static_cast<float>(sums[2 * group] + sums[2 * group + 1]);
                for (int c = 0; c < kPanel; ++c) total[c] -= scale[kPanel + c] * part;
            }
        }
        float* to = out + row * ld_out + first_column;
        for (int c = 0; c < num_columns; ++c) to[c] = total[c] + (bias != nullptr ? bias[first_column + c] : 0.0f);
    }
}

inline void rms_norm_row(const float* x, float* residual, const float* weight, int size, float eps, float* out) {
    float strands[kLanes] = {};
    for (int i = 0; i < size; ++i) {
        const float value = residual != nullptr ? x[i] + residual[i] : x[i];
        if (residual != nullptr) residual[i] = value;
        strands[i % kLanes] += value * value;
    }
    const float scale = 1.0f / std::sqrt(fold(strands) / static_cast<float>(size) + eps);
    const float* from = residual != nullptr ? residual : x;
    for (int i = 0; i < size; ++i) out[i] = from[i] * scale * weight[i];
}

inline void silu_mul_row(const float* gate_up, int size, float* out) {
    for (int i = 0; i < size; ++i) out[i] = gate_up[i] / (1.0f + std::exp(-gate_up[i])) * gate_up[size + i];
}

inline void gelu_tanh_mul_row(const float* gate_up, int size, float* out) {
    for (int i = 0; i < size; ++i) {
        const float x = gate_up[i];
        const float inner = 0.7978845608f * x * (1.0f + 0.044715f * x * x);
        out[i] = 0.5f * x * (1.0f + std::tanh(inner)) * gate_up[size + i];
    }
}

inline void rotate_head(float* head, const float* cos, const float* sin, int half) {
    for (int i = 0; i < half; ++i) {
        const float a = head[i], b = head[half + i];
        head[i] = a * cos[i] - b * sin[i];
        head[half + i] = b * cos[i] + a * sin[i];
    }
}

inline void store_kv(const float* from, int size, KVType kv_type, void* to) {
    if (kv_type == KVType::F32) {
        std::memcpy(to, from, sizeof(float) * size);
        return;
    }
    for (int i = 0; i < size; ++i) static_cast<uint16_t*>(to)[i] = float_to_bfloat16(from[i]);
}

inline float load_kv(const void* cache, int64_t index, KVType kv_type) {
    return kv_type == KVType::F32 ? static_cast<const float*>(cache)[index]
                                  : bfloat16_to_float(static_cast<const uint16_t*>(cache)[index]);
}

// One row at a time; tiles of positions as everywhere, so that a row's sums never depend on its chunk.
inline void attend_row(const AttentionShape& shape, const AttentionRequest& request, const void* keys,
                       const void* values, int kv_head, int token, int head, float* scratch) {
    const int dim = shape.head_dim;
    const int position = request.seq_len - request.num_tokens + token;
    const int first = shape.sliding_window > 0 ? std::max(0, position - shape.sliding_window + 1) : 0;
    const float* query = request.query + token * request.ld_query + static_cast<int64_t>(head) * dim;
    float* result = scratch;
    float* scores = scratch + (dim + 15) / 16 * 16;
    std::fill_n(result, dim, 0.0f);
    float maximum = -std::numeric_limits<float>::infinity(), sum = 0.0f;
    const auto index_of = [&](int p) {
        const int64_t block = request.block_table[p / shape.block_size];
        return ((block * shape.block_size + p % shape.block_size) * shape.num_kv_heads + kv_head) * dim;
    };
    for (int start = first / kTilePositions * kTilePositions; start <= position; start += kTilePositions) {
        const int from = std::max(start, first), to = std::min(start + kTilePositions, position + 1);
        float largest = maximum;
        for (int p = from; p < to; ++p) {
            const int64_t base = index_of(p);
            float strands[kLanes] = {};
            for (int d = 0; d < dim; ++d) strands[d % kLanes] += query[d] * shape.scale * load_kv(keys, base + d, shape.kv_type);
            float score = fold(strands);
            if (shape.softcap > 0.0f) score = shape.softcap * std::tanh(score / shape.softcap);
            scores[p - start] = score;
            largest = std::max(largest, score);
        }
        const float factor = std::exp(maximum - largest);
        sum *= factor;
        for (int d = 0; d < dim; ++d) result[d] *= factor;
        maximum = largest;
        for (int p = from; p < to; ++p) {
            const float weight = std::exp(scores[p - start] - maximum);
            const int64_t base = index_of(p);
            sum += weight;
            for (int d = 0; d < dim; ++d) result[d] += weight * load_kv(values, base + d, shape.kv_type);
        }
    }
    float* out = request.out + token * static_cast<int64_t>(shape.num_heads) * dim + static_cast<int64_t>(head) * dim;
    for (int d = 0; d < dim; ++d) out[d] = result[d] / sum;
}

inline void attend_head(const AttentionShape& shape, const AttentionRequest& request, const void* keys,
                        const void* values, int kv_head, int first_token, int num_tokens, float* scratch) {
    const int group = shape.num_heads / shape.num_kv_heads;
    for (int token = first_token; token < first_token + num_tokens; ++token) {
        for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
            attend_row(shape, request, keys, values, kv_head, token, head, scratch);
        }
    }
}

inline void softcap_row(float* x, int64_t size, float cap) {
    for (int64_t i = 0; i < size; ++i) x[i] = cap * std::tanh(x[i] / cap);
}

inline KernelTable make_table(const char* name) {
    return {name,        quantize_row, linear_panel, rms_norm_row, silu_mul_row, gelu_tanh_mul_row, rotate_head,
            store_kv,    attend_head,  softcap_row,  dense_panel,  block_maxima, block_weights,     num_above,
            mask_row};
}

}  // namespace pelton::PELTON_ISA
