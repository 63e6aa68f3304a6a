"""One connection of a device to one gateway over HTTP: a stream to read, POSTs to write.

Never reused: what goes wrong ends it, and `HttpTransport` makes another. Whatever a server says is
read within bounds, and a stream that has been silent for three beats is left.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx

from tidegate.errors import ConfigError, DeviceRefusedError, IdentityError, UnavailableError
from tidegate.link import statements
from tidegate.link.http_access import CHALLENGE_BYTES, PATH, header, sign_send, sign_stream
from tidegate.link.http_frames import POST_BYTES, Frame, FrameSplitter, Kind
from tidegate.link.http_stream import BEAT_S
from tidegate.link.http_url import HttpUrl
from tidegate.link.identity import DeviceIdentity
from tidegate.link.registry import EXPIRED, REVOKED
from tidegate.link.topics import check_name

CONNECT_TIMEOUT_S = 5.0
SILENT_S = 3 * BEAT_S
WINDOW_BYTES = 512 * 1024
"""That wait to be sent; beyond them `publish` waits."""
POSTS = 2
"""Under way at once: what is said meanwhile goes with the next one."""
GOODBYE_S = 1.0
"""How long a connection that is left waits for what it has ready to be sent."""
_IDLE_S = 10.0
"""The gateway closes a connection that was idle for 30 s: be earlier."""
_BUSY_S = 0.5
_MOST_ANSWER_BYTES = 4096
_CODE = re.compile(r"[a-z_]{1,32}")


class Peer:
    """A connection that stands once it has called `opened`.

    Args:
        url: where the gateway is.
        tls: for `https`.
        identity: who we are.
        who: reads that anew: our key may be replaced while the stream stands.
        take: gets every advert and every message.
        opened: called with the gateway's name.
    """

    def __init__(
        self,
        url: HttpUrl,
        tls: ssl.SSLContext | None,
        identity: DeviceIdentity,
        *,
        who: Callable[[], DeviceIdentity],
        take: Callable[[Frame], None],
        opened: Callable[[str], None],
    ) -> None:
        self._base = f"{url}{PATH}"
        self._identity, self._who = identity, who
        self._take, self._opened = take, opened
        self._gateway_id = ""
        self._challenge = b""
        self._number = 0
        self._posting = 0
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._something = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._closed = False
        self._client = httpx.AsyncClient(
            verify=not url.loopback if tls is None else tls,
            timeout=httpx.Timeout(SILENT_S, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=POSTS + 2, keepalive_expiry=_IDLE_S),
            # A proxy is for the way out, never for this machine.
            trust_env=not url.loopback,
            headers={"Accept-Encoding": "identity", "User-Agent": "tidegate"},
        )

    async def serve(self) -> None:
        """Connect, then send and receive until it ends, which is by an exception.

        Raises:
            UnavailableError: the gateway cannot be reached, or has gone.
            DeviceRefusedError: it takes nothing from us.
        """
        try:
            async with self._client:
                await self._ask()
                statement = sign_stream(self._identity, self._gateway_id, self._challenge)
                said = header(self._identity.handle, statement)
                async with self._call("GET", "/stream", said) as stream:
                    if stream.status_code != 200:
                        raise await _refusal(stream)
                    await self._carry(stream)
        finally:
            self._closed = True
            self._room.set()

    async def greet(self) -> str:
        """The name of the gateway that answers there; nothing is said of us.

        Raises:
            UnavailableError: none does.
        """
        async with self._client:
            await self._ask()
        return self._gateway_id

    async def publish(self, message: bytes) -> None:
        """Send it with what else waits, once there is room.

        Raises:
            UnavailableError: the connection has ended. Nothing was queued.
        """
        while self._waiting_bytes >= WINDOW_BYTES and not self._closed:
            self._room.clear()
            await self._room.wait()
        if self._closed:
            raise UnavailableError("http: the connection has ended")
        frame = Frame(Kind.MESSAGE, message).encode()
        self._waiting.append(frame)
        self._waiting_bytes += len(frame)
        self._something.set()

    async def _ask(self) -> None:
        """Learn the gateway's name and a challenge."""
        async with self._call("GET", "/challenge", None) as answer:
            if answer.status_code != 200:
                raise await _refusal(answer)
            body = await _bounded(answer)
        try:
            fields = json.loads(body)
            self._gateway_id = check_name("gateway", statements.text(fields, "gateway"))
            self._challenge = statements.hexadecimal(fields, "challenge", CHALLENGE_BYTES)
        except (ValueError, AttributeError, RecursionError, ConfigError, IdentityError):
            raise UnavailableError("what answers there is no gateway") from None

    async def _carry(self, stream: httpx.Response) -> None:
        tasks = [asyncio.create_task(self._read(stream))]
        tasks += [asyncio.create_task(self._send()) for _ in range(POSTS)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except asyncio.CancelledError:
            await self._drain()
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, stream: httpx.Response) -> None:
        splitter = FrameSplitter()
        stands = False
        try:
            async for data in stream.aiter_raw():
                for frame in splitter.feed(data):
                    if not stands:
                        stands = True
                        self._opened(self._gateway_id)
                    if frame.kind is Kind.BYE:
                        raise _goodbye(frame.data)
                    if frame.kind is not Kind.BEAT:
                        self._take(frame)
        except httpx.HTTPError as error:
            raise UnavailableError(_reason(error)) from error
        raise UnavailableError("the gateway closed the stream")

    async def _send(self) -> None:
        while True:
            await self._something.wait()
            body = self._batch()
            self._posting += 1
            try:
                await self._post(body)
            finally:
                self._posting -= 1

    def _batch(self) -> bytes:
        body = bytearray()
        while self._waiting and (not body or len(body) + len(self._waiting[0]) <= POST_BYTES):
            body += self._waiting.popleft()
        self._waiting_bytes -= len(body)
        if not self._waiting:
            self._something.clear()
        self._room.set()
        return bytes(body)

    async def _post(self, body: bytes) -> None:
        """Bring one body; what a busy gateway does not take is lost, and the session repeats it."""
        for is_last in (False, True):
            number, self._number = self._number, self._number + 1
            statement = sign_send(
                self._identity, self._gateway_id, self._challenge, number=number, body=body
            )
            said = header(self._challenge.hex(), statement)
            try:
                async with self._call("POST", "/send", said, body) as answer:
                    if answer.status_code in (429, 503):
                        await asyncio.sleep(_BUSY_S)
                    elif answer.status_code != 204 and (is_last or answer.status_code != 401):
                        raise await _refusal(answer)
                    if answer.status_code != 401:
                        return
                self._identity = await asyncio.to_thread(self._who)
            except _LostError:
                # A connection may be closed just when it is used again: one more, a fresh one.
                if is_last:
                    raise

    @asynccontextmanager
    async def _call(
        self, method: str, path: str, said: str | None, body: bytes | None = None
    ) -> AsyncIterator[httpx.Response]:
        headers = {} if said is None else {"Authorization": said}
        if body is not None:
            headers["Content-Type"] = "application/octet-stream"
        try:
            async with self._client.stream(
                method, self._base + path, headers=headers, content=body
            ) as response:
                yield response
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _LostError(_reason(error)) from None

    async def _drain(self) -> None:
        try:
            async with asyncio.timeout(GOODBYE_S):
                while self._waiting or self._posting:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            return


