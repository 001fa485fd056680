// Weights rounded by channel, against the same formula one number at a time, bit for bit: this says that it holds on a
// processor that is emulated, too.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "channel_rounding.h"
#include "checks.h"
#include "runtime.h"

namespace pelton {

namespace {

struct Line {
    float step, base;
    float q[kGroup];
    float error;
};

Line fit(const float* codes, float step) {
    Line line = {step, 0, {}, 0};
    const float low = *std::min_element(codes, codes + kGroup), high = *std::max_element(codes, codes + kGroup);
    line.base = std::min(std::max(std::nearbyint((low + high - 15 * step) / 2), 0.0f), 255 - 15 * step);
    float eight[8] = {};
    for (int k = 0; k < kGroup; ++k) {
        line.q[k] = std::min(std::max(std::nearbyint((codes[k] - line.base) / step), 0.0f), 15.0f);
        const float off = line.q[k] * step + line.base - codes[k];
        eight[k % 8] += off * off;
    }
    line.error = ((eight[0] + eight[1]) + (eight[2] + eight[3])) + ((eight[4] + eight[5]) + (eight[6] + eight[7]));
    return line;
}

Line nearest_line(const float* codes) {
    const float low = *std::min_element(codes, codes + kGroup), high = *std::max_element(codes, codes + kGroup);
    const float widest = std::ceil((high - low) / 15);
    Line best = fit(codes, std::max(widest, 1.0f));
    for (int narrower = 1; narrower < 3; ++narrower) {
        const Line line = fit(codes, std::max(widest - narrower, 1.0f));
        if (line.error < best.error) best = line;
    }
    return best;
}

// Blocks as weights/ writes them.
std::vector<uint8_t> plain_blocks(const float* values, int num_rows, int num_inputs, Format format) {
    const FormatTraits traits = traits_of(format);
    std::vector<uint8_t> blocks(static_cast<size_t>(num_rows) * num_inputs / kGroup * traits.file_block_bytes);
    uint8_t* block = blocks.data();
    for (int row = 0; row < num_rows; ++row, values += num_inputs) {
        float greatest = 0;
        bool is_finite = true;
        for (int i = 0; i < num_inputs; ++i) {
            greatest = std::max(greatest, std::fabs(values[i]));
            is_finite = is_finite && std::isfinite(values[i]);
        }
        const float scale = is_finite ? greatest / 127 : std::nanf(""), inverse = 1 / scale;
        for (int group = 0; group < num_inputs / kGroup; ++group, block += traits.file_block_bytes) {
            float codes[kGroup];
            for (int k = 0; k < kGroup; ++k) codes[k] = std::isfinite(inverse) ? values[group * kGroup + k] * inverse : 0;
            std::memcpy(block, &scale, 4);
            if (traits.bits == 8) {
                for (int k = 0; k < kGroup; ++k) block[4 + k] = static_cast<int8_t>(std::nearbyint(codes[k]));
                continue;
            }
            for (float& code : codes) code += 128;
            const Line line = nearest_line(codes);
            block[4] = static_cast<uint8_t>(line.step);
            block[5] = static_cast<uint8_t>(line.base);
            for (int k = 0; k < 16; ++k) {
                block[6 + k] = static_cast<uint8_t>(line.q[k]) | static_cast<uint8_t>(line.q[k + 16]) << 4;
            }
        }
    }
    return blocks;
}

}  // namespace

void check_rounding(const std::vector<Runtime*>& runtimes) {
    for (int num_inputs : {32, 64, 480, 544}) {
        for (int num_rows : {1, 31, 75}) {
            auto values = random_floats(static_cast<size_t>(num_rows) * num_inputs);
            for (int row = 0; row < num_rows; ++row) {
                float* own = values.data() + static_cast<size_t>(row) * num_inputs;
                for (int i = 0; i < num_inputs; ++i) {
                    if (row % 5 == 1) own[i] = own[i] * own[i] * own[i];
                    if (row % 5 == 2) own[i] = std::nearbyint(own[i]);
                    if (row % 9 == 3) own[i] *= 1e-38f;
                    if (row % 9 == 4) own[i] *= 1e-41f;
                }
                if (row % 9 == 5) own[row % num_inputs] = INFINITY;
                if (row % 9 == 6) own[row % num_inputs] = NAN;
                if (row % 9 == 7) std::fill(own, own + num_inputs, 0.0f);
            }
            for (Format format : {Format::INT8_CHANNEL, Format::INT4_CHANNEL}) {
                const auto blocks = plain_blocks(values.data(), num_rows, num_inputs, format);
                PackedMatrix expected = make_packed_matrix(format, num_rows, num_inputs);
                repack(expected, blocks.data(), runtimes.front()->pool());
                const BlockRows source("F32", reinterpret_cast<const uint8_t*>(values.data()), 4 * values.size(), num_rows,
                                       num_inputs);
                for (Runtime* runtime : runtimes) {
                    PackedMatrix matrix = make_packed_matrix(format, num_rows, num_inputs);
                    round_channels(matrix, source, runtime->kernels(), runtime->pool());
                    if (std::memcmp(matrix.data.get(), expected.data.get(), matrix.num_bytes()) != 0) {
                        fail("weights are rounded otherwise, bits " + std::to_string(traits_of(format).bits));
                    }
                }
            }
        }
    }
}

}  // namespace pelton
