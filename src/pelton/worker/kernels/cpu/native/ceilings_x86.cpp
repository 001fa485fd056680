// Loops that keep the arithmetic units or the memory of an x86-64 processor busy. Every function is compiled
// for what it uses, and called only where the processor has it.

#include "ceilings.h"
#include "processor.h"

#if defined(__x86_64__)

#include <immintrin.h>

namespace pelton {

namespace {

constexpr int kSteps = 4096;
// Independent sums: more than the units' number times their latency.
constexpr int kSums = 12;

#define PELTON_TARGET(isa) __attribute__((target(isa)))
// The compiler must take `value` for new, and therefore cannot move what is computed from it.
#define PELTON_RENEW(value) asm volatile("" : "+v"(value))

PELTON_TARGET("avx2,fma") double fp32_avx2() {
    __m256 sums[kSums], x = _mm256_set1_ps(0.5f);
    for (auto& sum : sums) sum = _mm256_setzero_ps();
    for (int step = 0; step < kSteps; ++step) {
        for (int i = 0; i < kSums; ++i) sums[i] = _mm256_fmadd_ps(sums[i], x, x);
    }
    for (auto& sum : sums) asm volatile("" : "+x"(sum));
    return 2.0 * 8 * kSums * kSteps;
}

// Without VNNI three instructions do what one does with it.
PELTON_TARGET("avx2") double int8_avx2() {
    __m256i sums[kSums], a = _mm256_set1_epi8(1), b = _mm256_set1_epi8(1);
    const __m256i ones = _mm256_set1_epi16(1);
    for (auto& sum : sums) sum = _mm256_setzero_si256();
    for (int step = 0; step < kSteps; ++step) {
        for (int i = 0; i < kSums; ++i) {
            asm volatile("" : "+x"(a));
            sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones));
        }
    }
    for (auto& sum : sums) asm volatile("" : "+x"(sum));
    return 2.0 * 32 * kSums * kSteps;
}

PELTON_TARGET("avx2,avxvnni") double int8_avx_vnni() {
    __m256i sums[kSums], a = _mm256_set1_epi8(1), b = _mm256_set1_epi8(1);
    for (auto& sum : sums) sum = _mm256_setzero_si256();
    for (int step = 0; step < kSteps; ++step) {
        for (int i = 0; i < kSums; ++i) sums[i] = _mm256_dpbusd_avx_epi32(sums[i], a, b);
    }
    for (auto& sum : sums) asm volatile("" : "+x"(sum));
    return 2.0 * 32 * kSums * kSteps;
}

PELTON_TARGET("avx512f") double fp32_avx512() {
    __m512 sums[kSums], x = _mm512_set1_ps(0.5f);
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    for (int step = 0; step < kSteps; ++step) {
        for (int i = 0; i < kSums; ++i) sums[i] = _mm512_fmadd_ps(sums[i], x, x);
    }
    for (auto& sum : sums) PELTON_RENEW(sum);
    return 2.0 * 16 * kSums * kSteps;
}

PELTON_TARGET("avx512f,avx512bw,avx512vnni") double int8_avx512_vnni() {
    __m512i sums[kSums], a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(1);
    for (auto& sum : sums) sum = _mm512_setzero_si512();
    for (int step = 0; step < kSteps; ++step) {
        for (int i = 0; i < kSums; ++i) sums[i] = _mm512_dpbusd_epi32(sums[i], a, b);
    }
    for (auto& sum : sums) PELTON_RENEW(sum);
    return 2.0 * 64 * kSums * kSteps;
}

PELTON_TARGET("avx512f,avx512bf16") double bf16_avx512() {
    const __m512 x = _mm512_set1_ps(0.5f);
    __m512 sums[kSums];
    const __m512bh a = _mm512_cvtne2ps_pbh(x, x);
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    for (int step = 0; step < kSteps; ++step) {
        for (int i = 0; i < kSums; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], a, a);
    }
    for (auto& sum : sums) PELTON_RENEW(sum);
    return 2.0 * 32 * kSums * kSteps;
}

// Eight tiles of 16 rows of 64 bytes.
PELTON_TARGET("amx-tile") void set_up_tiles() {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    // gcc's intrinsic says that it reads eight bytes only.
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
}

