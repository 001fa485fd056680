"""`EngineClient`: the one way to an engine, whether it runs in this process or in its own.

Used from one asyncio event loop. Bounds the queue, hands each submission's deltas to its stream, and
starts the engine again when its process dies.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from enum import StrEnum
from itertools import count
from typing import Protocol

from pelton.core.errors import (
    EngineDeadError,
    PeltonError,
    QueueFullError,
    RequestCancelledError,
    ServiceUnavailableError,
)
from pelton.core.events import EngineInfo, EngineStats
from pelton.core.output import RequestOutput
from pelton.core.request import Submission
from pelton.core.session import SessionInfo, TenancyStats
from pelton.engine.adapter_names import AdapterNames
from pelton.engine.admission import check_submission
from pelton.engine.service_rate import ServiceRate
from pelton.engine.wire import (
    AdapterLoaded,
    Cancel,
    Command,
    DeleteSession,
    DescribeTenants,
    EngineUpdate,
    ListSessions,
    Query,
    Reply,
    SessionDeleted,
    SessionList,
    SetTenant,
    Shutdown,
    Submit,
    TenantReport,
)

MAX_RESTART_DELAY_S = 30.0
# The engine answers between two steps.
REPLY_TIMEOUT_S = 10.0


class EngineState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    DRAINING = "draining"
    STOPPED = "stopped"


class EngineTransport(Protocol):
    """Carries commands to one engine and its updates back, all on the client's event loop."""

    async def start(self, on_update: Callable[[EngineUpdate], None], on_exit: Callable[[str], None]) -> EngineInfo:
        """Start the engine; returns once it is ready. Raises the typed error that stopped it.

        `on_exit` is called once with the reason if the engine ends after it was ready. May be called
        again after that.
        """
        ...

    def send(self, command: Command) -> None: ...

    async def stop(self) -> None:
        """End the engine and release everything; no call-backs follow."""
        ...


class EngineClient:
    def __init__(self, transport: EngineTransport, *, restart: bool = True) -> None:
        self.state = EngineState.STOPPED
        self.info: EngineInfo | None = None
        self.stats = EngineStats()
        self.num_restarts = 0
        self._transport = transport
        self._restart = restart
        self._streams: dict[str, RequestStream] = {}
        self._num_sequences = 0
        self._listeners: list[Callable[[EngineUpdate], None]] = []
        self._rate = ServiceRate()
        self._query_ids = count(1)
        self.adapters = AdapterNames(self._ask, transport.send, self._query_ids)
        self._replies: dict[int, asyncio.Future[Reply]] = {}
        self._restart_task: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self) -> None:
        """Start the engine; returns once it can take requests."""
        self.state = EngineState.STARTING
        try:
            self.info = await self._transport.start(self._take_update, self._take_exit)
            await self.adapters.restore(self.info, self._exchange)
        except BaseException:
            self.state = EngineState.STOPPED
            await self._transport.stop()
            raise
        self.state = EngineState.READY

    async def close(self, *, drain_timeout_s: float = 0.0) -> None:
        """Refuse new requests, let the running ones finish for a while, cancel the rest, stop."""
        if self.state is EngineState.STOPPED:
            return
        self.state = EngineState.DRAINING
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), drain_timeout_s)
        self.state = EngineState.STOPPED
        if self._restart_task is not None:
            self._restart_task.cancel()
        self._fail_all(RequestCancelledError("the server is shutting down"))
        with contextlib.suppress(PeltonError):
            self._transport.send(Shutdown())
        await self._transport.stop()

    def add_listener(self, listener: Callable[[EngineUpdate], None]) -> None:
        """`listener` hears every update, on the event loop, before streams wake."""
        self._listeners.append(listener)

    def is_open(self, request_id: str) -> bool:
        """Whether a submission has not ended."""
        return request_id in self._streams

    @property
    def num_requests(self) -> int:
        """Submissions that have not ended."""
        return len(self._streams)

    def submit(self, submission: Submission) -> RequestStream:
        """Send a submission to the engine.

        Raises `ServiceUnavailableError`, `QueueFullError`, `InvalidRequestError` or
        `ContextLengthExceededError` at once; later errors come through the stream.
        """
        if self.state is not EngineState.READY or self.info is None:
            raise ServiceUnavailableError(f"the engine is {self.state}; try again", retry_after_s=2.0)
        check_submission(submission, self.info)
        if submission.request_id in self._streams:
            raise PeltonError(f"request id {submission.request_id} is in use")
        excess = self._num_sequences + submission.sampling.n - self.info.max_num_seqs - self.info.max_num_waiting
        if excess > 0:
            raise QueueFullError(
                f"{self._num_sequences} requests are running or waiting, as many as allowed; try again later",
                retry_after_s=self._rate.time_for_s(excess, time.monotonic()),
            )
        stream = RequestStream(self, submission.request_id, submission.sampling.n)
        self._streams[submission.request_id] = stream
        self._num_sequences += submission.sampling.n
        self._idle.clear()
        self._transport.send(Submit(submission))
        return stream

    def set_tenant(self, tenant_id: str, changes: Mapping[str, int | float]) -> None:
        """Change fields of a tenant's `TenantSettings`. A restarted engine has to be told again."""
        if self.state is EngineState.READY:
            self._transport.send(SetTenant(tenant_id, dict(changes)))

    async def sessions(self, tenant_id: str) -> tuple[SessionInfo, ...]:
        """A tenant's sessions, the latest used first. Raises `ServiceUnavailableError`, as do the next two."""
        reply = await self._ask(ListSessions(next(self._query_ids), tenant_id))
        assert isinstance(reply, SessionList)
        return reply.sessions

    async def delete_session(self, tenant_id: str, session_id: str) -> bool:
        """Forget a session and give up its pins; False: the tenant has none of that id."""
        reply = await self._ask(DeleteSession(next(self._query_ids), tenant_id, session_id))
        assert isinstance(reply, SessionDeleted)
        return reply.was_there

    async def tenancy(self) -> TenancyStats:
        """Service, requests, sessions and pins by tenant."""
        reply = await self._ask(DescribeTenants(next(self._query_ids)))
        assert isinstance(reply, TenantReport)
        return reply.stats

    async def _ask(self, query: Query, timeout_s: float = REPLY_TIMEOUT_S) -> Reply:
        if self.state not in (EngineState.READY, EngineState.DRAINING):
            raise ServiceUnavailableError(f"the engine is {self.state}; try again", retry_after_s=2.0)
        return await self._exchange(query, timeout_s)

    async def _exchange(self, query: Query, timeout_s: float) -> Reply:
        future = self._replies[query.query_id] = asyncio.get_running_loop().create_future()
        try:
            self._transport.send(query)
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            raise ServiceUnavailableError("the engine did not answer in time; try again", retry_after_s=2.0) from None
        finally:
            del self._replies[query.query_id]

    # -- called by streams and the transport ------------------------------------------------------

    def _cancel(self, stream: RequestStream) -> None:
        if self._forget(stream) and self.state in (EngineState.READY, EngineState.DRAINING):
            self._transport.send(Cancel(stream.request_id))

    def _forget(self, stream: RequestStream) -> bool:
        if self._streams.pop(stream.request_id, None) is None:
            return False
        self._num_sequences -= stream.num_open
        if not self._streams:
            self._idle.set()
        return True

    def _take_update(self, update: EngineUpdate) -> None:
        self.stats = update.stats
        for listener in self._listeners:
            listener(update)
        for reply in update.replies:
            asked = self._replies.get(reply.query_id)
            if asked is not None and not asked.done():
                asked.set_result(reply)
            elif isinstance(reply, AdapterLoaded):
                self.adapters.take_unasked(reply)
        touched: dict[str, RequestStream] = {}
        for output in update.outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:  # cancelled meanwhile
                continue
            touched[output.request_id] = stream
            if output.finish_reason is not None:
                if stream.num_open == 1 or output.error is not None:
                    self._forget(stream)
                else:
                    self._num_sequences -= 1
                self._rate.count(time.monotonic())
                stream._push(output)
            else:
                stream._outputs.append(output)
        for stream in touched.values():
            stream._deliver()

    def _take_exit(self, reason: str) -> None:
        if self.state is EngineState.STOPPED:
            return
        draining = self.state is EngineState.DRAINING
        self.state = EngineState.STOPPED if draining or not self._restart else EngineState.RESTARTING
        self._fail_all(EngineDeadError(f"the engine ended unexpectedly ({reason}); the request may be sent again"))
        if self.state is EngineState.RESTARTING:
            self._restart_task = asyncio.get_running_loop().create_task(self._start_again())

    async def _start_again(self) -> None:
        delay_s = 0.1
        while True:
            await self._transport.stop()
            try:
                self.info = await self._transport.start(self._take_update, self._take_exit)
                await self.adapters.restore(self.info, self._exchange)
            except PeltonError:
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, MAX_RESTART_DELAY_S)
                continue
            self.num_restarts += 1
            self.state = EngineState.READY
            return

    def _fail_all(self, error: PeltonError) -> None:
        for asked in self._replies.values():
            if not asked.done():
                asked.set_exception(ServiceUnavailableError("the engine ended; try again", retry_after_s=2.0))
        streams = list(self._streams.values())
        for stream in streams:
            self._forget(stream)
            stream._fail(error)


