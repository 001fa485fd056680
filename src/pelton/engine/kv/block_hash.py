"""Content hashes of full blocks, chained so that equal hashes mean equal prefixes (law 5)."""

from __future__ import annotations

from array import array
from hashlib import blake2b

from pelton.core.request import Request

HASH_BYTES = 16


def root_hash(identity: str, cache_salt: str, lora_id: str = "") -> bytes:
    """Start of a chain. `identity` names model, KV type and compressor; the salt the tenant; the last the adapter."""
    digest = blake2b(digest_size=HASH_BYTES)
    for part in (identity, cache_salt, lora_id) if lora_id else (identity, cache_salt):
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def extend_block_hashes(request: Request, root: bytes, block_size: int) -> None:
    """Bring `request.block_hashes` up to the request's known tokens; well under 1 us a block."""
    hashes = request.block_hashes
    first, end = len(hashes), request.num_known_tokens // block_size
    if first >= end:
        return
    token_ids = array("i", request.known_token_ids(first * block_size, end * block_size))
    data, num_bytes = token_ids.tobytes(), block_size * token_ids.itemsize
    parent = hashes[-1] if hashes else root
    for start in range(0, len(data), num_bytes):
        parent = blake2b(parent + data[start : start + num_bytes], digest_size=HASH_BYTES).digest()
        hashes.append(parent)


def private_hash(request: Request, index: int) -> bytes:
    """A name for block `index` of a preempted request that only this request asks for; longer than a content hash."""
    name = f"{request.request_id}\0{request.num_preemptions}\0{index}"
    return blake2b(name.encode("utf-8", "surrogatepass"), digest_size=HASH_BYTES).digest() + b"\0"


def is_private(block_hash: bytes) -> bool:
    return len(block_hash) > HASH_BYTES
