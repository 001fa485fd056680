// Rows of a matrix in the file's own bytes, decoded to float32 exactly as weights/dequantize.py does.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace pelton {

// The formats that are known here, by name.
std::vector<std::string> block_row_formats();

struct BlockRows {
    // Throws std::invalid_argument for an unknown format, or for bytes that are not num_rows rows of `width`.
    BlockRows(const std::string& format, const uint8_t* data, size_t num_bytes, int64_t num_rows, int width);

    // out [width].
    void decode(int64_t row, float* out) const { decode_(data_ + row * row_bytes_, num_blocks_, out); }

    int64_t num_rows;
    int width;

private:
    const uint8_t* data_;
    int64_t row_bytes_;
    int num_blocks_;
    void (*decode_)(const uint8_t* blocks, int num_blocks, float* out);
};

}  // namespace pelton
