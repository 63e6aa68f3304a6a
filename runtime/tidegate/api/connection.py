"""One HTTP connection: uvicorn's protocol on h11, for peers who may dawdle, drip or not read.

uvicorn waits for ever for the first byte, for the end of a head, for the rest of a body that nobody
wants, and for a peer to read what it was sent. Here each of these has a time. While a request is
answered its own bounds hold (`tidegate.api.settings`), and none of these. uvicorn stops reading,
and with it noticing who leaves, when a peer sends more before it has its answer: here that waits in
a bounded buffer.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import sys
from asyncio import Transport
from typing import Final

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from tidegate.api.answers import error_object
from tidegate.api.tls import CLIENT_NAME, client_name

MOST_HEAD_BYTES: Final = 32 << 10
"""Request line and headers; a key and a trace's context take some hundred."""

MOST_EARLY_BYTES: Final = 64 << 10
"""Of requests that come before the answer to the one before them: some hundred small ones."""


class PatientProtocol(H11Protocol):
    """See the module."""

    idle_s = 30.0
    """Without a byte between two requests. Also how long a whole answer may wait for its reader to
    take some of it."""
    head_s = 10.0
    """From the first byte of a head to its end."""

    _timer: asyncio.TimerHandle | None = None
    _reading = False
    """A head has begun, or the rest of a body comes whose request was answered."""
    _unsent_bytes = 0
    """At the last look."""
    _early = b""
    """What came after a whole request and before the end of its answer."""

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self._app, self.app = self.app, self._serve
        name = client_name(transport.get_extra_info("peercert"))
        if name is not None:
            self.app_state = {**self.app_state, CLIENT_NAME: name}
        self._within(self.idle_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._rest()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self._awaited:
            self._early += data
            if len(self._early) > MOST_EARLY_BYTES:
                self._hang_up()
            return
        if not (self._busy or self._reading):
            self._reading = True
            self._within(self.head_s)
        super().data_received(data)
        if self._busy:
            self._rest()
        self._listen()

    def on_response_complete(self) -> None:
        """An answer was handed to the socket; the next request may be here already."""
        super().on_response_complete()
        self._unset_keepalive_if_required()  # ours knows of peers who do not read
        if not self._busy and not self.transport.is_closing():
            self._within(self.idle_s)
        self._listen()
        if self._early and not self.transport.is_closing():
            data, self._early = self._early, b""
            self.data_received(data)

    def _listen(self) -> None:
        """h11 has more than it may tell, and uvicorn reads no more: who leaves must be noticed."""
        if self._awaited:
            self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP; called while h11's error is handled."""
        if self._busy and self.cycle.response_started:
            self._hang_up()  # no room for another answer within one
            return
        error = sys.exc_info()[1]
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        told = f"the head is longer than {MOST_HEAD_BYTES} bytes" if status == 431 else msg
        body = json.dumps(error_object(told, status=status, code="invalid_request")).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        head = h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status])
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        self._within(self.head_s)  # to read it

    @property
    def _busy(self) -> bool:
        """A request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _awaited(self) -> bool:
        """A request came whole and is being answered: nothing else is due from the peer."""
        return self._busy and not self.cycle.more_body

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The app; an answer that it leaves unfinished ends with the connection.

        uvicorn would close it once everything was read, which a peer that does not read never does.
        """
        cycle = self.cycle  # the next request may be here before the app is done with this one
        try:
            await self._app(scope, receive, send)
        finally:
            if cycle.response_started and not cycle.response_complete:
                self._hang_up()

    def _hang_up(self) -> None:
        """At once: what was not read, the system need not keep either."""
        made = self.transport.get_extra_info("socket")
        if made is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _within(self, seconds: float) -> None:
        self._rest(reading=self._reading)
        self._unsent_bytes = self.transport.get_write_buffer_size()
        self._timer = self.loop.call_later(seconds, self._expire)

    def _rest(self, *, reading: bool = False) -> None:
        self._reading = reading
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        unsent_bytes = self.transport.get_write_buffer_size()
        if 0 < unsent_bytes < self._unsent_bytes:
            self._within(self.idle_s)
        elif unsent_bytes:
            self._hang_up()
        else:
            self.transport.close()
