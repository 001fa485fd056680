// Weights by channel, half a panel of 64 inputs at a time: as tiles of 8 bits take them.
#pragma once

#include "channel_avx512.h"
#include "tiles.h"

namespace pelton::avx512 {

constexpr int kWeightTileBytes = kChunk * kPanel / 2;  // 64 inputs of 16 outputs
constexpr int kStripBytes = 2 * kStripChunks * kWeightTileBytes;

// Two tiles of 16 outputs each that are multiplied side by side: the halves of a panel, or a half of each of two.
struct TileColumns {
    const uint8_t* panels[2];
    int halves[2];
};

// 64 inputs of half a panel, made of fewer than 8 bits, as tiles take them: [16 fours of inputs][16 outputs][4].
// Whoever makes first halves also fetches what lies further on.
template <Format kFormat, int kHalf>
inline void make_tile(ChannelGroups<kFormat> groups, uint8_t* to) {
    for (int group = 0; group < kChunk / kGroup; ++group) {
        groups.start();
        for (int pair = 0; pair < 4; ++pair, to += 2 * 64) {
            __m512i codes[2];
            groups.load_pair(pair, kHalf, codes[0], codes[1]);
            _mm512_store_si512(to, codes[0]);
            _mm512_store_si512(to + 64, codes[1]);
        }
        if constexpr (kHalf == 0) groups.prefetch();
        groups.group += ChannelGroups<kFormat>::kGroupBytes;
    }
}

// Chunks [first, last) of two columns of tiles, which are made, or fetched from memory, one tile after another.
template <Format kFormat>
struct Strip {
    using Groups = ChannelGroups<kFormat>;
    static constexpr int kChunkBytes = kChunk / kGroup * Groups::kGroupBytes;
    static constexpr int64_t kStride = Groups::kHasSteps ? 64 : 128;  // of a tile's rows

    TileColumns columns;
    int first;
    int last;
    uint8_t* made;  // kStripBytes, where they are
    int num_made = 0;

    int num_tiles() const { return 2 * (last - first); }

    void make_next() {
        const int side = num_made % 2;
        const uint8_t* chunk = columns.panels[side] + static_cast<int64_t>(first + num_made / 2) * kChunkBytes;
        if constexpr (Groups::kHasSteps) {
            uint8_t* to = made + num_made * kWeightTileBytes;
            columns.halves[side] == 0 ? make_tile<kFormat, 0>(Groups(chunk), to) : make_tile<kFormat, 1>(Groups(chunk), to);
        } else {
            for (int line = 0; line < kWeightTileBytes; line += 64) {
                _mm_prefetch(reinterpret_cast<const char*>(chunk + columns.halves[side] * 64 + 2 * line), _MM_HINT_T1);
            }
        }
        ++num_made;
    }

    // What lies further on in a panel; both its halves, so the second one asks for nothing.
    void prefetch_ahead(int chunk) const {
        for (int side = 0; side < 2; ++side) {
            if (columns.halves[side] != 0) continue;
            Groups groups(columns.panels[side] + static_cast<int64_t>(chunk) * kChunkBytes);
            for (int group = 0; group < kChunk / kGroup; ++group, groups.group += Groups::kGroupBytes) groups.prefetch();
        }
    }

    // Of the first chunk; the next one is 2 * kWeightTileBytes further on.
    const uint8_t* tile(int side) const {
        if constexpr (Groups::kHasSteps) return made + side * kWeightTileBytes;
        return columns.panels[side] + static_cast<int64_t>(first) * kChunkBytes + columns.halves[side] * 64;
    }
};

}  // namespace pelton::avx512
