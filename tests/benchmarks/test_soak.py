"""The soak's judge: a request that ends twice, never, or in the wrong way is caught."""

from __future__ import annotations

import json
from importlib import import_module
from typing import Any

import pytest

mix: Any = import_module("peers.mix")
soak: Any = import_module("edge.soak")

CHATS = [[{"role": "user", "content": f"question {number}"}] for number in range(5)]


def event(index: int, text: str = "", end: str | None = None) -> str:
    choice = {"index": index, "delta": {"content": text}, "finish_reason": end}
    return json.dumps({"choices": [choice]})


def judged(events: list[str], choices: int = 1) -> tuple[list[str], str | None]:
    """What the judge holds against a stream of these events, and its text."""
    asked = mix.Asked(kind="known", path=mix.CHAT, body={}, stream=True, choices=choices)
    record = soak.Record()
    body = "".join(f"data: {one}\n\n" for one in events).encode()
    text = soak.judge(asked, 200, body, record)
    return record.wrong, text


def test_a_stream_that_ends_once_is_right() -> None:
    assert judged([event(0, "a"), event(0, "b", "stop"), "[DONE]"]) == ([], "ab")
    both = [event(1, "x", "stop"), event(0, "y"), event(0, "", "length"), "[DONE]"]
    assert judged(both, choices=2) == ([], "y")


@pytest.mark.parametrize(
    "events",
    [
        [],
        [event(0, "a"), "[DONE]"],
        [event(0, "a", "stop")],
        [event(0, "a", "stop"), event(0, "", "stop"), "[DONE]"],
        [event(0, "a", "stop"), event(0, "b"), "[DONE]"],
        [event(0, "a", "stop"), event(1, "b", "stop"), "[DONE]"],
        [event(0, "a", "stop"), "[DONE]", "[DONE]"],
    ],
    ids=["nothing", "no end", "not done", "two ends", "goes on", "a choice too many", "done twice"],
)
def test_a_stream_that_does_not_end_exactly_once_is_wrong(events: list[str]) -> None:
    try:
        wrong, _ = judged(events)
    except ValueError:
        return  # the client counts what it cannot read as wrong
    assert len(wrong) == 1


@pytest.mark.parametrize(("choices", "status"), [(1, 400), (1, 500), (0, 200), (0, 500)])
def test_an_answer_is_right_only_where_one_was_due(choices: int, status: int) -> None:
    asked = mix.Asked(kind="bad", path=mix.CHAT, body={}, choices=choices)
    record = soak.Record()
    soak.judge(asked, status, b'{"error": {}}', record)
    assert len(record.wrong) == 1


def test_requests_are_the_same_in_every_run_and_of_every_kind() -> None:
    made = [mix.ask(number, CHATS, ()) for number in range(600)]
    assert made == [mix.ask(number, CHATS, ()) for number in range(600)]
    assert {one.kind for one in made} == set(mix.WEIGHTS)
    lacking = [mix.ask(number, CHATS, ("several", "structured")) for number in range(600)]
    assert not {"several", "structured"} & {one.kind for one in lacking}
