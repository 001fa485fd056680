#include "lora.h"

namespace pelton {

namespace {

// Work of a task: some microseconds.
constexpr int kRanksPerTask = 16;
constexpr int kPanelsPerTask = 8;

}  // namespace

bool LoraSite::fits(int inputs, int num_outputs) const {
    if (num_inputs != inputs) return false;
    for (const auto& part : parts) {
        if (part.column < 0 || part.num_outputs < 1 || part.num_outputs > num_outputs - part.column ||
            part.first_rank < 0 || part.num_ranks < 1 || part.num_ranks > num_ranks - part.first_rank) {
            return false;
        }
    }
    return true;
}

bool any_changes(std::span<const LoraRows> groups, int site) {
    for (const auto& group : groups) {
        if (group.num_rows && group.adapter->site(site) != nullptr) return true;
    }
    return false;
}

void LoraProducts::add(Runtime& runtime, std::span<const LoraRows> groups, int site, const float* x, int64_t ld_x,
                       float* out, int64_t ld_out) {
    tiles_.clear();
    size_t num_floats = 0;
    for (const auto& group : groups) {
        const LoraSite* here = group.adapter->site(site);
        if (here == nullptr) continue;
        for (int64_t row = 0; row < group.num_rows; row += kLoraRows) {
            const int num_rows = static_cast<int>(std::min<int64_t>(kLoraRows, group.num_rows - row));
            tiles_.push_back({here, group.rows + row, num_rows, num_floats});
            num_floats += static_cast<size_t>(num_rows) * here->num_ranks;
        }
    }
    if (tiles_.empty()) return;
    auto* shrunk = static_cast<float*>(memory_.reserve(num_floats * sizeof(float)));
    const KernelTable& kernels = runtime.kernels();

    tasks_.clear();
    for (size_t tile = 0; tile < tiles_.size(); ++tile) {
        const int num_ranks = tiles_[tile].site->num_ranks;
        for (int rank = 0; rank < num_ranks; rank += kRanksPerTask) {
            tasks_.push_back({static_cast<int>(tile), nullptr, {rank, std::min(rank + kRanksPerTask, num_ranks)}});
        }
    }
    runtime.pool().run_small(static_cast<int>(tasks_.size()), [&](int index, int) {
        const Task& task = tasks_[index];
        const Tile& tile = tiles_[task.tile];
        const float* from[kLoraRows];
        float* to[kLoraRows];
        for (int row = 0; row < tile.num_rows; ++row) {
            from[row] = x + tile.rows[row] * ld_x;
            to[row] = shrunk + tile.shrunk + static_cast<size_t>(row) * tile.site->num_ranks;
        }
        kernels.lora_shrink(tile.site->shrink, tile.site->num_inputs, task.range, from, tile.num_rows, to);
    });

    tasks_.clear();
    for (size_t tile = 0; tile < tiles_.size(); ++tile) {
        for (const auto& part : tiles_[tile].site->parts) {
            const int num_panels = (part.num_outputs + kLoraPanel - 1) / kLoraPanel;
            for (int panel = 0; panel < num_panels; panel += kPanelsPerTask) {
                tasks_.push_back({static_cast<int>(tile), &part, {panel, std::min(panel + kPanelsPerTask, num_panels)}});
            }
        }
    }
    runtime.pool().run_small(static_cast<int>(tasks_.size()), [&](int index, int) {
        const Task& task = tasks_[index];
        const Tile& tile = tiles_[task.tile];
        const float* from[kLoraRows];
        float* to[kLoraRows];
        for (int row = 0; row < tile.num_rows; ++row) {
            from[row] = shrunk + tile.shrunk + static_cast<size_t>(row) * tile.site->num_ranks + task.part->first_rank;
            to[row] = out + tile.rows[row] * ld_out + task.part->column;
        }
        kernels.lora_expand(*task.part, task.range, from, tile.num_rows, to);
    });
}

}  // namespace pelton
