"""`LoadedAdapters`: the LoRA adapters in memory, read from their files on a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pelton.core.errors import ConfigError
from pelton.core.lora import LoraAdapter
from pelton.core.model_spec import ModelSpec
from pelton.weights.lora import open_adapter
from pelton.worker.executors.host_resources import num_available_memory_bytes
from pelton.worker.kernels.ops import Kernels, LoraSite


class LoadedAdapters:
    """Implements `core.protocols.AdapterStore`; the model runner asks it for what a step needs."""

    def __init__(
        self, spec: ModelSpec, sites: Sequence[LoraSite], kernels: Kernels, *, max_loras: int, max_rank: int
    ) -> None:
        self._spec = spec
        self._sites = sites
        self._kernels = kernels
        self._max_loras = max_loras
        self._max_rank = max_rank
        self._lock = threading.Lock()
        self._loaded: dict[str, tuple[LoraAdapter, Any]] = {}
        self._thread: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self._loaded)

    def get(self, lora_id: str) -> Any | None:
        """The adapter in the kernels' layout."""
        found = self._loaded.get(lora_id)
        return found[1] if found is not None else None

    def load(self, path: str) -> Future[LoraAdapter]:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "pelton-adapters")
        return self._thread.submit(self.load_now, path)

    def load_now(self, path: str) -> LoraAdapter:
        """Raises `ConfigError` where there is no room, and what `open_adapter` raises."""
        weights = open_adapter(Path(path).expanduser(), self._spec, self._max_rank)
        with self._lock:
            if weights.lora_id in self._loaded:
                return self._loaded[weights.lora_id][0]
            if len(self._loaded) >= self._max_loras:
                raise ConfigError(
                    f"{len(self._loaded)} adapters are loaded, as many as max_loras allows: unload one, or raise it"
                )
        num_bytes = sum(module.a.data.nbytes + module.b.data.nbytes for module in weights.modules.values())
        if num_bytes > (num_free := num_available_memory_bytes()):
            raise ConfigError(f"the adapter at {path} takes {num_bytes >> 20} MiB, but {num_free >> 20} MiB are free")
        try:
            adapter = self._kernels.make_adapter(weights, self._sites)
        except MemoryError as error:
            raise ConfigError(f"the adapter at {path} takes {num_bytes >> 20} MiB, and the device is full") from error
        info = LoraAdapter(weights.lora_id, path, weights.rank, adapter.num_bytes, weights.base_model)
        with self._lock:
            return self._loaded.setdefault(weights.lora_id, (info, adapter))[0]

    def remove(self, lora_id: str) -> None:
        with self._lock:
            self._loaded.pop(lora_id, None)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
