"""OpenAI's two shapes of likelihoods, and the road of both through the engine and the link."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toyengine import PAGED, serving, toy_engine
from toyexecutor import ToyExecutor
from toytext import SPECIAL

from tidegate.api.answer_logprobs import logprobs_object
from tidegate.api.engine_backend import EngineBackend
from tidegate.api.http import create_app
from tidegate.api.wire import read_event, write_event
from tidegate.engine.events import ScoredToken, TextDelta, TokenLogprob
from tidegate.errors import LinkError

EURO = "€".encode()
HALF = ScoredToken(
    chosen=TokenLogprob(token=7, data=EURO[:2], logprob=-0.5),
    top=(
        TokenLogprob(token=7, data=EURO[:2], logprob=-0.5),
        TokenLogprob(token=8, data=b"a", logprob=-1.5),
    ),
    text_offset=3,
)


def test_a_chat_lists_tokens_with_bytes_and_alternatives() -> None:
    assert logprobs_object("chat", [HALF]) == {
        "content": [
            {
                "token": "\\xe2\\x82",
                "logprob": -0.5,
                "bytes": [0xE2, 0x82],
                "top_logprobs": [
                    {"token": "\\xe2\\x82", "logprob": -0.5, "bytes": [0xE2, 0x82]},
                    {"token": "a", "logprob": -1.5, "bytes": [97]},
                ],
            }
        ],
        "refusal": None,
    }


def test_a_completion_lists_columns_and_always_the_chosen_token() -> None:
    unlikely = ScoredToken(
        chosen=TokenLogprob(token=9, data=b"b", logprob=-7.0), top=HALF.top[1:], text_offset=4
    )
    assert logprobs_object("completion", [HALF, unlikely]) == {
        "tokens": ["bytes:\\xe2\\x82", "b"],
        "token_logprobs": [-0.5, -7.0],
        "top_logprobs": [{"bytes:\\xe2\\x82": -0.5, "a": -1.5}, {"a": -1.5, "b": -7.0}],
        "text_offset": [3, 4],
    }


logprobs = st.builds(
    TokenLogprob,
    token=st.integers(0, 2**31 - 1),
    data=st.binary(max_size=9),
    logprob=st.floats(-9999, 0),
)
scored = st.builds(
    ScoredToken,
    chosen=logprobs,
    top=st.lists(logprobs, max_size=20).map(tuple),
    text_offset=st.integers(0, 2**53 - 1),
)


@settings(deadline=None, max_examples=100)
@given(st.lists(scored, max_size=3).map(tuple))
def test_they_survive_the_link(told: tuple[ScoredToken, ...]) -> None:
    event = TextDelta(text="x", tokens=(1,), scored=told)
    assert read_event(write_event(event)) == event


GOOD: dict[str, Any] = {"at": 0, "token": [1, "6869", -0.5], "top": []}


@pytest.mark.parametrize(
    "bad",
    [
        {},
        [{}],
        [GOOD | {"more": 1}],
        [GOOD | {"at": -1}],
        [GOOD | {"at": True}],
        [GOOD | {"top": [GOOD["token"]] * 21}],
        [GOOD | {"token": [1, "6869"]}],
        [GOOD | {"token": [-1, "6869", -0.5]}],
        [GOOD | {"token": [1, "686", -0.5]}],
        [GOOD | {"token": [1, "zz", -0.5]}],
        [GOOD | {"token": [1, 5, -0.5]}],
        [GOOD | {"token": [1, "", 0.5]}],
        [GOOD | {"token": [1, "", -1e300]}],
        [GOOD | {"token": [1, "", True]}],
        [GOOD | {"token": [1, "00" * 1025, -0.5]}],
    ],
)
def test_damaged_likelihoods_are_refused(bad: object) -> None:
    body = {"event": "text", "text": "x", "tokens": [1], "scored": bad}
    with pytest.raises(LinkError, match=r"^event\.scored"):
        read_event(json.dumps(body).encode())


def asked(path: str, body: dict[str, object]) -> list[Any]:
    """The body of a whole answer, or the events of a stream without `[DONE]`."""

    async def run() -> list[Any]:
        engine = toy_engine(ToyExecutor(PAGED), eos=False)
        app = create_app(EngineBackend(engine, route="edge", created_s=0))
        transport = httpx.ASGITransport(app)
        async with (
            serving(engine),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            response = await client.post(path, json={"temperature": 0, "max_tokens": 24, **body})
        assert response.status_code == 200, response.text
        if not body.get("stream"):
            return [response.json()]
        datas = [one.removeprefix("data: ") for one in response.text.split("\n\n") if one]
        assert datas.pop() == "[DONE]"
        return [json.loads(one) for one in datas]

    return asyncio.run(run())


CHAT: dict[str, object] = {"messages": [{"role": "user", "content": "hello"}], "logprobs": True}


def test_a_chat_tells_the_likelihood_of_every_token_streamed_or_not() -> None:
    (whole,) = asked("/v1/chat/completions", CHAT | {"top_logprobs": 2})
    content = whole["choices"][0]["logprobs"]["content"]
    assert len(content) == whole["usage"]["completion_tokens"] == 24
    assert all(len(one["top_logprobs"]) == 2 and one["logprob"] <= 0 for one in content)
    assert all(one["top_logprobs"][0]["token"] == one["token"] for one in content), "greedy"
    chunks = asked("/v1/chat/completions", CHAT | {"top_logprobs": 2, "stream": True})
    told = [one["choices"][0]["logprobs"] for one in chunks]
    assert [one for part in told if part for one in part["content"]] == content


def test_a_completion_tells_offsets_that_find_the_tokens_in_its_text() -> None:
    (whole,) = asked("/v1/completions", {"prompt": "hello", "logprobs": 1})
    choice = whole["choices"][0]
    columns = choice["logprobs"]
    assert len(columns["tokens"]) == 24
    found = 0
    for token, at in zip(columns["tokens"], columns["text_offset"], strict=True):
        broken = token.startswith("bytes:") or choice["text"][at] == "\ufffd"
        found += not broken and token not in SPECIAL
        assert broken or token in SPECIAL or choice["text"][at:].startswith(token)
    assert found > 5
    chunks = asked("/v1/completions", {"prompt": "hello", "logprobs": 1, "stream": True})
    parts = [one["choices"][0]["logprobs"] for one in chunks]
    assert [one for part in parts if part for one in part["token_logprobs"]] == (
        columns["token_logprobs"]
    )


def test_who_did_not_ask_sees_null() -> None:
    (whole,) = asked("/v1/chat/completions", CHAT | {"logprobs": False})
    assert whole["choices"][0]["logprobs"] is None
