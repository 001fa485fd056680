"""The little HTTP that `pelton chat` needs: one request, one stream of events."""

from __future__ import annotations

import http.client
import json
from collections.abc import Generator
from typing import Any
from urllib.parse import urlsplit

from pelton.core.errors import ConfigError, PeltonError

# Silence longer than this means that the server hangs; a slow prefill is still an answer.
_TIMEOUT_S = 600.0


class ServerError(PeltonError):
    """The server cannot be reached, or answered with an error."""

    code = "server_error"


class HttpClient:
    """`base_url` may end in /v1. Every failure is a `ServerError` with one line."""

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        parts = urlsplit(base_url if "://" in base_url else f"http://{base_url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{base_url!r} is not a server's address, such as http://127.0.0.1:8000")
        self.base_url = f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/").removesuffix("/v1")
        self._is_tls = parts.scheme == "https"
        self._address = parts.netloc.rpartition("@")[2]
        self._path = urlsplit(self.base_url).path
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def get(self, path: str) -> Any:
        connection, response = self._send("GET", path, None)
        try:
            return json.loads(response.read())
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ServerError(f"{self.base_url}{path}: the answer is not JSON") from error
        finally:
            connection.close()

    def stream(self, path: str, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The JSON of each server-sent event, until [DONE]. Closing the generator hangs up, which stops the server."""
        connection, response = self._send("POST", path, {**body, "stream": True})
        try:
            for line in response:
                data = line.strip().removeprefix(b"data:").strip()
                if not line.startswith(b"data:") or not data:
                    continue
                if data == b"[DONE]":
                    return
                event = json.loads(data)
                if event.get("error"):
                    raise ServerError(_message(event))
                yield event
            raise ServerError("the server hung up before the answer ended")
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ServerError(f"the answer broke off: {str(error) or type(error).__name__}") from error
        finally:
            connection.close()

    def _send(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self._is_tls else http.client.HTTPConnection
        try:
            connection = kind(self._address, timeout=_TIMEOUT_S)
            payload = None if body is None else json.dumps(body).encode()
            connection.request(method, self._path + path, payload, self._headers)
            response = connection.getresponse()
            if response.status == 200:
                return connection, response
            content = response.read()
        except ConnectionRefusedError as error:
            raise ServerError(f"no server answers at {self.base_url}; `pelton serve` starts one") from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ServerError(f"{self.base_url} does not answer: {str(error) or type(error).__name__}") from error
        connection.close()
        raise ServerError(f"the server refused: HTTP {response.status}: {_message(content)}")


def _message(answer: Any) -> str:
    if isinstance(answer, bytes):
        try:
            answer = json.loads(answer)
        except ValueError:
            answer = answer.decode(errors="replace")
    for key in ("error", "message", "detail"):
        if isinstance(answer, dict) and key in answer:
            answer = answer[key]
    return " ".join(str(answer).split())[:300]
