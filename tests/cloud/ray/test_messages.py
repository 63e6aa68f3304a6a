"""What travels between processes arrives as it was, errors with all that they say."""

from __future__ import annotations

import pickle

import pytest

from tidegate.api.schema import read_chat
from tidegate.cloud.ray.messages import Ask, Refusal
from tidegate.errors import (
    CapacityError,
    ExecutionError,
    RequestError,
    TidegateError,
    UnavailableError,
)


@pytest.mark.parametrize(
    "error",
    [
        RequestError("model", "'x': must be 'y'", status=404),
        CapacityError("all full", retry_after_s=7.5),
        UnavailableError("going away"),
        ExecutionError("a step failed"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_refusal_is_raised_as_it_was(error: TidegateError) -> None:
    back = pickle.loads(pickle.dumps(Refusal.of(error))).error()
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)


def test_a_call_travels_whole() -> None:
    call = read_chat(
        {
            "messages": [{"role": "user", "content": "hi"}],
            "tools": [{"type": "function", "function": {"name": "look", "parameters": {}}}],
            "logprobs": True,
            "top_logprobs": 2,
            "stop": ["x"],
            "tidegate": {"priority": "interactive", "deadline_ms": 900},
        }
    )
    ask = Ask(call=call, prompt=(1, 2, 3), request_id="ab" * 16, anchor=b"k")
    assert pickle.loads(pickle.dumps(ask)) == ask


def test_what_is_said_does_not_show_in_a_log() -> None:
    call = read_chat({"messages": [{"role": "user", "content": "the heron"}]})
    ask = Ask(call=call, prompt=(4711,), request_id="ab" * 16, anchor=b"k")
    assert "heron" not in repr(ask)
    assert "4711" not in repr(ask)
