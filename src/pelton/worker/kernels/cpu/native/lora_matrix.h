// How the matrices of a LoRA adapter lie in memory. `cpu/adapter.py` packs them.
#pragma once

#include <cstdint>

namespace pelton {

constexpr int kLoraAlign = 16;  // inputs are padded to a multiple, with zeros
constexpr int kLoraPanel = 64;  // outputs that lie together, padded likewise
constexpr int kLoraRows = 4;    // rows that a kernel takes at a time, at most

constexpr int64_t lora_stride(int num_inputs) { return (num_inputs + kLoraAlign - 1) / kLoraAlign * kLoraAlign; }

// Float32, or bfloat16 in 16 bits. To shrink: [ranks][lora_stride(inputs)]. To expand: [panels][ranks][kLoraPanel].
struct LoraMatrix {
    const void* data = nullptr;
    bool bf16 = false;
};

// Columns of a product that share a matrix: query, key and value are three such parts.
struct LoraPart {
    int first_rank;  // among the site's
    int num_ranks;
    int column;
    int num_outputs;
    float scale;
    LoraMatrix expand;
};

struct LoraRange {
    int first;
    int last;
};

}  // namespace pelton
