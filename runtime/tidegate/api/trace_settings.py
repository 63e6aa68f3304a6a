"""Whether and where a service traces; the library that does it is loaded only if it shall."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from tidegate.api.tracing import Tracer
from tidegate.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceSettings:
    """Spans of one service.

    Raises:
        ConfigError: a value is not allowed.
    """

    endpoint: str
    """A collector's URL for OTLP over HTTP, with its path."""
    service: str
    """Its name in traces."""
    share: float = 1.0
    """Of the traces that begin here; who brings a trace decides for it."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            # No value is shown: a password may be in it.
            allowed = "a URL as http://127.0.0.1:4318/v1/traces"
            raise ConfigError("otlp-traces-endpoint", "...", allowed)
        if not 0 <= self.share <= 1:
            raise ConfigError("trace-share", self.share, "from 0 to 1")


@asynccontextmanager
async def tracing(settings: TraceSettings) -> AsyncIterator[Tracer]:
    """Trace while the block runs; what waits is sent at its end.

    Raises:
        ConfigError: the extra is not installed.
    """
    try:
        from tidegate.api.otel import OtelTracer, close_provider, open_provider
    except ModuleNotFoundError as error:
        allowed = f"left out, or used with pip install 'tidegate[otel]' ({error.name} is missing)"
        raise ConfigError("otlp-traces-endpoint", "...", allowed) from error
    provider = open_provider(settings.endpoint, service=settings.service, share=settings.share)
    try:
        yield OtelTracer(provider)
    finally:
        await asyncio.to_thread(close_provider, provider)
