#include "runtime.h"

#include <algorithm>

#include "denormals.h"
#include "column_attention.h"

namespace pelton {

namespace {

// Quantized activations that one pass over a panel reads again and again: they should stay in L2.
constexpr int kChunkBytes = 512 * 1024;

constexpr int chunk_rows(int row_bytes) { return std::max(48, kChunkBytes / row_bytes); }

// The same for tiles: a chunk of rows times a range of groups.
constexpr int kTileChunkRows = 512;
constexpr int kTileChunkGroups = 32;
constexpr int kFewPanels = 8;

// Rows of a gated layer's panel that stay in the caches.
constexpr int kGatedRows = 256;

// Rows of so many inputs that take as much memory as such a chunk; whole pairs of blocks.
constexpr int tile_rows_at_once(int num_inputs) {
    const int num_rows = kTileChunkRows * kTileChunkGroups * kGroup / num_inputs;
    return std::max(1, num_rows / (2 * kTileHeight)) * 2 * kTileHeight;
}

}  // namespace

// How much of a gated layer's two wide results is there at once, for a thread.
struct Runtime::GatedPieces {
    int rows_at_once;
    int panels_at_once;
    size_t side_bytes;
    size_t product_bytes;

    GatedPieces(int num_rows, int num_inputs)
        : rows_at_once(std::min(num_rows, tile_rows_at_once(num_inputs))),
          panels_at_once(num_rows <= 2 * kTileHeight ? kFewPanels : 1),
          side_bytes(aligned(static_cast<size_t>(rows_at_once) * ld() * sizeof(float))),
          product_bytes(tile_scratch_bytes(rows_at_once, num_inputs)) {}

