"""`BoundedProtocol`: uvicorn's HTTP/1.1 over httptools, with bounds on the head of a request that it has not.

A head is refused with 431 where it is too large or has too many fields, however it arrives, and with 408 where it
does not come in time; both in the common shape. Bodies are bounded where they are read (`request_body.py`).
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pelton.serving.errors import ErrorResponse, HTTPProblemError, error_body

MAX_NUM_HEADERS = 128


class BoundedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *args: Any, max_header_bytes: int, header_timeout_s: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self._max_header_bytes = max_header_bytes
        self._header_timeout_s = header_timeout_s
        self._is_in_head = True
        self._is_refused = False
        self._num_head_bytes = 0  # in parts that did not complete it
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        super().data_received(data)
        if self._is_in_head and not self._is_refused:
            self._num_head_bytes += len(data)
            if self._num_head_bytes > self._max_header_bytes:
                self._refuse_size()
            elif self._timer is None:
                self._arm()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = True
        self._num_head_bytes = 0

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._disarm()
        num_bytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if num_bytes > self._max_header_bytes or len(self.headers) > MAX_NUM_HEADERS:
            self._refuse_size()
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._is_refused:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        self._refuse(HTTPProblemError(400, "this is not HTTP/1.1 that can be read", code="invalid_http"))

    def _refuse_size(self) -> None:
        text = (
            f"the head of the request is larger than {self._max_header_bytes} bytes or has more than "
            f"{MAX_NUM_HEADERS} fields"
        )
        self._refuse(HTTPProblemError(431, text, code="headers_too_large"))

    def _time_out(self) -> None:
        self._timer = None
        if not self._num_head_bytes and self.cycle is None:  # nothing ever came, and nobody waits for an answer
            self.transport.close()
            return
        text = f"the head of the request did not arrive within {self._header_timeout_s:g} s"
        self._refuse(HTTPProblemError(408, text, code="request_timeout"))

    def _refuse(self, error: HTTPProblemError) -> None:
        """Answer and close, unless an earlier request of the connection is being answered: then only close."""
        if self._is_refused or self.transport.is_closing():
            return
        self._is_refused = True
        self._disarm()
        if self.cycle is None or self.cycle.response_complete:
            body = msgspec.json.encode(ErrorResponse(error=error_body(error)))
            head = (
                f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()

    def _arm(self) -> None:
        self._timer = self.loop.call_later(self._header_timeout_s, self._time_out)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
