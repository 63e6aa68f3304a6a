"""`POST /route/explain`: where a call would run now and why, in numbers; it runs nothing.

The body is that of a chat or of a completion, so what is explained is what would be asked. Served
only where the backend has a choice (`tidegate.api.backend.Explaining`).
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping

from starlette.routing import BaseRoute, Route
from starlette.types import Scope

from tidegate.api.backend import Backend, Explaining
from tidegate.api.models import chosen_model
from tidegate.api.reading import ReadingEndpoint, begin_reading
from tidegate.api.schema import Call, read_chat, read_completion
from tidegate.api.settings import HttpSettings
from tidegate.errors import RequestError

PATH = "/route/explain"


def read_explained(data: object) -> Call:
    """The body of `/route/explain`, as parsed JSON: that of the call to be explained.

    Raises:
        RequestError: it is neither a chat nor a completion, or one of its fields is wrong.
    """
    if not isinstance(data, dict):
        return read_chat(data)  # which refuses it
    chat, completion = (data.get(name) is not None for name in ("messages", "prompt"))
    if not chat and not completion:
        raise RequestError("messages", "is absent: must come, or else prompt")
    return read_chat(data) if chat else read_completion(data)


class ExplainEndpoint(ReadingEndpoint):
    """An ASGI endpoint."""

    def __init__(
        self,
        backend: Backend,
        explaining: Explaining,
        *,
        settings: HttpSettings,
        active: asyncio.BoundedSemaphore,
    ) -> None:
        super().__init__(settings=settings, active=active)
        self._backend, self._explaining = backend, explaining

    async def _answer(self, data: object, scope: Scope) -> bytes:
        call = read_explained(data)
        model = chosen_model(call.model, self._backend.models(), scope)
        await begin_reading(scope, model)
        told = _finite(await self._explaining.explain(call))
        return json.dumps(told, ensure_ascii=False, allow_nan=False).encode()


def _finite(value: object) -> object:
    """The same with null for numbers that JSON lacks: what is closed costs infinitely much."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value


def explain_routes(
    backend: Backend, *, settings: HttpSettings, active: asyncio.BoundedSemaphore
) -> list[BaseRoute]:
    """The route where there is something to explain; none, and so a 404, elsewhere."""
    if not isinstance(backend, Explaining):
        return []
    endpoint = ExplainEndpoint(backend, backend, settings=settings, active=active)
    return [Route(PATH, endpoint, methods=["POST"])]
