#include "dense.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#include "kernel_table.h"
#include "thread_pool.h"

namespace pelton {

namespace {

// Rows that one pass over a panel reads: with few inputs they stay in L2.
constexpr int kChunkRows = 64;

}  // namespace

DenseWeight::DenseWeight(int inputs, int outputs) : num_inputs(inputs), num_outputs(outputs) {
    if (inputs <= 0 || outputs <= 0) throw std::invalid_argument("the matrix has no inputs or no outputs");
    const size_t num_bytes = sizeof(float) * num_panels() * panel_values();
    memory.reset(static_cast<uint8_t*>(std::aligned_alloc(64, num_bytes)));
    if (memory == nullptr) throw std::bad_alloc();
    std::memset(memory.get(), 0, num_bytes);
    data = reinterpret_cast<float*>(memory.get());
}

void DenseWeight::set_rows(int first_output, int num_rows, const float* values) {
    if (first_output < 0 || num_rows < 0 || num_rows > num_outputs - first_output) {
        throw std::out_of_range("the matrix has fewer rows");
    }
    for (int row = 0; row < num_rows; ++row) {
        const int output = first_output + row;
        float* to = data + output / kPanel * panel_values() + output % kPanel;
        for (int i = 0; i < num_inputs; ++i) to[static_cast<int64_t>(i) * kPanel] = values[i];
        values += num_inputs;
    }
}

void linear_dense(const DenseWeight& weight, const float* x, int num_rows, const float* bias, float* out,
                  const KernelTable& kernels, ThreadPool& pool) {
    const int num_panels = weight.num_panels(), num_chunks = (num_rows + kChunkRows - 1) / kChunkRows;
    pool.run(num_panels * num_chunks, [&](int task, int) {
        const int panel = task % num_panels, first = task / num_panels * kChunkRows, column = panel * kPanel;
        kernels.dense_panel(weight.data + panel * weight.panel_values(), weight.num_inputs,
                            x + static_cast<int64_t>(first) * weight.num_inputs, std::min(kChunkRows, num_rows - first),
                            bias != nullptr ? bias + column : nullptr, std::min(kPanel, weight.num_outputs - column),
                            out + static_cast<int64_t>(first) * weight.num_outputs + column, weight.num_outputs);
    });
}

}  // namespace pelton
