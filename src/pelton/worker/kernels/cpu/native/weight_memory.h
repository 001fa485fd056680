// Memory of the process's own for the packed matrices of a model.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "thread_pool.h"

namespace pelton {

class WeightMemory {
public:
    // Zeros, in huge pages where the system has them: a stream of weights reads a third faster from these. A map of a
    // file would do with less at the start, but the page cache may give it small pages, and split up large ones later.
    explicit WeightMemory(size_t num_bytes);
    ~WeightMemory();
    WeightMemory(const WeightMemory&) = delete;
    WeightMemory& operator=(const WeightMemory&) = delete;

    uint8_t* data() const { return data_; }
    size_t num_bytes() const { return num_bytes_; }

    // Fills it with the first `num_bytes` of an open file. Throws `std::system_error` where they cannot be read, or the
    // file ends before.
    void read(int file, size_t num_bytes, ThreadPool& pool);

private:
    uint8_t* data_;
    size_t num_bytes_;
};

// `num_bytes` at `offset` of `memory`, which lives as long. Throws `std::out_of_range`.
std::shared_ptr<uint8_t> part_of(const std::shared_ptr<WeightMemory>& memory, size_t offset, size_t num_bytes);

}  // namespace pelton
