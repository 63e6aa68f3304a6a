"""The clients against a real server on loopback."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import FrozenInstanceError
from importlib import import_module
from typing import Any

import pytest
from echobackend import EchoBackend
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import serving

from tidegate import client as front_door
from tidegate.api.http import HttpSettings, create_app
from tidegate.api.keys import KeyRing, hash_key
from tidegate.api.schema import Options
from tidegate.client import (
    Answer,
    AsyncClient,
    CapacityError,
    Choice,
    Client,
    ConfigError,
    ExecutionError,
    IdentityError,
    Message,
    RequestError,
    TidegateError,
    Timings,
    UnavailableError,
    Usage,
)
from tidegate.client.answers import StreamReader, read_answer, read_error, read_models
from tidegate.client.exchange import AskOptions, connection
from tidegate.engine.events import Failed
from tidegate.engine.request import Priority, SamplingParams

ONE_TWO = Answer(
    choices=(Choice(text="one two", finish_reason="stop"),),
    model="echo-1",
    usage=Usage(prompt_tokens=2, completion_tokens=2),
    route="edge",
    reason="echo: no model",
    request_id="r1",
    timings=Timings(ttft_s=0.25, total_s=1.25, tokens_per_s=1.0),
)


@contextmanager
def connected(backend: EchoBackend, settings: HttpSettings | None = None) -> Iterator[Client]:
    """A client of a server of its own."""
    with (
        serving(create_app(backend, settings=settings)) as server,
        Client(server.url, timeout_s=10) as client,
    ):
        yield client


def soon(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline_s, "it never happened"
        time.sleep(0.005)


def test_the_front_door_exports_what_it_says() -> None:
    exported = {name for name in vars(front_door) if name[0].isupper()}
    assert sorted(exported) == sorted(front_door.__all__)
    assert all(hasattr(import_module("tidegate.client"), name) for name in front_door.__all__)


def test_importing_it_brings_httpx_and_nothing_heavy() -> None:
    script = "import sys, tidegate.client; print(*sys.modules)"
    path = os.pathsep.join(entry for entry in sys.path if entry)
    loaded = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert "httpx" in loaded
    heavy = {"starlette", "fastapi", "uvicorn", "numpy", "torch", "tokenizers", "prometheus_client"}
    assert not heavy & set(loaded)


def test_a_chat_is_a_whole_answer_with_its_route() -> None:
    with connected(EchoBackend()) as client:
        answer = client.chat("one two")
    assert answer == ONE_TWO
    with pytest.raises(FrozenInstanceError):
        answer.model = "other"  # type: ignore[misc]


def test_a_completion_takes_text_or_tokens() -> None:
    with connected(EchoBackend()) as client:
        assert client.complete("one two") == ONE_TWO
        assert client.complete((7, 8)).text == "7 8"


def test_a_stream_gives_the_same_answer_in_pieces() -> None:
    with connected(EchoBackend()) as client:
        with client.stream("one two") as stream:
            with pytest.raises(UnavailableError, match="before its end"):
                _ = stream.answer
            assert list(stream) == ["one", " two"]
        assert stream.answer == ONE_TWO
        stream = client.stream_completion("one two")
        assert "".join(stream) == "one two"
        assert stream.answer.request_id == "r2"


@pytest.mark.parametrize(
    "options",
    [
        {"structured_outputs": {"choice": ["on", "off"]}},
        {"response_format": {"type": "json_object"}},
    ],
)
def test_a_shape_reaches_the_backend(options: AskOptions) -> None:
    backend = EchoBackend()
    with connected(backend) as client:
        client.chat("hi", **options)
    (call,) = backend.calls
    assert call.constraint is not None
    assert call.constraint.kind in ("choice", "json_object")


def test_every_option_reaches_the_backend() -> None:
    backend = EchoBackend()
    said: list[Message | dict[str, object]] = [
        Message(role="system", content="be brief"),
        {"role": "user", "content": "hi"},
    ]
    with connected(backend) as client:
        client.chat(
            said,
            model="echo-1",
            max_tokens=5,
            temperature=0,
            top_p=0.5,
            top_k=3,
            seed=9,
            stop=["x"],
            min_p=0.1,
            stop_token_ids=[4],
            min_tokens=2,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            repetition_penalty=1.5,
            logit_bias={7: -100},
            logprobs=True,
            top_logprobs=2,
            route="edge",
            privacy="local",
            priority="interactive",
            deadline_ms=700,
            cache=False,
            speculation=False,
            context_policy="truncate_oldest",
        )
    [call] = backend.calls
    assert [(one.role, one.content) for one in call.messages] == [
        ("system", "be brief"),
        ("user", "hi"),
    ]
    assert call.model == "echo-1"
    assert call.sampling == SamplingParams(
        max_tokens=5,
        temperature=0.0,
        top_p=0.5,
        top_k=3,
        seed=9,
        stop=("x",),
        min_p=0.1,
        stop_token_ids=(4,),
        min_tokens=2,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.5,
        logit_bias=((7, -100.0),),
        logprobs=2,
    )
    assert call.options == Options(
        route="edge",
        privacy="local",
        priority=Priority.INTERACTIVE,
        deadline_ms=700,
        cache=False,
        speculation=False,
        context_policy="truncate_oldest",
    )


def test_models_are_cards() -> None:
    with connected(EchoBackend()) as client:
        assert client.models() == EchoBackend().models()


def test_a_wrong_request_is_refused_before_it_is_sent() -> None:
    with Client("http://127.0.0.1:1") as nobody:
        for ask in (nobody.chat, nobody.stream):
            with pytest.raises(RequestError, match=r"temperature: 9: must be a number"):
                ask("hi", temperature=9)
        with pytest.raises(RequestError, match="messages"):
            nobody.chat([])
        with pytest.raises(RequestError, match="prompt"):
            nobody.complete("")
        with pytest.raises(RequestError, match=r"tidegate\.route"):
            nobody.chat("hi", route="moon")  # type: ignore[arg-type]


BOTH = pytest.mark.parametrize("stream", [False, True])


def ask(client: Client, *, stream: bool, **options: Any) -> None:
    if stream:
        list(client.stream("one two", **options))
    else:
        client.chat("one two", **options)


@BOTH
@pytest.mark.parametrize(
    ("refuse", "raised"),
    [
        (RequestError("messages", "is too long", status=413), RequestError),
        (CapacityError("full", retry_after_s=7), CapacityError),
        (UnavailableError("gone"), UnavailableError),
        (ExecutionError("a step failed"), ExecutionError),
        (KeyError("x"), TidegateError),
    ],
)
def test_a_refusal_is_raised_as_the_class_it_was(
    stream: bool, refuse: Exception, raised: type[Exception]
) -> None:
    with connected(EchoBackend(refuse=refuse)) as client, pytest.raises(raised) as caught:
        ask(client, stream=stream)
    assert type(caught.value) is raised
    if isinstance(caught.value, RequestError):
        assert (caught.value.field, caught.value.status) == ("messages", 413)
        assert str(caught.value) == str(refuse)
    if isinstance(caught.value, CapacityError):
        assert caught.value.retry_after_s == 7.0


@BOTH
def test_an_answer_that_fails_midway_raises(stream: bool) -> None:
    gone = Failed(code="unavailable", message="the peer left", retryable=True)
    with (
        connected(EchoBackend(break_after=1, breaking=gone)) as client,
        pytest.raises(UnavailableError, match="the peer left"),
    ):
        ask(client, stream=stream)


def test_an_unserved_model_is_a_request_error() -> None:
    with connected(EchoBackend()) as client, pytest.raises(RequestError) as caught:
        client.chat("hi", model="gpt-9")
    assert (caught.value.field, caught.value.status) == ("model", 404)


def test_a_key_opens_and_a_wrong_one_is_an_identity_error() -> None:
    settings = HttpSettings(authorise=KeyRing([hash_key("tg-right")]))
    with serving(create_app(EchoBackend(), settings=settings)) as server:
        with Client(f"{server.url}/v1/", api_key="tg-right") as client:
            assert client.chat("one two") == ONE_TWO
        for key in (None, "tg-wrong"):
            with Client(server.url, api_key=key) as client, pytest.raises(IdentityError):
                client.models()


def test_leaving_a_stream_early_cancels_it() -> None:
    backend = EchoBackend(word_s=0.01, repeat=1000)
    with connected(backend) as client:
        with client.stream("one two") as stream:
            next(iter(stream))
        soon(lambda: backend.closed == 1)
        for _ in client.stream("one two"):
            break
        soon(lambda: backend.closed == 2)
        assert client.models()


def test_a_service_that_is_not_there_or_silent_is_unavailable() -> None:
    with Client("http://127.0.0.1:1") as client, pytest.raises(UnavailableError, match="reached"):
        client.models()
    silent = EchoBackend(word_s=1000)
    with (
        serving(create_app(silent)) as server,
        Client(server.url, timeout_s=0.3) as client,
        pytest.raises(UnavailableError, match="silent: ReadTimeout"),
    ):
        client.chat("hi")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"base_url": "localhost:8080"}, "base_url"),
        ({"base_url": "ftp://x"}, "base_url"),
        ({"base_url": "http://"}, "base_url"),
        ({"base_url": "http://[::1"}, "base_url"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"connect_timeout_s": -1}, "connect_timeout_s"),
        ({"api_key": "tg\n"}, "api_key"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], named: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ConfigError, match=named):
            kind(**settings)


def test_the_async_client_is_its_twin() -> None:
    async def all_of_it(url: str) -> None:
        async with AsyncClient(url, timeout_s=10) as client:
            assert await client.chat("one two") == ONE_TWO
            assert (await client.complete("one two")).text == "one two"
            assert await client.models() == EchoBackend().models()
            async with client.stream("one two") as stream:
                assert [text async for text in stream] == ["one", " two"]
            assert stream.answer.text == "one two"
            pieces = client.stream_completion([7, 8])
            assert "".join([text async for text in pieces]) == "7 8"
            with pytest.raises(RequestError, match="top_p"):
                client.stream("x", top_p=3)

    with serving(create_app(EchoBackend())) as server:
        asyncio.run(all_of_it(server.url))


def test_async_errors_and_early_leaving_are_the_same() -> None:
    slow, full = EchoBackend(word_s=0.01, repeat=1000), EchoBackend(refuse=CapacityError("full"))

    async def leave(url: str) -> None:
        async with AsyncClient(url) as client:
            async with client.stream("one two") as stream:
                async for _ in stream:
                    break
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await client.chat("one two")

    async def refused(url: str) -> None:
        async with AsyncClient(url) as client:
            with pytest.raises(CapacityError):
                await client.chat("x")
            with pytest.raises(CapacityError):
                await anext(aiter(client.stream("x")))

    with serving(create_app(slow)) as server:
        asyncio.run(leave(server.url))
        soon(lambda: slow.closed == 2)
    with serving(create_app(full)) as server:
        asyncio.run(refused(server.url))


@contextmanager
def blunt_server(answer: bytes) -> Iterator[str]:
    """Sends the same bytes to whoever connects first, then hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            peer, _ = listening.accept()
            with peer:
                peer.recv(65536)
                peer.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread.join(timeout=5)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