class _LostError(UnavailableError):
    """A connection could not be made, or broke."""


async def _bounded(answer: httpx.Response) -> bytes:
    """The start of a body; nobody sends us more than that of one that is no stream."""
    body = bytearray()
    async for data in answer.aiter_raw():
        body += data
        if len(body) >= _MOST_ANSWER_BYTES:
            break
    return bytes(body[:_MOST_ANSWER_BYTES])


async def _refusal(answer: httpx.Response) -> UnavailableError | DeviceRefusedError:
    """What an answer that is no success means."""
    try:
        code = json.loads(await _bounded(answer))["error"]["code"]
    except (ValueError, KeyError, TypeError, RecursionError):
        code = None
    told = code if isinstance(code, str) and _CODE.fullmatch(code) else "no reason given"
    if answer.status_code == 403 and told == DeviceRefusedError.code:
        return DeviceRefusedError("the gateway takes nothing from this device any more")
    return UnavailableError(f"HTTP {answer.status_code}: {told}")


def _goodbye(data: bytes) -> UnavailableError | DeviceRefusedError:
    told = data.decode("ascii", "replace")
    if told in (REVOKED, EXPIRED):
        return DeviceRefusedError(f"the gateway takes nothing from this device any more: {told}")
    shown = told if _CODE.fullmatch(told) else "no reason given"
    return UnavailableError(f"the gateway ended the stream: {shown}")


def _reason(error: Exception) -> str:
    """What went wrong, without a URL and without what a library thinks of it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"TLS: certificate refused: {cause.verify_message.lower()}"
        if isinstance(cause, ssl.SSLError):
            return f"TLS: {(cause.reason or type(cause).__name__).lower().replace('_', ' ')}"
        if isinstance(cause, socket.gaierror):
            return "unknown host"
        if isinstance(cause, OSError) and cause.errno is not None:
            return os.strerror(cause.errno).lower()
        cause = cause.__cause__ or cause.__context__
    return {
        "ConnectTimeout": f"no answer within {CONNECT_TIMEOUT_S:g} s",
        "ReadTimeout": f"silent for {SILENT_S:g} s",
    }.get(type(error).__name__, f"connection lost ({type(error).__name__})")
