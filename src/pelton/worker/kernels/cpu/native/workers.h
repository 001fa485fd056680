// Who does the parts of an operation: all threads of a pool, or one of them alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "packed_matrix.h"
#include "thread_pool.h"
#include "tiles.h"

namespace pelton {

// One thread of a pool's job that does a smaller job by itself.
struct AloneWorker {
    int thread;

    int num_threads() const { return 1; }
    template <typename Task>
    void run(int count, const Task& task) const {
        for (int i = 0; i < count; ++i) task(i, thread);
    }
    template <typename Task>
    void run_rows(int num_rows, int, const Task& task) const {
        run(num_rows, task);
    }
};

// From so many rows to a thread on, each takes rows of its own through an operation: what another core has written comes
// at a fifth of the speed of memory. With fewer it costs more that each of them makes all weights.
constexpr int kFewestOwnRows = 128;
// With what lies between two products, so many of a feed-forward layer fit in a core's second-level cache.
constexpr int kOwnRows = 256;

// Rows in pieces of neighbours, as many to each thread; one is none: threads share panels, not rows.
class RowPieces {
public:
    RowPieces(int num_rows, int num_threads) : num_pairs_((num_rows + kPairRows - 1) / kPairRows), num_rows_(num_rows) {
        const int per_thread = num_rows / num_threads;
        if (num_threads > 1 && per_thread >= kFewestOwnRows) count_ = (per_thread + kOwnRows - 1) / kOwnRows * num_threads;
    }

    int count() const { return count_; }
    int first(int piece) const {
        return std::min(num_rows_, static_cast<int>(static_cast<int64_t>(num_pairs_) * piece / count_) * kPairRows);
    }
    int num_rows(int piece) const { return first(piece + 1) - first(piece); }
    int most_rows() const { return std::min(num_rows_, (num_pairs_ + count_ - 1) / count_ * kPairRows); }

private:
    static constexpr int kPairRows = 2 * kTileHeight;  // blocks are read in pairs

    int num_pairs_;
    int num_rows_;
    int count_ = 1;
};

// Calls run(part, panels, first column, thread) for all panels, some neighbours at a time: streams of memory
// are long, and the kernel prefetches a next panel that is its own.
template <typename Workers, typename Run>
void run_panels(Workers& workers, std::span<const PackedMatrix> parts, const Run& run) {
    constexpr int kTasksPerThread = 16;
    int num_panels = 0;
    for (const auto& part : parts) num_panels += part.num_panels();
    const int num_tasks = workers.num_threads() == 1 ? 1 : std::min(num_panels, workers.num_threads() * kTasksPerThread);
    workers.run(num_tasks, [&](int task, int thread) {
        int first = static_cast<int>(static_cast<int64_t>(num_panels) * task / num_tasks);
        int last = static_cast<int>(static_cast<int64_t>(num_panels) * (task + 1) / num_tasks);
        int column = 0;
        for (const auto& part : parts) {
            const PanelRange panels = {std::max(first, 0), std::min(last, part.num_panels())};
            if (panels.first < panels.last) run(part, panels, column, thread);
            first -= part.num_panels();
            last -= part.num_panels();
            column += part.num_outputs;
        }
    });
}

}  // namespace pelton
