// The greatest column of every row of a product, which is never written out: logits of 64 rows are 39 MB that nobody
// reads twice where each row takes its greatest.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "buffer.h"
#include "kernel_table.h"
#include "linear_weight.h"
#include "sampling_weight.h"
#include "workers.h"

namespace pelton {

constexpr int64_t kNoColumn = -1;

class GreatestColumns {
public:
    // columns [S] of the S rows of a product with `weight`, plus bias [O] where given: of equal values the first;
    // kNoColumn where the greatest is not finite or any value is NaN. multiply(part, panels, result, thread) makes the
    // result's columns of some panels. Pieces of the result stay in the second-level cache.
    template <typename Multiply>
    void find(const KernelTable& kernels, ThreadPool& pool, const LinearWeight& weight, int num_rows, const float* bias,
              int64_t* columns, const Multiply& multiply) {
        if (num_rows == 0) return;
        const int panels_at_once = std::max(kPieceFloats / (num_rows * kPanel), 1);
        // Rows a little apart from a power of two, which would share few places of the cache.
        const int64_t ld = static_cast<int64_t>(panels_at_once) * kPanel + kAlign / sizeof(float);
        const size_t piece_bytes = aligned(num_rows * ld * sizeof(float));
        const size_t thread_bytes = piece_bytes + aligned(num_rows * sizeof(Found));
        auto* memory = static_cast<uint8_t*>(memory_.reserve(thread_bytes * pool.num_threads()));
        const auto found_by = [&](int thread) {
            return reinterpret_cast<Found*>(memory + thread * thread_bytes + piece_bytes);
        };
        for (int thread = 0; thread < pool.num_threads(); ++thread) std::fill_n(found_by(thread), num_rows, Found{});
        run_panels(pool, weight.parts, [&](const PackedMatrix& part, PanelRange panels, int column, int thread) {
            auto* piece = reinterpret_cast<float*>(memory + thread * thread_bytes);
            for (int first = panels.first; first < panels.last; first += panels_at_once) {
                const PanelRange some = {first, std::min(first + panels_at_once, panels.last)};
                const int64_t at = static_cast<int64_t>(first) * kPanel;
                multiply(part, some, LinearResult{bias == nullptr ? nullptr : bias + column, piece - at, ld}, thread);
                const int size = std::min(some.last * kPanel, part.num_outputs) - first * kPanel;
                for (int row = 0; row < num_rows; ++row) {
                    found_by(thread)[row].take(kernels, piece + row * ld, size, column + at);
                }
            }
        });
        for (int row = 0; row < num_rows; ++row) {
            Found found;
            for (int thread = 0; thread < pool.num_threads(); ++thread) found.take(found_by(thread)[row]);
            columns[row] = std::isfinite(found.value) ? found.column : kNoColumn;
        }
    }

private:
    static constexpr int kPieceFloats = 16 * 1024;
    static constexpr int kNumMaxima = (kPieceFloats + kSampleBlock - 1) / kSampleBlock;

    // NaN: one was met.
    struct Found {
        float value = -std::numeric_limits<float>::infinity();
        int64_t column = kNoColumn;

        void take(const Found& other) {
            if (std::isnan(value)) return;
            const bool is_first = other.value == value && (column == kNoColumn || other.column < column);
            if (std::isnan(other.value) || other.value > value || is_first) *this = other;
        }

        void take(const KernelTable& kernels, const float* x, int size, int64_t first_column) {
            float maxima[kNumMaxima];
            const float greatest = kernels.block_maxima(x, size, maxima);
            if (greatest < value) return;
            const int64_t block = std::find(maxima, maxima + (size - 1) / kSampleBlock, greatest) - maxima;
            take({greatest, first_column + (std::find(x + block * kSampleBlock, x + size, greatest) - x)});
        }
    };

    Buffer memory_;
};

}  // namespace pelton