CHUNK = b'data: {"model": "m", "choices": [{"delta": {"content": "hi"}}]}\n\n'


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"nonsense\r\n\r\n",
        HEAD,
        HEAD + CHUNK,
        HEAD + b"data: {oh\n\n",
        HEAD + b"data: [1]\n\n",
        HEAD + b'data: {"choices": 5}\n\n',
        HEAD + b"data: [DONE]\n\n",
        HEAD + b"data: " + b"x" * (1 << 20) + b"xxxx",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n<html>no!",
        b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 4\r\n\r\nnope",
    ],
)
def test_what_no_openai_server_sends_is_unavailable(answer: bytes) -> None:
    with blunt_server(answer) as url, Client(url) as client, pytest.raises(UnavailableError):
        list(client.stream("hi"))
    with blunt_server(answer) as url, Client(url) as client, pytest.raises(UnavailableError):
        client.chat("hi")


def test_a_server_without_the_extension_is_fine() -> None:
    answer = read_answer(
        {
            "id": "x",
            "model": "m",
            "choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}],
        }
    )
    assert (answer.text, answer.route, answer.request_id) == ("hi", None, "x")
    assert answer.timings == Timings()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(
                [
                    "choices",
                    "message",
                    "delta",
                    "content",
                    "text",
                    "tidegate",
                    "usage",
                    "error",
                    "finish_reason",
                    "route",
                    "ttft_s",
                    "data",
                    "code",
                    "param",
                    "model",
                    "index",
                    "logprobs",
                    "tokens",
                    "token_logprobs",
                    "top_logprobs",
                    "logprob",
                    "bytes",
                ]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=10,
)


