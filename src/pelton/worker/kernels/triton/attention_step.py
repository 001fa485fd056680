"""A plan that is made on the device, for steps that are captured: of bounds alone, whatever lengths come later.

Where the host knows the lengths, `attention_plan.py` plans better: here every request is cut into as many pieces as the
bounds say, and blocks in common are read once for each that has them. The bits are the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pelton.worker.kernels.ops import AttentionShape
from pelton.worker.kernels.triton import attention_plan
from pelton.worker.kernels.triton.attention import AttentionPlan
from pelton.worker.kernels.triton.attention_config import AttentionConfig, choose_config
from pelton.worker.kernels.triton.attention_plan import PlanSizes
from pelton.worker.kernels.triton.interpreter import mend_interpreter
from pelton.worker.kernels.triton.step_facts import StepFacts

mend_interpreter()
_RESULT = tl.constexpr(attention_plan.RESULT)
_FOLD = tl.constexpr(attention_plan.FOLD)
_EACH = tl.constexpr(attention_plan.EACH)
_ITEM_WORDS = tl.constexpr(attention_plan.ITEM_WORDS)
_MERGE_WORDS = tl.constexpr(attention_plan.MERGE_WORDS)


def plan_step(
    shape: AttentionShape, facts: StepFacts, block_tables: torch.Tensor, config: AttentionConfig | None = None
) -> AttentionPlan:
    """block_tables int32 [R, B]. May be captured, with what uses the plan."""
    config = config or choose_config(shape)
    num_requests, width = block_tables.shape
    group = shape.num_heads // shape.num_kv_heads
    is_narrow = facts.max_query_len <= config.narrow_rows // group
    tile_tokens = (config.narrow_rows if is_narrow else config.wide_rows) // group
    num_tiles = -(-facts.max_query_len // tile_tokens)
    most_chunks = -(-facts.max_seq_len // config.chunk_positions)
    num_pieces = min(most_chunks, -(-config.num_programs // max(1, num_requests * num_tiles * shape.num_kv_heads)))
    # A token's slots lie `most_chunks` apart. Where those of all would be too many, nothing is cut.
    if num_pieces > 1 and facts.num_tokens * most_chunks > config.max_slots:
        num_pieces = 1
    num_items = num_requests * num_tiles * num_pieces
    sizes = PlanSizes(
        num_items if is_narrow else 0,
        0 if is_narrow else num_items,
        facts.num_tokens if num_pieces > 1 else 0,
        facts.num_tokens,
        facts.num_tokens,
    )
    words = torch.empty(sizes.starts()[-1], dtype=torch.int32, device=block_tables.device)
    narrow, wide, merges, tokens, positions, slots, _ = sizes.views(words)
    if num_items:
        _plan_kernel[(num_requests,)](
            narrow if is_narrow else wide,
            merges,
            tokens,
            positions,
            slots,
            facts.query_start_loc,
            facts.seq_lens,
            width,
            most_chunks,
            TILE_TOKENS=tile_tokens,
            NUM_TILES=num_tiles,
            PIECES=num_pieces,
            CHUNK=config.chunk_positions,
            WINDOW=shape.sliding_window or 0,
            BLOCK=triton.next_power_of_2(max(num_tiles * num_pieces, min(1024, facts.max_query_len))),
        )
    num_slots = facts.num_tokens * most_chunks if num_pieces > 1 else 0
    tables = block_tables.reshape(-1)
    return AttentionPlan(shape, config, sizes, num_slots, 0, narrow, wide, merges, tokens, positions, slots, tables)


@triton.jit
def _plan_kernel(
    items,
    merges,
    tile_tokens,
    positions,
    slots,
    query_start_loc,
    seq_lens,
    table_width,
    most_chunks,
    TILE_TOKENS: tl.constexpr,
    NUM_TILES: tl.constexpr,
    PIECES: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: requests. A token's slots begin at its number times `most_chunks`, from its first chunk on."""
    request = tl.program_id(0)
    start = tl.load(query_start_loc + request)
    num_tokens = tl.load(query_start_loc + request + 1) - start
    first_position = tl.load(seq_lens + request) - num_tokens

    index = tl.arange(0, BLOCK)
    tile = index // PIECES
    piece = index % PIECES
    in_tile = tl.minimum(tl.maximum(num_tokens - tile * TILE_TOKENS, 0), TILE_TOKENS)
    low = first_position + tile * TILE_TOKENS
    first_chunk = tl.zeros([BLOCK], dtype=tl.int32)
    if WINDOW > 0:
        first_chunk = tl.maximum(low - WINDOW + 1, 0) // CHUNK
    num_chunks = (low + in_tile - 1) // CHUNK + 1 - first_chunk
    split = (num_chunks + PIECES - 1) // PIECES
    has_work = (in_tile > 0) & (piece * split < num_chunks)
    mode = tl.where(piece > 0, _EACH, tl.where(split >= num_chunks, _RESULT, _FOLD))

    item = items + (request * (NUM_TILES * PIECES) + index) * _ITEM_WORDS
    mask = index < NUM_TILES * PIECES
    tl.store(item, start + tile * TILE_TOKENS, mask=mask)
    tl.store(item + 1, tl.where(has_work, in_tile, 0), mask=mask)
    tl.store(item + 2, tl.zeros([BLOCK], dtype=tl.int32) + request * table_width, mask=mask)
    tl.store(item + 3, first_chunk + piece * split, mask=mask)
    tl.store(item + 4, first_chunk + tl.minimum((piece + 1) * split, num_chunks), mask=mask)
    tl.store(item + 5, mode, mask=mask)

    for base in tl.range(0, num_tokens, BLOCK):
        token = base + index
        kept = token < num_tokens
        tl.store(tile_tokens + start + token, start + token, mask=kept)
        tl.store(positions + start + token, first_position + token, mask=kept)
        if PIECES > 1:
            # Of the token's tile, as above.
            low = first_position + token // TILE_TOKENS * TILE_TOKENS
            first_chunk = tl.zeros([BLOCK], dtype=tl.int32)
            if WINDOW > 0:
                first_chunk = tl.maximum(low - WINDOW + 1, 0) // CHUNK
            last = tl.minimum(low + TILE_TOKENS, first_position + num_tokens) - 1
            num_chunks = last // CHUNK + 1 - first_chunk
            split = (num_chunks + PIECES - 1) // PIECES
            # What leads leaves one part, at its last chunk's place.
            merge = merges + (start + token) * _MERGE_WORDS
            first_slot = (start + token) * most_chunks
            tl.store(merge, start + token, mask=kept)
            tl.store(merge + 1, first_slot + split - 1, mask=kept)
            tl.store(merge + 2, tl.where(split >= num_chunks, 0, num_chunks - split + 1), mask=kept)
            tl.store(slots + start + token, first_slot - first_chunk, mask=kept)
