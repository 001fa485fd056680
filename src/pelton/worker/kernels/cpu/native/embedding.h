// Rows of an embedding table, decoded from the file's own bytes exactly as weights/dequantize.py does.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace pelton {

class ThreadPool;

struct EmbeddingTable {
    // Throws std::invalid_argument for an unknown format, or for bytes that are not num_rows rows of `width`.
    EmbeddingTable(const std::string& format, const uint8_t* data, size_t num_bytes, int64_t num_rows, int width,
                   float scale);

    const uint8_t* data;
    int64_t num_rows;
    int width;
    float scale;

    // Values of one block; blocks of a row lie one after another.
    void (*decode_block)(const uint8_t* block, float* out);
    int block_values;
    int block_bytes;
};

// out [T, width] = rows token_ids [T], times the scale. Throws std::out_of_range for a row that is not there.
void embed(const EmbeddingTable& table, const int64_t* token_ids, int num_tokens, float* out, ThreadPool& pool);

}  // namespace pelton