    int64_t ld() const { return panels_at_once * kPanel; }
    size_t work_bytes() const { return 2 * side_bytes + product_bytes; }
};

size_t LinearWeight::num_bytes() const {
    size_t total = 0;
    for (const auto& part : parts) total += part.num_bytes();
    return total;
}

void Runtime::linear(const LinearWeight& weight, const float* x, int num_rows, const float* bias, float* out) {
    if (weight.is_by_channel()) {
        channels_.linear(weight, x, num_rows, bias, out);
    } else if (multiplies_tiles(weight)) {
        multiply_tiles(weight, x, num_rows, bias, out);
    } else {
        multiply_panels(weight, prepare_panels(weight, x, num_rows), bias, out);
    }
}

bool Runtime::multiplies_tiles(const LinearWeight& weight) const {
    if (kernels_.tiles == nullptr || activation_ == ActivationType::INT8 || weight.is_by_channel()) return false;
    return std::all_of(weight.parts.begin(), weight.parts.end(), [this](const PackedMatrix& part) {
        const bool whole_groups = part.format == Format::BF16 && part.num_inputs % kGroup == 0;
        return !multiplies_floats(part) || (whole_groups && activation_ != ActivationType::F32);
    });
}

QuantizedRows Runtime::reserve_quantized(Buffer& buffer, int num_rows, int num_inputs) {
    const int num_groups = num_inputs / kGroup;
    const size_t value_bytes = aligned(static_cast<size_t>(num_rows) * num_inputs);
    const size_t scale_bytes = aligned(static_cast<size_t>(num_rows) * num_groups * sizeof(float));
    auto* memory = static_cast<uint8_t*>(buffer.reserve(value_bytes + 3 * scale_bytes + kAlign));
    return {num_rows, num_inputs, reinterpret_cast<int8_t*>(memory), reinterpret_cast<float*>(memory + value_bytes),
            reinterpret_cast<int32_t*>(memory + value_bytes + scale_bytes)};
}

void Runtime::quantize_row(const float* x, int num_values, const QuantizedRows& to, int row, int first) const {
    const size_t at = static_cast<size_t>(row) * to.num_inputs + first, group = at / kGroup;
    kernels_.quantize_row(x, num_values, to.values + at, to.scales + group, to.sums + 2 * group);
}

QuantizedRows Runtime::quantize(const float* x, int num_rows, int num_inputs) {
    const QuantizedRows rows = reserve_quantized(activations_, num_rows, num_inputs);
    pool_.run_rows(num_rows, num_inputs, [&](int row, int) {
        quantize_row(x + static_cast<size_t>(row) * num_inputs, num_inputs, rows, row, 0);
    });
    return rows;
}

Runtime::PanelInputs Runtime::prepare_panels(const LinearWeight& weight, const float* x, int num_rows) {
    const int num_inputs = weight.num_inputs;
    const auto is_float = [this](const PackedMatrix& part) { return multiplies_floats(part); };
    const bool any_floats = std::any_of(weight.parts.begin(), weight.parts.end(), is_float);
    const bool all_floats = std::all_of(weight.parts.begin(), weight.parts.end(), is_float);
    const QuantizedRows quantized = all_floats ? QuantizedRows{} : quantize(x, num_rows, num_inputs);
    const int padded_inputs = (num_inputs + kGroup - 1) / kGroup * kGroup;
    const size_t scratch_bytes =
        std::max(linear_scratch_bytes(padded_inputs), any_floats ? dense_scratch_bytes(padded_inputs) : 0);
    return {{num_rows, num_inputs, x}, quantized, reserve_scratch(scratch_bytes)};
}

// Rows [first, last) of one panel's columns; `result` starts at row `first`.
void Runtime::multiply_panel(const PackedMatrix& part, int panel, const PanelInputs& inputs, std::pair<int, int> rows,
                             const LinearResult& result, int thread) const {
    const auto [first, last] = rows;
    const int num_inputs = inputs.floats.num_inputs;
    uint8_t* scratch = inputs.scratch.of(thread);
    const size_t value = static_cast<size_t>(first) * num_inputs;
    if (multiplies_floats(part)) {
        kernels_.dense_panel(part, panel, {last - first, num_inputs, inputs.floats.values + value}, result.bias,
                             result.out, result.ld_out, scratch);
        return;
    }
    const QuantizedRows& all = inputs.quantized;
    const size_t group = value / kGroup;
    kernels_.linear_panel(part, panel,
                          {last - first, num_inputs, all.values + value, all.scales + group, all.sums + 2 * group},
                          result.bias, result.out, result.ld_out, scratch);
}

void Runtime::multiply_panels(const LinearWeight& weight, const PanelInputs& inputs, const float* bias, float* out) {
    const int num_rows = inputs.floats.num_rows;
    int num_panels = 0;
    bool any_floats = false;
    for (const auto& part : weight.parts) {
        num_panels += part.num_panels();
        any_floats = any_floats || multiplies_floats(part);
    }
    const int at_once = chunk_rows(any_floats ? 4 * weight.num_inputs : weight.num_inputs);
    const int num_chunks = (num_rows + at_once - 1) / at_once;
    pool_.run(num_panels * num_chunks, [&](int task, int thread) {
        const int first = static_cast<int>(static_cast<int64_t>(num_rows) * (task / num_panels) / num_chunks);
        const int last = static_cast<int>(static_cast<int64_t>(num_rows) * (task / num_panels + 1) / num_chunks);
        int panel = task % num_panels, column = 0;
        for (const auto& part : weight.parts) {
            if (panel >= part.num_panels()) {
                panel -= part.num_panels();
                column += part.num_outputs;
                continue;
            }
            float* to = out + static_cast<int64_t>(first) * weight.num_outputs + column;
            multiply_panel(part, panel, inputs, {first, last},
                           {bias != nullptr ? bias + column : nullptr, to, weight.num_outputs}, thread);
            return;
        }
    });
}

void Runtime::greatest_columns(const LinearWeight& weight, const float* x, int num_rows, const float* bias,
                               int64_t* columns) {
    if (weight.is_by_channel()) return channels_.greatest_columns(weight, x, num_rows, bias, columns);
    if (!multiplies_tiles(weight)) {
        const PanelInputs inputs = prepare_panels(weight, x, num_rows);
        const auto multiply = [&](const PackedMatrix& part, PanelRange panels, const LinearResult& result, int thread) {
            for (int panel = panels.first; panel < panels.last; ++panel) {
                multiply_panel(part, panel, inputs, {0, num_rows}, result, thread);
            }
        };
        return greatest_.find(kernels_, pool_, weight, num_rows, bias, columns, multiply);
    }
    const TiledRows rows = reserve_tiles(activations_, num_rows, weight.num_inputs);
    pack_tiles(pool_, x, rows);
    const ThreadScratch scratch = reserve_scratch(tile_scratch_bytes(num_rows, weight.num_inputs));
    const auto multiply = [&](const PackedMatrix& part, PanelRange panels, const LinearResult& result, int thread) {
        const FlushDenormals flush;
        kernels_.tiles->linear_panels(part, panels, {0, weight.num_inputs / kGroup}, rows, result,
                                      scratch.of(thread));
    };
    greatest_.find(kernels_, pool_, weight, num_rows, bias, columns, multiply);
}

TiledRows Runtime::reserve_tiles(Buffer& buffer, int num_rows, int num_inputs) {
    // Blocks are read in pairs; what lies past the last row is never part of a result.
    const int64_t num_blocks = (num_rows + kTileHeight - 1) / kTileHeight + 1;
    return {num_rows, num_inputs,
            static_cast<uint16_t*>(buffer.reserve(num_blocks * kTileHeight * num_inputs * sizeof(uint16_t)))};
}

Runtime::ThreadScratch Runtime::reserve_scratch(size_t num_bytes) {
    num_bytes = aligned(num_bytes);
    return {static_cast<uint8_t*>(scratch_.reserve(num_bytes * pool_.num_threads())), num_bytes};
}

// Calls run(workers, first row, rows) for all rows: at once, or for pieces that threads take alone.
template <typename Run>
void Runtime::run_pieces(int num_rows, const Run& run) {
    const RowPieces pieces(num_rows, pool_.num_threads());
    if (pieces.count() == 1) return run(pool_, 0, num_rows);
    pool_.run(pieces.count(), [&](int piece, int thread) {
        run(AloneWorker{thread}, pieces.first(piece), pieces.num_rows(piece));
    });
}

template <typename Workers>
void Runtime::pack_tiles(Workers& workers, const float* x, const TiledRows& to) {
    workers.run((to.num_rows + kTileHeight - 1) / kTileHeight, [&](int block, int) {
        const int row = block * kTileHeight;
        kernels_.tiles->pack_rows(x + static_cast<int64_t>(row) * to.num_inputs, std::min(kTileHeight, to.num_rows - row),
                                  to.num_inputs, to.block(block));
    });
}

void Runtime::multiply_tiles(const LinearWeight& weight, const float* x, int num_rows, const float* bias, float* out) {
    const TiledRows all = reserve_tiles(activations_, num_rows, weight.num_inputs);
    const ThreadScratch scratch = reserve_scratch(tile_scratch_bytes(std::min(num_rows, kTileChunkRows), weight.num_inputs));
    run_pieces(num_rows, [&](auto&& workers, int64_t first, int count) {
        const TiledRows rows = all.from(first, count);
        pack_tiles(workers, x + first * weight.num_inputs, rows);
        multiply_tiles(workers, weight, rows, bias, out + first * weight.num_outputs, scratch);
    });
}

template <typename Workers>
void Runtime::multiply_tiles(Workers& workers, const LinearWeight& weight, const TiledRows& x, const float* bias,
                             float* out, const ThreadScratch& scratch) {
    const int num_groups = weight.num_inputs / kGroup;
    for (int row = 0; row < x.num_rows; row += kTileChunkRows) {
        const TiledRows rows = x.from(row, kTileChunkRows);
        const int groups_at_once = rows.is_few() ? num_groups : kTileChunkRows * kTileChunkGroups / rows.num_rows;
        for (int group = 0; group < num_groups; group += groups_at_once) {
            const GroupRange groups = {group, std::min(group + groups_at_once, num_groups)};
            run_panels(workers, weight.parts, [&](const PackedMatrix& part, PanelRange panels, int column, int thread) {
                const FlushDenormals flush;  // as tiles do
                const LinearResult result = {bias != nullptr ? bias + column : nullptr,
                                             out + static_cast<int64_t>(row) * weight.num_outputs + column,
                                             weight.num_outputs};
                kernels_.tiles->linear_panels(part, panels, groups, rows, result, scratch.of(thread));
            });
        }
    }
}

void Runtime::gated_mlp(const GatedWeights& weights, const float* x, int num_rows, float* out) {
    if (channels_.can_fuse(weights)) return channels_.gated_mlp(weights, x, num_rows, out);
    if (weights.gate_up->parts.size() == 2 && multiplies_tiles(*weights.gate_up) && multiplies_tiles(*weights.down)) {
        return gated_tiles(weights, x, num_rows, out);
    }
    if (weights.gate_up->parts.size() == 2 && multiplies_groups(*weights.gate_up) && multiplies_groups(*weights.down)) {
        return gated_groups(weights, x, num_rows, out);
    }
    const int size = weights.down->num_inputs;
    auto* wide = static_cast<float*>(mlp_.reserve(static_cast<size_t>(num_rows) * size * 3 * sizeof(float)));
    float* narrow = wide + static_cast<size_t>(num_rows) * size * 2;
    linear(*weights.gate_up, x, num_rows, weights.gate_up_bias, wide);
    gated(weights.gelu, wide, num_rows, size, narrow);
    linear(*weights.down, narrow, num_rows, weights.down_bias, out);
}

bool Runtime::multiplies_groups(const LinearWeight& weight) const {
    return !weight.is_by_channel() && !multiplies_tiles(weight) &&
           std::none_of(weight.parts.begin(), weight.parts.end(),
                        [this](const PackedMatrix& part) { return multiplies_floats(part); });
}

// What lies between the products is one panel of either side at a time, which becomes a group of the next product's
// inputs: the same bits as one operation after another, without 12 bytes to a value that leave the caches.
void Runtime::gated_groups(const GatedWeights& weights, const float* x, int num_rows, float* out) {
    const auto& sides = weights.gate_up->parts;
    const int size = weights.down->num_inputs;
    const PanelInputs inputs = prepare_panels(*weights.gate_up, x, num_rows);
    const QuantizedRows hidden = reserve_quantized(mlp_, num_rows, size);
    const int rows_at_once = std::min({num_rows, kGatedRows, chunk_rows(weights.gate_up->num_inputs)});
    const int num_chunks = num_rows == 0 ? 0 : (num_rows + rows_at_once - 1) / rows_at_once;
    // A few rows are bound by memory, whose streams should be long.
    const int panels_at_once = num_rows <= kGatedRows / kFewPanels ? kFewPanels : 1;
    const int width = panels_at_once * kPanel;
    const size_t wide_bytes = aligned(static_cast<size_t>(rows_at_once) * 2 * width * sizeof(float));
    const size_t own_bytes = wide_bytes + aligned(width * sizeof(float));
    auto* memory = static_cast<uint8_t*>(gated_.reserve(own_bytes * pool_.num_threads()));
    const auto act = weights.gelu ? kernels_.gelu_tanh_mul_row : kernels_.silu_mul_row;
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
        const int first = static_cast<int>(static_cast<int64_t>(num_rows) * chunk / num_chunks);
        const int last = static_cast<int>(static_cast<int64_t>(num_rows) * (chunk + 1) / num_chunks);
        run_panels(pool_, std::span(sides).first(1), [&](const PackedMatrix&, PanelRange panels, int, int thread) {
            auto* wide = reinterpret_cast<float*>(memory + thread * own_bytes);
            auto* narrow = reinterpret_cast<float*>(memory + thread * own_bytes + wide_bytes);
            for (int panel = panels.first; panel < panels.last; panel += panels_at_once) {
                const int count = std::min(panels_at_once, panels.last - panel), num_columns = count * kPanel;
                for (int side = 0; side < 2; ++side) {
                    const float* bias = weights.gate_up_bias == nullptr ? nullptr : weights.gate_up_bias + side * size;
                    const LinearResult result = {bias, wide + side * num_columns - panel * kPanel, 2 * num_columns};
                    for (int i = panel; i < panel + count; ++i) {
                        multiply_panel(sides[side], i, inputs, {first, last}, result, thread);
                    }
                }
                for (int row = first; row < last; ++row) {
                    act(wide + static_cast<int64_t>(row - first) * 2 * num_columns, num_columns, narrow);
                    quantize_row(narrow, num_columns, hidden, row, panel * kPanel);
                }
            }
        });
    }
    multiply_panels(*weights.down, {{num_rows, size, nullptr}, hidden, reserve_scratch(linear_scratch_bytes(size))},
                    weights.down_bias, out);
}