class RequestStream:
    """The deltas of one submission, all its sequences together.

    Iterate to get lists of `RequestOutput`, each with all that came since the last; a slow reader gets
    longer lists, never a backlog of wake-ups. Ends when every sequence has; raises the typed error
    that ended the submission. Leaving early must be followed by `cancel()`.

    `sink`, where set, is offered deltas while the reader waits; if it takes them (True), the reader sleeps
    on. It spares a task switch per step, which costs more than the write that most readers wake up for.
    """

    __slots__ = ("_client", "_error", "_outputs", "_waiter", "num_open", "request_id", "sink")

    def __init__(self, client: EngineClient, request_id: str, num_sequences: int) -> None:
        self.request_id = request_id
        self.num_open = num_sequences
        self.sink: Callable[[list[RequestOutput]], bool] | None = None
        self._client = client
        self._outputs: list[RequestOutput] = []
        self._error: PeltonError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> list[RequestOutput]:
        if not self._outputs and self._error is None:
            if self.num_open == 0:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._outputs:
            outputs, self._outputs = self._outputs, []
            return outputs
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        raise StopAsyncIteration

    def cancel(self) -> None:
        """Free the engine's side within one step. Does nothing once the submission has ended."""
        self._client._cancel(self)
        self.num_open = 0
        self._wake()

    def fail(self, error: PeltonError) -> None:
        """As `cancel`; whoever reads gets `error`. Does nothing once the submission has ended."""
        if self.num_open:
            self._client._cancel(self)
            self._fail(error)

    def _push(self, output: RequestOutput) -> None:
        if output.error is not None:
            self.num_open = 0
            self._error = output.error.to_error()
            return
        if output.finish_reason is not None:
            self.num_open -= 1
        self._outputs.append(output)

    def _deliver(self) -> None:
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        if self.sink is not None and self._error is None and self.sink(self._outputs):
            self._outputs = []
        else:
            waiter.set_result(None)

    def _fail(self, error: PeltonError) -> None:
        self.num_open = 0
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
