"""A service's log on stderr, as text or JSON lines; what failed is told without its message.

An exception's message may quote what it tripped over, and that may be a prompt: of exceptions there
are types and frames, whoever logs them, a library or Python itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final

_log = logging.getLogger("tidegate")

_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


def add_log_format(parser: argparse.ArgumentParser) -> None:
    """Declare the flag."""
    parser.add_argument(
        "--log-format", choices=tuple(LOG_FORMATS), default="text", help="of the log on stderr"
    )


class TextFormatter(logging.Formatter):
    """Time, level, message; of an exception type and frames."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """The lines; a traceback that another handler has put into words is not taken over."""
        record.exc_text = None
        return super().format(record)

    def formatException(self, ei: _ExcInfo) -> str:  # noqa: N802
        """Without the message."""
        from tidegate.errors import describe_defect

        return "" if ei[1] is None else describe_defect(ei[1])


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and its request and trace."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; newlines of a message are escaped, so one record is one line."""
        from tidegate.api.log_context import log_context
        from tidegate.errors import describe_defect

        told: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        context = log_context()
        if context is not None:
            told["request_id"] = context.request_id
            if context.trace_id is not None:
                told["trace_id"] = context.trace_id
        if record.exc_info and record.exc_info[1] is not None:
            told["defect"] = describe_defect(record.exc_info[1])
        return json.dumps(told)


LOG_FORMATS: Final[dict[str, Callable[[], logging.Formatter]]] = {
    "text": TextFormatter,
    "json": JsonFormatter,
}


def start_log(formatter: logging.Formatter) -> None:
    """Send everything to stderr in this format: ours, libraries', warnings, and the last words."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    sys.excepthook = _last_words


def log_stray(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An event loop's handler of exceptions that nobody caught."""
    from tidegate.errors import describe_defect

    error = context.get("exception")
    what = "" if error is None else describe_defect(error)
    _log.error("%s: %s", context.get("message", "in the event loop"), what)


def _last_words(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    _log.critical("the process ends", exc_info=(kind, error, trace))
