"""The HTTP surface without a socket: answers, streams, errors, reports."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import hypothesis
import pytest
from echobackend import EchoBackend
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from tidegate.api.backend import AnswerEvent
from tidegate.api.http import HttpSettings, create_app
from tidegate.api.keys import KeyRing, hash_key, new_key
from tidegate.api.schema import Call
from tidegate.engine.events import Cancelled, Failed, Usage
from tidegate.errors import (
    CapacityError,
    ConfigError,
    ExecutionError,
    RequestError,
    UnavailableError,
)

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "one two three"}]}


def ask(
    backend: EchoBackend,
    method: str,
    path: str,
    *,
    settings: HttpSettings | None = None,
    **request: Any,
) -> httpx.Response:
    """One request to an app of its own."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(backend, settings=settings))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **request)

    return asyncio.run(send())


def chat(backend: EchoBackend | None = None, **body: object) -> httpx.Response:
    return ask(backend or EchoBackend(), "POST", CHAT, json={**HELLO, **body})


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def stream_of(response: httpx.Response) -> list[Any]:
    """The parsed events of a stream; `[DONE]` as None."""
    assert response.headers["content-type"].startswith("text/event-stream")
    datas = [one.removeprefix("data: ") for one in response.text.split("\n\n") if one]
    return [None if one == "[DONE]" else json.loads(one) for one in datas]


def test_a_chat_is_answered_whole_with_usage_and_where_it_ran() -> None:
    response = chat()
    body = response.json()
    assert response.status_code == 200
    assert body["object"] == "chat.completion"
    assert body["id"] == "chatcmpl-r1"
    assert body["choices"][0]["message"]["content"] == "one two three"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["total_tokens"] == 6
    assert body["tidegate"] == {
        "route": "edge",
        "reason": "echo: no model",
        "model": "echo-1",
        "request_id": "r1",
        "ttft_s": 0.25,
        "total_s": 1.25,
        "tokens_per_s": 2.0,
    }
    assert response.headers["x-request-id"] == "r1"


