"""The storm's judge: an answer without its end, with two, or of the wrong kind is caught."""

from __future__ import annotations

import json
import random
from importlib import import_module
from typing import Any

import pytest

mix: Any = import_module("cloud.storm_mix")
client: Any = import_module("cloud.storm_client")
KEYS = mix.Keys(good="good", tight="tight")


def wanted(kind: str) -> Any:
    return mix.planned(kind, random.Random(1), KEYS, 8)


def came(body: str, status: int | None = 200, **fields: Any) -> Any:
    return client.Exchange(status=status, body=body.encode(), **{"whole": True, **fields})


def stream(*events: str) -> str:
    return "".join(f"data: {event}\n\n" for event in events)


def chunk(text: str = "", end: str | None = None, index: int = 0) -> str:
    choice = {"index": index, "delta": {"content": text}, "finish_reason": end}
    return json.dumps({"choices": [choice]})


def error(code: str) -> str:
    return json.dumps({"error": {"message": "no", "type": "server_error", "code": code}})


def test_a_stream_that_ends_once_is_an_answer() -> None:
    one = came(stream(chunk("a"), chunk("b", "stop"), "[DONE]"))
    assert mix.judge(one, wanted("stream")) == ("answer", None)
    assert mix.text_of(one) == "ab"


@pytest.mark.parametrize(
    ("kind", "one"),
    [
        ("stream", came(stream(chunk("a"), chunk("b", "stop")))),
        ("stream", came(stream(chunk("a"), "[DONE]"))),
        ("stream", came(stream(chunk("a", "stop"), "[DONE]", "[DONE]"))),
        ("stream", came(stream(chunk("a", "stop"), chunk("a", "stop"), "[DONE]"))),
        ("stream", came(stream(chunk("a", "stop"), "[DONE]"), whole=False)),
        ("whole", came('{"choices": [{"finish_reason": null}]}')),
        ("whole", came("{}")),
        ("whole", came("", status=None, whole=False)),
        ("whole", came("Internal Server Error", status=500)),
        ("whole", came(error("internal_error"), status=500)),
        ("whole", came(error("unavailable"), status=503)),
        ("whole", came("", left=True)),
        ("bad input", came('{"choices": [{"finish_reason": "stop"}]}')),
    ],
)
def test_any_other_end_is_wrong(kind: str, one: Any) -> None:
    assert mix.judge(one, wanted(kind))[1] is not None


def test_an_error_object_ends_a_request_where_one_may() -> None:
    refused = came(error("rate_limit_exceeded"), status=429, headers={"retry-after": "2"})
    assert mix.judge(refused, wanted("over its rate")) == ("error rate_limit_exceeded", None)
    assert mix.judge(refused, wanted("stream"))[1] is not None
    broken = came(stream(chunk("a"), error("unavailable")))
    assert mix.judge(broken, wanted("stream")) == ("error unavailable", None)


def test_who_is_told_to_come_again_does_and_who_left_does_not() -> None:
    assert mix.should_retry(came("", status=None, whole=False))
    assert mix.should_retry(came(error("unavailable"), status=503))
    assert not mix.should_retry(came(error("rate_limit_exceeded"), status=429))
    assert not mix.should_retry(came("", status=None, whole=False, left=True))
