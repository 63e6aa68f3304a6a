"""The routes of a gateway's HTTP path, for devices that cannot reach the broker.

    GET  /tidegate/1/challenge   the gateway's name and something to sign
    GET  /tidegate/1/stream      frames for one device, until it leaves or is sent away
    POST /tidegate/1/send        frames from the device whose stream is open

A listener of its own and not the API's: devices bring a signature instead of an API key, and who
may reach the one need not reach the other. Nobody learns from an answer whether a handle exists.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from tidegate.api.body import unless_gone
from tidegate.api.door import ClientGoneError
from tidegate.errors import (
    CapacityError,
    DeviceRefusedError,
    IdentityError,
    LinkError,
    RequestError,
    TidegateError,
    UnavailableError,
)
from tidegate.link.core_thread import CoreThread
from tidegate.link.http_access import PATH, Challenges, read_header
from tidegate.link.http_door import HttpDoor
from tidegate.link.http_frames import POST_BYTES, Kind, split
from tidegate.link.http_hub import HttpHub
from tidegate.link.http_stream import BEAT_S, DeviceStream

_STATUS: tuple[tuple[type[TidegateError], int], ...] = (
    (DeviceRefusedError, 403),
    (IdentityError, 401),
    (CapacityError, 503),
    (UnavailableError, 409),
    (LinkError, 400),
)
_MESSAGES = {
    400: "the body is no row of frames",
    401: "this device is not recognised here",
    403: "the gateway takes nothing from this device any more",
    409: "this device has no stream open here",
    503: "there is no room now",
}
_HEADERS = {"Cache-Control": "no-store"}


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkHttpTiming:
    """Waits of the routes, in seconds."""

    beat_s: float = BEAT_S
    body_s: float = 15.0
    """For a body to come whole."""
    write_s: float = 20.0
    """For a device to take what is written, which is 64 KiB or one message."""
    recheck_s: float = 5.0
    """Between looks at the registry for devices whose stream is open."""


class LinkHttp:
    """The ASGI app. `close` it after the server has ended.

    Args:
        door: decides who may; this app closes it.
        hub: what the streams belong to; the app's own task runs with it.
        timing: waits.
    """

    def __init__(
        self, door: HttpDoor, hub: HttpHub, *, timing: LinkHttpTiming | None = None
    ) -> None:
        self._door, self._hub = door, hub
        self._timing = timing or LinkHttpTiming()
        self._challenges = Challenges()
        self._thread = CoreThread("tidegate-http")
        hub.serve_with(self._send_away_refused)

    async def close(self) -> None:
        await self._thread.call(self._door.close)
        self._thread.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        routes: dict[tuple[str, str], Callable[..., Awaitable[None]]] = {
            ("GET", f"{PATH}/challenge"): self._challenge,
            ("GET", f"{PATH}/stream"): self._stream,
            ("POST", f"{PATH}/send"): self._send,
        }
        route = routes.get((scope["method"], scope["path"]))
        try:
            if route is None:
                await _refusal(404, "not_found", "no such path")(scope, receive, send)
                return
            await route(scope, receive, send)
        except ClientGoneError:
            return
        except RequestError as error:
            response = _refusal(error.status, error.code, str(error))
            response.headers["Connection"] = "close"  # the rest of the body is not worth reading
            await response(scope, receive, send)
        except TidegateError as error:
            status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
            message = _MESSAGES.get(status, "internal error")
            await _refusal(status, error.code, message)(scope, receive, send)

    async def _challenge(self, scope: Scope, receive: Receive, send: Send) -> None:
        challenge = self._challenges.issue(time.monotonic())
        body = {"gateway": self._door.gateway_id, "challenge": challenge.hex()}
        await JSONResponse(body, headers=_HEADERS)(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        handle, statement = read_header(Headers(scope=scope).get("authorization", ""))
        challenge = await self._thread.call(self._door.open_stream, handle, statement)
        self._challenges.redeem(time.monotonic(), challenge)
        stream = self._hub.open(handle, challenge)
        try:
            headers = [
                (b"content-type", b"application/octet-stream"),
                (b"cache-control", b"no-store"),
                (b"x-accel-buffering", b"no"),  # nginx would hold back what it thinks too little
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await unless_gone(receive, self._pour(stream, send))
        finally:
            self._hub.close(stream)

    async def _pour(self, stream: DeviceStream, send: Send) -> None:
        while data := await stream.take(self._timing.beat_s):
            try:
                async with asyncio.timeout(self._timing.write_s):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except TimeoutError:
                # It takes nothing. Ending without the last chunk makes the server hang up.
                raise ClientGoneError from None
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        name, statement = read_header(headers.get("authorization", ""))
        stream = self._find(name)
        body = await self._body(headers, receive)
        try:
            number = await self._thread.call(
                self._door.take_send, stream.handle, stream.challenge, statement, body
            )
        except DeviceRefusedError:
            await self._send_away((stream.handle,))
            raise
        # It may have ended meanwhile; and what was taken already changes nothing a second time.
        if self._find(name).numbers.take(number):
            for frame in split(body):
                if frame.kind is Kind.MESSAGE:
                    self._hub.receive(stream, frame.data)
        await Response(status_code=204, headers=_HEADERS)(scope, receive, send)

    def _find(self, name: str) -> DeviceStream:
        try:
            stream = self._hub.find(bytes.fromhex(name))
        except ValueError:
            stream = None
        if stream is None:
            raise UnavailableError("http: no such stream")
        return stream

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        declared = headers.get("content-length", "")
        body = bytearray()
        more = not (declared.isdecimal() and int(declared[:20]) > POST_BYTES)
        try:
            async with asyncio.timeout(self._timing.body_s):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    body += message.get("body", b"")
                    if len(body) > POST_BYTES:
                        break
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            problem = f"did not come whole within {self._timing.body_s:g} s"
            raise RequestError("body", problem, status=408) from None
        raise RequestError("body", f"must be at most {POST_BYTES} bytes", status=413)

    async def _send_away_refused(self) -> None:
        """End the streams of devices that were revoked or have expired, within `recheck_s`."""
        while True:
            await asyncio.sleep(self._timing.recheck_s)
            await self._send_away(self._hub.handles)

    async def _send_away(self, handles: tuple[str, ...]) -> None:
        """End those of `handles` that are refused; each is told why."""
        try:
            refused = await self._thread.call(self._door.refused, handles)
        except CapacityError:
            return  # every body asks again; the streams are asked about next time
        for handle, code in refused.items():
            self._hub.end([handle], code)


def _refusal(status: int, code: str, message: str) -> JSONResponse:
    body = {"error": {"code": code, "message": message}}
    return JSONResponse(body, status, headers=dict(_HEADERS))
