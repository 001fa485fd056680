"""Messages between client and engine: structs within a process, MessagePack between two. Never pickle."""

from __future__ import annotations

import msgspec

from pelton.core.errors import ErrorInfo
from pelton.core.events import EngineInfo, EngineStats, RequestEvent
from pelton.core.output import RequestOutput
from pelton.core.request import Submission


class Submit(msgspec.Struct, tag="submit", frozen=True):
    submission: Submission


class Cancel(msgspec.Struct, tag="cancel", frozen=True):
    """End a submission; one that has ended already is no error."""

    request_id: str


class Shutdown(msgspec.Struct, tag="shutdown", frozen=True):
    """End at once; what still runs is dropped."""


class Ready(msgspec.Struct, tag="ready", frozen=True):
    info: EngineInfo


class StartFailed(msgspec.Struct, tag="start_failed", frozen=True):
    error: ErrorInfo


class EngineUpdate(msgspec.Struct, tag="update", frozen=True):
    """What one turn of the loop has to tell."""

    outputs: tuple[RequestOutput, ...]
    events: tuple[RequestEvent, ...]
    stats: EngineStats


Command = Submit | Cancel | Shutdown
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
