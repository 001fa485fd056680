#include "weight_memory.h"

#include <sys/mman.h>

#include <cerrno>
#include <stdexcept>
#include <system_error>

namespace pelton {

namespace {

constexpr size_t kHugePage = size_t{2} << 20;

uint8_t* map(void* at, size_t num_bytes, int protection, int flags, int file) {
    void* memory = mmap(at, num_bytes, protection, flags, file, 0);
    if (memory == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
    return static_cast<uint8_t*>(memory);
}

// Only a hint: systems without huge pages go on without.
void prefer_huge_pages([[maybe_unused]] uint8_t* data, [[maybe_unused]] size_t num_bytes) {
#ifdef MADV_HUGEPAGE
    madvise(data, num_bytes, MADV_HUGEPAGE);
#endif
}

}  // namespace

WeightMemory::WeightMemory(size_t num_bytes) : num_bytes_(num_bytes) {
    // The kernel puts a map of this size where a huge page may start only if its length is whole ones.
    num_bytes_ = (num_bytes + kHugePage - 1) / kHugePage * kHugePage;
    data_ = map(nullptr, num_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
    prefer_huge_pages(data_, num_bytes_);
}

WeightMemory::WeightMemory(int file, size_t num_bytes) : num_bytes_(num_bytes) {
    data_ = map(nullptr, num_bytes, PROT_READ, MAP_SHARED, file);
    prefer_huge_pages(data_, num_bytes);
}

WeightMemory::~WeightMemory() { munmap(data_, num_bytes_); }

void WeightMemory::replace_with(int file, size_t num_bytes) {
    constexpr size_t kPage = 4096;
    const size_t kept = (num_bytes + kPage - 1) / kPage * kPage;
    if (num_bytes == 0 || kept > num_bytes_) throw std::out_of_range("the file is larger than the memory");
    map(data_, num_bytes, PROT_READ, MAP_SHARED | MAP_FIXED, file);
    prefer_huge_pages(data_, num_bytes);
    if (kept < num_bytes_ && munmap(data_ + kept, num_bytes_ - kept) == 0) num_bytes_ = kept;
}

void WeightMemory::prefetch() const {
#ifdef MADV_POPULATE_READ
    if (madvise(data_, num_bytes_, MADV_POPULATE_READ) == 0) return;
#endif
    madvise(data_, num_bytes_, MADV_WILLNEED);
}

std::shared_ptr<uint8_t> part_of(const std::shared_ptr<WeightMemory>& memory, size_t offset, size_t num_bytes) {
    if (offset % 64 != 0 || offset > memory->num_bytes() || num_bytes > memory->num_bytes() - offset) {
        throw std::out_of_range("the matrix lies outside its memory");
    }
    return {memory, memory->data() + offset};
}

}  // namespace pelton
