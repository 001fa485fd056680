#include "channel_products.h"

#include <algorithm>

#include "denormals.h"

namespace pelton {

namespace {

constexpr int kPairHeight = 2 * ByteRows::kHeight;
constexpr int kChunkBytes = 1280 * 1024;  // rows in 8 bits that stay in the second-level cache, beside a panel

int chunk_rows(int num_inputs) { return std::max(1, kChunkBytes / num_inputs / kPairHeight) * kPairHeight; }

// Places of all buffers for rows in 8 bits.
struct ByteLayout {
    size_t value_bytes;
    size_t word_bytes;
    size_t outlier_bytes;

    // Blocks are read in pairs; what lies past the last row is never part of a result.
    ByteLayout(int num_rows, int num_inputs) {
        const ByteRows rows = {num_rows, num_inputs, nullptr, nullptr, nullptr, nullptr, nullptr};
        const int64_t num_blocks = (num_rows + ByteRows::kHeight - 1) / ByteRows::kHeight + 1;
        value_bytes = num_blocks * rows.block_bytes();
        // One more for the second row of a pair.
        word_bytes = aligned((num_rows + 1) * sizeof(float));
        outlier_bytes = aligned(static_cast<size_t>(num_rows) * most_outliers(num_inputs) * sizeof(Outlier));
    }
    size_t num_bytes() const { return value_bytes + 3 * word_bytes + outlier_bytes; }
};

size_t hidden_bytes(int num_rows, int size) { return static_cast<size_t>(num_rows + 1) * size * sizeof(uint16_t); }

}  // namespace

void ChannelProducts::linear(const LinearWeight& weight, const float* x, int num_rows, const float* bias, float* out) {
    const RowPieces pieces(num_rows, pool_.num_threads());
    if (pieces.count() == 1) return linear(pool_, shared_, weight, x, num_rows, bias, out);
    reserve_own({&weight}, pieces.most_rows());
    pool_.run(pieces.count(), [&](int piece, int thread) {
        const int64_t first = pieces.first(piece);
        AloneWorker worker{thread};
        linear(worker, own_[thread], weight, x + first * weight.num_inputs, pieces.num_rows(piece), bias,
               out + first * weight.num_outputs);
    });
}

template <typename Workers>
void ChannelProducts::linear(Workers& workers, Workspace& space, const LinearWeight& weight, const float* x, int num_rows,
                             const float* bias, float* out) {
    multiply(workers, space, weight, quantize(workers, space, x, num_rows, weight.num_inputs, true), bias, out);
}

void ChannelProducts::greatest_columns(const LinearWeight& weight, const float* x, int num_rows, const float* bias,
                                       int64_t* columns) {
    const ByteRows rows = quantize(pool_, shared_, x, num_rows, weight.num_inputs, true);
    const size_t scratch_bytes = aligned(channel_scratch_bytes(rows.num_rows));
    auto* scratch = static_cast<uint8_t*>(shared_.scratch.reserve(scratch_bytes * pool_.num_threads()));
    const auto multiply = [&](const PackedMatrix& part, PanelRange panels, const LinearResult& result, int thread) {
        kernels_.channel_panels(part, panels, rows, result, scratch + thread * scratch_bytes);
    };
    greatest_.find(kernels_, pool_, weight, num_rows, bias, columns, multiply);
}

bool ChannelProducts::can_fuse(const GatedWeights& weights) const {
    const auto& sides = weights.gate_up->parts;
    return kernels_.gated_channel_panels != nullptr && sides.size() == 2 && sides[0].format == sides[1].format &&
           weights.gate_up->is_by_channel() && weights.down->is_by_channel();
}

void ChannelProducts::gated_mlp(const GatedWeights& weights, const float* x, int num_rows, float* out) {
    const RowPieces pieces(num_rows, pool_.num_threads());
    if (pieces.count() == 1) return gated_mlp(pool_, shared_, weights, x, num_rows, out);
    reserve_own({weights.gate_up, weights.down}, pieces.most_rows());
    for (auto& space : own_) space.hidden.reserve(hidden_bytes(pieces.most_rows(), weights.down->num_inputs));
    pool_.run(pieces.count(), [&](int piece, int thread) {
        const int64_t first = pieces.first(piece);
        AloneWorker worker{thread};
        gated_mlp(worker, own_[thread], weights, x + first * weights.gate_up->num_inputs, pieces.num_rows(piece),
                  out + first * weights.down->num_outputs);
    });
}

// All that products of pieces of `num_rows` need: tasks of a pool must not throw.
void ChannelProducts::reserve_own(std::initializer_list<const LinearWeight*> weights, int num_rows) {
    for (auto& space : own_) {
        for (const auto* weight : weights) space.rows.reserve(ByteLayout(num_rows, weight->num_inputs).num_bytes());
        space.scratch.reserve(aligned(channel_scratch_bytes(num_rows)));
    }
}

template <typename Workers>
void ChannelProducts::gated_mlp(Workers& workers, Workspace& space, const GatedWeights& weights, const float* x,
                                int num_rows, float* out) {
    const ByteRows rows = quantize(workers, space, x, num_rows, weights.gate_up->num_inputs, false);
    const PairedRows hidden = multiply_gated(workers, space, weights, rows);
    multiply(workers, space, *weights.down, quantize(workers, space, hidden), weights.down_bias, out);
}

template <typename Workers>
PairedRows ChannelProducts::multiply_gated(Workers& workers, Workspace& space, const GatedWeights& weights,
                                           const ByteRows& x) {
    const int size = weights.down->num_inputs;
    const auto& sides = weights.gate_up->parts;
    const float* bias = weights.gate_up_bias;
    const GatedPanels gated = {{&sides[0], &sides[1]}, {bias, bias == nullptr ? nullptr : bias + size}, weights.gelu};
    const PairedRows hidden = {x.num_rows, size, static_cast<uint16_t*>(space.hidden.reserve(hidden_bytes(x.num_rows, size)))};
    const int at_once = chunk_rows(x.num_inputs);
    const size_t scratch_bytes = aligned(channel_scratch_bytes(std::min(x.num_rows, at_once)));
    auto* scratch = static_cast<uint8_t*>(space.scratch.reserve(scratch_bytes * workers.num_threads()));
    for (int row = 0; row < x.num_rows; row += at_once) {
        const ByteRows rows = x.from(row, at_once);
        const PairedRows to = hidden.from(row, at_once);
        run_panels(workers, std::span(sides).first(1), [&](const PackedMatrix&, PanelRange panels, int, int thread) {
            const FlushDenormals flush;
            const int own = workers.num_threads() == 1 ? 0 : thread;
            kernels_.gated_channel_panels(gated, panels, rows, to, scratch + own * scratch_bytes);
        });
    }
    return hidden;
}

template <typename Workers>
void ChannelProducts::multiply(Workers& workers, Workspace& space, const LinearWeight& weight, const ByteRows& x,
                               const float* bias, float* out) {
    const int at_once = chunk_rows(x.num_inputs);
    const size_t scratch_bytes = aligned(channel_scratch_bytes(std::min(x.num_rows, at_once)));
    auto* scratch = static_cast<uint8_t*>(space.scratch.reserve(scratch_bytes * workers.num_threads()));
    for (int row = 0; row < x.num_rows; row += at_once) {
        const ByteRows rows = x.from(row, at_once);
        run_panels(workers, weight.parts, [&](const PackedMatrix& part, PanelRange panels, int column, int thread) {
            const LinearResult result = {bias != nullptr ? bias + column : nullptr, out + column, weight.num_outputs};
            const int own = workers.num_threads() == 1 ? 0 : thread;
            kernels_.channel_panels(part, panels, rows, result, scratch + own * scratch_bytes);
        });
    }
}

template <typename Workers>
ByteRows ChannelProducts::quantize(Workers& workers, Workspace& space, const float* x, int num_rows, int num_inputs,
                                   bool with_outliers) {
    ByteRows rows = make_rows(space, num_rows, num_inputs);
    if (!with_outliers) rows.outliers = nullptr;
    workers.run_rows(num_rows, num_inputs, [&](int row, int) {
        kernels_.quantize_channel_row(x + static_cast<int64_t>(row) * num_inputs, rows, row);
    });
    return rows;
}

template <typename Workers>
ByteRows ChannelProducts::quantize(Workers& workers, Workspace& space, const PairedRows& x) {
    const ByteRows rows = make_rows(space, x.num_rows, x.num_inputs);
    workers.run_rows(x.num_rows, x.num_inputs, [&](int row, int) { kernels_.quantize_paired_row(x.at(row, 0), rows, row); });
    return rows;
}

// In memory that the next call reuses.
ByteRows ChannelProducts::make_rows(Workspace& space, int num_rows, int num_inputs) {
    const ByteLayout layout(num_rows, num_inputs);
    auto* memory = static_cast<uint8_t*>(space.rows.reserve(layout.num_bytes()));
    const auto words = [&](int index) { return memory + layout.value_bytes + index * layout.word_bytes; };
    return {num_rows,
            num_inputs,
            reinterpret_cast<int8_t*>(memory),
            reinterpret_cast<float*>(words(0)),
            reinterpret_cast<int32_t*>(words(1)),
            reinterpret_cast<int32_t*>(words(2)),
            reinterpret_cast<Outlier*>(words(3))};
}

}  // namespace pelton
