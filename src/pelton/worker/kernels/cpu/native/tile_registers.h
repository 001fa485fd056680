// The eight tile registers. The compilers' own intrinsics do not say which memory they read.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace pelton::amx {

struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int tile, int num_rows, int num_row_bytes) {
        rows[tile] = static_cast<uint8_t>(num_rows);
        row_bytes[tile] = static_cast<uint16_t>(num_row_bytes);
    }
    void load() const { asm volatile("ldtilecfg %0" ::"m"(*this)); }
};

template <int kTile>
inline void load_tile(const void* from, int64_t stride_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(kTile) : "memory");
}

// The same of what passes by, past what should stay in L1.
template <int kTile>
inline void load_passing_tile(const void* from, int64_t stride_bytes) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(kTile) : "memory");
}

template <int kTile>
inline void store_tile(void* to, int64_t stride_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride_bytes), "i"(kTile) : "memory");
}

template <int kTile>
inline void zero_tile() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

// Tiles 0 to 3 hold sums wherever tiles multiply.
inline void zero_sums() {
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
}

// sums += a [rows, 32] * b [16 pairs, columns, 2], of bfloat16.
template <int kSums, int kA, int kB>
inline void multiply_tiles() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kA), "i"(kB));
}

inline void release_tiles() { asm volatile("tilerelease"); }

}  // namespace pelton::amx
