"""The enrolment endpoint: `POST /enrol` takes a sealed request and answers with a sealed answer.

It needs neither TLS nor an API key: what comes is sealed to the token's key and proves the token,
what goes is sealed to the device and signed. A refusal is a short JSON error in clear.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tidegate.errors import CapacityError, ConfigError, IdentityError, TidegateError
from tidegate.link.enrolment import MOST_MESSAGE_BYTES
from tidegate.link.enrolment_gateway import Enrolment

PATH = "/enrol"
_BODY_S = 10.0
"""For one request to arrive; a slow sender holds no place for longer."""


def endpoint(enrolment: Enrolment) -> Starlette:
    """The app; requests are answered one at a time, each off the event loop."""
    one_at_a_time = asyncio.Lock()

    async def enrol(request: Request) -> Response:
        try:
            async with asyncio.timeout(_BODY_S):
                body = await _read(request)
        except (TimeoutError, ClientDisconnect):
            return _refusal(IdentityError("enrolment: the request did not arrive"), 408)
        if body is None:
            return _refusal(IdentityError("enrolment: the request is too large"), 413)
        source = "" if request.client is None else network_of(request.client.host)
        try:
            async with one_at_a_time:
                answer = await asyncio.to_thread(enrolment.enrol, body, source=source)
        except (IdentityError, ConfigError) as error:
            return _refusal(error, 403)
        except CapacityError as error:
            wait = {"Retry-After": str(math.ceil(error.retry_after_s))}
            return _refusal(error, 429, wait)
        return Response(answer, media_type="application/octet-stream")

    return Starlette(routes=[Route(PATH, enrol, methods=["POST"])])


def network_of(host: str) -> str:
    """Whose address it is: of IPv6 the first 64 bits, since one machine has all the rest."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.version == 4:
        return host
    return str(ipaddress.ip_network(f"{address}/64", strict=False))


async def _read(request: Request) -> bytes | None:
    """The body; None when it is larger than any request."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_MESSAGE_BYTES:
            return None
    return body


def _refusal(
    error: TidegateError, status: int, headers: dict[str, str] | None = None
) -> JSONResponse:
    content = {"error": {"code": error.code, "message": str(error)}}
    return JSONResponse(content, status_code=status, headers=headers)
