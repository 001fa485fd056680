"""What all attention layers of a KV group share in one step: a list of work, made on the host.

An item of work is a tile of query rows with a run of chunks: positions from multiples of `chunk_positions` on. A
chunk adds to a row what depends on the two of them alone, and a row's chunks are merged in order, each into the
sum of those before it. So it changes no bit of a row how items are cut (law 3): in one item with all chunks, which
writes the result; in an item that leads, which folds a row's first chunks into one partial result, and items
that write one for each chunk, merged afterwards; or with rows of many requests in one tile, where these have
blocks in common (a cascade).

Legend: T tokens, R requests, B blocks in a table, G query heads per key-value head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pelton.worker.kernels.ops import AttentionShape
from pelton.worker.kernels.triton.attention_config import AttentionConfig
from pelton.worker.kernels.triton.attention_sharing import find_shared_prefixes

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.int32]

# What an item does with its chunks; attention_kernels.py has the same numbers.
RESULT, FOLD, EACH = 0, 1, 2
ITEM_WORDS = 8  # first of tile_tokens, tokens, first of tables, first chunk, end chunk, mode; two to spare
MERGE_WORDS = 4  # token, first slot, slots; one to spare
_ALIGNMENT_WORDS = 4  # sections start at 16 bytes, as wide loads want


@dataclass(frozen=True, slots=True)
class PlanSizes:
    """How many of each thing a plan has room for: what grids, and so a captured graph, depend on."""

    num_narrow: int  # items
    num_wide: int
    num_merges: int
    num_tile_tokens: int
    num_tokens: int

    def rounded(self) -> PlanSizes:
        """Each rounded up to a power of two."""
        return PlanSizes(*(size and 1 << (size - 1).bit_length() for size in self._all()))

    def holds(self, other: PlanSizes) -> bool:
        return all(own >= size for own, size in zip(self._all(), other._all(), strict=True))

    @staticmethod
    def for_decodes(
        num_requests: int, tokens_per_request: int, num_kv_heads: int, config: AttentionConfig
    ) -> PlanSizes:
        """Room for any step of `num_requests` at most with so many tokens each at most, whatever their contexts. So
        many tokens must fit in one narrow tile."""
        num_tokens = num_requests * tokens_per_request
        # A tile for each request, at most as many again for what they share, and what splitting adds.
        num_items = 2 * num_requests + config.num_programs // num_kv_heads
        return PlanSizes(num_items, 0, num_tokens, 2 * num_tokens, num_tokens)

    def starts(self) -> list[int]:
        """First words of items (narrow, wide), merges, tile_tokens, positions, slots, tables."""
        counts = (
            self.num_narrow * ITEM_WORDS,
            self.num_wide * ITEM_WORDS,
            self.num_merges * MERGE_WORDS,
            self.num_tile_tokens,
            self.num_tokens,
            self.num_tokens,
        )
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + -(-count // _ALIGNMENT_WORDS) * _ALIGNMENT_WORDS)
        return starts

    def views(self, words: Any) -> list[Any]:
        """The sections of `words`, an array on the host or the device, tables last, which have what is left."""
        starts = self.starts()
        return [words[start:end] for start, end in zip(starts, [*starts[1:], len(words)], strict=True)]

    def _all(self) -> tuple[int, ...]:
        return (self.num_narrow, self.num_wide, self.num_merges, self.num_tile_tokens, self.num_tokens)


@dataclass(frozen=True, slots=True)
class HostPlan:
    """Before it is on the device. `pack` makes of it one array, for the step's one copy."""

    shape: AttentionShape
    config: AttentionConfig
    narrow_items: Words  # [., ITEM_WORDS]
    wide_items: Words
    merges: Words  # [., MERGE_WORDS]
    tile_tokens: Words  # tokens of tiles, one tile's after another's
    positions: Words  # [T]
    slots: Words  # [T]: where a token's partial results would start if its first chunk were number 0
    tables: Words  # tables of all requests, as long as each is used
    num_slots: int
    num_blocks: int  # that a cache must have

    @property
    def sizes(self) -> PlanSizes:
        return PlanSizes(
            len(self.narrow_items), len(self.wide_items), len(self.merges), len(self.tile_tokens), len(self.positions)
        )

    def pack(self, sizes: PlanSizes) -> Words:
        """All of it in one array, laid out for `sizes`. What is left over is zeros: items that do nothing."""
        parts = (
            *(self.narrow_items, self.wide_items, self.merges),
            *(self.tile_tokens, self.positions, self.slots, self.tables),
        )
        words: Words = np.zeros(sizes.starts()[-1] + max(1, len(self.tables)), dtype=np.int32)
        for section, part in zip(sizes.views(words), parts, strict=True):
            section[: part.size] = part.reshape(-1)
        return words


