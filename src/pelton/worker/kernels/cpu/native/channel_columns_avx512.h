// Columns of products by channel, two halves of panels at a time, and what becomes of their sums.
#pragma once

#include "channel_strips_avx512.h"
#include "gated_avx512.h"

namespace pelton::avx512 {

// Panels of a matrix, one after another, and where their sums go.
struct PlainColumns {
    const PackedMatrix& matrix;
    int first_panel;
    const LinearResult& result;

    struct Sink {
        ChannelColumns columns;

        void store(const ByteRows& rows, int row, int count, const int32_t* sums) const {
            for (const int end = row + count; row < end; ++row, sums += kPanel) {
                columns.store(rows, row, _mm512_load_si512(sums), _mm512_load_si512(sums + 16));
            }
        }
    };

    TileColumns tiles(int unit) const {
        const uint8_t* panel = matrix.panel(first_panel + unit);
        return {{panel, panel}, {0, 1}};
    }
    Sink sink(int unit) const { return {{matrix, first_panel + unit, result}}; }
};

// 16 outputs of gate beside the same of up, so that both sums of a row are there at once.
struct GatedColumns {
    const GatedPanels& gated;
    int first_panel;
    const PairedRows& hidden;

    GatedColumns(const GatedPanels& gated, int first_panel, const PairedRows& hidden)
        : gated(gated), first_panel(first_panel), hidden(hidden) {}

    struct Sink {
        GatedSums sums_of;
        bool gelu;
        uint16_t* to;
        int64_t pair_values;

        // Whole pairs of rows; the last may reach past the end.
        void store(const ByteRows& rows, int row, int count, const int32_t* sums) const {
            for (const int end = row + count; row < end; row += 2, sums += 2 * kPanel) {
                const __m512 first = act(rows, row, sums), second = act(rows, row + 1, sums + kPanel);
                _mm512_store_si512(to + row / 2 * pair_values,
                                   reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
            }
        }
        __m512 act(const ByteRows& rows, int row, const int32_t* sums) const {
            const __m512 gate = sums_of.value(rows, row, 0, sums), up = sums_of.value(rows, row, 1, sums + 16);
            return gelu ? rough_gelu_mul(gate, up) : rough_silu_mul(gate, up);
        }
    };

    TileColumns tiles(int unit) const {
        const int panel = first_panel + unit / 2;
        return {{gated.sides[0]->panel(panel), gated.sides[1]->panel(panel)}, {unit % 2, unit % 2}};
    }
    Sink sink(int unit) const {
        const int panel = first_panel + unit / 2, half = unit % 2;
        return {GatedSums(gated.sides, gated.bias, panel, half), gated.gelu, hidden.at(0, panel * kPanel + 16 * half),
                hidden.pair_values()};
    }
};

}  // namespace pelton::avx512