void Runtime::gated_tiles(const GatedWeights& weights, const float* x, int num_rows, float* out) {
    const int num_inputs = weights.gate_up->num_inputs, size = weights.down->num_inputs;
    const TiledRows all = reserve_tiles(activations_, num_rows, num_inputs);
    const TiledRows all_hidden = reserve_tiles(mlp_, num_rows, size);
    const GatedPieces pieces(num_rows, num_inputs);
    const ThreadScratch scratch =
        reserve_scratch(std::max(pieces.work_bytes(), tile_scratch_bytes(std::min(num_rows, kTileChunkRows), size)));
    run_pieces(num_rows, [&](auto&& workers, int64_t first, int count) {
        const TiledRows rows = all.from(first, count), hidden = all_hidden.from(first, count);
        pack_tiles(workers, x + first * num_inputs, rows);
        multiply_gated(workers, weights, pieces, rows, hidden, scratch);
        multiply_tiles(workers, *weights.down, hidden, weights.down_bias, out + first * weights.down->num_outputs, scratch);
    });
}

// Panels of gate and up are multiplied side by side, and their activation goes straight into tiles: for many rows
// the two wide results would cost as much time in memory as the products.
template <typename Workers>
void Runtime::multiply_gated(Workers& workers, const GatedWeights& weights, const GatedPieces& pieces, const TiledRows& x,
                             const TiledRows& hidden, const ThreadScratch& scratch) {
    const int size = weights.down->num_inputs;
    const auto& parts = weights.gate_up->parts;
    const float* bias[2] = {weights.gate_up_bias, weights.gate_up_bias == nullptr ? nullptr : weights.gate_up_bias + size};
    for (int row = 0; row < x.num_rows; row += pieces.rows_at_once) {
        const TiledRows rows = x.from(row, pieces.rows_at_once);
        const TiledRows to = hidden.from(row, pieces.rows_at_once);
        run_panels(workers, std::span(parts).first(1), [&](const PackedMatrix&, PanelRange panels, int, int thread) {
            const FlushDenormals flush;
            uint8_t* work = scratch.of(thread);
            float* sides[2] = {reinterpret_cast<float*>(work), reinterpret_cast<float*>(work + pieces.side_bytes)};
            for (int first = panels.first; first < panels.last; first += pieces.panels_at_once) {
                const PanelRange some = {first, std::min(first + pieces.panels_at_once, panels.last)};
                for (int side = 0; side < 2; ++side) {
                    kernels_.tiles->linear_panels(parts[side], some, {0, rows.num_inputs / kGroup}, rows,
                                                  {bias[side], sides[side] - first * kPanel, pieces.ld()},
                                                  work + 2 * pieces.side_bytes);
                }
                for (int panel = some.first; panel < some.last; ++panel) {
                    store_gated(weights.gelu, sides, (panel - some.first) * kPanel, pieces.ld(), to, panel);
                }
            }
        });
    }
}

