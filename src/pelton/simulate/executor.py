"""`CostExecutor`: steps that compute nothing and take as long, on the virtual clock, as the cost function says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from zlib import crc32

from pelton.core.batch import ScheduledBatch, StepResult
from pelton.core.events import EngineInfo
from pelton.engine.config import EngineConfig
from pelton.simulate.cost import StepCost, StepShape, shape_of

# Called with each step when it is submitted, its shape, and when it will be done.
StepListener = Callable[[ScheduledBatch, StepShape, float], None]

VOCAB_SIZE = 2**31 - 1
# A context that no trace reaches, where the settings name none.
MAX_MODEL_LEN = 262_144


def simulated_info(config: EngineConfig, cost: StepCost) -> EngineInfo:
    """The engine's facts on that machine; settings win over what the cost says of its KV cache.

    Host memory behind it is what --host-kv-cache-gb says, by default none; there is no disk.
    """
    num_blocks = config.num_kv_blocks or cost.num_kv_tokens // config.block_size + 1
    block_bytes = cost.kv_bytes_per_token * config.block_size
    step_size = config.step_size()
    num_host_blocks = int((config.host_kv_cache_gb or 0) * 2**30 / block_bytes)
    return EngineInfo(
        max_model_len=min(config.max_model_len or MAX_MODEL_LEN, (num_blocks - 1) * config.block_size),
        num_blocks=num_blocks,
        block_size=config.block_size,
        max_num_seqs=step_size.num_requests,
        max_num_batched_tokens=step_size.num_tokens,
        max_num_waiting=config.max_num_waiting,
        dtype="none",
        vocab_size=VOCAB_SIZE,
        device="none",
        kernels=cost.name,
        num_threads=1,
        enable_prefix_caching=config.enable_prefix_caching,
        num_host_blocks=num_host_blocks + 1 if num_host_blocks else 0,
        kv_block_bytes=block_bytes,
        kv_identity=cost.name,
    )


class CostExecutor:
    """Implements `Executor`. Steps run one after the other, as on a device.

    A request's tokens are all the same and, but for chance, no other request's: two answers never share blocks,
    one that is continued does.
    """

    def __init__(self, cost: StepCost, block_size: int, loop: asyncio.AbstractEventLoop) -> None:
        self.cost = cost
        self.busy_s = 0.0
        self._block_size = block_size
        self.listeners: list[StepListener] = []
        self._loop = loop
        self._free_s = 0.0  # when the last step submitted will be done
        self._tokens: dict[str, tuple[int]] = {}

    def submit(self, batch: ScheduledBatch) -> Future[StepResult]:
        shape = shape_of(batch, self._block_size)
        elapsed_s = self.cost.step_s(shape)
        self.busy_s += elapsed_s
        self._free_s = max(self._loop.time(), self._free_s) + elapsed_s
        for request_id in batch.finished_ids:
            self._tokens.pop(request_id, None)
        sampled = tuple(self._token(scheduled.request_id) if scheduled.samples else () for scheduled in batch.requests)
        future: Future[StepResult] = Future()
        result = StepResult(batch.step_id, sampled, elapsed_s=elapsed_s, kv_copy_s=self.cost.kv_copy_s(shape))
        self._loop.call_at(self._free_s, future.set_result, result)
        for listener in self.listeners:
            listener(batch, shape, self._free_s)
        return future

    def _token(self, request_id: str) -> tuple[int]:
        token = self._tokens.get(request_id)
        if token is None:
            token = self._tokens[request_id] = (crc32(request_id.encode()) % VOCAB_SIZE,)
        return token

    def close(self) -> None:
        """Nothing is held."""


class OneLetterDecoder:
    """Implements `TokenDecoder`: nobody reads a simulated answer."""

    eos_token_ids: frozenset[int] = frozenset()

    def token_bytes(self, token_id: int) -> bytes:  # noqa: ARG002
        return b"a"

    def is_special(self, token_id: int) -> bool:  # noqa: ARG002
        return False
