// The requests of a step, checked once for all layers of a KV group.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "attention.h"
#include "attention_schedule.h"

namespace pelton {

class AttentionPlan {
public:
    // query_start_loc [R + 1], seq_lens [R], block_tables [R, num_columns]; copied. Whatever a step was made
    // of, nothing outside its arrays is touched: throws std::out_of_range for a request that does not fit.
    // chunk_threads: see Runtime::chunk_threads.
    AttentionPlan(const AttentionShape& shape, const int64_t* query_start_loc, const int64_t* seq_lens,
                  int64_t num_requests, const int64_t* block_tables, int64_t num_columns, int chunk_threads)
        : shape_(shape), num_columns_(num_columns), block_tables_(block_tables, block_tables + num_requests * num_columns),
          starts_(query_start_loc, query_start_loc + num_requests + 1), seq_lens_(seq_lens, seq_lens + num_requests) {
        for (int64_t row = 0; row < num_requests; ++row) {
            const int64_t num_tokens = starts_[row + 1] - starts_[row];
            if (starts_[row] < 0 || num_tokens < 1 || num_tokens > seq_lens_[row] ||
                seq_lens_[row] > num_columns * shape.block_size) {
                throw std::out_of_range("a request does not fit its block table");
            }
            for (int64_t column = 0; column <= (seq_lens_[row] - 1) / shape.block_size; ++column) {
                const int64_t block = block_tables_[row * num_columns + column];
                if (block < 0) throw std::out_of_range("a block table has a negative block");
                num_blocks_ = std::max(num_blocks_, block + 1);
            }
        }
        std::vector<AttentionSchedule::Request> requests;
        requests.reserve(num_requests);
        for (int64_t row = 0; row < num_requests; ++row) {
            requests.push_back({static_cast<int>(starts_[row + 1] - starts_[row]), static_cast<int>(seq_lens_[row]),
                                block_tables_.data() + row * num_columns});
        }
        schedule_ = AttentionSchedule(shape, requests, chunk_threads);
    }

    const AttentionShape& shape() const { return shape_; }
    const AttentionSchedule& schedule() const { return schedule_; }

    // Throws std::out_of_range where there are fewer tokens, or fewer blocks in the cache, than needed.
    void check(int64_t num_tokens, int64_t num_blocks) const {
        if (num_tokens < starts_.back()) throw std::out_of_range("a request has more tokens than the step");
        if (num_blocks < num_blocks_) throw std::out_of_range("a block table has a block that does not exist");
    }

    // The requests with rows of `query`, ld_query apart, and of `out` [T, N * D].
    std::vector<AttentionRequest> requests(const float* query, int64_t ld_query, float* out) const {
        const int64_t ld_out = static_cast<int64_t>(shape_.num_heads) * shape_.head_dim;
        std::vector<AttentionRequest> requests;
        requests.reserve(seq_lens_.size());
        for (size_t row = 0; row < seq_lens_.size(); ++row) {
            requests.push_back({query + starts_[row] * ld_query, ld_query, out + starts_[row] * ld_out,
                                static_cast<int>(starts_[row + 1] - starts_[row]), static_cast<int>(seq_lens_[row]),
                                block_tables_.data() + row * num_columns_});
        }
        return requests;
    }

private:
    AttentionShape shape_;  // but for scale and softcap, which belong to a layer
    int64_t num_columns_;
    std::vector<int64_t> block_tables_;
    std::vector<int64_t> starts_;
    std::vector<int64_t> seq_lens_;
    AttentionSchedule schedule_;
    int64_t num_blocks_ = 0;  // that a cache must have for these tables
};

}  // namespace pelton
