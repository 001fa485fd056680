// What works on one row of float32, in vectors: quantization, norms, gates, rotary, stores, soft caps.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "attention.h"
#include "quantized_group.h"
#include "vector_math.h"

namespace pelton::PELTON_ISA {

typedef int8_t SmallInts __attribute__((vector_size(kLanes)));

inline void quantize_row(const float* x, int num_inputs, int8_t* values, float* scales, int32_t* sums) {
    constexpr int kVectors = kGroup / kLanes;
    for (int group = 0; group < num_inputs / kGroup; ++group, x += kGroup, values += kGroup) {
        Floats part[kVectors];
        Ints sizes = {};
        for (int i = 0; i < kVectors; ++i) {
            part[i] = load<Floats>(x + i * kLanes);
            const Ints size = bits_as<Ints>(abs(part[i]));  // ordered as the values are; NaN above infinity
            const Ints larger = size > sizes;
            sizes = (larger & size) | (~larger & sizes);
        }
        uint32_t largest = 0;
        for (int i = 0; i < kLanes; ++i) largest = std::max(largest, static_cast<uint32_t>(sizes[i]));
        const GroupScale group_scale = scale_of_group(largest);
        if (group_scale.inverse == 0.0f) {
            set_empty_group(group_scale, group, values, scales, sums);
            continue;
        }
        Ints sum[2] = {};
        for (int i = 0; i < kVectors; ++i) {
            const Ints q = __builtin_convertvector(round(part[i] * splat(group_scale.inverse)), Ints);
            sum[i * kLanes / 16] += q;
            store(values + i * kLanes, __builtin_convertvector(q, SmallInts));
        }
        scales[group] = group_scale.scale;
        for (int half = 0; half < 2; ++half) {
            int32_t total = 0;
            for (int i = 0; i < kLanes; ++i) total += sum[half][i];
            sums[2 * group + half] = total;
        }
    }
}

inline void rms_norm_row(const float* x, float* residual, const float* weight, int size, float eps, float* out) {
    Floats squares = {};
    for (int i = 0; i < size; i += kLanes) {
        Floats value = load_some(x + i, size - i);
        if (residual != nullptr) {
            value += load_some(residual + i, size - i);
            store_some(residual + i, value, size - i);
        }
        squares = multiply_add(value, value, squares);
    }
    const float scale = 1.0f / std::sqrt(reduce_add(squares) / static_cast<float>(size) + eps);
    const float* from = residual != nullptr ? residual : x;
    for (int i = 0; i < size; i += kLanes) {
        const Floats value = load_some(from + i, size - i) * splat(scale) * load_some(weight + i, size - i);
        store_some(out + i, value, size - i);
    }
}

// 1 / (1 + exp(-x)), without overflow: exp only of what is negative.
inline Floats sigmoid(Floats x) {
    const Floats e = exp_negative(-abs(x));
    return select(x < Floats{}, e, splat(1.0f)) / (splat(1.0f) + e);
}

inline void silu_mul_row(const float* gate_up, int size, float* out) {
    for (int i = 0; i < size; i += kLanes) {
        const Floats gate = load_some(gate_up + i, size - i), up = load_some(gate_up + size + i, size - i);
        store_some(out + i, gate * sigmoid(gate) * up, size - i);
    }
}

inline void gelu_tanh_mul_row(const float* gate_up, int size, float* out) {
    for (int i = 0; i < size; i += kLanes) {
        const Floats x = load_some(gate_up + i, size - i), up = load_some(gate_up + size + i, size - i);
        const Floats inner = multiply_add(x * x, splat(0.044715f), splat(1.0f)) * x * splat(0.7978845608f);
        const Floats half = x * splat(0.5f);
        store_some(out + i, multiply_add(half, tanh_of(inner), half) * up, size - i);
    }
}

inline void rotate_head(float* head, const float* cos, const float* sin, int half) {
    for (int i = 0; i < half; i += kLanes) {
        const int left = half - i;
        const Floats a = load_some(head + i, left), b = load_some(head + half + i, left);
        const Floats c = load_some(cos + i, left), s = load_some(sin + i, left);
        store_some(head + i, a * c - b * s, left);
        store_some(head + half + i, b * c + a * s, left);
    }
}

// Round to nearest even; NaN stays NaN.
inline Halves to_bfloat16(Floats values) {
    const Words bits = bits_as<Words>(values);
    const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Words is_nan = bits_as<Words>((bits_as<Ints>(bits) & 0x7fffffff) > 0x7f800000);
    return __builtin_convertvector((is_nan & ((bits >> 16) | 64)) | (~is_nan & rounded), Halves);
}

inline void store_kv(const float* from, int size, KVType kv_type, void* to) {
    if (kv_type == KVType::F32) {
        std::memcpy(to, from, sizeof(float) * size);
        return;
    }
    auto* halves = static_cast<uint16_t*>(to);
    int i = 0;
    for (; i + kLanes <= size; i += kLanes) store(halves + i, to_bfloat16(load<Floats>(from + i)));
    for (; i < size; ++i) halves[i] = float_to_bfloat16(from[i]);
}

inline void softcap_row(float* x, int64_t size, float cap) {
    for (int64_t i = 0; i < size; i += kLanes) {
        const int left = static_cast<int>(std::min<int64_t>(size - i, kLanes));
        store_some(x + i, tanh_of(load_some(x + i, left) / splat(cap)) * splat(cap), left);
    }
}

}  // namespace pelton::PELTON_ISA
