// What this machine gives at most, measured by loops that do nothing else: the yardstick of `pelton bench kernels`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace pelton {

// The name says what is counted: bytes per second for "dram", "l3" and "l2", else operations per second (a
// multiplication and an addition are two).
struct Ceiling {
    const char* name;
    double one_thread;
    double all_threads;
};

// Memory to allocate and read for "dram": four times the last cache, at least 256 MiB, at most 1 GiB.
size_t dram_buffer_bytes();

// The best of several short runs, on one thread and on `num_threads`, each thread reading memory of its own.
// Takes about 4 s. What this processor or this build lacks is left out.
std::vector<Ceiling> measure_ceilings(int num_threads, size_t dram_bytes);

// Bytes of a core's second-level cache (a guess where the system does not say), and of the last one (then 0).
size_t l2_cache_bytes();
size_t l3_cache_bytes();

// Arithmetic on registers alone. `run` returns the operations that it did, in well under a millisecond.
struct PeakLoop {
    const char* name;
    double (*run)();
};

// Reads all of `data`, a multiple of 1024 bytes; the result keeps the compiler from leaving it out.
using ReadLoop = uint64_t (*)(const uint8_t* data, size_t num_bytes);

// Of this processor; no loops and a null pointer on another architecture.
std::vector<PeakLoop> x86_peak_loops();
ReadLoop x86_read_loop();

}  // namespace pelton