class Kept(EchoBackend):
    """Remembers the keys that calls came with."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[str | None] = []

    def answer(self, call: Call) -> AsyncIterator[AnswerEvent]:
        self.keys.append(call.retry_key)
        return super().answer(call)


def test_an_idempotency_key_comes_with_the_call_and_several_answers_have_none() -> None:
    backend = Kept()
    for n in (1, 2):
        ask(backend, "POST", CHAT, json={**HELLO, "n": n}, headers={"Idempotency-Key": "abc-1"})
    chat(backend)
    assert backend.keys == ["abc-1", None, None, None]


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb"])
def test_a_key_that_is_no_key_is_refused_by_name(key: str) -> None:
    response = ask(EchoBackend(), "POST", CHAT, json=HELLO, headers={"Idempotency-Key": key})
    assert response.status_code == 400
    assert "1 to 255 printable ASCII" in error_of(response)["message"]


def test_a_completion_is_answered_whole() -> None:
    body = ask(EchoBackend(), "POST", "/v1/completions", json={"prompt": "a b"}).json()
    assert (body["object"], body["choices"][0]["text"]) == ("text_completion", "a b")


def test_a_chat_streams_role_texts_reason_and_done() -> None:
    first, *middle, last, done = stream_of(chat(stream=True, max_tokens=2))
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert first["tidegate"]["route"] == "edge"
    assert [one["choices"][0]["delta"]["content"] for one in middle] == ["one", " two"]
    assert last["choices"][0] == {
        "index": 0,
        "delta": {},
        "finish_reason": "length",
        "logprobs": None,
    }
    assert last["tidegate"]["tokens_per_s"] == 1.0
    assert done is None


def test_a_stream_ends_with_usage_when_asked() -> None:
    *_, usage, done = stream_of(chat(stream=True, stream_options={"include_usage": True}))
    assert (usage["choices"], usage["usage"]["completion_tokens"], done) == ([], 3, None)
    assert usage["tidegate"]["request_id"] == "r1"


def test_a_completion_streams() -> None:
    body = {"prompt": [7, 8], "stream": True}
    *texts, last, _ = stream_of(ask(EchoBackend(), "POST", "/v1/completions", json=body))
    assert "".join(one["choices"][0]["text"] for one in texts) == "7 8"
    assert last["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("raised", "status", "code", "retry_after"),
    [
        (RequestError("messages", "is too long", status=422), 422, "invalid_request", None),
        (CapacityError("full", retry_after_s=2.2), 429, "over_capacity", "3"),
        (UnavailableError("the engine stopped"), 503, "unavailable", "2"),
        (ExecutionError("step 3 of 9"), 500, "execution_failed", None),
        (ConfigError("path", "/etc/x", "readable"), 500, "invalid_config", None),
        (KeyError("one two three"), 500, "internal_error", None),
    ],
)
def test_a_refusal_before_the_first_event_has_its_status(
    stream: bool, raised: Exception, status: int, code: str, retry_after: str | None
) -> None:
    response = chat(EchoBackend(refuse=raised), stream=stream)
    assert response.status_code == status
    assert error_of(response)["code"] == code
    assert response.headers.get("retry-after") == retry_after
    assert "one two three" not in response.text
    assert "/etc/x" not in response.text


FAILED = Failed(code="unavailable", message="the peer left", retryable=True)
BREAKS: list[tuple[Exception | Failed | Cancelled | None, int, str]] = [
    (FAILED, 503, "unavailable"),
    (Failed(code="odd", message="who knows", retryable=False), 500, "odd"),
    (Cancelled(usage=Usage(prompt_tokens=1, completion_tokens=1)), 503, "cancelled"),
    (CapacityError("full"), 429, "over_capacity"),
    (ValueError("one two three"), 500, "internal_error"),
    (None, 500, "internal_error"),
]


@pytest.mark.parametrize(("breaking", "status", "code"), BREAKS)
def test_a_failure_midway_is_the_status_of_a_whole_answer(
    breaking: Exception | Failed | Cancelled | None, status: int, code: str
) -> None:
    response = chat(EchoBackend(break_after=1, breaking=breaking))
    assert (response.status_code, error_of(response)["code"]) == (status, code)


@pytest.mark.parametrize(("breaking", "status", "code"), BREAKS)
def test_a_failure_midway_is_an_error_event_that_ends_a_stream(
    breaking: Exception | Failed | Cancelled | None, status: int, code: str
) -> None:
    response = chat(EchoBackend(break_after=1, breaking=breaking), stream=True)
    *_, text, error = stream_of(response)
    assert response.status_code == 200
    assert text["choices"][0]["delta"]["content"] == "one"
    assert error["error"]["code"] == code
    assert "one two three" not in json.dumps(error)


def test_unexpected_errors_are_logged_with_the_id_and_without_the_data(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = EchoBackend(refuse=KeyError("one two three"))
    with caplog.at_level(logging.DEBUG):
        response = ask(broken, "POST", CHAT, json=HELLO, headers={"X-Request-Id": "mine-7"})
    assert response.headers["x-request-id"] == "mine-7"
    [record] = [one for one in caplog.records if one.name.startswith("tidegate")]
    assert "mine-7" in record.getMessage()
    assert "KeyError" in record.getMessage()
    assert "one two three" not in caplog.text


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "is not JSON at character 1"),
        (b"", "is not JSON"),
        (b'{"messages": "\xff"}', "is not UTF-8 at byte 14"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"temperature": NaN}', "a number that is not allowed"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "a number that is not allowed"),
        (b"[]", "is a list of 0: must be a JSON object"),
    ],
)
def test_a_body_that_is_no_request_is_a_400(body: bytes, said: str) -> None:
    response = ask(
        EchoBackend(), "POST", CHAT, content=body, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400
    assert said in error_of(response)["message"]
    assert error_of(response)["param"] == "body"


bodies = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(
                ["messages", "role", "content", "stream", "model", "tidegate", "stop", "n"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@given(bodies, st.booleans())
@hypothesis.settings(max_examples=60, deadline=None)
def test_no_body_whatever_is_answered_with_a_server_error(data: object, nearly: bool) -> None:
    if nearly and isinstance(data, dict):
        data = {**HELLO, **data}
    content = json.dumps(data).encode()
    headers = {"Content-Type": "application/json"}
    response = ask(EchoBackend(), "POST", CHAT, content=content, headers=headers)
    assert response.status_code in (200, 400, 404)
    if response.status_code != 200:
        error_of(response)


def test_a_wrong_field_is_a_400_that_names_it() -> None:
    response = chat(temperature=9)
    assert response.status_code == 400
    assert error_of(response) == {
        "message": "temperature: 9: must be a number from 0 to 2",
        "type": "invalid_request_error",
        "param": "temperature",
        "code": "invalid_request",
    }


def test_an_unserved_model_is_a_404_that_lists_what_is_served() -> None:
    response = chat(model="gpt-9")
    assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")
    assert "echo-1" in error_of(response)["message"]


def test_other_content_types_are_refused_so_that_web_pages_cannot_post() -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        headers = {"Content-Type": kind} if kind else {}
        response = ask(EchoBackend(), "POST", CHAT, content=b"{}", headers=headers)
        assert response.status_code == 415


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_a_413_that_says_the_limit(chunked: bool) -> None:
    async def pieces() -> Any:
        for _ in range(10):
            yield b"x" * 50

    content = pieces() if chunked else b"x" * 500
    response = ask(
        EchoBackend(),
        "POST",
        CHAT,
        settings=HttpSettings(body_limit_bytes=100),
        content=content,
        headers={"Content-Type": "application/json"},
    )
    assert response.status_code == 413
    assert "100 bytes" in error_of(response)["message"]


def test_a_prompt_of_a_megabyte_is_answered() -> None:
    word = "tide" * 250_000
    body = chat(messages=[{"role": "user", "content": word}]).json()
    assert body["choices"][0]["message"]["content"] == word


def test_unknown_paths_and_methods_have_openais_shape() -> None:
    assert error_of(ask(EchoBackend(), "GET", "/v2/x"))["code"] == "not_found"
    response = ask(EchoBackend(), "GET", CHAT)
    assert (response.status_code, error_of(response)["code"]) == (405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_models_are_listed_and_looked_up() -> None:
    listed = ask(EchoBackend(), "GET", "/v1/models").json()
    assert [card["id"] for card in listed["data"]] == ["echo-1"]
    assert ask(EchoBackend(), "GET", "/v1/models/echo-1").json() == listed["data"][0]
    assert ask(EchoBackend(), "GET", "/v1/models/no/such").status_code == 404


@pytest.mark.parametrize(
    ("backend", "health", "ready"),
    [
        (EchoBackend(), 200, 200),
        (EchoBackend(ready=False), 200, 503),
        (EchoBackend(healthy=False), 503, 503),
    ],
)
def test_health_is_progress_and_ready_is_more(
    backend: EchoBackend, health: int, ready: int
) -> None:
    assert ask(backend, "GET", "/health").status_code == health
    assert ask(backend, "GET", "/ready").status_code == ready


def test_a_stream_that_fails_before_its_first_word_is_refused_with_a_status() -> None:
    gone = Failed(code="unavailable", message="the engine is shutting down", retryable=True)
    body = {"messages": [{"role": "user", "content": "a b"}], "stream": True}
    refused = ask(EchoBackend(break_after=0, breaking=gone), "POST", CHAT, json=body)
    assert refused.status_code == 503
    assert refused.headers["Retry-After"]
    assert error_of(refused)["code"] == "unavailable"


def test_status_is_shown_only_when_set() -> None:
    assert ask(EchoBackend(), "GET", "/status").status_code == 404
    shown = ask(EchoBackend(), "GET", "/status", settings=HttpSettings(status=True))
    process = shown.json().pop("process")
    assert shown.json() == {"running": 0, "process": process}
    assert process["tasks"] >= 1
    assert process["threads"] >= 1


def test_a_key_is_asked_for_everywhere_but_on_probes() -> None:
    key = new_key()
    settings = HttpSettings(authorise=KeyRing([hash_key(new_key()), hash_key(key)]), status=True)

    def status(path: str, authorization: str | None) -> int:
        headers = {"Authorization": authorization.encode("latin-1")} if authorization else {}
        response = ask(EchoBackend(), "GET", path, settings=settings, headers=headers)
        if response.status_code == 401:
            assert error_of(response)["code"] == "invalid_api_key"
        return response.status_code

    for path in ("/v1/models", "/status"):
        assert status(path, f"Bearer {key}") == 200
        assert status(path, f"bearer {key}") == 200
        for wrong in (None, "Bearer", "Bearer ", "Bearer nope", f"Basic {key}", key, "Bearer \xe9"):
            assert status(path, wrong) == 401
    assert status("/unknown", None) == 401
    assert [status(path, None) for path in ("/health", "/ready", "/metrics")] == [200, 200, 200]


def test_an_authoriser_may_say_too_many() -> None:
    def limited(_: str | None) -> bool:
        raise CapacityError("this key is over its rate", retry_after_s=7)

    response = ask(EchoBackend(), "GET", "/v1/models", settings=HttpSettings(authorise=limited))
    assert (response.status_code, response.headers["retry-after"]) == (429, "7")


def test_a_rebound_host_name_is_refused() -> None:
    settings = HttpSettings(allowed_hosts=("localhost", "127.0.0.1", "[::1]"))
    for host, status in {
        "localhost": 200,
        "LOCALHOST:80": 200,
        "127.0.0.1:8080": 200,
        "[::1]:8080": 200,
        "evil.example": 403,
        "": 403,
    }.items():
        response = ask(
            EchoBackend(), "GET", "/v1/models", settings=settings, headers={"Host": host}
        )
        assert response.status_code == status, host


def test_an_unsafe_request_id_is_replaced() -> None:
    response = ask(EchoBackend(), "GET", "/health", headers={"X-Request-Id": "a b\tc"})
    assert response.headers["x-request-id"].isalnum()


def test_metrics_count_calls_as_vllm_would() -> None:
    async def both() -> str:
        transport = httpx.ASGITransport(create_app(EchoBackend()))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for body in (HELLO, {**HELLO, "max_tokens": 1}, {**HELLO, "stream": True}):
                await client.post(CHAT, json=body)
            return (await client.get("/metrics")).text

    shown = asyncio.run(both())
    for line in (
        'tidegate_requests_total{model_name="echo-1",route="edge"} 3.0',
        'tidegate_request_success_total{finished_reason="stop",model_name="echo-1"} 2.0',
        'tidegate_request_success_total{finished_reason="length",model_name="echo-1"} 1.0',
        'tidegate_prompt_tokens_total{model_name="echo-1"} 9.0',
        'tidegate_generation_tokens_total{model_name="echo-1"} 7.0',
        'tidegate_time_to_first_token_seconds_count{model_name="echo-1"} 3.0',
        'tidegate_inter_token_latency_seconds_count{model_name="echo-1"} 4.0',
        'tidegate_e2e_request_latency_seconds_count{model_name="echo-1"} 3.0',
        "echo_up 1.0",
    ):
        assert line in shown


def test_a_refusal_for_lack_of_room_is_counted_once() -> None:
    async def refused() -> str:
        app = create_app(EchoBackend(refuse=CapacityError("full")))
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://test"
        ) as client:
            await client.post(CHAT, json=HELLO)
            await client.post(CHAT, json={**HELLO, "temperature": 9})
            return (await client.get("/metrics")).text

    shown = asyncio.run(refused())
    assert 'tidegate_admission_rejections_total{code="over_capacity"} 1.0' in shown
    assert not re.search(r"^tidegate_request_success_total\{.*\} [1-9]", shown, re.MULTILINE)


def test_a_path_with_a_slash_too_many_is_not_redirected() -> None:
    assert ask(EchoBackend(), "GET", "/v1/models").status_code == 200
    assert ask(EchoBackend(), "GET", "/health/").status_code == 404


def test_extra_routes_pass_the_same_door() -> None:
    async def page(_: Request) -> Response:
        return PlainTextResponse("hello")

    async def send(authorise: KeyRing | None) -> int:
        app = create_app(
            EchoBackend(),
            settings=HttpSettings(authorise=authorise),
            extra_routes=[Route("/", page)],
        )
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://test"
        ) as client:
            return (await client.get("/")).status_code

    assert asyncio.run(send(None)) == 200
    assert asyncio.run(send(KeyRing([hash_key("x")]))) == 401


def test_settings_and_keys_say_what_they_must_be() -> None:
    with pytest.raises(ConfigError, match="body_limit_bytes = 0: must be above 0"):
        HttpSettings(body_limit_bytes=0)
    with pytest.raises(ConfigError, match="api_keys"):
        KeyRing([])
    with pytest.raises(ConfigError, match="64 hex digits"):
        KeyRing(["tg-plain-key-by-mistake"])
