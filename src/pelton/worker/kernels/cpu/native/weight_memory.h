// Memory for the packed matrices of a model: the process's own, or at first the pages of a file. And when memory is taken.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace pelton {

class WeightMemory {
public:
    // Zeros, in huge pages where the system has them: a stream of weights reads a third faster from these.
    explicit WeightMemory(size_t num_bytes);
    // The first `num_bytes` of an open file, read-only.
    WeightMemory(int file, size_t num_bytes);
    ~WeightMemory();
    WeightMemory(const WeightMemory&) = delete;
    WeightMemory& operator=(const WeightMemory&) = delete;

    uint8_t* data() const { return data_; }
    size_t num_bytes() const { return num_bytes_; }

    // Of the file, what no memory of the process's own has taken the place of yet.
    size_t num_mapped_bytes() const { return num_mapped_bytes_.load(std::memory_order_relaxed); }

    // Puts memory of the first kind in place of the file's, for readers to go on with: the page cache has small pages
    // among its huge ones, and splits those up or gives them away while nobody reads. Call it once. Throws
    // `std::system_error` where there is no more memory; what is mapped then stays so.
    void copy_file();

private:
    uint8_t* data_;
    size_t num_bytes_;
    std::atomic<size_t> num_mapped_bytes_{0};
};

// `num_bytes` at `offset` of `memory`, which lives as long. Throws `std::out_of_range`.
std::shared_ptr<uint8_t> part_of(const std::shared_ptr<WeightMemory>& memory, size_t offset, size_t num_bytes);

// Takes the pages of [data, data + num_bytes) now, in the calling thread, rather than as they are first written; what they
// hold stays. Nothing where the system cannot.
void take_pages(uint8_t* data, size_t num_bytes);

}  // namespace pelton
