"""`TorchRanks`: ranks that are processes, over torch.distributed: NCCL between GPUs, gloo between CPUs.

Sums: every rank gets what all others have and adds it up itself, in the order of ranks and in float32. An all-reduce
adds in an order that depends on the size of its message, so on the other rows of a step; it moves less, 2 (n - 1) / n
of a message where this moves n - 1, which matters from four ranks on.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from pelton.core.errors import ConfigError

_TIMEOUT = timedelta(minutes=5)


class TorchRanks:
    """Implements `parallel.Ranks` for tensors. One group a process."""

    def __init__(
        self, rank: int, size: int, store: str, device_index: int | None, *, batch_invariant: bool = True
    ) -> None:
        """`device_index`: of a GPU; None: the CPU. All ranks must be there (`wait_for_all`).

        Raises `ConnectionError` where one stays away.
        """
        if device_index is not None and torch.cuda.device_count() < size:
            raise ConfigError(f"tensor_parallel_size is {size}, but there are {torch.cuda.device_count()} GPUs")
        self.rank = rank
        self.size = size
        self._device = torch.device("cpu") if device_index is None else torch.device("cuda", device_index)
        self._batch_invariant = batch_invariant
        try:
            dist.init_process_group(
                "gloo" if device_index is None else "nccl",
                init_method=f"file://{store}",
                rank=rank,
                world_size=size,
                timeout=_TIMEOUT,
            )
        except RuntimeError as error:
            raise ConnectionError(f"rank {rank} did not meet the other {size - 1} ranks: {error}") from error

    def add_up(self, x: torch.Tensor) -> torch.Tensor:
        if not self._batch_invariant:
            x = x.contiguous()
            dist.all_reduce(x)
            return x
        parts = self._parts(x)
        total = parts[0].float()
        for part in parts[1:]:
            total = total + part.float()
        return total.to(x.dtype)

    def gather(self, x: torch.Tensor, num_columns: int) -> torch.Tensor:
        missing = -(-num_columns // self.size) - x.shape[1]
        parts = self._parts(torch.nn.functional.pad(x, (0, missing)) if missing else x)
        return torch.cat(parts, dim=1)[:, :num_columns]

    def least(self, values: Sequence[int]) -> list[int]:
        found = torch.tensor(values, dtype=torch.int64, device=self._device)
        dist.all_reduce(found, op=dist.ReduceOp.MIN)
        return found.tolist()

    def leave(self) -> None:
        dist.destroy_process_group()

    def _parts(self, x: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return parts