constexpr int kTileSteps = 1024;
constexpr double kTileProducts = 4.0 * kTileSteps * 16 * 16;  // of 64 bytes by 64 bytes each

PELTON_TARGET("amx-tile,amx-bf16") double bf16_amx() {
    set_up_tiles();
    for (int step = 0; step < kTileSteps; ++step) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
    return 2.0 * 32 * kTileProducts;
}

PELTON_TARGET("amx-tile,amx-int8") double int8_amx() {
    set_up_tiles();
    for (int step = 0; step < kTileSteps; ++step) {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
    }
    _tile_release();
    return 2.0 * 64 * kTileProducts;
}

// Bytes ahead of the reads: the hardware's own prefetchers leave some bandwidth unused.
constexpr size_t kAhead = 1024;

PELTON_TARGET("avx2") uint64_t read_avx2(const uint8_t* data, size_t num_bytes) {
    __m256i sums[8];
    for (auto& sum : sums) sum = _mm256_setzero_si256();
    for (size_t i = 0; i < num_bytes; i += sizeof(sums)) {
        for (int j = 0; j < 8; ++j) {
            if (j % 2 == 0) _mm_prefetch(reinterpret_cast<const char*>(data + i + kAhead + 32 * j), _MM_HINT_T0);
            const auto* from = reinterpret_cast<const __m256i*>(data + i + 32 * j);
            sums[j] = _mm256_add_epi64(sums[j], _mm256_load_si256(from));
        }
    }
    for (int j = 1; j < 8; ++j) sums[0] = _mm256_add_epi64(sums[0], sums[j]);
    alignas(32) uint64_t words[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(words), sums[0]);
    return words[0];
}

PELTON_TARGET("avx512f") uint64_t read_avx512(const uint8_t* data, size_t num_bytes) {
    __m512i sums[8];
    for (auto& sum : sums) sum = _mm512_setzero_si512();
    for (size_t i = 0; i < num_bytes; i += sizeof(sums)) {
        for (int j = 0; j < 8; ++j) {
            _mm_prefetch(reinterpret_cast<const char*>(data + i + kAhead + 64 * j), _MM_HINT_T0);
            sums[j] = _mm512_add_epi64(sums[j], _mm512_load_si512(data + i + 64 * j));
        }
    }
    for (int j = 1; j < 8; ++j) sums[0] = _mm512_add_epi64(sums[0], sums[j]);
    alignas(64) uint64_t words[8];
    _mm512_store_si512(words, sums[0]);
    return words[0];
}

}  // namespace

std::vector<PeakLoop> x86_peak_loops() {
    __builtin_cpu_init();
    const ProcessorFeatures& features = processor_features();
    const bool has_avx2 = __builtin_cpu_supports("avx2");
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
    const PeakLoop loops[] = {
        {features.tile_int8 ? "int8_amx" : nullptr, int8_amx},
        {features.tile_bf16 ? "bf16_amx" : nullptr, bf16_amx},
        {has_avx512 && __builtin_cpu_supports("avx512vnni") ? "int8_avx512_vnni" : nullptr, int8_avx512_vnni},
        {has_avx512 && __builtin_cpu_supports("avx512bf16") ? "bf16_avx512" : nullptr, bf16_avx512},
        {has_avx512 ? "fp32_avx512" : nullptr, fp32_avx512},
        {has_avx2 && features.avx_vnni ? "int8_avx_vnni" : nullptr, int8_avx_vnni},
        {has_avx2 ? "int8_avx2" : nullptr, int8_avx2},
        {has_avx2 && __builtin_cpu_supports("fma") ? "fp32_avx2" : nullptr, fp32_avx2},
    };
    std::vector<PeakLoop> present;
    for (const PeakLoop& loop : loops) {
        if (loop.name != nullptr) present.push_back(loop);
    }
    return present;
}

ReadLoop x86_read_loop() {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) return read_avx512;
    return __builtin_cpu_supports("avx2") ? read_avx2 : nullptr;
}

}  // namespace pelton

#else

namespace pelton {

std::vector<PeakLoop> x86_peak_loops() { return {}; }
ReadLoop x86_read_loop() { return nullptr; }

}  // namespace pelton

#endif
