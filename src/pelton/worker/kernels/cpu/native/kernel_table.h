// What an instruction set implements. One source file each; one of them is chosen at run time.
//
// Every function works on one row, panel or head and reads nothing but its arguments, in an order that
// depends on nothing else: that is law 3. Legend as in ops.py.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention.h"
#include "column_kernels.h"
#include "lora_matrix.h"
#include "packed_matrix.h"
#include "tiles.h"

namespace pelton {

struct KernelTable {
    const char* name;

    // Float activations [I] to 8 bits: values [I], scales [I / 32], sums [I / 32, 2] of each half group.
    void (*quantize_row)(const float* x, int num_inputs, int8_t* values, float* scales, int32_t* sums);

    // Columns of panel `panel` of out [S, ld_out] = rows times panel, plus bias [O] where given.
    // `scratch`: linear_scratch_bytes(num_inputs), aligned to 64.
    void (*linear_panel)(const PackedMatrix& matrix, int panel, const QuantizedRows& rows, const float* bias,
                         float* out, int64_t ld_out, uint8_t* scratch);

    // As linear_panel, but of float activations, and weights of any format: float32 products, one multiply-add
    // per input, in order. `scratch`: dense_scratch_bytes(num_inputs), aligned to 64.
    void (*dense_panel)(const PackedMatrix& matrix, int panel, const FloatRows& rows, const float* bias, float* out,
                        int64_t ld_out, uint8_t* scratch);

    // out [H] = rms_norm(x + residual) * weight; residual becomes x + residual. residual may be null.
    void (*rms_norm_row)(const float* x, float* residual, const float* weight, int size, float eps, float* out);

    // gate_up [2F] -> out [F].
    void (*silu_mul_row)(const float* gate_up, int size, float* out);
    void (*gelu_tanh_mul_row)(const float* gate_up, int size, float* out);

    // Rotate one head [D] in place by halves; cos and sin [half].
    void (*rotate_head)(float* head, const float* cos, const float* sin, int half);

    // One head [D] into a cache of kv_type.
    void (*store_kv)(const float* from, int size, KVType kv_type, void* to);

    // Tokens [first_token, + num_tokens) of a request, all query heads of `kv_head`.
    // `scratch`: attention_scratch_floats(shape), aligned to 64.
    void (*attend_head)(const AttentionShape& shape, const AttentionRequest& request, const void* keys,
                        const void* values, int kv_head, int first_token, int num_tokens, float* scratch);

    // x [size] becomes cap * tanh(x / cap).
    void (*softcap_row)(float* x, int64_t size, float cap);

    // Passes over a row of logits: see sampling_rows.h.
    float (*block_maxima)(const float* x, int64_t size, float* maxima);
    void (*block_weights)(const float* x, int64_t size, float greatest, float inverse_temperature, int64_t* weights);
    int64_t (*num_above)(const float* x, int64_t size, int64_t index);
    void (*mask_row)(float* x, int64_t size, const uint32_t* words);

    // Ranks `ranks` of A x, for num_rows <= kLoraRows rows x [I] into out [ranks].
    void (*lora_shrink)(const LoraMatrix& matrix, int num_inputs, LoraRange ranks, const float* const* x, int num_rows,
                        float* const* out);

    // Panels of out [O] += scale * B shrunk [ranks], for as many rows.
    void (*lora_expand)(const LoraPart& part, LoraRange panels, const float* const* shrunk, int num_rows,
                        float* const* out);

    // Float activations [I] become a row in 8 bits, all that belongs to it.
    void (*quantize_channel_row)(const float* x, const ByteRows& rows, int row);

    // result = rows times the `panels` of a matrix by channel: sums of integers are exact, so their order is free.
    // `scratch`: channel_scratch_bytes(num_rows), aligned to 64.
    void (*channel_panels)(const PackedMatrix& matrix, PanelRange panels, const ByteRows& rows, const LinearResult& result,
                           uint8_t* scratch);

    // A row of weights [I] to blocks of INT8_CHANNEL or INT4_CHANNEL (rounding_rows.h).
    void (*round_channel_row)(const float* values, int num_inputs, int bits, uint8_t* blocks);

    // hidden = act(gate) * up of the `panels` of both sides, within 3e-4 before it is rounded. `scratch`:
    // channel_scratch_bytes, aligned to 64. The rows have no outliers. Null, with the one below: gated layers are not fused.
    void (*gated_channel_panels)(const GatedPanels& gated, PanelRange panels, const ByteRows& rows,
                                 const PairedRows& hidden, uint8_t* scratch) = nullptr;

    // As quantize_channel_row, of a row of pairs from PairedRows::at on.
    void (*quantize_paired_row)(const uint16_t* from, const ByteRows& rows, int row) = nullptr;

    // Null: attend_head only.
    const ColumnKernels* columns = nullptr;

    // Null: no tiles, activations in 8 bits.
    const TileKernels* tiles = nullptr;
};

// Weights as bytes [groups][8 k4][2 halves][64 lanes], then scales and minima [groups][...][32] float32.
inline size_t linear_scratch_bytes(int num_inputs) {
    return static_cast<size_t>(num_inputs / kGroup) * (1024 + 4 * kPanel * 4);
}

// Chunks of weights that stay in the first-level cache while all rows pass by.
constexpr int kStripChunks = 16;

// Sums of all rows in 32 bits, and two strips of weights made of fewer than 8.
inline size_t channel_scratch_bytes(int num_rows) {
    const int height = 2 * ByteRows::kHeight;
    return static_cast<size_t>(std::max((num_rows + height - 1) / height, 2)) * height * kPanel * 4 +
           2 * static_cast<size_t>(kStripChunks) * kChunk * kPanel;
}

// A panel of quantized weights as float32 [inputs][32].
inline size_t dense_scratch_bytes(int num_inputs) { return static_cast<size_t>(num_inputs) * kPanel * 4; }

const KernelTable& portable_kernels();
#if defined(__x86_64__)
const KernelTable& avx2_kernels();       // AVX2, FMA, F16C
const KernelTable& avx2_vnni_kernels();  // and AVX-VNNI
const KernelTable& avx512_kernels();     // AVX-512 F, BW, VL, DQ, VNNI, BF16
const KernelTable& amx_kernels();        // the same and AMX tiles of bfloat16
#elif defined(__aarch64__)
const KernelTable& neon_dotprod_kernels();  // Armv8.2-A with dot products
#endif

// The fastest table that this processor runs, or the one named. Null where that does not run here.
const KernelTable* find_kernels(const char* name);

}  // namespace pelton
