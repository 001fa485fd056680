// Operations whose weights have formats by channel: activations are rounded to 8 bits with one scale per row.
#pragma once

#include <initializer_list>
#include <vector>

#include "buffer.h"
#include "greatest_columns.h"
#include "kernel_table.h"
#include "linear_weight.h"
#include "workers.h"

namespace pelton {

// One operation at a time: not thread-safe.
class ChannelProducts {
public:
    ChannelProducts(const KernelTable& kernels, ThreadPool& pool)
        : kernels_(kernels), pool_(pool), own_(pool.num_threads()) {}

    // As Runtime::linear.
    void linear(const LinearWeight& weight, const float* x, int num_rows, const float* bias, float* out);

    // As Runtime::greatest_columns.
    void greatest_columns(const LinearWeight& weight, const float* x, int num_rows, const float* bias, int64_t* columns);

    // Whether `gated_mlp` takes this layer.
    bool can_fuse(const GatedWeights& weights) const;

    // As Runtime::gated_mlp; what lies between the products is rounded to bfloat16.
    void gated_mlp(const GatedWeights& weights, const float* x, int num_rows, float* out);

private:
    // Memory of the workers that do an operation together.
    struct Workspace {
        Buffer rows, hidden, scratch;
    };

    template <typename Workers>
    void linear(Workers& workers, Workspace& space, const LinearWeight& weight, const float* x, int num_rows,
                const float* bias, float* out);
    template <typename Workers>
    void gated_mlp(Workers& workers, Workspace& space, const GatedWeights& weights, const float* x, int num_rows, float* out);
    template <typename Workers>
    PairedRows multiply_gated(Workers& workers, Workspace& space, const GatedWeights& weights, const ByteRows& x);
    template <typename Workers>
    void multiply(Workers& workers, Workspace& space, const LinearWeight& weight, const ByteRows& x, const float* bias,
                  float* out);
    template <typename Workers>
    ByteRows quantize(Workers& workers, Workspace& space, const float* x, int num_rows, int num_inputs, bool with_outliers);
    template <typename Workers>
    ByteRows quantize(Workers& workers, Workspace& space, const PairedRows& x);
    static ByteRows make_rows(Workspace& space, int num_rows, int num_inputs);
    void reserve_own(std::initializer_list<const LinearWeight*> weights, int num_rows);

    const KernelTable& kernels_;
    ThreadPool& pool_;
    Workspace shared_;
    std::vector<Workspace> own_;  // of each thread
    GreatestColumns greatest_;
};

}  // namespace pelton