@dataclass(slots=True)
class _Tiles:
    """Arrays [number of tiles]; chunks from `first_chunk` to before `end_chunk`."""

    first: Ints  # in tile_tokens
    num_tokens: Ints
    request: Ints  # whose table is read
    first_chunk: Ints
    end_chunk: Ints
    is_wide: npt.NDArray[np.bool_]
    # Of the tile that has the first chunks of these tokens, itself or a shared one.
    lead_first: Ints
    lead_end: Ints


def make_plan(
    shape: AttentionShape,
    query_start_loc: Ints,
    seq_lens: Ints,
    block_tables: npt.NDArray[np.int64],
    config: AttentionConfig,
) -> HostPlan:
    """block_tables [R, B]; see `ForwardBatch`. Raises `IndexError` for a request that does not fit its table."""
    starts, lens = np.asarray(query_start_loc, dtype=np.int64), np.asarray(seq_lens, dtype=np.int64)
    block_tables = np.asarray(block_tables, dtype=np.int64)
    num_new = np.diff(starts)
    num_used = _num_used_blocks(shape, num_new, lens, block_tables)
    tables = np.concatenate([table[:used] for table, used in zip(block_tables, num_used.tolist(), strict=True)] or [[]])
    if len(tables) and tables.min() < 0:
        raise IndexError("a block table has a negative block")
    positions = np.arange(starts[-1]) + np.repeat(lens - num_new - starts[:-1], num_new)

    own_tiles, own_tokens = _own_tiles(shape, config, starts, positions), np.arange(starts[-1])
    tiles, tile_tokens = own_tiles, own_tokens
    if config.share_prefixes and shape.sliding_window is None:
        tiles, tile_tokens = _share(shape, config, tiles, tile_tokens, (starts, lens, block_tables))
    split, num_slots = _choose_split(shape, config, tiles)
    if num_slots > config.max_slots:
        # What follows a shared prefix is in one part for each chunk; only rows that share nothing need none.
        tiles, tile_tokens = own_tiles, own_tokens
        split, num_slots = _choose_split(shape, config, tiles)
    items = _items(tiles, split, np.concatenate([[0], np.cumsum(num_used)]))
    merges, slots = _merges(tiles, split, len(positions))
    is_wide, items = items[:, -1] != 0, items[:, :-1]
    return HostPlan(
        shape,
        config,
        _as_words(items[~is_wide], ITEM_WORDS),
        _as_words(items[is_wide], ITEM_WORDS),
        _as_words(merges, MERGE_WORDS),
        tile_tokens.astype(np.int32),
        positions.astype(np.int32),
        slots.astype(np.int32),
        tables.astype(np.int32),
        num_slots,
        int(tables.max()) + 1 if len(tables) else 0,
    )


