// Weights rounded by channel as they are loaded: the formula of weights/channel_quantization.py, to the same bits.
#pragma once

#include "block_rows.h"
#include "kernel_table.h"
#include "packed_matrix.h"
#include "thread_pool.h"

namespace pelton {

// `source` rounded to the format of `matrix`, one by channel, and repacked. Writes every byte of `matrix`.
void round_channels(PackedMatrix& matrix, const BlockRows& source, const KernelTable& kernels, ThreadPool& pool);

}  // namespace pelton
