"""Connections of peers who dawdle, drip, do not read or speak no HTTP, on a real socket."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from echobackend import EchoBackend
from loopback import serving
from starlette.types import Receive, Scope, Send

from tidegate.api.connection import MOST_EARLY_BYTES, MOST_HEAD_BYTES, PatientProtocol
from tidegate.api.http import HttpSettings, create_app
from tidegate.api.server import BoundServer

CHAT = "/v1/chat/completions"
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


class Brisk(PatientProtocol):
    """With less patience."""

    idle_s = 0.4
    head_s = 0.3


def connect(server: BoundServer, *, receive_bytes: int | None = None) -> socket.socket:
    made = socket.socket()
    if receive_bytes is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    made.settimeout(10)
    made.connect(("127.0.0.1", server.port))
    return made


def post(content: str, **fields: Any) -> bytes:
    body = json.dumps({"messages": [{"role": "user", "content": content}], **fields}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def read_all(sock: socket.socket) -> bytes:
    """Until the server hangs up."""
    try:
        return read_to_the_end(sock)
    except ConnectionResetError:
        return b""


def read_to_the_end(sock: socket.socket) -> bytes:
    got = b""
    while piece := sock.recv(65536):
        got += piece
    return got


def healthy(sock: socket.socket) -> bool:
    """Read one answer of `/health`."""
    got = b""
    while not got.endswith(b"}"):
        piece = sock.recv(65536)
        assert piece, got
        got += piece
    return got.startswith(b"HTTP/1.1 200")


def drip(sock: socket.socket, data: bytes, *, within_s: float = 8.0) -> float:
    """Send a byte every 50 ms; the seconds until the server hung up."""
    began_s = time.monotonic()
    sock.settimeout(0.05)
    for byte in data:
        assert time.monotonic() - began_s < within_s, "it was never hung up on"
        try:
            sock.sendall(bytes([byte]))
            if sock.recv(65536) == b"":
                return time.monotonic() - began_s
        except TimeoutError:
            continue
        except OSError:
            return time.monotonic() - began_s
    raise AssertionError("everything was taken")


def soon(condition: Callable[[], bool], *, within_s: float = 8.0) -> None:
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() - began_s < within_s, "it never happened"
        time.sleep(0.01)


def open_connections(server: BoundServer) -> int:
    return len(server._server.server_state.connections)


def test_a_connection_that_says_nothing_is_closed() -> None:
    with serving(create_app(EchoBackend()), protocol=Brisk) as server, connect(server) as sock:
        assert read_all(sock) == b""
        soon(lambda: open_connections(server) == 0)


def test_a_kept_connection_is_closed_once_nothing_comes_for_long() -> None:
    with serving(create_app(EchoBackend()), protocol=Brisk) as server, connect(server) as sock:
        for _ in range(3):  # each within its time
            sock.sendall(HEALTH)
            assert healthy(sock)
            time.sleep(0.2)
        began_s = time.monotonic()
        assert read_all(sock) == b""
        assert time.monotonic() - began_s < 5


@pytest.mark.parametrize("before", [b"", HEALTH], ids=["at first", "after an answer"])
def test_a_head_that_drips_is_hung_up_on(before: bytes) -> None:
    with serving(create_app(EchoBackend()), protocol=Brisk) as server, connect(server) as sock:
        if before:
            sock.sendall(before)
            assert healthy(sock)
        assert drip(sock, b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 500) < 5


def test_the_rest_of_a_body_that_nobody_wants_may_not_drip_for_ever() -> None:
    with serving(create_app(EchoBackend()), protocol=Brisk) as server, connect(server) as sock:
        sock.sendall(HEALTH.replace(b"\r\n\r\n", b"\r\nContent-Length: 1000000\r\n\r\n"))
        assert healthy(sock)
        assert drip(sock, b"x" * 500) < 5


def test_an_answer_may_take_longer_than_any_patience_with_connections() -> None:
    backend = EchoBackend(word_s=0.2)
    with serving(create_app(backend), protocol=Brisk) as server, connect(server) as sock:
        for stream in (True, False):
            sock.sendall(post("one two three", stream=stream))
            got = b""
            while not (got.endswith(b"0\r\n\r\n") if stream else b"one two three" in got):
                piece = sock.recv(65536)
                assert piece, got
                got += piece
        assert backend.ended == 2


def test_requests_sent_at_once_on_one_connection_are_answered_in_turn() -> None:
    with serving(create_app(EchoBackend()), protocol=Brisk) as server, connect(server) as sock:
        sock.sendall(HEALTH * 3 + post("one", stream=True) + HEALTH)
        assert read_all(sock).count(b"HTTP/1.1 200") == 5


@pytest.mark.parametrize("early", [b"\r\n", HEALTH, HEALTH * 30], ids=["a line", "one", "many"])
@pytest.mark.parametrize("apart", [True, False], ids=["apart", "at once"])
def test_who_sends_more_before_its_answer_and_leaves_is_noticed(early: bytes, apart: bool) -> None:
    backend = EchoBackend(word_s=30.0)
    with serving(create_app(backend)) as server:
        with connect(server) as sock:
            sock.sendall(post("one two") + (b"" if apart else early))
            soon(lambda: backend.begun == 1)
            if apart:
                sock.sendall(early)
                time.sleep(0.05)  # to be read on its own
        soon(lambda: backend.closed == 1)
        soon(lambda: open_connections(server) == 0)


def test_who_asked_for_another_protocol_and_leaves_is_noticed() -> None:
    backend = EchoBackend(word_s=30.0)
    upgrade = b"\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    with serving(create_app(backend)) as server:
        with connect(server) as sock:
            sock.sendall(post("one two").replace(b"\r\nHost: x\r\n", upgrade))
            soon(lambda: backend.begun == 1)
        soon(lambda: backend.closed == 1)


def test_requests_sent_during_an_answer_are_answered_in_turn_piece_by_piece() -> None:
    backend = EchoBackend(word_s=0.1)
    with serving(create_app(backend)) as server, connect(server) as sock:
        sock.sendall(post("one two three", stream=True) + HEALTH[:9])
        soon(lambda: backend.begun == 1)
        later = HEALTH[9:] + post("four five", stream=True)
        for place in range(0, len(later), 50):
            sock.sendall(later[place : place + 50])
            time.sleep(0.005)
        sock.sendall(HEALTH.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        got = read_all(sock)
        assert got.count(b"HTTP/1.1 200") == 4
        assert got.index(b"three") < got.index(b'"healthy"') < got.index(b"five")


def test_who_sends_too_much_before_its_answer_is_hung_up_on() -> None:
    backend = EchoBackend(word_s=30.0)
    with serving(create_app(backend)) as server, connect(server) as sock:
        sock.sendall(post("one two"))
        soon(lambda: backend.begun == 1)
        with suppress(OSError):
            sock.sendall(HEALTH * (MOST_EARLY_BYTES // len(HEALTH) + 1))
        soon(lambda: backend.closed == 1)
        soon(lambda: open_connections(server) == 0)


def test_what_is_left_to_do_after_an_answer_is_not_held_against_the_next_request() -> None:
    backend = EchoBackend(word_s=0.02)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await served(scope, receive, send)
        await asyncio.sleep(0.03)  # while the next answer has begun

    served = create_app(backend)
    with serving(app) as server, connect(server) as sock:
        for _ in range(3):
            sock.sendall(post("one two three four", stream=True))
            got = b""
            while not got.endswith(b"0\r\n\r\n"):
                piece = sock.recv(65536)
                assert piece, got
                got += piece
    assert backend.ended == 3


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([b"X-%d: a" % number for number in range(150)], b"at most 100 headers"),
        ([b"X-Long: " + b"a" * 30_000, b"Y-Long: " + b"a" * 30_000], b"at most 100 headers and"),
    ],
    ids=["many", "long"],
)
def test_a_head_that_is_too_large_is_refused_by_name(lines: list[bytes], told: bytes) -> None:
    with serving(create_app(EchoBackend())) as server, connect(server) as sock:
        sock.sendall(b"\r\n".join([b"GET /health HTTP/1.1", b"Host: x", *lines]) + b"\r\n\r\n")
        sock.shutdown(socket.SHUT_WR)
        answer = read_all(sock)
        assert answer.startswith(b"HTTP/1.1 431")
        assert told in answer


def test_a_head_that_never_ends_is_refused_once_it_is_too_large() -> None:
    with serving(create_app(EchoBackend())) as server, connect(server) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * (MOST_HEAD_BYTES + 1))
        head, _, body = read_all(sock).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 431")
        assert str(MOST_HEAD_BYTES) in json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    "sent",
    [
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\xff" * 64 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nNo Colon\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nnothing like a chunk\r\n",
    ],
)
def test_what_is_no_http_gets_an_error_object(sent: bytes) -> None:
    backend = EchoBackend()
    with serving(create_app(backend)) as server, connect(server) as sock:
        sock.sendall(sent)
        head, _, body = read_all(sock).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400")
        assert json.loads(body)["error"]["type"] == "invalid_request_error"
        soon(lambda: open_connections(server) == 0)
    assert backend.begun == 0


def test_nonsense_after_a_request_ends_its_connection_and_its_answer_stays_whole() -> None:
    backend = EchoBackend(word_s=0.05)
    with serving(create_app(backend)) as server, connect(server) as sock:
        sock.sendall(post("one two three", stream=True) + b"\x00\x01nonsense\r\n\r\n")
        got = read_all(sock)
        assert b"[DONE]" in got
        soon(lambda: open_connections(server) == 0)


def test_a_stream_that_is_not_read_costs_little_and_ends_with_its_connection() -> None:
    backend = EchoBackend(repeat=2000)  # 200 MB
    app = create_app(backend, settings=HttpSettings(write_timeout_s=0.5))
    with serving(app) as server, connect(server, receive_bytes=4096) as stuck:
        stuck.sendall(post(" ".join(["w" * 10_000] * 10), stream=True, max_tokens=20_000))
        soon(lambda: backend.begun == 1)
        soon(lambda: open_connections(server) == 1)
        (connection,) = server._server.server_state.connections
        most = 0

        def over() -> bool:
            nonlocal most
            most = max(most, connection.transport.get_write_buffer_size())
            return open_connections(server) == 0

        soon(over)
        assert backend.closed == 1
        # asyncio's mark and one event.
        assert most < (64 << 10) + 20_000
        with pytest.raises(ConnectionResetError):
            read_to_the_end(stuck)


def test_a_whole_answer_that_is_not_read_is_dropped_with_its_connection() -> None:
    backend = EchoBackend(repeat=100)
    with (
        serving(create_app(backend), protocol=Brisk) as server,
        connect(server, receive_bytes=4096) as stuck,
    ):
        stuck.sendall(post(" ".join(["w" * 10_000] * 10), max_tokens=20_000))
        soon(lambda: backend.ended == 1)
        soon(lambda: open_connections(server) == 0)


def test_a_whole_answer_that_is_read_slowly_arrives() -> None:
    backend = EchoBackend(repeat=100)
    with (
        serving(create_app(backend), protocol=Brisk) as server,
        connect(server, receive_bytes=65536) as slow,
    ):
        slow.sendall(post(" ".join(["w" * 10_000] * 10), max_tokens=20_000))
        got, began_s = 0, time.monotonic()
        while got < 10_000_000:
            piece = slow.recv(100_000)
            assert piece, f"it ended after {got} bytes"
            got += len(piece)
            if time.monotonic() - began_s < 2:  # for longer than `idle_s`
                time.sleep(0.005)
