"""`AdapterNames`: the LoRA adapters of an engine by the names that clients use, on the client's side of the border."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from itertools import count

from pelton.core.errors import InvalidRequestError, ModelNotFoundError, PeltonError
from pelton.core.events import EngineInfo
from pelton.core.lora import LoraAdapter
from pelton.engine.wire import AdapterLoaded, Command, LoadAdapter, Query, Reply, UnloadAdapter

LOAD_TIMEOUT_S = 120.0
Ask = Callable[[Query, float], Awaitable[Reply]]
_log = logging.getLogger("pelton.engine")


class AdapterNames(Mapping[str, LoraAdapter]):
    """Used on the event loop. `ask` sends a query and returns its reply, within so many seconds."""

    def __init__(
        self,
        ask: Ask,
        send: Callable[[Command], None],
        query_ids: count[int],
    ) -> None:
        self._ask = ask
        self._send = send
        self._query_ids = query_ids
        self._lock = asyncio.Lock()
        self._adapters: dict[str, LoraAdapter] = {}
        self._has_started = False

    def __getitem__(self, name: str) -> LoraAdapter:
        return self._adapters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)

    async def load(self, name: str, path: str, *, replace: bool = False) -> LoraAdapter:
        """Load an adapter and give it a name; with `replace`, that may be another's, whose requests go on.

        Raises `InvalidRequestError` for a name in use, and what was wrong with the files.
        """
        async with self._lock:
            if name in self and not replace:
                problem = f"the adapter {name!r} has already been loaded; load_inplace puts another in its place"
                raise InvalidRequestError(problem, param="lora_name")
            old, adapter = self.get(name), await self._load(path, self._ask)
            self._adapters[name] = adapter
            self._unload_unnamed(old)
            return adapter

    async def unload(self, name: str) -> None:
        """Take a name back; requests that run with the adapter go on. Raises `ModelNotFoundError`."""
        async with self._lock:
            if name not in self:
                raise ModelNotFoundError(f"no adapter {name!r} is loaded")
            self._unload_unnamed(self._adapters.pop(name))

    async def restore(self, info: EngineInfo, ask: Ask) -> None:
        """In a new engine, which has those of its settings, what the names stood for in the one before.

        `ask` works before the engine takes requests.
        """
        async with self._lock:
            named = dict(self._adapters) if self._has_started else dict(info.lora_modules)
            self._has_started = True
            found = {adapter.path: adapter for _, adapter in info.lora_modules}
            self._adapters = {}
            for name, adapter in named.items():
                try:
                    self._adapters[name] = found.get(adapter.path) or await self._load(adapter.path, ask)
                except PeltonError as error:
                    _log.warning("adapter %s was not loaded again: %s", name, error)
            for adapter in found.values():
                self._unload_unnamed(adapter)

    def take_unasked(self, reply: AdapterLoaded) -> None:
        """A load has ended that nobody waits for any more."""
        self._unload_unnamed(reply.adapter)

    async def _load(self, path: str, ask: Ask) -> LoraAdapter:
        reply = await ask(LoadAdapter(next(self._query_ids), path), LOAD_TIMEOUT_S)
        assert isinstance(reply, AdapterLoaded)
        if reply.adapter is None:
            raise reply.error.to_error() if reply.error is not None else PeltonError("the adapter was not loaded")
        return reply.adapter

    def _unload_unnamed(self, adapter: LoraAdapter | None) -> None:
        """One content may have several names. Nobody waits for the reply: what is sent later comes later."""
        if adapter is not None and all(other.lora_id != adapter.lora_id for other in self.values()):
            self._send(UnloadAdapter(next(self._query_ids), adapter.lora_id))