@given(json_values)
@settings(deadline=None, max_examples=200)
def test_any_json_is_an_answer_or_unavailable(data: object) -> None:
    for read in (read_answer, read_models):
        try:
            read(data)
        except UnavailableError:
            continue


@given(st.lists(json_values, max_size=3), st.binary(max_size=10))
@settings(deadline=None, max_examples=200)
def test_any_stream_is_texts_or_one_of_our_errors(events: list[object], junk: bytes) -> None:
    sent = b"".join(b"data: " + json.dumps(one).encode() + b"\n\n" for one in events) + junk
    try:
        assert all(isinstance(text, str) for text in StreamReader().feed(sent))
    except TidegateError:
        return


@given(st.integers(300, 599), st.binary(max_size=20), json_values)
@settings(deadline=None, max_examples=200)
def test_any_error_body_is_one_of_our_errors(status: int, junk: bytes, data: object) -> None:
    for body in (junk, json.dumps({"error": data}).encode()):
        assert isinstance(read_error(status, body, {"retry-after": "soon"}), TidegateError)


def test_a_proxy_in_the_environment_is_not_asked_for_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with serving(create_app(EchoBackend())) as server, Client(server.url) as client:
        assert client.chat("hello", privacy="local").text
    assert connection("http://10.0.0.5", api_key=None, timeout_s=1, connect_timeout_s=1).trust_env
