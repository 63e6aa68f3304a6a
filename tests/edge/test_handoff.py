"""Handing an answer over in its middle: the cloud goes on where the device's context ended."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from linkpair import HERE, ScriptedCloud, failed, finished, linked, said
from toyengine import PAGED, serving
from toyexecutor import ToyExecutor
from toytext import toy_text

from tidegate.api.backend import AnswerEvent, Routed
from tidegate.api.engine_backend import EngineBackend, encode_call
from tidegate.api.schema import Call, call_to_json, read_chat, read_completion
from tidegate.cloud.handler import read_call
from tidegate.edge.answer_cache import AnswerCache
from tidegate.edge.answer_memory import AnswerMemory
from tidegate.edge.cloud_leg import CloudLeg
from tidegate.edge.handoff import can_be_continued, continuation
from tidegate.edge.service import EdgeBackend
from tidegate.engine.engine import Engine
from tidegate.engine.events import Finished, ScoredToken, TextDelta, TokenLogprob, Usage
from tidegate.errors import RequestError

CONTEXT_TOKENS = 128


def call(**fields: object) -> Call:
    body = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 400}
    return read_chat(body | fields)


def answered(
    folder: Path, cloud: ScriptedCloud, asked: Call, *, kept: bool = True
) -> list[AnswerEvent]:
    """The events of one answer of a device whose model never stops by itself."""

    async def run() -> list[AnswerEvent]:
        text = toy_text(context_tokens=1024, eos=False)
        engine = Engine(ToyExecutor(PAGED), text, model_id="toy")
        async with serving(engine), linked(folder, cloud) as link, asyncio.timeout(20):
            backend = EdgeBackend(
                EngineBackend(engine, route="edge", created_s=0),
                cloud=CloudLeg(link.device),
                memory=AnswerMemory(
                    AnswerCache(budget_bytes=1 << 16, ttl_s=60, clock=engine.clock)
                ),
                batch_rows=4,
                queue_limit=4,
            )
            events = [event async for event in backend.answer(asked)]
            again = await anext(backend.answer(asked))
            assert isinstance(again, Routed)
            whole = kept and asked.sampling.max_tokens < CONTEXT_TOKENS
            assert again.route == ("cache" if whole else "edge"), "only whole answers are kept"
            return events

    return asyncio.run(run())


def test_the_cloud_goes_on_with_the_same_answer_and_it_is_said(tmp_path: Path) -> None:
    cloud = ScriptedCloud((HERE, said(" and"), said(" so on"), finished(tokens=2)))
    first, *middle, end = answered(tmp_path, cloud, call())
    at = next(i for i, event in enumerate(middle) if isinstance(event, Routed))
    second, here, there = middle[at], middle[:at], middle[at + 1 :]
    assert isinstance(first, Routed)
    assert isinstance(second, Routed)
    assert (first.route, second.route, second.model) == ("edge", "cloud", "big")
    assert second.request_id == first.request_id
    assert second.reason == "continued in the cloud: the device's 128 tokens are full"
    local = text_of(here)
    assert text_of(there) == " and so on"
    assert isinstance(end, Finished)
    assert end.reason == "stop"
    prompt_tokens = end.usage.prompt_tokens
    assert end.usage.completion_tokens == CONTEXT_TOKENS - prompt_tokens + 2
    sent = json.loads(cloud.bodies[0])
    assert sent["messages"][-1] == {"role": "assistant", "content": local}
    assert sent["continue_final_message"] is True
    assert sent["max_tokens"] == 400 - (CONTEXT_TOKENS - prompt_tokens)


def text_of(events: list[AnswerEvent]) -> str:
    assert all(isinstance(event, TextDelta) for event in events)
    return "".join(event.text for event in events if isinstance(event, TextDelta))


@pytest.mark.parametrize(
    "options",
    [{"privacy": "local"}, {"privacy": "redact"}, {"route": "edge"}],
    ids=lambda one: "-".join(one.values()),
)
def test_what_may_not_leave_is_cut_short_instead(tmp_path: Path, options: dict[str, str]) -> None:
    cloud = ScriptedCloud((HERE, said("never"), finished()))
    *_, end = answered(tmp_path, cloud, call(tidegate=options))
    assert isinstance(end, Finished)
    assert end.reason == "length"
    assert not cloud.bodies


@pytest.mark.parametrize(
    "asked",
    [{"presence_penalty": 1}, {"frequency_penalty": 1}, {"logit_bias": {"7": 1}}, {"n": 2}],
    ids=lambda one: next(iter(one)),
)
def test_what_another_model_cannot_go_on_with_is_cut_short_instead(
    tmp_path: Path, asked: dict[str, object]
) -> None:
    cloud = ScriptedCloud((HERE, said("never"), finished()))
    *_, end = answered(tmp_path, cloud, call(**asked))
    assert isinstance(end, Finished)
    assert end.reason == "length"
    assert not cloud.bodies


def test_likelihoods_of_the_rest_find_their_place_in_the_whole(tmp_path: Path) -> None:
    one = ScoredToken(chosen=TokenLogprob(token=7, data=b" and", logprob=-1.0), text_offset=0)
    rest = TextDelta(text=" and", tokens=(7,), scored=(one,))
    cloud = ScriptedCloud((HERE, rest, finished(tokens=1)))
    _, *middle, _ = answered(tmp_path, cloud, call(logprobs=True), kept=False)
    texts = [event for event in middle if isinstance(event, TextDelta)]
    said_here = "".join(event.text for event in texts[:-1])
    assert texts[-1].scored[0].text_offset == len(said_here)
    assert texts[0].scored[0].text_offset == 0


def test_a_long_enough_answer_is_not_continued(tmp_path: Path) -> None:
    cloud = ScriptedCloud((HERE, said("never"), finished()))
    answered(tmp_path, cloud, call(max_tokens=20))
    assert not cloud.bodies


def test_when_the_cloud_says_nothing_the_cut_answer_stands(tmp_path: Path) -> None:
    cloud = ScriptedCloud((failed("over_capacity", "full", retryable=True),))
    first, *middle, end = answered(tmp_path, cloud, call())
    assert isinstance(first, Routed)
    assert text_of(middle)
    assert isinstance(end, Finished)
    assert end.reason == "length"


def test_a_continuation_keeps_what_was_begun_and_survives_the_wire() -> None:
    used = Usage(prompt_tokens=10, completion_tokens=5)
    once = continuation(call(max_tokens=50), "one ", used)
    twice = continuation(once, "two ", used)
    assert twice.messages[-1].content == "one two "
    assert len(twice.messages) == 2
    assert twice.sampling.max_tokens == 40
    raw = continuation(read_completion({"prompt": "abc", "max_tokens": 9}), "def", used)
    assert (raw.prompt, raw.sampling.max_tokens) == ("abcdef", 4)
    least = continuation(call(max_tokens=50, min_tokens=8), "one ", used)
    assert least.sampling.min_tokens == 3
    assert continuation(least, "two ", used).sampling.min_tokens == 0


def test_a_continued_prompt_is_the_template_with_the_begun_answer_after_it() -> None:
    text = toy_text(context_tokens=256)
    begun = call()
    tokens = asyncio.run(encode_call(text, begun))
    rest = continuation(begun, "so far", Usage(prompt_tokens=4, completion_tokens=2))
    continued = asyncio.run(encode_call(text, rest))
    assert continued[: len(tokens)] == tokens
    assert text.decode(continued[len(tokens) :]) == "so far"


@pytest.mark.parametrize("roles", [("user",), ("assistant",), ("assistant", "user")])
def test_only_an_assistants_message_after_another_can_be_continued(roles: tuple[str, ...]) -> None:
    messages = [{"role": role, "content": "x"} for role in roles]
    body = {"messages": messages, "continue_final_message": True}
    with pytest.raises(RequestError, match="continue_final_message"):
        read_call(json.dumps(body).encode())


def test_a_continued_constraint_covers_what_was_begun_too() -> None:
    shaped = call(structured_outputs={"regex": "[a-z]+", "begun": "ab"})
    rest = continuation(shaped, "cd", Usage(prompt_tokens=4, completion_tokens=2))
    assert rest.constraint is not None
    assert (rest.constraint.source, rest.constraint.begun) == ("[a-z]+", "abcd")
    assert read_chat(call_to_json(rest)) == rest


def test_another_model_goes_on_in_the_middle_of_the_json_that_the_first_began() -> None:
    """A small context here, a larger one there, and one valid answer over both."""
    schema = {"type": "array", "items": {"enum": ["lamp", "fan"]}, "minItems": 9, "maxItems": 12}
    asked = call(structured_outputs={"json": schema}, temperature=1, seed=5, max_tokens=200)

    async def answer(context_tokens: int, seen: Call) -> tuple[str, Finished]:
        executor = ToyExecutor(PAGED, context_tokens=context_tokens)
        text = toy_text(context_tokens=context_tokens)
        async with serving(Engine(executor, text, model_id="toy")) as engine:
            backend = EngineBackend(engine, route="cloud", created_s=0)
            events = [event async for event in backend.answer_as(seen, "00" * 16)]
            *said, end = events[1:]
            assert isinstance(end, Finished)
            return text_of(said), end

    async def run() -> None:
        begun, end = await answer(40, asked)
        assert end.reason == "length"
        rest, last = await answer(
            160, read_chat(call_to_json(continuation(asked, begun, end.usage)))
        )
        assert last.reason == "stop"
        whole = json.loads(begun + rest)
        assert 9 <= len(whole) <= 12
        assert set(whole) <= {"lamp", "fan"}

    asyncio.run(run())


def test_an_answer_that_may_call_tools_is_not_another_models_to_continue() -> None:
    tool = {"type": "function", "function": {"name": "now"}}
    assert can_be_continued(call())
    assert not can_be_continued(call(tools=[tool]))
    assert can_be_continued(call(tools=[tool], tool_choice="none"))
