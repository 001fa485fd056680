// Rows of an embedding table.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "block_rows.h"

namespace pelton {

class ThreadPool;

struct EmbeddingTable : BlockRows {
    // Throws what `BlockRows` does.
    EmbeddingTable(const std::string& format, const uint8_t* data, size_t num_bytes, int64_t num_rows, int width,
                   float factor)
        : BlockRows(format, data, num_bytes, num_rows, width), scale(factor) {}

    float scale;
};

// out [T, width] = rows token_ids [T], times the scale. Throws std::out_of_range for a row that is not there.
void embed(const EmbeddingTable& table, const int64_t* token_ids, int num_tokens, float* out, ThreadPool& pool);

}  // namespace pelton
