// Vectors of float32 as wide as the compiler's target has them, for kernels that are written once for every
// instruction set. The source file that includes this defines PELTON_ISA, the namespace.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "float16.h"

namespace pelton::PELTON_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint8_t Bytes __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

template <typename Vector>
inline Vector load(const void* from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof(vector));
    return vector;
}

// The first `count` floats, then zeros.
inline Floats load_some(const float* from, int count) {
    if (count >= kLanes) return load<Floats>(from);
    Floats vector = {};
    for (int i = 0; i < count; ++i) vector[i] = from[i];
    return vector;
}

template <typename Vector>
inline void store(void* to, Vector vector) {
    std::memcpy(to, &vector, sizeof(vector));
}

inline void store_some(float* to, Floats vector, int count) {
    if (count >= kLanes) return store(to, vector);
    for (int i = 0; i < count; ++i) to[i] = vector[i];
}

inline Floats splat(float value) { return value - Floats{}; }
inline Ints splat(int32_t value) { return value - Ints{}; }

template <typename To, typename From>
inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

inline Floats to_floats(Ints values) { return __builtin_convertvector(values, Floats); }

// a * b + c, rounded once where the processor can.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}

inline Floats select(Ints mask, Floats yes, Floats no) {
    return bits_as<Floats>((mask & bits_as<Ints>(yes)) | (~mask & bits_as<Ints>(no)));
}

// Where either is NaN, b.
inline Floats max(Floats a, Floats b) { return select(a > b, a, b); }

inline Floats abs(Floats a) { return bits_as<Floats>(bits_as<Ints>(a) & 0x7fffffff); }

// To the nearest integer, halves to even; |a| < 2^22.
inline Floats round(Floats a) {
    const Floats magic = splat(12582912.0f);  // 1.5 * 2^23
    return (a + magic) - magic;
}

// In one order, whatever the compiler.
inline float reduce_add(Floats a) {
    for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) a[i] += a[i + width];
    }
    return a[0];
}

inline float reduce_max(Floats a) {
    for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) a[i] = a[i] > a[i + width] ? a[i] : a[i + width];
    }
    return a[0];
}

// kLanes values of bfloat16.
inline Floats load_bfloat16(const uint16_t* from) {
    return bits_as<Floats>(__builtin_convertvector(load<Halves>(from), Words) << 16);
}

}  // namespace pelton::PELTON_ISA
