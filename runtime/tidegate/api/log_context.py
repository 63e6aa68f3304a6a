"""Which request a line of the log belongs to: kept for its task, added by the log's formatter."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")


@dataclass(slots=True)
class LogContext:
    """Of one request; its id may become the backend's while it runs."""

    request_id: str
    trace_id: str | None


_current: ContextVar[LogContext | None] = ContextVar("tidegate_log_context", default=None)


def log_context() -> LogContext | None:
    """Of the request that this task serves; None in tasks that serve none."""
    return _current.get()


@contextmanager
def logged_as(context: LogContext) -> Iterator[None]:
    """Say so in every line that is logged in the block, and in tasks that begin in it."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)


def trace_id_of(traceparent: str) -> str | None:
    """The trace that a W3C `traceparent` header names; None for none, or one that is damaged.

    W3C Trace Context, section 3.2.2: an id of zeros and version ff are none.
    """
    found = _TRACEPARENT.fullmatch(traceparent)
    if found is None or traceparent.startswith("ff") or not found[1].strip("0"):
        return None
    return found[1]
