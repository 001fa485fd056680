#include "ceilings.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <thread>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pelton {

namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

constexpr int kNumRuns = 5;
constexpr Seconds kRunTime{0.015};
constexpr Seconds kMemoryRunTime{0.05};
constexpr size_t kReadBytes = 256 * 1024;  // between two looks at the clock
constexpr size_t kHugePage = 2 << 20;

// Integers of 8 bits as the compiler vectorizes them for the oldest processor that this build runs on.
double run_plain_int8() {
    static int8_t a[4096], b[4096];
    constexpr int kRepeats = 64;
    int32_t total = 0;
    for (int repeat = 0; repeat < kRepeats; ++repeat) {
        asm volatile("" : : "r"(a), "r"(b) : "memory");
        int32_t sum = 0;
        for (int i = 0; i < 4096; ++i) sum += static_cast<int32_t>(a[i]) * b[i];
        total += sum;
    }
    asm volatile("" : : "r"(total));
    return 2.0 * 4096 * kRepeats;
}

double run_plain_fp32() {
    float sums[64] = {}, factors[64];
    for (float& factor : factors) factor = 0.5f;
    constexpr int kRepeats = 4096;
    for (int repeat = 0; repeat < kRepeats; ++repeat) {
        for (int i = 0; i < 64; ++i) sums[i] = sums[i] * factors[i] + factors[i];
    }
    asm volatile("" : : "r"(sums) : "memory");
    return 2.0 * 64 * kRepeats;
}

uint64_t read_plain(const uint8_t* data, size_t num_bytes) {
    uint64_t sums[8] = {};
    for (size_t i = 0; i < num_bytes; i += sizeof(sums)) {
        uint64_t words[8];
        std::memcpy(words, data + i, sizeof(words));
        for (int j = 0; j < 8; ++j) sums[j] += words[j];
    }
    uint64_t sum = 0;
    for (uint64_t part : sums) sum += part;
    return sum;
}

// Units per second of `num_threads` threads that start together; `work(thread)` returns the units it did.
template <typename Work>
double best_rate(int num_threads, Seconds run_time, const Work& work) {
    double best = 0;
    for (int run = 0; run < kNumRuns; ++run) {
        std::atomic<int> num_waiting{num_threads};
        std::vector<double> rates(num_threads);
        const auto measure = [&](int thread) {
            num_waiting.fetch_sub(1);
            while (num_waiting.load() > 0) std::this_thread::yield();
            double units = 0;
            const auto start = Clock::now();
            Seconds elapsed{0};
            do {
                units += work(thread);
                elapsed = Clock::now() - start;
            } while (elapsed < run_time);
            rates[thread] = units / elapsed.count();
        };
        std::vector<std::thread> threads;
        for (int thread = 1; thread < num_threads; ++thread) threads.emplace_back(measure, thread);
        measure(0);
        for (auto& thread : threads) thread.join();
        double total = 0;
        for (double rate : rates) total += rate;
        best = std::max(best, total);
    }
    return best;
}

struct Free {
    void operator()(uint8_t* data) const { std::free(data); }
};

// Memory whose pages are there, by huge pages where the system has them.
class ReadBuffer {
public:
    explicit ReadBuffer(size_t num_bytes) : num_bytes_(std::max(num_bytes / kHugePage, size_t{1}) * kHugePage) {
        data_.reset(static_cast<uint8_t*>(std::aligned_alloc(kHugePage, num_bytes_)));
        if (data_ == nullptr) throw std::bad_alloc();
#if defined(__linux__)
        madvise(data_.get(), num_bytes_, MADV_HUGEPAGE);
#endif
        std::memset(data_.get(), 1, num_bytes_);
    }

    // Every thread goes round and round in `bytes_per_thread` of its own, or in an equal share of the whole.
    Ceiling measure(const char* name, ReadLoop read, int num_threads, size_t bytes_per_thread) const {
        return {name, rate(read, 1, bytes_per_thread), rate(read, num_threads, bytes_per_thread)};
    }

private:
    struct alignas(64) Position {
        size_t offset = 0;
    };

    double rate(ReadLoop read, int num_threads, size_t bytes_per_thread) const {
        bytes_per_thread = std::min(bytes_per_thread, num_bytes_ / num_threads);
        const size_t step = std::min(bytes_per_thread, kReadBytes) / 1024 * 1024;
        const size_t num_steps = bytes_per_thread / step;
        std::vector<Position> positions(num_threads);
        return best_rate(num_threads, kMemoryRunTime, [&](int thread) {
            size_t& offset = positions[thread].offset;
            const uint64_t sum = read(data_.get() + (thread * num_steps + offset) * step, step);
            asm volatile("" : : "r"(sum));
            offset = (offset + 1) % num_steps;
            return static_cast<double>(step);
        });
    }

    size_t num_bytes_;
    std::unique_ptr<uint8_t, Free> data_;
};

[[maybe_unused]] size_t system_says(int name) {
    const long value = sysconf(name);
    return value > 0 ? static_cast<size_t>(value) : 0;
}

}  // namespace

size_t l2_cache_bytes() {
    size_t num_bytes = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    num_bytes = system_says(_SC_LEVEL2_CACHE_SIZE);
#endif
    return num_bytes > 0 ? num_bytes : 512 * 1024;
}

size_t l3_cache_bytes() {
#if defined(_SC_LEVEL3_CACHE_SIZE)
    return system_says(_SC_LEVEL3_CACHE_SIZE);
#else
    return 0;
#endif
}

size_t dram_buffer_bytes() {
    return std::clamp(4 * l3_cache_bytes(), size_t{256} << 20, size_t{1} << 30);
}

std::vector<Ceiling> measure_ceilings(int num_threads, size_t dram_bytes) {
    std::vector<Ceiling> ceilings;
    const ReadLoop fast_read = x86_read_loop();
    const ReadLoop read = fast_read != nullptr ? fast_read : read_plain;
    {
        const ReadBuffer buffer(dram_bytes);
        ceilings.push_back(buffer.measure("dram", read, num_threads, dram_bytes));
        const size_t l2 = l2_cache_bytes();
        const size_t l3_share = std::min(4 * l2, l3_cache_bytes() / (2 * num_threads));
        if (l3_share >= 2 * l2) ceilings.push_back(buffer.measure("l3", read, num_threads, l3_share));
        ceilings.push_back(buffer.measure("l2", read, num_threads, l2 / 2));
    }
    std::vector<PeakLoop> loops = x86_peak_loops();
    loops.push_back({"fp32_plain", run_plain_fp32});
    loops.push_back({"int8_plain", run_plain_int8});
    for (const PeakLoop& loop : loops) {
        const auto work = [&](int) { return loop.run(); };
        ceilings.push_back({loop.name, best_rate(1, kRunTime, work), best_rate(num_threads, kRunTime, work)});
    }
    return ceilings;
}

}  // namespace pelton
