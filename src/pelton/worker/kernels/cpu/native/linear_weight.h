// Weights of linear layers and of gated feed-forward layers, as operations take them.
#pragma once

#include <vector>

#include "packed_matrix.h"

namespace pelton {

// Matrices over the same inputs, side by side in the output. They may differ in format.
struct LinearWeight {
    explicit LinearWeight(int inputs) : num_inputs(inputs) {}
    LinearWeight(const LinearWeight&) = delete;
    LinearWeight& operator=(const LinearWeight&) = delete;

    std::vector<PackedMatrix> parts;
    int num_inputs;
    int num_outputs = 0;

    size_t num_bytes() const;
    // All parts have formats by channel or none has.
    bool is_by_channel() const { return !parts.empty() && traits_of(parts.front().format).by_channel; }
};

// Of a gated feed-forward layer; biases may be null.
struct GatedWeights {
    const LinearWeight* gate_up;
    const float* gate_up_bias;
    const LinearWeight* down;
    const float* down_bias;
    bool gelu;
};

}  // namespace pelton
