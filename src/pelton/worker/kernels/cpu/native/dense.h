// Matrices that have no packed format, as float32: panels of 32 outputs, [panels][I][32].
#pragma once

#include <cstdint>
#include <memory>

#include "packed_matrix.h"

namespace pelton {

struct KernelTable;
class ThreadPool;

struct DenseWeight {
    // Zeros. Throws std::invalid_argument for a matrix without inputs or outputs, std::bad_alloc.
    DenseWeight(int num_inputs, int num_outputs);

    // Rows [first_output, first_output + num_rows) from `values` [num_rows, I].
    void set_rows(int first_output, int num_rows, const float* values);

    int num_panels() const { return (num_outputs + kPanel - 1) / kPanel; }
    int64_t panel_values() const { return static_cast<int64_t>(num_inputs) * kPanel; }

    int num_inputs;
    int num_outputs;
    std::unique_ptr<uint8_t, FreeAligned> memory;
    float* data;
};

// out [S, O] = x [S, I] times weight, plus bias [O] where given.
void linear_dense(const DenseWeight& weight, const float* x, int num_rows, const float* bias, float* out,
                  const KernelTable& kernels, ThreadPool& pool);

}  // namespace pelton
