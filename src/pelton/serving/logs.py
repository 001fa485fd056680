"""Log lines on standard error: coloured for a terminal, JSON otherwise. Never a prompt or an answer.

Of our own: importing the usual library would take a tenth of the time from start to first token.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

_COLOURS = {"info": 32, "warning": 33, "error": 31}  # ANSI
_level = logging.INFO


def configure_logs(level: str) -> None:
    """`level` as in `ServerConfig.log_level`. For the process as a whole."""
    global _level
    _level = getattr(logging, level.upper())
    # uvicorn reports through the standard library; its notes on starting and stopping repeat ours.
    logging.basicConfig(
        level=max(_level, logging.WARNING), stream=sys.stderr, format="%(levelname)s %(name)s %(message)s"
    )


class Logger:
    """An event in fixed words, and what varies as fields."""

    def info(self, event: str, **fields: Any) -> None:
        self._write("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._write("warning", event, fields)

    def exception(self, event: str, **fields: Any) -> None:
        """An error, with the traceback of the exception being handled."""
        self._write("error", event, {**fields, "exception": traceback.format_exc().rstrip()})

    def _write(self, level: str, event: str, fields: Mapping[str, Any]) -> None:
        if getattr(logging, level.upper()) >= _level:
            as_text = _as_line if sys.stderr.isatty() else _as_json
            print(as_text(level, event, fields), file=sys.stderr, flush=True)


def _as_json(level: str, event: str, fields: Mapping[str, Any]) -> str:
    time = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    return json.dumps({**fields, "event": event, "level": level, "timestamp": time}, default=repr)


def _as_line(level: str, event: str, fields: Mapping[str, Any]) -> str:
    fields = dict(fields)
    exception = fields.pop("exception", None)
    words = [f"\x1b[2m{datetime.now():%H:%M:%S.%f}\x1b[0m", f"\x1b[{_COLOURS[level]}m{level:<7}\x1b[0m", f"{event:<20}"]
    words += [f"\x1b[36m{name}\x1b[0m={_plain(value)}" for name, value in fields.items()]
    return " ".join(words) + (f"\n{exception}" if exception else "")


def _plain(value: Any) -> str:
    """What a client sent must not move the cursor."""
    text = str(value)
    return text if text.isprintable() and " " not in text and text else repr(text)
