#include "weight_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>

namespace pelton {

namespace {

constexpr size_t kHugePage = size_t{2} << 20;

constexpr size_t kPieceBytes = 4 * kHugePage;

uint8_t* map(size_t num_bytes, int protection, int flags, int file) {
    void* memory = mmap(nullptr, num_bytes, protection, flags, file, 0);
    if (memory == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
    return static_cast<uint8_t*>(memory);
}

// The kernel puts a map where a huge page may start only if its length is whole ones.
size_t whole_pages(size_t num_bytes) { return (num_bytes + kHugePage - 1) / kHugePage * kHugePage; }

uint8_t* map_own(size_t num_bytes) {
    uint8_t* data = map(num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
#ifdef MADV_HUGEPAGE
    madvise(data, num_bytes, MADV_HUGEPAGE);  // only a hint: systems without huge pages go on without
#endif
    return data;
}

}  // namespace

WeightMemory::WeightMemory(size_t num_bytes) : data_(map_own(whole_pages(num_bytes))), num_bytes_(whole_pages(num_bytes)) {}

WeightMemory::WeightMemory(int file, size_t num_bytes)
    : data_(map(num_bytes, PROT_READ, MAP_SHARED, file)), num_bytes_(num_bytes), num_mapped_bytes_(num_bytes) {}

WeightMemory::~WeightMemory() { munmap(data_, num_bytes_); }

void WeightMemory::copy_file() {
#if defined(__linux__)
    const size_t num_bytes = num_mapped_bytes();
    if (num_bytes == 0) return;
    uint8_t* own = map_own(whole_pages(num_bytes));
    for (size_t offset = 0; offset < num_bytes; offset += kPieceBytes) {
        const size_t size = std::min(kPieceBytes, num_bytes - offset);
        std::memcpy(own + offset, data_ + offset, size);
        // In one go: a reader sees the file's bytes or these, which are the same.
        if (mremap(own + offset, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, data_ + offset) == MAP_FAILED) {
            const int error = errno;
            munmap(own + offset, whole_pages(num_bytes) - offset);
            throw std::system_error(error, std::generic_category(), "mremap");
        }
        num_mapped_bytes_.store(num_bytes - offset - size, std::memory_order_relaxed);
    }
#endif
}

std::shared_ptr<uint8_t> part_of(const std::shared_ptr<WeightMemory>& memory, size_t offset, size_t num_bytes) {
    if (offset % 64 != 0 || offset > memory->num_bytes() || num_bytes > memory->num_bytes() - offset) {
        throw std::out_of_range("the matrix lies outside its memory");
    }
    return {memory, memory->data() + offset};
}

void take_pages([[maybe_unused]] uint8_t* data, [[maybe_unused]] size_t num_bytes) {
#ifdef MADV_POPULATE_WRITE
    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t start = reinterpret_cast<uintptr_t>(data) / page * page;
    const uintptr_t end = reinterpret_cast<uintptr_t>(data) + num_bytes;
    madvise(reinterpret_cast<void*>(start), end - start, MADV_POPULATE_WRITE);  // a refusal costs speed only
#endif
}

}  // namespace pelton
