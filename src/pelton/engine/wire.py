"""Messages between client and engine: structs within a process, MessagePack between two. Never pickle."""

from __future__ import annotations

import msgspec

from pelton.core.errors import ErrorInfo
from pelton.core.events import EngineInfo, EngineStats, RequestEvent
from pelton.core.lora import LoraAdapter
from pelton.core.output import RequestOutput
from pelton.core.request import Submission
from pelton.core.session import SessionInfo, TenancyStats


class Submit(msgspec.Struct, tag="submit", frozen=True):
    submission: Submission


class Cancel(msgspec.Struct, tag="cancel", frozen=True):
    """End a submission; one that has ended already is no error."""

    request_id: str


class ListSessions(msgspec.Struct, tag="list_sessions", frozen=True):
    """What a tenant's sessions are; answered by `SessionList`."""

    query_id: int
    tenant_id: str


class DeleteSession(msgspec.Struct, tag="delete_session", frozen=True):
    """Forget a tenant's session and its pins; answered by `SessionDeleted`."""

    query_id: int
    tenant_id: str
    session_id: str


class DescribeTenants(msgspec.Struct, tag="describe_tenants", frozen=True):
    """Answered by `TenantReport`."""

    query_id: int


class SetTenant(msgspec.Struct, tag="set_tenant", frozen=True):
    """Change fields of a tenant's `TenantSettings`; those not named are as they were at the start."""

    tenant_id: str
    changes: dict[str, int | float]


class LoadAdapter(msgspec.Struct, tag="load_adapter", frozen=True):
    """Read a LoRA adapter's files; answered by `AdapterLoaded`, steps later."""

    query_id: int
    path: str


class UnloadAdapter(msgspec.Struct, tag="unload_adapter", frozen=True):
    """No new request may name it; it is freed after the last that does. Answered by `AdapterUnloaded`."""

    query_id: int
    lora_id: str


class Shutdown(msgspec.Struct, tag="shutdown", frozen=True):
    """End at once; what still runs is dropped."""


class Ready(msgspec.Struct, tag="ready", frozen=True):
    info: EngineInfo


class StartFailed(msgspec.Struct, tag="start_failed", frozen=True):
    error: ErrorInfo


class SessionList(msgspec.Struct, tag="session_list", frozen=True):
    query_id: int
    sessions: tuple[SessionInfo, ...]


class SessionDeleted(msgspec.Struct, tag="session_deleted", frozen=True):
    query_id: int
    was_there: bool


class TenantReport(msgspec.Struct, tag="tenant_report", frozen=True):
    query_id: int
    stats: TenancyStats


class AdapterLoaded(msgspec.Struct, tag="adapter_loaded", frozen=True):
    query_id: int
    adapter: LoraAdapter | None = None
    error: ErrorInfo | None = None


class AdapterUnloaded(msgspec.Struct, tag="adapter_unloaded", frozen=True):
    query_id: int


TenancyQuery = ListSessions | DeleteSession | DescribeTenants
TenancyReply = SessionList | SessionDeleted | TenantReport
Query = TenancyQuery | LoadAdapter | UnloadAdapter
Reply = TenancyReply | AdapterLoaded | AdapterUnloaded


class EngineUpdate(msgspec.Struct, tag="update", frozen=True):
    """What one turn of the loop has to tell."""

    outputs: tuple[RequestOutput, ...]
    events: tuple[RequestEvent, ...]
    stats: EngineStats
    replies: tuple[Reply, ...] = ()


Command = Submit | Cancel | Query | SetTenant | Shutdown
EngineMessage = Ready | StartFailed | EngineUpdate

_encoder = msgspec.msgpack.Encoder()
_command_decoder = msgspec.msgpack.Decoder(Command)
_engine_decoder = msgspec.msgpack.Decoder(EngineMessage)


def encode(message: Command | EngineMessage) -> bytes:
    return _encoder.encode(message)


def decode_command(data: bytes) -> Command:
    command: Command = _command_decoder.decode(data)
    return command


def decode_engine_message(data: bytes) -> EngineMessage:
    message: EngineMessage = _engine_decoder.decode(data)
    return message
