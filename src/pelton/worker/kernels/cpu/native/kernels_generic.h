// Every kernel of a table, written once in vectors of the target's width. Included by one source file per
// instruction set, which defines PELTON_ISA (a namespace) first.
#pragma once

#include "attention_generic.h"
#include "channel_generic.h"
#include "dense_tiles.h"
#include "kernel_table.h"
#include "linear_tiles.h"
#include "lora_rows.h"
#include "rounding_rows.h"
#include "rows_generic.h"
#include "sampling_rows.h"

namespace pelton::PELTON_ISA {

inline KernelTable make_table(const char* name) {
    return {name,         quantize_row,      linear_panel,  dense_panel, rms_norm_row,
            silu_mul_row, gelu_tanh_mul_row, rotate_head,   store_kv,    attend_head,
            softcap_row,  block_maxima,      block_weights, num_above,   mask_row,
            lora_shrink,  lora_expand,
            quantize_channel_row, channel_panels, round_channel_row};
}

}  // namespace pelton::PELTON_ISA
