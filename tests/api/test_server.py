"""The HTTP surface on a real socket: disconnects, slow peers, limits, the official client."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import signal
import socket
import time
from collections.abc import Callable

import httpx
import openai
import pytest
from echobackend import EchoBackend
from loopback import serving

from tidegate.api.http import HttpSettings, create_app
from tidegate.api.server import BoundServer, serve_app
from tidegate.engine.events import Failed
from tidegate.errors import CapacityError, ConfigError, UnavailableError

HELLO: list[openai.types.chat.ChatCompletionMessageParam] = [
    {"role": "user", "content": "one two three"}
]
LONG = " ".join(["word"] * 2000)
BULKY = " ".join(["w" * 10_000] * 100)


def body(*, content: str = LONG, stream: bool = True) -> bytes:
    message = {"role": "user", "content": content}
    return json.dumps({"messages": [message], "stream": stream}).encode()


def head(length: int, *, kind: str = "application/json") -> bytes:
    lines = ("POST /v1/chat/completions HTTP/1.1", "Host: x", f"Content-Type: {kind}")
    return ("\r\n".join((*lines, f"Content-Length: {length}")) + "\r\n\r\n").encode()


def connect(server: BoundServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=10)


def soon(condition: Callable[[], bool], *, within_s: float = 5.0) -> float:
    """Wait for `condition`; how long it took."""
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() - began_s < within_s, "it never happened"
        time.sleep(0.005)
    return time.monotonic() - began_s


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_the_answer_at_once(stream: bool) -> None:
    backend = EchoBackend(word_s=0.05)
    with serving(create_app(backend)) as server:
        sock = connect(server)
        asked = body(stream=stream)
        sock.sendall(head(len(asked)) + asked)
        soon(lambda: backend.begun == 1)
        sock.close()
        assert soon(lambda: backend.closed == 1) < 2


def test_a_client_that_leaves_while_the_backend_is_silent_is_noticed() -> None:
    backend = EchoBackend(word_s=1000)
    with serving(create_app(backend)) as server:
        sock = connect(server)
        asked = body()
        sock.sendall(head(len(asked)) + asked)
        soon(lambda: backend.begun == 1)
        sock.close()
        assert soon(lambda: backend.closed == 1) < 2


def test_a_slow_reader_does_not_hold_up_the_others() -> None:
    backend = EchoBackend(repeat=100)  # 100 MB: more than the kernel buffers
    with serving(create_app(backend)) as server, connect(server) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        asked = body(content=BULKY)
        slow.sendall(head(len(asked)) + asked)
        soon(lambda: backend.begun == 1)
        with openai_client(server) as client:
            for _ in range(5):
                answer = client.chat.completions.create(
                    model="echo-1", messages=HELLO, max_tokens=3
                )
                assert answer.choices[0].message.content == "one two three"
        assert (backend.ended, backend.closed) == (5, 0)
        slow.close()
        soon(lambda: backend.closed == 1)


def test_a_reader_that_takes_nothing_is_given_up() -> None:
    backend = EchoBackend(repeat=100)
    settings = HttpSettings(write_timeout_s=0.3)
    with serving(create_app(backend, settings=settings)) as server, connect(server) as stuck:
        asked = body(content=BULKY)
        stuck.sendall(head(len(asked)) + asked)
        soon(lambda: backend.closed == 1)
        stuck.close()


def test_half_a_body_is_refused_in_time_and_its_connection_closed() -> None:
    backend = EchoBackend()
    with serving(create_app(backend, settings=HttpSettings(body_timeout_s=0.3))) as server:
        with connect(server) as sock:
            sock.sendall(head(1000) + b'{"messages":')
            answer = read_all(sock)
        assert answer.startswith(b"HTTP/1.1 408")
        with connect(server) as sock:
            sock.sendall(head(1000) + b'{"messages":')
        assert backend.begun == 0


def test_a_declared_length_over_the_limit_is_refused_before_the_body() -> None:
    with (
        serving(create_app(EchoBackend())) as server,
        connect(server) as sock,
    ):
        sock.sendall(head(10**15))
        assert read_all(sock).startswith(b"HTTP/1.1 413")


def read_all(sock: socket.socket) -> bytes:
    """Until the server closes."""
    return b"".join(iter(lambda: sock.recv(65536), b""))


def test_a_silent_stream_sends_heartbeats() -> None:
    settings = HttpSettings(heartbeat_s=0.05)
    with (
        serving(create_app(EchoBackend(word_s=0.3), settings=settings)) as server,
        httpx.Client(base_url=server.url) as client,
    ):
        asked = body(content="one two")
        headers = {"Content-Type": "application/json"}
        answer = client.post("/v1/chat/completions", content=asked, headers=headers)
    assert answer.text.count(": waiting\n\n") >= 4
    assert answer.text.endswith("data: [DONE]\n\n")


def test_calls_over_the_limit_are_told_to_wait() -> None:
    backend = EchoBackend(word_s=1000)
    with serving(create_app(backend, settings=HttpSettings(max_calls=1))) as server:
        first = connect(server)
        asked = body()
        first.sendall(head(len(asked)) + asked)
        soon(lambda: backend.begun == 1)
        with openai_client(server) as client, pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="echo-1", messages=HELLO)
        first.close()
        soon(lambda: backend.closed == 1)


def test_any_mix_of_leaving_and_staying_leaves_nothing_behind() -> None:
    backend = EchoBackend(word_s=0.002)
    settings = HttpSettings(max_calls=40)
    rng = random.Random(7)
    plans = [(rng.random() < 0.5, rng.choice([0.0, 0.01, 0.05, None])) for _ in range(40)]

    async def visit(server: BoundServer, stream: bool, stay_s: float | None) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        asked = body(content="word " * 30, stream=stream)
        writer.write(head(len(asked)).replace(b"Host", b"Connection: close\r\nHost") + asked)
        await writer.drain()
        got = b""
        if stay_s is None:
            got = await reader.read(-1)
        else:
            await asyncio.sleep(stay_s)
        writer.close()
        return got

    async def everybody(server: BoundServer) -> list[bytes]:
        return await asyncio.gather(*(visit(server, *plan) for plan in plans))

    with serving(create_app(backend, settings=settings)) as server:
        for got, (_, stay_s) in zip(asyncio.run(everybody(server)), plans, strict=True):
            assert stay_s is not None or got.startswith(b"HTTP/1.1 200")
        soon(lambda: backend.begun == backend.ended + backend.closed)
        assert backend.ended >= sum(stay_s is None for _, stay_s in plans)
        # All places are free again.
        assert asyncio.run(everybody(server))
        with openai_client(server) as client:
            client.chat.completions.create(model="echo-1", messages=HELLO)


def openai_client(server: BoundServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def test_the_official_client_chats_streams_and_lists() -> None:
    with serving(create_app(EchoBackend())) as server, openai_client(server) as client:
        answer = client.chat.completions.create(
            model="echo-1", messages=HELLO, extra_body={"tidegate": {"privacy": "local"}}
        )
        assert answer.choices[0].message.content == "one two three"
        assert answer.usage is not None
        assert answer.usage.total_tokens == 6
        assert answer.model_extra is not None
        assert answer.model_extra["tidegate"]["route"] == "edge"
        stream = client.chat.completions.create(
            model="echo-1", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        said = "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)
        assert said == "one two three"
        assert chunks[-1].usage is not None
        assert client.completions.create(model="echo-1", prompt="a b").choices[0].text == "a b"
        texts = client.completions.create(model="echo-1", prompt="a b", stream=True)
        assert "".join(one.choices[0].text for one in texts) == "a b"
        assert [card.id for card in client.models.list()] == ["echo-1"]


@pytest.mark.parametrize(
    ("backend", "raised"),
    [
        (EchoBackend(refuse=CapacityError("full")), openai.RateLimitError),
        (EchoBackend(refuse=UnavailableError("gone")), openai.InternalServerError),
        (EchoBackend(refuse=KeyError("x")), openai.InternalServerError),
    ],
)
def test_the_official_client_raises_its_own_classes(
    backend: EchoBackend, raised: type[Exception]
) -> None:
    with serving(create_app(backend)) as server, openai_client(server) as client:
        with pytest.raises(raised):
            client.chat.completions.create(model="echo-1", messages=HELLO)
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="gpt-9", messages=HELLO)
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="echo-1", messages=HELLO, n=99)
        assert caught.value.param == "n"


def test_the_official_client_meets_an_error_within_a_stream() -> None:
    broken = EchoBackend(
        break_after=1, breaking=Failed(code="unavailable", message="peer left", retryable=True)
    )
    with serving(create_app(broken)) as server, openai_client(server) as client:
        stream = client.chat.completions.create(model="echo-1", messages=HELLO, stream=True)
        with pytest.raises(openai.APIError, match="peer left"):
            list(stream)


def test_a_busy_port_is_one_clear_error() -> None:
    with (
        serving(create_app(EchoBackend())) as server,
        pytest.raises(ConfigError, match=f"port = {server.port}: must be free"),
    ):
        BoundServer(create_app(EchoBackend()), "127.0.0.1", server.port)


def test_a_peer_that_vanishes_can_be_hung_up_on() -> None:
    server = BoundServer(create_app(EchoBackend()), "127.0.0.1", 0, gone_after_s=30.0)
    wait_ms = server._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    server.close()
    assert wait_ms == 30_000


def test_other_addresses_that_cannot_be_bound_are_named() -> None:
    app = create_app(EchoBackend())
    with pytest.raises(ConfigError, match="port = 70000"):
        BoundServer(app, "127.0.0.1", 70000)
    for host in ("203.0.113.7", "a..b", "x" * 300):
        with pytest.raises(ConfigError, match=r"host = .*this machine"):
            BoundServer(app, host, 0)


def test_draining_finishes_the_answers_in_flight() -> None:
    backend = EchoBackend(word_s=0.1)
    with (
        serving(create_app(backend)) as server,
        openai_client(server) as client,
        client.chat.completions.create(model="echo-1", messages=HELLO, stream=True) as stream,
    ):
        soon(lambda: backend.begun == 1)
        server.drain()
        said = "".join(one.choices[0].delta.content or "" for one in stream)
        assert said == "one two three"


def test_cancelling_ends_calls_in_flight_and_leaves_signals_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = EchoBackend(word_s=1000)
    before = signal.getsignal(signal.SIGTERM)

    async def cancel_midway() -> None:
        server = BoundServer(create_app(backend), "127.0.0.1", 0)
        running = asyncio.create_task(server.run())
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        asked = body()
        writer.write(head(len(asked)) + asked)
        while backend.begun == 0:
            await asyncio.sleep(0.01)
        assert signal.getsignal(signal.SIGTERM) is before
        running.cancel()
        async with asyncio.timeout(2):
            with pytest.raises(asyncio.CancelledError):
                await running
        assert backend.closed == 1
        writer.close()

    with caplog.at_level(logging.INFO):
        asyncio.run(cancel_midway())
    assert not [one for one in caplog.records if one.name != "asyncio"]


def test_who_is_cut_off_by_the_end_of_the_service_is_told_to_come_again() -> None:
    async def cut_off() -> bytes:
        server = BoundServer(create_app(EchoBackend(word_s=1000)), "127.0.0.1", 0)
        running = asyncio.create_task(server.run())
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(head(100))  # and no body
        await asyncio.sleep(0.1)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        answer = await asyncio.wait_for(reader.read(-1), 5)
        writer.close()
        return answer

    answer = asyncio.run(cut_off())
    assert answer.startswith(b"HTTP/1.1 503")
    assert b"retry-after: 2" in answer.lower()
    assert b'"unavailable"' in answer


def test_serve_app_runs_until_cancelled() -> None:
    async def briefly() -> None:
        async with asyncio.timeout(0.3):
            await serve_app(create_app(EchoBackend()), "127.0.0.1", 0)

    with pytest.raises(TimeoutError):
        asyncio.run(briefly())
