#include "program.h"

#include <chrono>
#include <cstring>

namespace pelton {

int Program::add_slot(int width) {
    if (width < 1) throw std::invalid_argument("a slot needs a width");
    widths_.push_back(width);
    return static_cast<int>(widths_.size()) - 1;
}

Program::Matrix Program::at(View view) const { return {memory_[view.slot] + view.column, widths_[view.slot]}; }

void Program::check(View view, int num_columns) const {
    if (view.slot < 0 || view.slot >= static_cast<int>(widths_.size()) || view.column < 0 || num_columns < 1 ||
        num_columns > widths_[view.slot] - view.column) {
        throw std::invalid_argument("a view is wider than its slot");
    }
}

// Kernels of whole matrices take rows without gaps.
void Program::check_whole(View view, int num_columns) const {
    check(view, num_columns);
    if (num_columns != widths_[view.slot]) throw std::invalid_argument("a view is not its whole slot");
}

void Program::check_group(int group) const {
    if (group < 0 || group >= static_cast<int>(groups_.size())) throw std::invalid_argument("there is no such group");
}

void Program::select_rows(int size, View out) {
    check(out, size);
    ops_.push_back([=, this] {
        if (inputs_.hidden_width != size) throw std::invalid_argument("rows of another width were expected");
        const Matrix to = at(out);
        for (int row = 0; row < inputs_.num_rows; ++row) {
            std::memcpy(to.row(row), inputs_.hidden + inputs_.rows[row] * size, sizeof(float) * size);
        }
    });
}

void Program::embedding(const EmbeddingTable& table, View out) {
    check_whole(out, table.width);
    ops_.push_back([=, this, &table] { embed(table, inputs_.token_ids, inputs_.num_rows, at(out).data, runtime_.pool()); });
}

void Program::linear(const LinearWeight& weight, View x, const float* bias, View out) {
    check_whole(x, weight.num_inputs);
    check_whole(out, weight.num_outputs);
    ops_.push_back(
        [=, this, &weight] { runtime_.linear(weight, at(x).data, inputs_.num_rows, bias, at(out).data); });
}

void Program::rms_norm(View x, int num_heads, const float* weight, int size, float eps, View out) {
    check(x, num_heads * size);
    check(out, num_heads * size);
    ops_.push_back([=, this] {
        const Matrix from = at(x), to = at(out);
        runtime_.pool().run_rows(inputs_.num_rows, num_heads * size, [&](int row, int) {
            for (int column = 0; column < num_heads * size; column += size) {
                runtime_.kernels().rms_norm_row(from.row(row) + column, nullptr, weight, size, eps,
                                                to.row(row) + column);
            }
        });
    });
}

void Program::add_rms_norm(View x, View residual, const float* weight, int size, float eps, View out) {
    check(x, size);
    check(residual, size);
    check(out, size);
    ops_.push_back([=, this] {
        const Matrix from = at(x), sum = at(residual), to = at(out);
        runtime_.pool().run_rows(inputs_.num_rows, size, [&](int row, int) {
            runtime_.kernels().rms_norm_row(from.row(row), sum.row(row), weight, size, eps, to.row(row));
        });
    });
}

void Program::adapt(int site, View x, int num_inputs, View out, int num_outputs) {
    check(x, num_inputs);
    check(out, num_outputs);
    sites_.push_back({site, num_inputs, num_outputs});
    ops_.push_back([=, this] {
        if (inputs_.adapters.empty()) return;
        const Matrix from = at(x), to = at(out);
        lora_.add(runtime_, inputs_.adapters, site, from.data, from.ld, to.data, to.ld);
    });
}

void Program::gated_mlp(const GatedWeights& weights, std::pair<int, int> sites, View x, View out) {
    if (weights.gate_up->num_outputs != 2 * weights.down->num_inputs) {
        throw std::invalid_argument("gate and up do not fit down");
    }
    check_whole(x, weights.gate_up->num_inputs);
    check_whole(out, weights.down->num_outputs);
    for (const auto& [site, weight] : {std::pair(sites.first, weights.gate_up), std::pair(sites.second, weights.down)}) {
        if (site >= 0) sites_.push_back({site, weight->num_inputs, weight->num_outputs});
    }
    ops_.push_back([=, this] {
        if (any_changes(inputs_.adapters, sites.first) || any_changes(inputs_.adapters, sites.second)) {
            run_adapted_mlp(weights, sites, x, out);
        } else {
            runtime_.gated_mlp(weights, at(x).data, inputs_.num_rows, at(out).data);
        }
    });
}

// One product after another: between them, adapters change rows of what `Runtime::gated_mlp` never writes out. Where
// that rounds otherwise (weights by channel), rows without an adapter must still go its way, so both are run.
void Program::run_adapted_mlp(const GatedWeights& weights, std::pair<int, int> sites, View x, View out) {
    const Matrix from = at(x), to = at(out);
    if (!Runtime::rounds_by_channel(weights)) {
        run_mlp_parts(weights, sites, from.data, inputs_.num_rows, inputs_.adapters, to.data);
        return;
    }
    runtime_.gated_mlp(weights, from.data, inputs_.num_rows, to.data);
    std::vector<int64_t> rows, places(inputs_.num_rows);
    for (int row = 0; row < inputs_.num_rows; ++row) places[row] = row;
    std::vector<LoraRows> groups;
    for (const auto& group : inputs_.adapters) {
        if (group.adapter->site(sites.first) == nullptr && group.adapter->site(sites.second) == nullptr) continue;
        groups.push_back({group.adapter, places.data() + rows.size(), group.num_rows});
        rows.insert(rows.end(), group.rows, group.rows + group.num_rows);
    }
    const size_t num_inputs = weights.gate_up->num_inputs, num_outputs = weights.down->num_outputs;
    auto* own = static_cast<float*>(adapted_rows_.reserve(sizeof(float) * rows.size() * (num_inputs + num_outputs)));
    float* results = own + rows.size() * num_inputs;
    for (size_t i = 0; i < rows.size(); ++i) {
        std::memcpy(own + i * num_inputs, from.row(rows[i]), sizeof(float) * num_inputs);
    }
    run_mlp_parts(weights, sites, own, static_cast<int>(rows.size()), groups, results);
    for (size_t i = 0; i < rows.size(); ++i) {
        std::memcpy(to.row(rows[i]), results + i * num_outputs, sizeof(float) * num_outputs);
    }
}

void Program::run_mlp_parts(const GatedWeights& weights, std::pair<int, int> sites, const float* x, int num_rows,
                            std::span<const LoraRows> adapters, float* out) {
    const int num_inputs = weights.gate_up->num_inputs, size = weights.down->num_inputs;
    auto* wide = static_cast<float*>(adapted_.reserve(sizeof(float) * 3 * size * num_rows));
    float* narrow = wide + static_cast<int64_t>(2) * size * num_rows;
    runtime_.linear(*weights.gate_up, x, num_rows, weights.gate_up_bias, wide);
    lora_.add(runtime_, adapters, sites.first, x, num_inputs, wide, 2 * size);
    runtime_.gated(weights.gelu, wide, num_rows, size, narrow);
    runtime_.linear(*weights.down, narrow, num_rows, weights.down_bias, out);
    lora_.add(runtime_, adapters, sites.second, narrow, size, out, weights.down->num_outputs);
}

void Program::gated(bool gelu, View gate_up, int size, View out) {
    check_whole(gate_up, 2 * size);
    check_whole(out, size);
    ops_.push_back([=, this] { runtime_.gated(gelu, at(gate_up).data, inputs_.num_rows, size, at(out).data); });
}

void Program::softcap(View x, int size, float cap) {
    check(x, size);
    ops_.push_back([=, this] {
        const Matrix values = at(x);
        runtime_.pool().run_rows(inputs_.num_rows, size, [&](int row, int) {
            runtime_.kernels().softcap_row(values.row(row), size, cap);
        });
    });
}

void Program::rotate_and_store(int group, View query, View key, View value, CachePair cache) {
    check_group(group);
    const AttentionShape shape = groups_[group];
    check(query, shape.num_heads * shape.head_dim);
    check(key, shape.num_kv_heads * shape.head_dim);
    check(value, shape.num_kv_heads * shape.head_dim);
    ops_.push_back([=, this] {
        const Matrix queries = at(query), keys = at(key), values = at(value);
        const GroupInputs& inputs = inputs_.groups[group];
        runtime_.rotate_and_store(shape, {inputs_.num_rows, inputs.slot_mapping, inputs.cos, inputs.sin, inputs.half},
                                  {queries.data, queries.ld, keys.data, keys.ld, values.data, values.ld}, cache.keys,
                                  cache.values);
    });
}

void Program::attend(int group, View query, CachePair cache, float scale, float softcap, View out) {
    check_group(group);
    AttentionShape shape = groups_[group];
    shape.scale = scale;
    shape.softcap = softcap;
    check(query, shape.num_heads * shape.head_dim);
    check_whole(out, shape.num_heads * shape.head_dim);
    ops_.push_back([=, this] {
        const Matrix queries = at(query);
        const auto requests = plans_[group].requests(queries.data, queries.ld, at(out).data);
        runtime_.attend(shape, requests, plans_[group].schedule(), cache.keys, cache.values);
    });
}

void Program::check_adapters() const {
    for (const auto& group : inputs_.adapters) {
        for (int64_t i = 0; i < group.num_rows; ++i) {
            if (group.rows[i] < 0 || group.rows[i] >= inputs_.num_rows) throw std::out_of_range("a row does not exist");
        }
        for (const auto& site : sites_) {
            const LoraSite* here = group.adapter->site(site.index);
            if (here != nullptr && !here->fits(site.num_inputs, site.num_outputs)) {
                throw std::invalid_argument("an adapter does not fit the model");
            }
        }
    }
}

// Tables and token ids are checked by AttentionPlan and embed.
void Program::check_inputs() const {
    for (size_t group = 0; group < inputs_.groups.size(); ++group) {
        const GroupInputs& inputs = inputs_.groups[group];
        if (inputs.half < 0 || 2 * inputs.half > groups_[group].head_dim) {
            throw std::invalid_argument("more dimensions are rotated than there are");
        }
        for (int token = 0; token < inputs_.num_rows; ++token) {
            const int64_t slot = inputs.slot_mapping[token];
            if (slot < 0 || slot >= num_blocks_ * groups_[group].block_size) {
                throw std::out_of_range("a slot does not exist");
            }
        }
    }
    check_adapters();
    if (inputs_.rows != nullptr) {
        for (int row = 0; row < inputs_.num_rows; ++row) {
            if (inputs_.rows[row] < 0 || inputs_.rows[row] >= inputs_.num_hidden) {
                throw std::out_of_range("a row does not exist");
            }
        }
    }
}

void Program::run(const ProgramInputs& inputs, float* result) {
    inputs_ = inputs;
    check_inputs();
    plans_.clear();
    for (size_t group = 0; group < inputs.groups.size(); ++group) {
        plans_.emplace_back(groups_[group], inputs.query_start_loc, inputs.seq_lens, inputs.num_requests,
                            inputs.groups[group].block_tables, inputs.groups[group].num_columns,
                            runtime_.chunk_threads(groups_[group]));
        plans_.back().check(inputs.num_rows, num_blocks_);
    }
    // Slots but the result lie one after another, each from a cache line on.
    std::vector<size_t> offsets(widths_.size());
    size_t num_bytes = 0;
    for (size_t slot = 1; slot < widths_.size(); ++slot) {
        offsets[slot] = num_bytes;
        num_bytes += (sizeof(float) * inputs.num_rows * widths_[slot] + 63) / 64 * 64;
    }
    auto* memory = static_cast<uint8_t*>(buffer_.reserve(num_bytes));
    memory_.assign(1, result);
    for (size_t slot = 1; slot < widths_.size(); ++slot) {
        memory_.push_back(reinterpret_cast<float*>(memory + offsets[slot]));
    }
    if (times_s_.size() != ops_.size()) {
        for (const auto& op : ops_) op();
        return;
    }
    for (size_t i = 0; i < ops_.size(); ++i) {
        const auto start = std::chrono::steady_clock::now();
        ops_[i]();
        times_s_[i] += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
}

}  // namespace pelton
