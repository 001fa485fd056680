// One layer's attention by columns: pieces of a schedule shared out among threads.
#pragma once

#include <span>
#include <vector>

#include "attention_schedule.h"
#include "buffer.h"
#include "kernel_table.h"
#include "thread_pool.h"

namespace pelton {

struct AttentionCaches {
    const void* keys;
    const void* values;
};

// Memory that one layer leaves to the next.
struct AttentionMemory {
    Buffer scratch, parts;
};

class ColumnAttention {
public:
    // `schedule` is made of the same requests. All of these must outlive it.
    ColumnAttention(const ColumnKernels& kernels, const AttentionShape& shape, std::span<const AttentionRequest> requests,
                  const AttentionSchedule& schedule, AttentionCaches caches, AttentionMemory& memory, ThreadPool& pool);

    void run();

private:
    // Some heads of a piece, which one thread computes.
    struct Task {
        int piece;
        int first_head;
        int num_heads;
    };

    void make_tasks();
    bool is_light(const AttentionSchedule::Piece& piece) const;
    void run_tasks(std::span<const Task> tasks);
    // Of the first chunk of positions that a task takes.
    UpcomingBlocks blocks_of(const Task& task, int head) const;
    UpcomingBlocks blocks_between(const AttentionRequest& request, int start, int end, int head) const;
    int start_of(const AttentionSchedule::Run& run) const;
    void attend(const AttentionSchedule::Piece& piece, int kv_head, const UpcomingBlocks& upcoming, int thread) const;
    void merge(const AttentionSchedule::Merge& merge, int kv_head, int thread) const;

    // All columns of `kv_head` in some tokens of a request.
    void set_columns(AttentionColumn* to, const AttentionRequest& request, int kv_head, int first, int count) const;
    AttentionColumn* columns_of(int thread) const;
    float* work_of(int thread) const;
    float* part_at(int kv_head, int tile) const;

    const ColumnKernels& kernels_;
    const AttentionShape& shape_;
    std::span<const AttentionRequest> requests_;
    const AttentionSchedule& schedule_;
    AttentionCaches caches_;
    ThreadPool& pool_;
    int group_;  // query heads to a key-value head
    size_t column_bytes_;
    size_t work_bytes_;  // of a thread, columns included
    int64_t part_floats_;
    uint8_t* scratch_;
    float* parts_;
    std::vector<Task> tasks_;
};

}  // namespace pelton
