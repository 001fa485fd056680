// A single row goes without tiles. Its result does not show it, being the same to the bit; the tile registers do, as
// products by tiles leave nothing of what a thread had set up in them.

#include <cstring>
#include <string>
#include <vector>

#include "checks.h"
#include "tile_registers.h"

namespace pelton {

namespace {

// Whether `run`, which must work in this thread alone, sets up the tile registers.
template <typename Run>
bool uses_tiles(const Run& run) {
    amx::TileConfig before, after;
    before.set(0, 3, 64);
    before.load();
    run();
    asm volatile("sttilecfg %0" : "=m"(after));
    amx::release_tiles();
    return std::memcmp(&before, &after, sizeof(before)) != 0;
}

}  // namespace

void check_one_row(const KernelTable& kernels) {
    constexpr int kSize = 256, kOutputs = 70;
    Runtime runtime(kernels, 1, {});
    for (int index = 0; index < kNumFormats; ++index) {
        const Format format = static_cast<Format>(index);
        if (traits_of(format).is_dense()) continue;
        LinearWeight weight(kSize), gate_up(kSize), down(kSize);
        add_random_part(weight, format, kOutputs, runtime.pool());
        for (int side = 0; side < 2; ++side) add_random_part(gate_up, format, kSize, runtime.pool());
        add_random_part(down, format, kOutputs, runtime.pool());
        const GatedWeights gated = {&gate_up, nullptr, &down, nullptr, false};
        // Two rows show that the registers would tell.
        for (int num_rows : {1, 2}) {
            const auto x = random_floats(num_rows * kSize);
            Exact<float> out(num_rows * kOutputs);
            std::vector<int64_t> greatest(num_rows);
            const bool in_tiles[] = {
                uses_tiles([&] { runtime.linear(weight, x.data(), num_rows, nullptr, out.data()); }),
                uses_tiles([&] { runtime.greatest_columns(weight, x.data(), num_rows, nullptr, greatest.data()); }),
                uses_tiles([&] { runtime.gated_mlp(gated, x.data(), num_rows, out.data()); })};
            for (bool is_used : in_tiles) {
                if (is_used != (num_rows > 1)) fail("one row in tiles, or two without, format " + std::to_string(index));
            }
        }
    }
}

}  // namespace pelton
