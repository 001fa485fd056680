"""`AdapterTable`: which LoRA adapters are loaded, who runs with them, and when one that was given up may go."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future

from pelton.core.errors import ErrorInfo, ModelNotFoundError, PeltonError, UnsupportedModelError
from pelton.core.lora import LoraAdapter
from pelton.core.protocols import AdapterStore
from pelton.core.request import Request
from pelton.engine.wire import AdapterLoaded, AdapterUnloaded, LoadAdapter, UnloadAdapter


class AdapterTable:
    """On the engine's thread. An adapter that is unloaded takes no new requests, serves those that it has, and is
    freed once no step in flight computes with it."""

    def __init__(self, store: AdapterStore | None = None, loaded: Iterable[LoraAdapter] = ()) -> None:
        self.on_done: Callable[[], None] = lambda: None  # called on another thread when a load has ended
        self._store = store
        self._num_users = {adapter.lora_id: 0 for adapter in loaded}
        self._last_step_ids: dict[str, int] = {}  # of the steps that may have computed with it
        self._leaving: set[str] = set()
        self._loads: list[tuple[int, Future[LoraAdapter]]] = []
        self._replies: list[AdapterLoaded | AdapterUnloaded] = []

    # -- loads and unloads ------------------------------------------------------------------------

    def ask(self, query: LoadAdapter | UnloadAdapter) -> None:
        """The reply is among those of `take_replies`, at once or later."""
        if isinstance(query, UnloadAdapter):
            if query.lora_id in self._num_users:
                self._leaving.add(query.lora_id)
            self._replies.append(AdapterUnloaded(query.query_id))
        elif self._store is None:
            error = UnsupportedModelError("this engine takes no adapters")
            self._replies.append(AdapterLoaded(query.query_id, error=ErrorInfo.of(error)))
        else:
            future = self._store.load(query.path)
            self._loads.append((query.query_id, future))
            future.add_done_callback(lambda _: self.on_done())

    def take_replies(self) -> list[AdapterLoaded | AdapterUnloaded]:
        done = [load for load in self._loads if load[1].done()]
        if done:
            self._loads = [load for load in self._loads if load not in done]
        replies, self._replies = self._replies, []
        return replies + [self._loaded(query_id, future) for query_id, future in done]

    def _loaded(self, query_id: int, future: Future[LoraAdapter]) -> AdapterLoaded:
        try:
            adapter = future.result()
        except Exception as error:
            if not isinstance(error, PeltonError):
                error = PeltonError(f"the adapter could not be loaded: {type(error).__name__}: {error}")
            return AdapterLoaded(query_id, error=ErrorInfo.of(error))
        self._num_users.setdefault(adapter.lora_id, 0)
        self._leaving.discard(adapter.lora_id)
        return AdapterLoaded(query_id, adapter)

    # -- requests ---------------------------------------------------------------------------------

    def check(self, lora_id: str) -> None:
        """Raises `ModelNotFoundError` for an adapter that takes no requests."""
        if lora_id and (lora_id not in self._num_users or lora_id in self._leaving):
            raise ModelNotFoundError(f"the adapter {lora_id} is not loaded")

    def begin(self, request: Request) -> None:
        if request.lora_id:
            self._num_users[request.lora_id] += 1

    def end(self, request: Request, last_step_id: int) -> None:
        """`last_step_id` is the newest step in flight."""
        if request.lora_id:
            self._num_users[request.lora_id] -= 1
            self._last_step_ids[request.lora_id] = last_step_id

    def settle(self, oldest_step_id: int | None) -> None:
        """Free what nobody needs; `oldest_step_id` is the oldest step in flight, None: there is none."""
        # A load under way may find it in memory and count on it.
        if not self._leaving or self._loads or self._store is None:
            return
        for lora_id in tuple(self._leaving):
            last_step_id = self._last_step_ids.get(lora_id, -1)
            if not self._num_users[lora_id] and (oldest_step_id is None or oldest_step_id > last_step_id):
                self._store.remove(lora_id)
                self._leaving.discard(lora_id)
                self._last_step_ids.pop(lora_id, None)
                del self._num_users[lora_id]
