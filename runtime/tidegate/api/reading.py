"""Calls that compute no tokens: the door's bounds, a body in, JSON out, a key that pays for one."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tidegate.api.admission import visit_of
from tidegate.api.body import read_json, unless_gone
from tidegate.api.door import ClientGoneError
from tidegate.api.settings import HttpSettings
from tidegate.errors import CapacityError


class ReadingEndpoint(ABC):
    """An ASGI endpoint of a call that computes no tokens."""

    def __init__(self, *, settings: HttpSettings, active: asyncio.BoundedSemaphore) -> None:
        self._settings, self._active = settings, active

    @abstractmethod
    async def _answer(self, data: object, scope: Scope) -> bytes:
        """The body of the answer, JSON. Where keys pay, `begin_reading` comes first."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if self._active.locked():
            limit = self._settings.max_calls
            raise CapacityError(f"{limit} calls are being answered already: try again later")
        async with self._active:
            data = await read_json(scope, receive, self._settings)
            visit = visit_of(scope)
            try:
                body = await unless_gone(receive, self._answer(data, scope))
            except ClientGoneError:
                raise  # it pays
            except Exception as error:
                if visit is not None:
                    visit.tally.reading_failed(error)
                raise
            if visit is not None:
                visit.tally.read_only(0)
        await Response(body, media_type="application/json")(scope, receive, send)


async def begin_reading(scope: Scope, model: str) -> None:
    """The caller's key pays for one request of `model` and for no tokens, where keys do.

    Raises:
        AccessError, LimitError, UnavailableError: see `Visit.admit`.
    """
    visit = visit_of(scope)
    if visit is not None:
        await visit.admit_tokens(0, model)
        visit.tally.begin_reading()
