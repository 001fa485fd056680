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
    void run_small(int count, const Task& task) const {
        run(count, task);
    }
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
