#include "channel_rounding.h"

#include <algorithm>
#include <vector>

namespace pelton {

void round_channels(PackedMatrix& matrix, const BlockRows& source, const KernelTable& kernels, ThreadPool& pool) {
    const int bits = traits_of(matrix.format).bits;
    const size_t row_bytes = matrix.file_row_bytes();
    // A panel at a time, so that blocks go from cache to cache and no matrix is in memory twice.
    std::vector<std::vector<uint8_t>> blocks(pool.num_threads(), std::vector<uint8_t>(kPanel * row_bytes));
    std::vector<std::vector<float>> values(pool.num_threads(), std::vector<float>(matrix.num_inputs));
    pool.run(matrix.num_panels(), [&](int panel, int thread) {
        const int first_row = panel * kPanel, num_rows = std::min(kPanel, matrix.num_outputs - first_row);
        for (int row = 0; row < num_rows; ++row) {
            source.decode(first_row + row, values[thread].data());
            kernels.round_channel_row(values[thread].data(), matrix.num_inputs, bits,
                                      blocks[thread].data() + row * row_bytes);
        }
        repack_panel(matrix, panel, blocks[thread].data());
    });
}

}  // namespace pelton