// Columns [column, column + 32) of both sides, rows `ld` apart, to group `group` of `to`.
void Runtime::store_gated(bool gelu, const float* const (&sides)[2], int column, int64_t ld, const TiledRows& to,
                          int group) const {
    for (int block = 0; block * kTileHeight < to.num_rows; ++block) {
        const int64_t at = block * kTileHeight * ld + column;
        kernels_.tiles->gated_rows(gelu, sides[0] + at, sides[1] + at, ld,
                                   std::min(kTileHeight, to.num_rows - block * kTileHeight),
                                   to.block(block) + static_cast<int64_t>(group) * kTileValues);
    }
}

void Runtime::rms_norm(const float* x, float* residual, const float* weight, int num_rows, int size, float eps,
                       float* out) {
    pool_.run_rows(num_rows, size, [&](int row, int) {
        const int64_t at = static_cast<int64_t>(row) * size;
        kernels_.rms_norm_row(x + at, residual != nullptr ? residual + at : nullptr, weight, size, eps, out + at);
    });
}

void Runtime::gated(bool gelu, const float* gate_up, int num_rows, int size, float* out) {
    const auto row_kernel = gelu ? kernels_.gelu_tanh_mul_row : kernels_.silu_mul_row;
    pool_.run_rows(num_rows, 2 * size, [&](int row, int) {
        row_kernel(gate_up + 2 * static_cast<int64_t>(row) * size, size, out + static_cast<int64_t>(row) * size);
    });
}