def _num_used_blocks(shape: AttentionShape, num_new: Ints, seq_lens: Ints, block_tables: Ints) -> Ints:
    num_used = (seq_lens - 1) // shape.block_size + 1
    fits = (num_new >= 1) & (num_new <= seq_lens) & (num_used <= block_tables.shape[1])
    if not fits.all():
        row = int(np.argmin(fits))
        raise IndexError(
            f"request {row} of the step has {num_new[row]} new tokens of {seq_lens[row]}, and a table of "
            f"{block_tables.shape[1]} blocks of {shape.block_size}"
        )
    return num_used


def _own_tiles(shape: AttentionShape, config: AttentionConfig, starts: Ints, positions: Ints) -> _Tiles:
    """Every request's tokens in tiles, over all chunks that they see."""
    group = shape.num_heads // shape.num_kv_heads
    num_new = np.diff(starts)
    is_wide = num_new > config.wide_from * (config.narrow_rows // group)
    per_tile = np.where(is_wide, config.wide_rows // group, config.narrow_rows // group)
    num_tiles = -(-num_new // per_tile)
    request = np.repeat(np.arange(len(num_new)), num_tiles)
    index = np.arange(len(request)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)
    first = starts[request] + index * per_tile[request]
    num_tokens = np.minimum(per_tile[request], starts[request + 1] - first)
    first_seen = np.zeros_like(first)
    if shape.sliding_window is not None:
        first_seen = np.maximum(0, positions[first] - shape.sliding_window + 1)
    first_chunk = first_seen // config.chunk_positions
    end_chunk = positions[first + num_tokens - 1] // config.chunk_positions + 1
    return _Tiles(first, num_tokens, request, first_chunk, end_chunk, is_wide[request], first_chunk, end_chunk)


def _share(
    shape: AttentionShape,
    config: AttentionConfig,
    tiles: _Tiles,
    tile_tokens: Ints,
    batch: tuple[Ints, Ints, Ints],
) -> tuple[_Tiles, Ints]:
    """`tiles` with one more for what requests have in common, ahead of those, which begin after that."""
    starts, seq_lens, block_tables = batch
    num_new = np.diff(starts)
    per_tile = config.narrow_rows // (shape.num_heads // shape.num_kv_heads)
    # A tile for each: their chunks in common are those that all tokens see whole.
    candidates = np.flatnonzero(num_new <= per_tile)
    num_whole = (seq_lens - num_new)[candidates] // config.chunk_positions
    groups = find_shared_prefixes(block_tables[candidates], num_whole, config.chunk_positions, shape.block_size)
    if not groups:
        return tiles, tile_tokens
    end_chunk = np.zeros(len(num_new), dtype=np.int64)
    shared: list[tuple[int, int, int, int]] = []  # first, tokens, request, end chunk
    tokens = [tile_tokens]
    first = len(tile_tokens)
    for members, num_chunks in groups:
        requests = candidates[members]
        end_chunk[requests] = num_chunks
        own = np.concatenate([np.arange(starts[request], starts[request + 1]) for request in requests.tolist()])
        tokens.append(own)
        for low in range(0, len(own), per_tile):
            shared.append((first + low, min(per_tile, len(own) - low), int(requests[0]), num_chunks))
        first += len(own)
    lead_end = end_chunk[tiles.request]
    is_led = lead_end > 0
    new = np.array(shared).T
    none = np.zeros(len(shared), dtype=np.int64)
    return _Tiles(
        np.concatenate([new[0], tiles.first]),
        np.concatenate([new[1], tiles.num_tokens]),
        np.concatenate([new[2], tiles.request]),
        np.concatenate([none, np.where(is_led, lead_end, tiles.first_chunk)]),
        np.concatenate([new[3], tiles.end_chunk]),
        np.concatenate([none > 0, tiles.is_wide]),
        np.concatenate([none, np.where(is_led, 0, tiles.lead_first)]),
        # Of a shared tile 0, so that it is not taken for the one that ends its tokens' chunks.
        np.concatenate([none, np.where(is_led, lead_end, tiles.lead_end)]),
    ), np.concatenate(tokens)


def _choose_split(shape: AttentionShape, config: AttentionConfig, tiles: _Tiles) -> tuple[int, int]:
    """(chunks of a narrow item at most, partial results): the shortest items that are not too many."""
    most_chunks = int((tiles.end_chunk - tiles.first_chunk).max(initial=1))
    most_items = len(tiles.first) + config.num_programs // shape.num_kv_heads
    split = 1
    while True:
        num_slots = int((tiles.num_tokens * _num_slots(tiles, split)).sum())
        num_items = int(_num_pieces(tiles, split).sum())
        if split >= most_chunks or (num_items <= most_items and num_slots <= config.max_slots):
            return split, num_slots
        split *= 2


def _num_pieces(tiles: _Tiles, split: int) -> Ints:
    return np.where(tiles.is_wide, 1, -(-(tiles.end_chunk - tiles.first_chunk) // split))


def _lead_end(tiles: _Tiles, split: int) -> Ints:
    """End of the chunks that the item which leads takes of each tile's tokens."""
    return np.where(tiles.is_wide, tiles.lead_end, np.minimum(tiles.lead_first + split, tiles.lead_end))


def _num_slots(tiles: _Tiles, split: int) -> Ints:
    """Partial results for each token of a tile that ends its tokens' chunks; none where one item has them all."""
    lead_end = _lead_end(tiles, split)
    is_last = tiles.lead_end > 0
    return np.where(is_last & (tiles.end_chunk > lead_end), tiles.end_chunk - lead_end + 1, 0)


def _items(tiles: _Tiles, split: int, table_starts: Ints) -> Ints:
    """[., 7]: the six words of an item and whether it is wide; those with most to do first."""
    num_pieces = _num_pieces(tiles, split)
    tile = np.repeat(np.arange(len(num_pieces)), num_pieces)
    piece = np.arange(len(tile)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    first_chunk = tiles.first_chunk[tile] + piece * split
    end_chunk = np.where(piece + 1 < num_pieces[tile], first_chunk + split, tiles.end_chunk[tile])
    is_shared = tiles.lead_end[tile] == 0
    leads = (piece == 0) & (is_shared | (tiles.lead_first == tiles.first_chunk)[tile])
    is_whole = leads & ~is_shared & (num_pieces[tile] == 1)
    mode = np.where(is_whole, RESULT, np.where(leads, FOLD, EACH))
    columns = (tiles.first[tile], tiles.num_tokens[tile], table_starts[tiles.request[tile]], first_chunk, end_chunk)
    items = np.stack([*columns, mode, tiles.is_wide[tile]], axis=1)
    return items[np.argsort(first_chunk - end_chunk, kind="stable")]


def _merges(tiles: _Tiles, split: int, num_tokens: int) -> tuple[Ints, Ints]:
    """(token, first slot, slots) [., 3] of tokens whose result is in parts, and all tokens' `HostPlan.slots`."""
    num_slots = np.repeat(_num_slots(tiles, split), tiles.num_tokens)
    lead_end = np.repeat(_lead_end(tiles, split), tiles.num_tokens)
    tile_start = np.cumsum(tiles.num_tokens) - tiles.num_tokens
    token = np.arange(len(num_slots)) + np.repeat(tiles.first - tile_start, tiles.num_tokens)
    is_split = num_slots > 0
    token, num_slots, lead_end = token[is_split], num_slots[is_split], lead_end[is_split]
    first_slot = np.cumsum(num_slots) - num_slots
    slots = np.zeros(num_tokens, dtype=np.int64)
    slots[token] = first_slot - (lead_end - 1)
    return np.stack([token, first_slot, num_slots], axis=1), slots


def _as_words(rows: Ints, num_words: int) -> Words:
    """int32 rows of `num_words`, zeros at their ends."""
    words = np.zeros((len(rows), num_words), dtype=np.int32)
    words[:, : rows.shape[1]] = rows
    return words
