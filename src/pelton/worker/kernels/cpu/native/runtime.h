// `Runtime`: kernels chosen for this processor, threads, and the scratch memory of one engine.
#pragma once

#include <algorithm>
#include <memory>
#include <span>
#include <vector>

#include "attention_schedule.h"
#include "buffer.h"
#include "channel_products.h"
#include "greatest_columns.h"
#include "kernel_table.h"
#include "linear_weight.h"
#include "thread_pool.h"
#include "column_attention.h"
#include "workers.h"

namespace pelton {

// What activations are rounded to as they enter a product with quantized weights, and in tiles with those of BF16.
enum class ActivationType {
    Auto,  // the fastest
    INT8,
    BF16,  // with tiles only
    F32,
};

struct Tokens {
    int num_tokens;
    const int64_t* slots;  // [T]
    const float* cos;      // [T, half]
    const float* sin;
    int half;
};

// Rows of heads; consecutive tokens are ld apart.
struct HeadRows {
    float* queries;  // [T, N, D]
    int64_t ld_queries;
    float* keys;  // [T, K, D]
    int64_t ld_keys;
    const float* values;
    int64_t ld_values;
};

// One operation at a time: not thread-safe.
class Runtime {
public:
    Runtime(const KernelTable& kernels, int num_threads, const std::vector<int>& cpus,
            ActivationType activation = ActivationType::Auto)
        : kernels_(kernels), activation_(activation), pool_(num_threads, cpus), channels_(kernels, pool_) {}

    const KernelTable& kernels() const { return kernels_; }
    ThreadPool& pool() { return pool_; }

    // out [S, O] = x [S, I] times weight, plus bias [O] where given.
    void linear(const LinearWeight& weight, const float* x, int num_rows, const float* bias, float* out);

    // columns [S]: where each row of what `linear` would make is greatest, of equal values the first; kNoColumn where that
    // is not finite or a value is NaN.
    void greatest_columns(const LinearWeight& weight, const float* x, int num_rows, const float* bias, int64_t* columns);

    // out [S, H] of x [S, H]; residual [S, H] (may be null) becomes x + residual.
    void rms_norm(const float* x, float* residual, const float* weight, int num_rows, int size, float eps, float* out);

    // out [S, O] = down(act(gate) * up) with (gate, up) [S, 2F] = gate_up(x) for x [S, I].
    void gated_mlp(const GatedWeights& weights, const float* x, int num_rows, float* out);

    // Whether `gated_mlp` rounds otherwise than its products one by one.
    static bool rounds_by_channel(const GatedWeights& weights) {
        return weights.gate_up->is_by_channel() || weights.down->is_by_channel();
    }

    // [S, 2F] -> [S, F].
    void gated(bool gelu, const float* gate_up, int num_rows, int size, float* out);

    // Rotates queries and keys in place; stores keys and values at their slots.
    void rotate_and_store(const AttentionShape& shape, const Tokens& tokens, const HeadRows& rows, void* key_cache,
                          void* value_cache);

    // Whether attention of this shape is by columns.
    bool attends_in_chunks(const AttentionShape& shape) const {
        return kernels_.columns != nullptr && kernels_.columns->can_attend(shape);
    }
    // How many threads take chunks of positions, for a schedule; 0: none does.
    int chunk_threads(const AttentionShape& shape) const { return attends_in_chunks(shape) ? pool_.num_threads() : 0; }

    // `schedule` is made of the same requests.
    void attend(const AttentionShape& shape, std::span<const AttentionRequest> requests,
                const AttentionSchedule& schedule, const void* key_cache, const void* value_cache);

private:
    // Float32 products, of decoded weights where need be, unless all of the weight is multiplied in tiles.
    bool multiplies_floats(const PackedMatrix& part) const {
        return activation_ == ActivationType::F32 || traits_of(part.format).is_dense();
    }
    // A weight with a dense part goes another way as a whole.
    bool multiplies_tiles(const LinearWeight& weight) const;
    // As much for each thread.
    struct ThreadScratch {
        uint8_t* memory;
        size_t num_bytes;
        uint8_t* of(int thread) const { return memory + thread * num_bytes; }
    };
    ThreadScratch reserve_scratch(size_t num_bytes);
    // Rows as a product of panels takes them, and its memory.
    struct PanelInputs {
        FloatRows floats;
        QuantizedRows quantized;
        ThreadScratch scratch;
    };
    PanelInputs prepare_panels(const LinearWeight& weight, const float* x, int num_rows);
    void multiply_panel(const PackedMatrix& part, int panel, const PanelInputs& inputs, std::pair<int, int> rows,
                        const LinearResult& result, int thread) const;
    void multiply_panels(const LinearWeight& weight, const PanelInputs& inputs, const float* bias, float* out);
    // Rows in 8 bits, in memory that the next call reuses.
    QuantizedRows quantize(const float* x, int num_rows, int num_inputs);
    static QuantizedRows reserve_quantized(Buffer& buffer, int num_rows, int num_inputs);
    // Some groups of a row, from input `first` on.
    void quantize_row(const float* x, int num_values, const QuantizedRows& to, int row, int first) const;
    // Whether its products are of integers in groups of 32.
    bool multiplies_groups(const LinearWeight& weight) const;
    void gated_groups(const GatedWeights& weights, const float* x, int num_rows, float* out);
    struct GatedPieces;
    TiledRows reserve_tiles(Buffer& buffer, int num_rows, int num_inputs);
    template <typename Run>
    void run_pieces(int num_rows, const Run& run);
    template <typename Workers>
    void pack_tiles(Workers& workers, const float* x, const TiledRows& to);
    void multiply_tiles(const LinearWeight& weight, const float* x, int num_rows, const float* bias, float* out);
    template <typename Workers>
    void multiply_tiles(Workers& workers, const LinearWeight& weight, const TiledRows& x, const float* bias, float* out,
                        const ThreadScratch& scratch);
    void gated_tiles(const GatedWeights& weights, const float* x, int num_rows, float* out);
    template <typename Workers>
    void multiply_gated(Workers& workers, const GatedWeights& weights, const GatedPieces& pieces, const TiledRows& x,
                        const TiledRows& hidden, const ThreadScratch& scratch);
    void store_gated(bool gelu, const float* const (&sides)[2], int column, int64_t ld, const TiledRows& to,
                     int group) const;

    const KernelTable& kernels_;
    ActivationType activation_;
    ThreadPool pool_;
    ChannelProducts channels_;
    Buffer activations_;
    Buffer scratch_;
    AttentionMemory attention_;
    Buffer mlp_;
    Buffer gated_;
    GreatestColumns greatest_;
};

}  // namespace pelton