void Runtime::rotate_and_store(const AttentionShape& shape, const Tokens& tokens, const HeadRows& rows,
                               void* key_cache, void* value_cache) {
    const int dim = shape.head_dim;
    const int64_t element_bytes = kv_bytes(shape.kv_type);
    const bool in_chunks = attends_in_chunks(shape);
    auto *keys = static_cast<uint8_t*>(key_cache), *values = static_cast<uint8_t*>(value_cache);
    const int num_values = (shape.num_heads + 2 * shape.num_kv_heads) * dim;
    pool_.run_rows(tokens.num_tokens, num_values, [&](int token, int) {
        const float* cos = tokens.cos + static_cast<int64_t>(token) * tokens.half;
        const float* sin = tokens.sin + static_cast<int64_t>(token) * tokens.half;
        for (int head = 0; head < shape.num_heads; ++head) {
            kernels_.rotate_head(rows.queries + token * rows.ld_queries + static_cast<int64_t>(head) * dim, cos, sin,
                                 tokens.half);
        }
        for (int head = 0; head < shape.num_kv_heads; ++head) {
            float* key = rows.keys + token * rows.ld_keys + static_cast<int64_t>(head) * dim;
            const float* value = rows.values + token * rows.ld_values + static_cast<int64_t>(head) * dim;
            kernels_.rotate_head(key, cos, sin, tokens.half);
            const int64_t slot = tokens.slots[token];
            if (in_chunks) {
                const int64_t block = slot / shape.block_size;
                const int64_t at = (block * shape.num_kv_heads + head) * dim * shape.block_size * element_bytes;
                kernels_.columns->store_head(shape, key, value, static_cast<int>(slot % shape.block_size), keys + at, values + at);
            } else {
                const int64_t at = (slot * shape.num_kv_heads + head) * dim * element_bytes;
                kernels_.store_kv(key, dim, shape.kv_type, keys + at);
                kernels_.store_kv(value, dim, shape.kv_type, values + at);
            }
        }
    });
}

void Runtime::attend(const AttentionShape& shape, std::span<const AttentionRequest> requests,
                     const AttentionSchedule& schedule, const void* key_cache, const void* value_cache) {
    if (attends_in_chunks(shape)) {
        ColumnAttention(*kernels_.columns, shape, requests, schedule, {key_cache, value_cache}, attention_, pool_).run();
        return;
    }
    const size_t scratch_bytes = aligned(attention_scratch_floats(shape) * sizeof(float));
    auto* scratch = static_cast<uint8_t*>(attention_.scratch.reserve(scratch_bytes * pool_.num_threads()));
    pool_.run(static_cast<int>(schedule.pieces.size()) * shape.num_kv_heads, [&](int index, int thread) {
        const FlushDenormals flush;
        const auto& run = schedule.runs[schedule.pieces[index / shape.num_kv_heads].run];
        kernels_.attend_head(shape, requests[run.request], key_cache, value_cache, index % shape.num_kv_heads,
                             run.first_token, run.num_tokens,
                             reinterpret_cast<float*>(scratch + thread * scratch_bytes));
    });
}

}  // namespace pelton
