// `Program`: a forward pass recorded once and replayed each step in one call.
//
// Values live in slots: matrices of a fixed width whose rows are the step's tokens (or, for the head, the
// rows that are sampled). Ops read and write columns of slots. Whoever records a program decides which
// values share a slot. Legend as in ops.py.
#pragma once

#include <functional>
#include <span>
#include <utility>
#include <vector>

#include "attention_plan.h"
#include "embedding.h"
#include "lora.h"
#include "runtime.h"

namespace pelton {

// Columns of a slot from `column` on.
struct View {
    int slot;
    int column;
};

struct CachePair {
    void* keys;
    void* values;
};

// What a KV group's layers share in one step.
struct GroupInputs {
    const int64_t* slot_mapping;  // [T]
    const float* cos;             // [T, half]
    const float* sin;
    int half;
    const int64_t* block_tables;  // [R, num_columns]
    int64_t num_columns;
};

// What a run is given. A body has tokens and requests, a head has rows of a body's result.
struct ProgramInputs {
    int num_rows = 0;
    const int64_t* token_ids = nullptr;  // [T]
    int64_t num_requests = 0;
    const int64_t* query_start_loc = nullptr;  // [R + 1]
    const int64_t* seq_lens = nullptr;         // [R]
    std::span<const GroupInputs> groups;
    const float* hidden = nullptr;  // [num_hidden, hidden_width]
    int64_t num_hidden = 0;
    int hidden_width = 0;
    const int64_t* rows = nullptr;  // [S]
    std::span<const LoraRows> adapters;
};

class Program {
public:
    // `groups` are the shapes of the KV groups; their caches have num_blocks blocks.
    Program(Runtime& runtime, std::vector<AttentionShape> groups, int64_t num_blocks)
        : runtime_(runtime), groups_(std::move(groups)), num_blocks_(num_blocks) {}

    // The first slot is the result, in the caller's memory. Throws std::invalid_argument for width < 1.
    int add_slot(int width);

    // One function per op. What is pointed to must outlive the program. Throws std::invalid_argument for
    // columns that a slot does not have.
    void select_rows(int size, View out);  // of the run's `hidden`
    void embedding(const EmbeddingTable& table, View out);
    void linear(const LinearWeight& weight, View x, const float* bias, View out);
    // out += what the run's adapters add at `site`, for their rows of x.
    void adapt(int site, View x, int num_inputs, View out, int num_outputs);
    // Each of `num_heads` heads of `size` columns by itself.
    void rms_norm(View x, int num_heads, const float* weight, int size, float eps, View out);
    // out = norm(x + residual); residual becomes x + residual.
    void add_rms_norm(View x, View residual, const float* weight, int size, float eps, View out);
    // `sites` of the two products; -1: no adapter changes it.
    void gated_mlp(const GatedWeights& weights, std::pair<int, int> sites, View x, View out);
    void gated(bool gelu, View gate_up, int size, View out);
    void softcap(View x, int size, float cap);
    void rotate_and_store(int group, View query, View key, View value, CachePair cache);
    void attend(int group, View query, CachePair cache, float scale, float softcap, View out);

    // Runs the ops in order; result [num_rows, width of the first slot]. Throws std::out_of_range for
    // inputs that name a token, row, slot of a cache or block that does not exist; nothing is written then.
    void run(const ProgramInputs& inputs, float* result);

    const std::vector<int>& slot_widths() const { return widths_; }
    // From now on every op of a run is timed: two looks at the clock each.
    void time_ops() { times_s_.assign(ops_.size(), 0.0); }

    // Seconds of each op, in the order of recording, since `time_ops` or the last call.
    std::vector<double> take_times() { return std::exchange(times_s_, std::vector<double>(times_s_.size())); }

    int result_width() const { return widths_.empty() ? 0 : widths_[0]; }
    size_t num_groups() const { return groups_.size(); }

private:
    using Op = std::function<void()>;

    // A view once its program runs: the first row, and how far rows are apart.
    struct Matrix {
        float* data;
        int64_t ld;
        float* row(int64_t index) const { return data + index * ld; }
    };
    Matrix at(View view) const;
    void check(View view, int num_columns) const;
    void check_whole(View view, int num_columns) const;
    void check_group(int group) const;
    void check_inputs() const;
    void check_adapters() const;
    void run_adapted_mlp(const GatedWeights& weights, std::pair<int, int> sites, View x, View out);
    void run_mlp_parts(const GatedWeights& weights, std::pair<int, int> sites, const float* x, int num_rows,
                       std::span<const LoraRows> adapters, float* out);

    Runtime& runtime_;
    std::vector<AttentionShape> groups_;
    int64_t num_blocks_;
    std::vector<int> widths_;
    std::vector<Op> ops_;
    std::vector<double> times_s_;  // of each op; empty: none is timed

    // Of the run under way.
    ProgramInputs inputs_;
    std::vector<AttentionPlan> plans_;
    std::vector<float*> memory_;  // of each slot
    Buffer buffer_;

    // A product that adapters may change.
    struct Site {
        int index;
        int num_inputs;
        int num_outputs;
    };
    std::vector<Site> sites_;
    LoraProducts lora_;
    Buffer adapted_, adapted_rows_;
};

}  // namespace pelton
