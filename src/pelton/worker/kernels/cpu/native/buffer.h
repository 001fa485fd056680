// Memory that an operation leaves to the next.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include "packed_matrix.h"

namespace pelton {

constexpr size_t kAlign = 64;

constexpr size_t aligned(size_t num_bytes) { return (num_bytes + kAlign - 1) / kAlign * kAlign; }

// Memory that grows and is kept; contents are not preserved.
class Buffer {
public:
    // Throws std::bad_alloc.
    void* reserve(size_t num_bytes) {
        if (num_bytes > num_bytes_) {
            data_.reset();
            num_bytes_ = 0;
            auto* data = static_cast<uint8_t*>(std::aligned_alloc(kAlign, aligned(num_bytes)));
            if (data == nullptr) throw std::bad_alloc();
            data_.reset(data);
            num_bytes_ = num_bytes;
        }
        return data_.get();
    }

private:
    std::unique_ptr<uint8_t, FreeAligned> data_;
    size_t num_bytes_ = 0;
};

}  // namespace pelton
