// What the checks of the native kernels share.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "runtime.h"

namespace pelton {

// Memory that ends where a page that nobody may touch begins: sanitizers do not see masked vector accesses.
template <typename T>
struct AtEdge {
    using value_type = T;
    AtEdge() = default;
    template <typename U>
    AtEdge(const AtEdge<U>&) {}

    static constexpr size_t kPage = 4096;
    static size_t pages(size_t count) { return (count * sizeof(T) + kPage - 1) / kPage * kPage; }

    T* allocate(size_t count) {
        void* memory = mmap(nullptr, pages(count) + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        auto* edge = static_cast<uint8_t*>(memory) + pages(count);
        if (mprotect(edge, kPage, PROT_NONE) != 0) throw std::bad_alloc();
        return reinterpret_cast<T*>(edge - count * sizeof(T));
    }
    void deallocate(T* data, size_t count) {
        munmap(reinterpret_cast<uint8_t*>(data) + count * sizeof(T) - pages(count), pages(count) + kPage);
    }
    template <typename U>
    bool operator==(const AtEdge<U>&) const { return true; }
};

template <typename T>
using Exact = std::vector<T, AtEdge<T>>;

inline std::mt19937 generator(0);

[[noreturn]] inline void fail(const std::string& what) {
    std::fprintf(stderr, "%s\n", what.c_str());
    std::exit(1);
}

inline Exact<float> random_floats(size_t count) {
    std::normal_distribution<float> normal;
    Exact<float> values(count);
    for (auto& value : values) value = normal(generator);
    return values;
}

inline Exact<uint8_t> random_bytes(size_t count) {
    Exact<uint8_t> values(count);
    for (auto& value : values) value = static_cast<uint8_t>(generator());
    return values;
}

template <typename T>
bool same_bits(const Exact<T>& a, const Exact<T>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// Random bytes as weights: scales may be infinite or NaN, as those of a damaged file.
inline void add_random_part(LinearWeight& weight, Format format, int num_outputs, ThreadPool& pool) {
    const FormatTraits traits = traits_of(format);
    const int num_blocks = num_outputs * (weight.num_inputs / traits.file_block_values);
    auto source = random_bytes(static_cast<size_t>(num_blocks) * traits.file_block_bytes);
    // Not so float32: most random bits are numbers whose products overflow on one path before they do on another.
    const bool has_float = traits.file_block_bytes == 36 || traits.by_channel || format == Format::F32;
    const int num_floats = format == Format::INT4 ? 2 : has_float ? 1 : 0;
    for (int i = 0; i < num_blocks * num_floats; ++i) {
        const float value = std::normal_distribution<float>()(generator);
        const size_t block = static_cast<size_t>(i / num_floats) * traits.file_block_bytes;
        std::memcpy(source.data() + block + 4 * (i % num_floats), &value, 4);
    }
    for (int i = 0; format == Format::INT4_CHANNEL && i < num_blocks; ++i) {
        // base + step * 15 has 8 bits.
        uint8_t* step = source.data() + static_cast<size_t>(i) * traits.file_block_bytes + 4;
        step[0] %= 18;
        step[1] %= 256 - 15 * step[0];
    }
    PackedMatrix matrix = make_packed_matrix(format, num_outputs, weight.num_inputs);
    repack(matrix, source.data(), pool);
    weight.num_outputs += num_outputs;
    weight.parts.push_back(std::move(matrix));
}

// The greatest columns that a product is said to have are those of its result `out`.
inline void check_greatest(Runtime& runtime, const LinearWeight& weight, std::pair<const float*, int> rows,
                           const float* bias, const float* out) {
    const auto [x, num_rows] = rows;
    std::vector<int64_t> found(num_rows);
    runtime.greatest_columns(weight, x, num_rows, bias, found.data());
    for (int row = 0; row < num_rows; ++row, out += weight.num_outputs) {
        const bool any_nan = std::any_of(out, out + weight.num_outputs, [](float value) { return std::isnan(value); });
        const float* greatest = std::max_element(out, out + weight.num_outputs);
        const bool is_finite = !any_nan && std::isfinite(*greatest);
        if (found[row] != (is_finite ? greatest - out : kNoColumn)) fail("another column is the greatest");
    }
}

// products.cpp: of weights by channel, of gated layers, of adapters.
void check_products(const KernelTable& kernels);

// rounding.cpp.
void check_rounding(const std::vector<Runtime*>& runtimes);

#if defined(__x86_64__)
// bf16_attention.cpp: the products of bfloat16 pairs, which only some processors choose.
bool check_bf16_attention();

// one_row_amx.cpp: of kernels with tiles.
void check_one_row(const KernelTable& kernels);
#endif

}  // namespace pelton
