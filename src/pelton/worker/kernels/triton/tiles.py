"""Tile sizes of matrix products: fixed tables, so that nothing is tuned while requests wait.

The weight is the left operand of every product (y^T = W x^T): a tile of at least 64 outputs fills a `wgmma` whatever
the number of rows, so that 1 and 8192 rows run the same instruction, which sums up 16 (8-bit types: 32) inputs at a
time, in the order of the inputs. Sums over inputs are cut into slices whose length depends on the weight alone. A
slice is summed by itself, then slices in order: by one program where rows are many, by a program each where they are
few and outputs alone would not fill the chip. Both give the same bits, which is law 3. What it asks of a table, for
all its rows (`order_of_sums`): one number of inputs, and 64 outputs for each warpgroup (four warps), which `wgmma` has
on its left side.

`docs/gpu-products.md` has the arithmetic behind the numbers. None of them has been measured yet.
"""

from __future__ import annotations

from dataclasses import dataclass

# Programs that keep an H100 (132 multiprocessors) streaming: two each, and four where codes are expanded, as each then
# waits for its arithmetic. Constants rather than what the device says, so that sums are cut alike on every device.
_WANTED_PROGRAMS = 264
_WANTED_PACKED_PROGRAMS = 528
# Inputs: below, writing and reading partial sums costs more than it fills.
_MIN_SLICE = 1024
_MIN_PACKED_SLICE = 512
_SLICE_STEP = 256  # a multiple of every BLOCK_K
_SLICED_BLOCK_O = 64
# Up to this many rows slices go to programs of their own; above, their partial sums would cost a third of the weight.
MAX_SPLIT_ROWS = 32


@dataclass(frozen=True, slots=True)
class Tile:
    rows: int
    outputs: int
    inputs: int
    num_warps: int
    num_stages: int


# Rows up to which a tile serves -> the tile. bf16 and fp16: 64 inputs are 128 bytes, a row of the swizzled layout.
# Decode: 8 stages of 10 KiB, two programs on a multiprocessor: 160 KiB in flight where Little's law asks for 20.
# Prefill: 128 x 128 with two accumulators (slice, total) takes 128 registers of 256 threads; 256 rows would spill.
_DENSE = (
    (16, Tile(16, 64, 64, 4, 8)),
    (32, Tile(32, 64, 64, 4, 7)),
    (64, Tile(64, 64, 64, 4, 6)),
    (None, Tile(128, 128, 64, 8, 4)),
)
# 8-bit operands: 128 inputs are the same 128 bytes, and the block of DeepSeek's scales.
_BYTES = (
    (16, Tile(16, 64, 128, 4, 8)),
    (32, Tile(32, 64, 128, 4, 7)),
    (64, Tile(64, 64, 128, 4, 6)),
    (None, Tile(128, 128, 128, 8, 4)),
)
# Packed codes are expanded in registers and enter `wgmma` from there; `inputs` is that of a block of 16 words.
_PACKED = (
    (16, Tile(16, 64, 128, 4, 6)),
    (32, Tile(32, 64, 128, 4, 5)),
    (64, Tile(64, 64, 128, 4, 4)),
    (None, Tile(128, 128, 128, 8, 3)),
)
# A third accumulator, of a block before its scales: 128 rows would spill.
_BLOCKS = (*_BYTES[:-1], (None, Tile(64, 128, 128, 8, 4)))
TABLES = {"float": _DENSE, "int8": _BYTES, "fp8": _BYTES, "fp8_block": _BLOCKS, "packed": _PACKED}


def choose_tile(kind: str, num_rows: int) -> Tile:
    return next(tile for most, tile in TABLES[kind] if most is None or num_rows <= most)


def order_of_sums(kind: str, num_rows: int) -> tuple[int, int]:
    """(inputs of a tile, outputs of a warpgroup): with the weight's slices all that a row's sum depends on."""
    tile = choose_tile(kind, num_rows)
    return tile.inputs, tile.outputs * 4 // tile.num_warps


def slice_length(kind: str, num_outputs: int, num_inputs: int) -> int:
    """Inputs that are summed up by themselves: a function of the weight alone."""
    wanted, least = (_WANTED_PACKED_PROGRAMS, _MIN_PACKED_SLICE) if kind == "packed" else (_WANTED_PROGRAMS, _MIN_SLICE)
    num_tiles = -(-num_outputs // _SLICED_BLOCK_O)
    num_slices = min(-(-wanted // num_tiles), max(num_inputs // least, 1))
    length = -(-num_inputs // num_slices)
    return -(-length // _SLICE_STEP) * _SLICE_STEP


def num_slices(kind: str, num_outputs: int, num_inputs: int) -> int:
    return -(-num_inputs // slice_length(kind, num_outputs, num_inputs))
