"""Shapes of attention's tiles, chosen for an H100. docs/gpu-attention.md says why."""

from __future__ import annotations

from dataclasses import dataclass

from pelton.worker.kernels.ops import AttentionShape

# Bytes of a pipeline's stages that leave room for the queries in 227 KiB, or for a second program beside the first.
_STAGE_BYTES = 96 << 10


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """A row is one query head of one token. Results depend on `chunk_positions` and `tile_positions`; on a GPU they
    may depend on rows and warps as well, by the matrix instruction that those lead to; on nothing else."""

    chunk_positions: int = 256  # what is summed by itself, from multiples of this on; a multiple of the next
    tile_positions: int = 64  # keys and values that a product takes in
    narrow_rows: int = 64  # of tiles for requests with few new tokens
    wide_rows: int = 128
    wide_from: int = 4  # narrow tiles of a request: with more, it gets wide ones, which are never split
    # Long contexts are split until there are about so many programs: four for each of 132 multiprocessors.
    num_programs: int = 512
    # Bounds partial results: 64 MiB for 32 heads of 128.
    max_slots: int = 4096
    share_prefixes: bool = True

    def num_warps(self, num_rows: int, head_dim: int) -> int:
        """Four hold 64 rows, one matrix instruction's; twice that where a row of results is long."""
        return 8 if num_rows >= 128 or (num_rows == 64 and head_dim > 128) else 4

    def num_stages(self, head_dim: int, element_bytes: int) -> int:
        stage_bytes = 2 * self.tile_positions * padded_head_dim(head_dim) * element_bytes
        return min(4, max(2 if element_bytes <= 2 else 1, _STAGE_BYTES // stage_bytes))


def padded_head_dim(head_dim: int) -> int:
    """Products and index ranges want a power of two, 16 at least."""
    return max(16, 1 << (head_dim - 1).bit_length())


def choose_config(shape: AttentionShape, *, batch_invariant: bool = True) -> AttentionConfig:
    """With `batch_invariant`, decodes go through the same matrix instructions as prefills (64 rows each), so that a
    row's bits do not depend on which of them computes it; without, tiles of decodes are as small as the rows allow.
    """
    group = shape.num_heads // shape.num_kv_heads
    least_rows = 1 << (group - 1).bit_length()
    narrow_rows = max(64 if batch_invariant else 16, least_rows)
    # Two accumulators of 128 x 256 would not fit the registers.
    wide_rows = max(128 if shape.head_dim <= 128 else 64, narrow_rows)
    return AttentionConfig(narrow_rows=narrow_rows, wide_rows=wide_rows)
