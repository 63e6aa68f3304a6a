"""Cloud answers that outlived their caller: who asks again gets them, and HTTP shows them.

A daemon that is killed finishes its cloud requests after its restart, but whoever asked is gone.
A call that is repeated with the same `Idempotency-Key` gets that answer; for calls without one
there are::

    GET    /link/answers         what the outbox holds: no text
    GET    /link/answers/{id}    a whole answer's text
    DELETE /link/answers/{id}    forget it, or stop it while it runs

Nothing is kept for ever: the outbox is bounded in bytes and forgets a day after a deadline.
"""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from tidegate.api.wire import read_event
from tidegate.engine.events import Finished, TextDelta
from tidegate.errors import LinkError
from tidegate.link.device import DeviceLink
from tidegate.link.device_views import PendingRequest
from tidegate.link.envelope import REQUEST_ID_BYTES, RequestId
from tidegate.link.outbox import Outcome

_STATES = {Outcome.OPEN: "running", Outcome.DONE: "whole", Outcome.FAILED: "failed"}


def answer_routes(link: DeviceLink) -> list[BaseRoute]:
    """The routes of one link; they pass the same door as all others, keys included."""

    async def listed(_: Request) -> Response:
        return JSONResponse({"answers": [_shown(one) for one in await link.pending()]})

    async def one(request: Request) -> Response:
        held = await _find(link, request.path_params["id"])
        if held.outcome is not Outcome.DONE:
            return JSONResponse(_shown(held))
        payloads = await link.peek(held.request_id)
        return JSONResponse({**_shown(held), **_said(payloads)})

    async def forget(request: Request) -> Response:
        held = await _find(link, request.path_params["id"])
        if held.is_read:
            raise HTTPException(409, "its caller is reading it")
        await link.discard(held.request_id)
        return Response(status_code=204)

    return [
        Route("/link/answers", listed),
        Route("/link/answers/{id}", one),
        Route("/link/answers/{id}", forget, methods=["DELETE"]),
    ]


async def _find(link: DeviceLink, name: str) -> PendingRequest:
    try:
        request_id = RequestId(bytes.fromhex(name))
    except ValueError:
        raise HTTPException(404, "no such answer") from None
    if len(request_id) == REQUEST_ID_BYTES:
        for held in await link.pending():
            if held.request_id == request_id:
                return held
    raise HTTPException(404, "no such answer")


def _shown(held: PendingRequest) -> dict[str, object]:
    return {
        "id": held.request_id.hex(),
        "state": _STATES[held.outcome],
        "code": held.code or None,
        "age_s": round(held.age_s, 1),
        "held_bytes": held.held_bytes,
        "is_read": held.is_read,
    }


def _said(payloads: list[bytes]) -> dict[str, object]:
    """The text of an answer's events, and how it ended."""
    text: list[str] = []
    ended: dict[str, object] = {"finish_reason": None}
    for payload in payloads:
        try:
            event = read_event(payload)
        except LinkError as error:
            return {"text": "".join(text), "problem": str(error)}
        if isinstance(event, TextDelta):
            text.append(event.text)
        elif isinstance(event, Finished):
            ended = {
                "finish_reason": event.reason,
                "prompt_tokens": event.usage.prompt_tokens,
                "completion_tokens": event.usage.completion_tokens,
            }
    return {"text": "".join(text), **ended}
