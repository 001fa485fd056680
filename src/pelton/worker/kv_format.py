"""How a block of a layer's keys, or values, lies in memory: as an array of numbers, or as codes and their scales.

    codes   [block_size, K, bytes of a head]   a number a byte (fp8, int8), or two, the first one low (int4)
    scales  [block_size, K] of 4 bytes         a float32 (fp8, int8), or scale and minimum in float16 (int4)

Each token and head has a scale of its own, so that it can be written as soon as the token is known and never changes.
The scales lie within the block: whoever copies, swaps or stores a block's bytes takes them along, and knows
nothing of them. A cache of codes is an array [num_blocks, bytes of a block], whose type tells the format.
"""

from __future__ import annotations

from dataclasses import dataclass

from pelton.core.errors import ConfigError
from pelton.core.model_spec import ModelSpec

SCALE_BYTES = 4
_ALIGNMENT = 16  # of a block's parts, as wide loads want


@dataclass(frozen=True, slots=True)
class KVFormat:
    """A type of the KV cache."""

    name: str
    element_bits: int
    array_dtype: str
    is_packed: bool = False

    def codes_bytes(self, block_size: int, num_kv_heads: int, head_dim: int) -> int:
        """Of one block's codes; where its scales start."""
        head_bytes = -(-head_dim * self.element_bits // 8)
        return _aligned(block_size * num_kv_heads * head_bytes)

    def block_shape(self, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        """Of one layer's keys or values in one block. Raises `ConfigError` for heads that cannot be packed."""
        if not self.is_packed:
            return (block_size, num_kv_heads, head_dim)
        if head_dim % 2:
            raise ConfigError(f"kv_cache_dtype is {self.name}, which packs heads of even size, not of {head_dim}")
        scales_bytes = _aligned(block_size * num_kv_heads * SCALE_BYTES)
        return (self.codes_bytes(block_size, num_kv_heads, head_dim) + scales_bytes,)

    def block_bytes(self, spec: ModelSpec, block_size: int) -> int:
        """Of a block of one group's layers, keys and values."""
        if not self.is_packed:
            return spec.kv_bytes_per_block(block_size, self.element_bits // 8)
        (layer_bytes,) = self.block_shape(block_size, spec.num_kv_heads, spec.head_dim)
        return 2 * spec.num_layers_per_kv_group * layer_bytes


KV_FORMATS = {
    kv_format.name: kv_format
    for kv_format in (
        KVFormat("float32", 32, "float32"),
        KVFormat("bfloat16", 16, "bfloat16"),
        KVFormat("float16", 16, "float16"),
        KVFormat("fp8", 8, "float8_e4m3fn", is_packed=True),
        KVFormat("int8", 8, "int8", is_packed=True),
        KVFormat("int4", 4, "uint8", is_packed=True),
    )
}
BY_ARRAY_DTYPE = {kv_format.array_dtype: kv_format for kv_format in KV_FORMATS.values()}


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
