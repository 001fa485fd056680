// `Runtime`: kernels chosen for this processor, threads, and the scratch memory of one engine.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "kernel_table.h"
#include "thread_pool.h"

namespace pelton {

// Memory that grows and is kept; contents are not preserved.
class Buffer {
public:
    void* reserve(size_t num_bytes);

private:
    std::unique_ptr<uint8_t, FreeAligned> data_;
    size_t num_bytes_ = 0;
};

// Matrices over the same inputs, side by side in the output. They may differ in format.
struct LinearWeight {
    explicit LinearWeight(int inputs) : num_inputs(inputs) {}
    LinearWeight(const LinearWeight&) = delete;
    LinearWeight& operator=(const LinearWeight&) = delete;

    std::vector<PackedMatrix> parts;
    int num_inputs;
    int num_outputs = 0;

    size_t num_bytes() const;
};

// What activations are rounded to as they enter a product.
enum class ActivationType {
    Auto,  // the fastest: 8 bits with quantized weights, float32 with dense ones
    INT8,
    BF16,
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
        : kernels_(kernels), activation_(activation), pool_(num_threads, cpus) {}

    const KernelTable& kernels() const { return kernels_; }
    ThreadPool& pool() { return pool_; }

    // out [S, O] = x [S, I] times weight, plus bias [O] where given.
    void linear(const LinearWeight& weight, const float* x, int num_rows, const float* bias, float* out);

    // out [S, H] of x [S, H]; residual [S, H] (may be null) becomes x + residual.
    void rms_norm(const float* x, float* residual, const float* weight, int num_rows, int size, float eps, float* out);

    // [S, 2F] -> [S, F].
    void gated(bool gelu, const float* gate_up, int num_rows, int size, float* out);

    // Rotates queries and keys in place; stores keys and values at their slots.
    void rotate_and_store(const AttentionShape& shape, const Tokens& tokens, const HeadRows& rows, void* key_cache,
                          void* value_cache);

    void attend(const AttentionShape& shape, std::span<const AttentionRequest> requests, const void* key_cache,
                const void* value_cache);

    void argmax(const float* logits, int num_rows, int64_t size, int64_t* out);

private:
    bool takes_floats(const PackedMatrix& part) const;
    // Rows in 8 bits, in memory that the next call reuses.
    QuantizedRows quantize(const float* x, int num_rows, int num_inputs);

    const KernelTable& kernels_;
    ActivationType activation_;
    ThreadPool pool_;
    Buffer quantized_;
    Buffer scratch_;
};

}  // namespace pelton
