#include "runtime.h"

#include <algorithm>
#include <new>

namespace pelton {

namespace {

constexpr size_t kAlign = 64;
// Quantized activations that one pass over a panel reads again and again: they should stay in L2.
constexpr int kChunkBytes = 512 * 1024;

constexpr size_t aligned(size_t num_bytes) { return (num_bytes + kAlign - 1) / kAlign * kAlign; }

}  // namespace

void* Buffer::reserve(size_t num_bytes) {
    if (num_bytes > num_bytes_) {
        data_.reset();
        num_bytes_ = 0;
        auto* data = static_cast<uint8_t*>(std::aligned_alloc(kAlign, aligned(num_bytes)));
        if (data == nullptr) throw std::bad_alloc();
        data_.reset(data);
        num_bytes_ = num_bytes;
    }
    return data_.get();
}

size_t LinearWeight::num_bytes() const {
    size_t total = 0;
    for (const auto& part : parts) total += part.num_bytes();
    return total;
}

bool Runtime::takes_floats(const PackedMatrix& part) const {
    return activation_ == ActivationType::F32 || traits_of(part.format).is_dense();
}

QuantizedRows Runtime::quantize(const float* x, int num_rows, int num_inputs) {
    const int num_groups = num_inputs / kGroup;
    const size_t value_bytes = aligned(static_cast<size_t>(num_rows) * num_inputs);
    const size_t scale_bytes = aligned(static_cast<size_t>(num_rows) * num_groups * sizeof(float));
    auto* memory = static_cast<uint8_t*>(quantized_.reserve(value_bytes + 3 * scale_bytes + kAlign));
    auto* values = reinterpret_cast<int8_t*>(memory);
    auto* scales = reinterpret_cast<float*>(memory + value_bytes);
    auto* sums = reinterpret_cast<int32_t*>(memory + value_bytes + scale_bytes);
    pool_.run(num_rows, [&](int row, int) {
        const size_t group = static_cast<size_t>(row) * num_groups;
        kernels_.quantize_row(x + static_cast<size_t>(row) * num_inputs, num_inputs,
                              values + static_cast<size_t>(row) * num_inputs, scales + group, sums + 2 * group);
    });
    return {num_rows, num_inputs, values, scales, sums};
}

void Runtime::linear(const LinearWeight& weight, const float* x, int num_rows, const float* bias, float* out) {
    const int num_inputs = weight.num_inputs;
    int num_panels = 0;
    bool any_floats = false, any_quantized = false;
    for (const auto& part : weight.parts) {
        num_panels += part.num_panels();
        (takes_floats(part) ? any_floats : any_quantized) = true;
    }
    const QuantizedRows quantized = any_quantized ? quantize(x, num_rows, num_inputs) : QuantizedRows{};
    const int padded_inputs = (num_inputs + kGroup - 1) / kGroup * kGroup;
    const size_t scratch_bytes = aligned(
        std::max(linear_scratch_bytes(padded_inputs), any_floats ? dense_scratch_bytes(padded_inputs) : 0));
    auto* scratch = static_cast<uint8_t*>(scratch_.reserve(scratch_bytes * pool_.num_threads()));
    const int chunk_rows = std::max(48, kChunkBytes / (any_floats ? 4 * num_inputs : num_inputs));
    const int num_chunks = (num_rows + chunk_rows - 1) / chunk_rows;
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
            const float* offsets = bias != nullptr ? bias + column : nullptr;
            float* to = out + static_cast<int64_t>(first) * weight.num_outputs + column;
            uint8_t* memory = scratch + thread * scratch_bytes;
            const size_t value = static_cast<size_t>(first) * num_inputs;
            if (takes_floats(part)) {
                kernels_.dense_panel(part, panel, {last - first, num_inputs, x + value}, offsets, to,
                                     weight.num_outputs, memory);
            } else {
                const size_t group = value / kGroup;
                kernels_.linear_panel(part, panel,
                                      {last - first, num_inputs, quantized.values + value, quantized.scales + group,
                                       quantized.sums + 2 * group},
                                      offsets, to, weight.num_outputs, memory);
            }
            return;
        }
    });
}

void Runtime::rms_norm(const float* x, float* residual, const float* weight, int num_rows, int size, float eps,
                       float* out) {
    pool_.run(num_rows, [&](int row, int) {
        const int64_t at = static_cast<int64_t>(row) * size;
        kernels_.rms_norm_row(x + at, residual != nullptr ? residual + at : nullptr, weight, size, eps, out + at);
    });
}

void Runtime::gated(bool gelu, const float* gate_up, int num_rows, int size, float* out) {
    const auto row_kernel = gelu ? kernels_.gelu_tanh_mul_row : kernels_.silu_mul_row;
    pool_.run(num_rows, [&](int row, int) {
        row_kernel(gate_up + 2 * static_cast<int64_t>(row) * size, size, out + static_cast<int64_t>(row) * size);
    });
}

void Runtime::rotate_and_store(const AttentionShape& shape, const Tokens& tokens, const HeadRows& rows,
                               void* key_cache, void* value_cache) {
    const int dim = shape.head_dim;
    const int64_t element_bytes = shape.kv_type == KVType::F32 ? 4 : 2;
    pool_.run(tokens.num_tokens, [&](int token, int) {
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
            const int64_t at = (tokens.slots[token] * shape.num_kv_heads + head) * dim * element_bytes;
            kernels_.store_kv(key, dim, shape.kv_type, static_cast<uint8_t*>(key_cache) + at);
            kernels_.store_kv(value, dim, shape.kv_type, static_cast<uint8_t*>(value_cache) + at);
        }
    });
}

void Runtime::attend(const AttentionShape& shape, std::span<const AttentionRequest> requests, const void* key_cache,
                     const void* value_cache) {
    struct Task {
        int request;
        int kv_head;
        int first_token;
    };
    std::vector<Task> tasks;
    for (int index = 0; index < static_cast<int>(requests.size()); ++index) {
        for (int token = 0; token < requests[index].num_tokens; token += kTileTokens) {
            for (int head = 0; head < shape.num_kv_heads; ++head) tasks.push_back({index, head, token});
        }
    }
    // Longest first: what is left over at the end is short.
    std::stable_sort(tasks.begin(), tasks.end(), [&](const Task& a, const Task& b) {
        const auto cost = [&](const Task& task) {
            const AttentionRequest& request = requests[task.request];
            const int64_t num_tokens = std::min(kTileTokens, request.num_tokens - task.first_token);
            return num_tokens * (request.seq_len - request.num_tokens + task.first_token + num_tokens);
        };
        return cost(a) > cost(b);
    });
    const size_t scratch_bytes = aligned(attention_scratch_floats(shape) * sizeof(float));
    auto* scratch = static_cast<uint8_t*>(scratch_.reserve(scratch_bytes * pool_.num_threads()));
    pool_.run(static_cast<int>(tasks.size()), [&](int index, int thread) {
        const Task& task = tasks[index];
        const AttentionRequest& request = requests[task.request];
        kernels_.attend_head(shape, request, key_cache, value_cache, task.kv_head, task.first_token,
                             std::min(kTileTokens, request.num_tokens - task.first_token),
                             reinterpret_cast<float*>(scratch + thread * scratch_bytes));
    });
}

void Runtime::argmax(const float* logits, int num_rows, int64_t size, int64_t* out) {
    pool_.run(num_rows, [&](int row, int) { out[row] = kernels_.argmax_row(logits + row * size, size); });
}

}  // namespace pelton
