// Memory for the packed matrices of a model: first the process's own, later the pages of a file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace pelton {

class WeightMemory {
public:
    // Zeros, in huge pages where the system has them: a stream of weights reads a third faster from these.
    explicit WeightMemory(size_t num_bytes);
    // The first `num_bytes` of an open file, read-only, shared with every process that maps them.
    WeightMemory(int file, size_t num_bytes);
    ~WeightMemory();
    WeightMemory(const WeightMemory&) = delete;
    WeightMemory& operator=(const WeightMemory&) = delete;

    uint8_t* data() const { return data_; }
    size_t num_bytes() const { return num_bytes_; }

    // Puts the file's first `num_bytes` in place of the same bytes of memory, for readers to go on with, and
    // frees what lies behind them. Throws `std::system_error`; then nothing has changed.
    void replace_with(int file, size_t num_bytes);

    // Reads all of it from disk now, rather than page by page when it is first used.
    void prefetch() const;

private:
    uint8_t* data_;
    size_t num_bytes_;
};

// `num_bytes` at `offset` of `memory`, which lives as long. Throws `std::out_of_range`.
std::shared_ptr<uint8_t> part_of(const std::shared_ptr<WeightMemory>& memory, size_t offset, size_t num_bytes);

}  // namespace pelton
