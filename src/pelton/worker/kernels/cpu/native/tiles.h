// AMX tiles of bfloat16: 16 rows of 32 values times 32 x 16 values, summed in float32.
//
// A tile product adds up each element of its result in one order, whatever the number of rows; results of
// successive products chain through the same registers or through float32 in memory. So a row is the same
// to the bit in a step of one row and of five hundred (law 3).
#pragma once

#include <algorithm>
#include <cstdint>

#include "packed_matrix.h"

namespace pelton {

constexpr int kTileHeight = 16;
constexpr int kTileValues = kTileHeight * 32;  // bfloat16 in a tile
constexpr int kTileGroupBytes = 2 * kTileValues * 2;  // a panel's group of weights
constexpr int kTileRing = 8;   // groups of few rows' products in flight
constexpr int kTileStrip = 16;  // groups that stay in L1 while all rows pass by, at most
constexpr int kTileStripBytes = kTileStrip * kTileGroupBytes;
static_assert(kTileRing <= 2 * kTileStrip);

// Activations as tiles: [ceil(num_rows / 16)][num_inputs / 32][16][32] bfloat16. Within a group of 32,
// inputs lie in the order that unpacks weights fastest (tile_input).
struct TiledRows {
    int num_rows;
    int num_inputs;
    uint16_t* values;

    // Sums of so few stay in tile registers.
    bool is_few() const { return num_rows <= 2 * kTileHeight; }

    uint16_t* block(int index) const { return values + static_cast<int64_t>(index) * kTileHeight * num_inputs; }

    // `count` rows or those that are left from `first` on, a multiple of 16.
    TiledRows from(int first, int count) const {
        return {std::min(count, num_rows - first), num_inputs, block(first / kTileHeight)};
    }
};

// Which input of a group of 32 lies at `place`: of four bytes, the outer two come first.
constexpr int tile_input(int place) {
    constexpr int kOrder[4] = {0, 3, 1, 2};
    return place / 4 * 4 + kOrder[place % 4];
}

// Rows two by two: [ceil(num_rows / 2)][num_inputs / 16][2][16] bfloat16.
struct PairedRows {
    int num_rows;
    int num_inputs;
    uint16_t* values;

    int64_t pair_values() const { return 2 * static_cast<int64_t>(num_inputs); }
    // Input `input`, a multiple of 16, of a row.
    uint16_t* at(int row, int input) const { return values + row / 2 * pair_values() + row % 2 * 16 + 2 * input; }

    // `count` rows or those that are left from `first` on, an even number.
    PairedRows from(int first, int count) const { return {std::min(count, num_rows - first), num_inputs, at(first, 0)}; }
};

struct GroupRange {
    int first;
    int last;
};

struct PanelRange {
    int first;
    int last;
};

// A matrix's columns of the result: [S, ld_out], plus bias [O] where given.
struct LinearResult {
    const float* bias;
    float* out;
    int64_t ld_out;
};

// Both sides of a gated layer by channel, of one format; biases may be null.
struct GatedPanels {
    const PackedMatrix* sides[2];
    const float* bias[2];
    bool gelu;
};

// Bytes that linear_panels needs: for many rows two strips of weights and the sums, for a single
// one its values as floats.
constexpr size_t tile_scratch_bytes(int num_rows, int num_inputs) {
    const int padded = (num_rows + 2 * kTileHeight - 1) / (2 * kTileHeight) * 2 * kTileHeight;
    return std::max(2 * kTileStripBytes + padded * kPanel * sizeof(float), num_inputs * sizeof(float));
}

// What a processor with tiles does with them.
struct TileKernels {
    // num_rows <= 16 rows of x to one block of `to`.
    void (*pack_rows)(const float* x, int num_rows, int num_inputs, uint16_t* to);

    // result = rows times the `groups` of the `panels`: the first groups start the sums, later ones add to the
    // result. Up to 32 rows take all groups at once. Blocks of rows are read in pairs, past the last one if need
    // be. `scratch`: tile_scratch_bytes, aligned to 64.
    void (*linear_panels)(const PackedMatrix& matrix, PanelRange panels, GroupRange groups, const TiledRows& rows,
                          const LinearResult& result, uint8_t* scratch);

    // act(gate) * up of a group of 32 columns [num_rows <= 16, 32], rows `ld` apart, as a tile.
    void (*gated_rows)(bool gelu, const float* gate, const float* up, int64_t ld, int num_rows, uint16_t* to);
};

}  // namespace pelton
