// LoRA adapters (Hu et al., arXiv:2106.09685): additions of low rank to products, for the rows that ask for them.
//
// y += scale * B (A x). Every row and output is summed up in one order, whatever the other rows and their adapters.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "runtime.h"

namespace pelton {

// Where an adapter changes a product. The matrices' bytes are their owner's.
struct LoraSite {
    int num_inputs = 0;
    int num_ranks = 0;  // of all parts
    LoraMatrix shrink;
    std::vector<LoraPart> parts;

    // Whether it fits a product of these widths.
    bool fits(int inputs, int num_outputs) const;
};

class LoraAdapter {
public:
    explicit LoraAdapter(int num_sites) : sites_(num_sites) {}

    // Throws std::out_of_range for a site that does not exist.
    void set_site(int index, LoraSite site) { sites_.at(index) = std::move(site); }
    // Null where it changes nothing.
    const LoraSite* site(int index) const {
        return index >= 0 && index < static_cast<int>(sites_.size()) && sites_[index].num_ranks ? &sites_[index] : nullptr;
    }

private:
    std::vector<LoraSite> sites_;
};

// Rows of a run that one adapter changes; no row belongs to two.
struct LoraRows {
    const LoraAdapter* adapter;
    const int64_t* rows;
    int64_t num_rows;
};

// Adds what adapters add to products, with memory of its own.
class LoraProducts {
public:
    // out [., ld_out] += the adapters' part at `site` for x [., ld_x].
    void add(Runtime& runtime, std::span<const LoraRows> groups, int site, const float* x, int64_t ld_x, float* out,
             int64_t ld_out);

private:
    // A few rows of one adapter.
    struct Tile {
        const LoraSite* site;
        const int64_t* rows;
        int num_rows;
        size_t shrunk;  // where their sums begin
    };
    struct Task {
        int tile;
        const LoraPart* part;  // null: shrink
        LoraRange range;       // of ranks, or panels
    };

    Buffer memory_;
    std::vector<Tile> tiles_;
    std::vector<Task> tasks_;
};

bool any_changes(std::span<const LoraRows> groups, int site);

}  // namespace pelton
