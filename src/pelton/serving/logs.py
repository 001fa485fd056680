"""Log lines on standard error: coloured for a terminal, JSON otherwise. Never a prompt or an answer."""

from __future__ import annotations

import logging
import sys

import structlog


def configure_logs(level: str) -> None:
    """`level` as in `ServerConfig.log_level`. For the process as a whole."""
    number = getattr(logging, level.upper())
    is_terminal = sys.stderr.isatty()
    renderer = structlog.dev.ConsoleRenderer() if is_terminal else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=not is_terminal),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    # uvicorn reports through the standard library; its notes on starting and stopping repeat ours.
    logging.basicConfig(
        level=max(number, logging.WARNING), stream=sys.stderr, format="%(levelname)s %(name)s %(message)s"
    )
