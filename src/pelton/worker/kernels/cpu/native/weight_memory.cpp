#include "weight_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <stdexcept>
#include <system_error>

namespace pelton {

namespace {

constexpr size_t kHugePage = size_t{2} << 20;

constexpr size_t kPieceBytes = 4 * kHugePage;

// Only a hint: systems without huge pages go on without.
void prefer_huge_pages([[maybe_unused]] uint8_t* data, [[maybe_unused]] size_t num_bytes) {
#ifdef MADV_HUGEPAGE
    madvise(data, num_bytes, MADV_HUGEPAGE);
#endif
}

// 0, or the error that kept `num_bytes` at `offset` of the file from `data`.
int try_read(int file, uint8_t* data, size_t num_bytes, size_t offset) {
    while (num_bytes > 0) {
        const ssize_t count = pread(file, data, num_bytes, static_cast<off_t>(offset));
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return count < 0 ? errno : EIO;
        data += count;
        offset += static_cast<size_t>(count);
        num_bytes -= static_cast<size_t>(count);
    }
    return 0;
}

}  // namespace

WeightMemory::WeightMemory(size_t num_bytes) {
    // The kernel puts a map of this size where a huge page may start only if its length is whole ones.
    num_bytes_ = (num_bytes + kHugePage - 1) / kHugePage * kHugePage;
    void* memory = mmap(nullptr, num_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
    data_ = static_cast<uint8_t*>(memory);
    prefer_huge_pages(data_, num_bytes_);
}

WeightMemory::~WeightMemory() { munmap(data_, num_bytes_); }

void WeightMemory::read(int file, size_t num_bytes, ThreadPool& pool) {
    if (num_bytes > num_bytes_) throw std::out_of_range("the file is larger than the memory");
    std::atomic<int> error{0};
    pool.run(static_cast<int>((num_bytes + kPieceBytes - 1) / kPieceBytes), [&](int piece, int) {
        const size_t offset = piece * kPieceBytes;
        const int failed = try_read(file, data_ + offset, std::min(kPieceBytes, num_bytes - offset), offset);
        if (failed != 0) error.store(failed);
    });
    if (error != 0) throw std::system_error(error, std::generic_category(), "read");
}

std::shared_ptr<uint8_t> part_of(const std::shared_ptr<WeightMemory>& memory, size_t offset, size_t num_bytes) {
    if (offset % 64 != 0 || offset > memory->num_bytes() || num_bytes > memory->num_bytes() - offset) {
        throw std::out_of_range("the matrix lies outside its memory");
    }
    return {memory, memory->data() + offset};
}

}  // namespace pelton
