#include "column_attention.h"

#include <algorithm>
#include <atomic>

#include "denormals.h"

namespace pelton {

ColumnAttention::ColumnAttention(const ColumnKernels& kernels, const AttentionShape& shape,
                             std::span<const AttentionRequest> requests, const AttentionSchedule& schedule,
                             AttentionCaches caches, AttentionMemory& memory, ThreadPool& pool)
    : kernels_(kernels),
      shape_(shape),
      requests_(requests),
      schedule_(schedule),
      caches_(caches),
      pool_(pool),
      group_(shape.num_heads / shape.num_kv_heads),
      column_bytes_(aligned(std::max(schedule.num_columns, kPartColumns) * sizeof(AttentionColumn))),
      work_bytes_(column_bytes_ +
                  aligned(kernels.scratch_floats(shape.head_dim, schedule.num_columns) * sizeof(float))),
      part_floats_(kernels.part_floats(shape.head_dim)),
      scratch_(static_cast<uint8_t*>(memory.scratch.reserve(work_bytes_ * pool.num_threads()))),
      parts_(static_cast<float*>(
          memory.parts.reserve(schedule.num_tiles * shape.num_kv_heads * part_floats_ * sizeof(float)))) {
    make_tasks();
}

void ColumnAttention::run() {
    run_tasks(tasks_);
    const int num_kv_heads = shape_.num_kv_heads;
    pool_.run(static_cast<int>(schedule_.merges.size()) * num_kv_heads, [&](int index, int thread) {
        const FlushDenormals flush;
        merge(schedule_.merges[index / num_kv_heads], index % num_kv_heads, thread);
    });
}

// Bound by memory: one tile of columns or few for each block that is read.
bool ColumnAttention::is_light(const AttentionSchedule::Piece& piece) const {
    return piece.chunk >= 0 || schedule_.runs[piece.run].num_tokens * group_ <= kPartColumns;
}

// Heads of the same blocks lie together, so of a light piece one thread takes several.
void ColumnAttention::make_tasks() {
    const int num_pieces = static_cast<int>(schedule_.pieces.size());
    int at_once = std::clamp(num_pieces * shape_.num_kv_heads / (pool_.num_threads() * kTasksPerThread), 1,
                             shape_.num_kv_heads);
    while (shape_.num_kv_heads % at_once != 0) --at_once;
    for (int piece = 0; piece < num_pieces; ++piece) {
        const int num_heads = is_light(schedule_.pieces[piece]) ? at_once : 1;
        for (int head = 0; head < shape_.num_kv_heads; head += num_heads) tasks_.push_back({piece, head, num_heads});
    }
}

// Where there are tasks enough, a thread takes the next one before it begins a light one, whose blocks it fetches meanwhile.
void ColumnAttention::run_tasks(std::span<const Task> tasks) {
    const int num_tasks = static_cast<int>(tasks.size());
    const bool are_many = num_tasks >= pool_.num_threads() * kTasksPerThread;
    std::atomic<int> num_taken{0};
    pool_.run(std::min(num_tasks, pool_.num_threads()), [&](int, int thread) {
        const FlushDenormals flush;
        for (int index = num_taken++; index < num_tasks;) {
            const Task& task = tasks[index];
            const auto& piece = schedule_.pieces[task.piece];
            const bool looks_ahead = are_many && is_light(piece);
            const int next = looks_ahead ? num_taken++ : num_tasks;
            for (int head = task.first_head; head < task.first_head + task.num_heads; ++head) {
                const bool is_last = head + 1 == task.first_head + task.num_heads;
                UpcomingBlocks upcoming;
                if (!is_last) {
                    upcoming = blocks_of(task, head + 1);
                } else if (next < num_tasks) {
                    upcoming = blocks_of(tasks[next], tasks[next].first_head);
                }
                attend(piece, head, upcoming, thread);
            }
            index = looks_ahead ? next : num_taken++;
        }
    });
}

UpcomingBlocks ColumnAttention::blocks_of(const Task& task, int head) const {
    const auto& piece = schedule_.pieces[task.piece];
    const bool is_run = piece.chunk < 0;
    const int start = is_run ? start_of(schedule_.runs[piece.run]) : schedule_.chunks[piece.chunk].start;
    const int index = is_run ? schedule_.runs[piece.run].request : schedule_.chunks[piece.chunk].members.front();
    return blocks_between(requests_[index], start, start + kChunkPositions, head);
}

UpcomingBlocks ColumnAttention::blocks_between(const AttentionRequest& request, int start, int end, int head) const {
    const int last = (std::min(request.seq_len, end) + shape_.block_size - 1) / shape_.block_size;
    return {request.block_table, start / shape_.block_size, last, head};
}

int ColumnAttention::start_of(const AttentionSchedule::Run& run) const {
    if (shape_.sliding_window <= 0) return 0;
    const AttentionRequest& request = requests_[run.request];
    const int first = request.seq_len - request.num_tokens + run.first_token - shape_.sliding_window + 1;
    return std::max(first, 0) / kChunkPositions * kChunkPositions;
}

void ColumnAttention::attend(const AttentionSchedule::Piece& piece, int kv_head, const UpcomingBlocks& upcoming,
                           int thread) const {
    AttentionColumn* columns = columns_of(thread);
    if (piece.chunk < 0) {
        const auto& run = schedule_.runs[piece.run];
        const AttentionRequest& request = requests_[run.request];
        set_columns(columns, request, kv_head, run.first_token, run.num_tokens);
        ColumnRun own = {columns, run.num_tokens * group_, request.seq_len, request.block_table, {{}, upcoming}};
        const int second_chunk = start_of(run) + kChunkPositions;
        if (is_light(piece)) own.upcoming[0] = blocks_between(request, second_chunk, request.seq_len, kv_head);
        kernels_.attend(shape_, own, caches_.keys, caches_.values, kv_head, work_of(thread));
        return;
    }
    const auto& chunk = schedule_.chunks[piece.chunk];
    const AttentionRequest& first = requests_[chunk.members.front()];
    const int own = first.num_tokens * group_, per_tile = kPartColumns / own;
    const int num_members = static_cast<int>(chunk.members.size());
    const int num_columns = (num_members + per_tile - 1) / per_tile * kPartColumns;
    std::fill_n(columns, num_columns, AttentionColumn{});
    for (int i = 0; i < num_members; ++i) {
        set_columns(columns + i / per_tile * kPartColumns + i % per_tile * own, requests_[chunk.members[i]], kv_head, 0,
                    first.num_tokens);
    }
    kernels_.attend_chunk(shape_, {columns, num_columns, first.seq_len, first.block_table, {upcoming}}, caches_.keys,
                          caches_.values, kv_head, chunk.start, part_at(kv_head, chunk.first_tile), work_of(thread));
}

void ColumnAttention::merge(const AttentionSchedule::Merge& merge, int kv_head, int thread) const {
    const AttentionRequest& request = requests_[merge.request];
    AttentionColumn* columns = columns_of(thread);
    set_columns(columns, request, kv_head, 0, request.num_tokens);
    std::vector<ChunkPart> own;
    own.reserve(merge.parts.size());
    for (const auto& part : merge.parts) own.push_back({part_at(kv_head, part.tile), part.lane});
    kernels_.merge_chunks(shape_, own, columns, request.num_tokens * group_, work_of(thread));
}

void ColumnAttention::set_columns(AttentionColumn* to, const AttentionRequest& request, int kv_head, int first,
                                int count) const {
    const int64_t ld_out = static_cast<int64_t>(shape_.num_heads) * shape_.head_dim;
    for (int token = first; token < first + count; ++token) {
        for (int head = kv_head * group_; head < (kv_head + 1) * group_; ++head, ++to) {
            const int64_t at = static_cast<int64_t>(head) * shape_.head_dim;
            *to = {request.query + token * request.ld_query + at, request.out + token * ld_out + at,
                   request.seq_len - request.num_tokens + token};
        }
    }
}

AttentionColumn* ColumnAttention::columns_of(int thread) const {
    return reinterpret_cast<AttentionColumn*>(scratch_ + thread * work_bytes_);
}

float* ColumnAttention::work_of(int thread) const {
    return reinterpret_cast<float*>(scratch_ + thread * work_bytes_ + column_bytes_);
}

float* ColumnAttention::part_at(int kv_head, int tile) const {
    return parts_ + (static_cast<int64_t>(kv_head) * schedule_.num_tiles + tile) * part_floats_;
}

}  // namespace pelton
