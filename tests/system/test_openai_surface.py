"""More of the official OpenAI client against a device daemon and a cloud service.

Calls in parallel, one's own answers sent again, seeds and stops, models, and what a user is told
of fields that are not served.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from openaiends import Ends, end_model

pytestmark = pytest.mark.system

BOTH = pytest.mark.parametrize("end", ["device", "cloud"])
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "which lamp is on?"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"level": {"type": "integer", "minimum": 0, "maximum": 9}},
                "required": ["level"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("lamp", "fan")
]
CALLING: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 200}
MOST_SEEDS = 60
"""A random model calls again after a call about every other time."""


def seed_of_several(client: openai.OpenAI, end: str) -> tuple[int, list[tuple[str, str]]]:
    """A seed with which the model makes several calls, and those."""
    for seed in range(MOST_SEEDS):
        answer = client.chat.completions.create(
            model=end_model(end), messages=MESSAGES, seed=seed, **CALLING
        )
        calls: Any = answer.choices[0].message.tool_calls or []
        if len(calls) > 1 and answer.choices[0].finish_reason == "tool_calls":
            assert len({call.id for call in calls}) == len(calls)
            return seed, [(call.function.name, call.function.arguments) for call in calls]
    raise AssertionError(f"no seed below {MOST_SEEDS} made several calls")


@BOTH
def test_several_calls_come_whole_and_streamed_to_who_waits_and_who_awaits(
    ends: Ends, end: str
) -> None:
    async def streamed(seed: int) -> list[tuple[str, str]]:
        async with (
            ends.awaiting(end) as client,
            client.chat.completions.stream(
                model=end_model(end), messages=MESSAGES, seed=seed, **CALLING
            ) as stream,
        ):
            final = await stream.get_final_completion()
        assert final.choices[0].finish_reason == "tool_calls"
        calls: Any = final.choices[0].message.tool_calls
        return [(call.function.name, call.function.arguments) for call in calls]

    with ends.client(end) as client:
        seed, whole = seed_of_several(client, end)
        alone = client.chat.completions.create(
            model=end_model(end), messages=MESSAGES, seed=seed, parallel_tool_calls=False, **CALLING
        )
    for name, arguments in whole:
        assert name in ("lamp", "fan")
        assert 0 <= json.loads(arguments)["level"] <= 9
    assert asyncio.run(streamed(seed)) == whole
    assert len(alone.choices[0].message.tool_calls or []) == 1


@BOTH
def test_an_answers_message_is_sent_again_as_the_client_holds_it(ends: Ends, end: str) -> None:
    with ends.client(end) as client:
        asked: Any = {"model": end_model(end), "seed": 3, "max_tokens": 60}
        called = client.chat.completions.create(
            messages=MESSAGES,
            tools=TOOLS,
            tool_choice="required",
            parallel_tool_calls=False,
            **asked,
        )
        message = called.choices[0].message
        assert message.tool_calls
        after: Any = [
            *MESSAGES,
            message,
            {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "done"},
        ]
        said = client.chat.completions.create(messages=after, **asked)
        again: Any = [*after, said.choices[0].message.model_dump(), *MESSAGES]
        assert client.chat.completions.create(messages=again, **asked).choices


@BOTH
def test_a_seed_repeats_an_answer_and_a_stop_ends_it(ends: Ends, end: str) -> None:
    with ends.client(end) as client:
        asked: Any = {
            "model": end_model(end),
            "messages": MESSAGES,
            "max_tokens": 16,
            "temperature": 1,
            "extra_body": {"ignore_eos": True, "tidegate": {"cache": False}},
        }
        first, again, other = [
            client.chat.completions.create(seed=seed, **asked).choices[0].message.content or ""
            for seed in (5, 5, 6)
        ]
        assert first == again != other
        words = first.split()
        stop = words[len(words) // 2]
        cut = client.chat.completions.create(seed=5, stop=[stop], **asked).choices[0]
    assert cut.message.content == first[: first.index(stop)]
    assert cut.finish_reason == "stop"


@BOTH
def test_models_are_listed_and_shown_to_who_waits_and_who_awaits(ends: Ends, end: str) -> None:
    async def listed() -> list[str]:
        async with ends.awaiting(end) as client:
            return [card.id async for card in client.models.list()]

    with ends.client(end) as client:
        assert client.models.retrieve(end_model(end)).owned_by == "tidegate"
        with pytest.raises(openai.NotFoundError) as missing:
            client.models.retrieve("moon")
    assert missing.value.code == "model_not_found"
    assert asyncio.run(listed()) == [end_model(end)]


@BOTH
def test_text_is_tokenized_and_spelt_again_below_the_clients_base_url(ends: Ends, end: str) -> None:
    with ends.client(end) as client:
        told: Any = client.post("/tokenize", body={"prompt": "a lamp"}, cast_to=object)
        spelt = client.post("/detokenize", body={"tokens": told["tokens"]}, cast_to=object)
        used = client.completions.create(model=end_model(end), prompt="a lamp", max_tokens=1).usage
    assert spelt == {"prompt": "a lamp"}
    assert used is not None
    assert told["count"] == used.prompt_tokens


@BOTH
def test_a_wrong_call_is_refused_alike_to_who_awaits(ends: Ends, end: str) -> None:
    async def run() -> None:
        async with ends.awaiting(end) as client:
            with pytest.raises(openai.BadRequestError) as wrong:
                await client.chat.completions.create(
                    model=end_model(end), messages=MESSAGES, temperature=3
                )
            assert (wrong.value.param, wrong.value.code) == ("temperature", "invalid_request")
            with pytest.raises(openai.NotFoundError):
                await client.completions.create(model="moon", prompt="x")

    asyncio.run(run())


TAKEN: list[dict[str, Any]] = [
    {"user": "me", "metadata": {"a": "b"}, "safety_identifier": "x", "prompt_cache_key": "y"},
    {"store": False, "service_tier": "auto", "modalities": ["text"], "reasoning_effort": "none"},
    {"prediction": {"type": "content", "content": "the hall"}, "verbosity": "medium"},
    {"max_completion_tokens": 2, "parallel_tool_calls": True, "stop": None, "logit_bias": {}},
]
REFUSED: list[tuple[str, Any]] = [
    ("store", True),
    ("service_tier", "flex"),
    ("modalities", ["text", "audio"]),
    ("audio", {"voice": "alloy", "format": "wav"}),
    ("reasoning_effort", "high"),
    ("verbosity", "low"),
    ("web_search_options", {}),
    ("functions", [{"name": "lamp"}]),
]


@pytest.mark.parametrize("fields", TAKEN)
def test_what_changes_nothing_is_taken(ends: Ends, fields: dict[str, Any]) -> None:
    asked: Any = {"model": "cloud", "messages": MESSAGES, "stop": "tide", **fields}
    with ends.client("cloud") as client:
        assert client.chat.completions.create(**asked).choices


@pytest.mark.parametrize(("field", "value"), REFUSED)
def test_what_is_not_served_is_a_bad_request_that_names_it(
    ends: Ends, field: str, value: Any
) -> None:
    asked: Any = {"model": "cloud", "messages": MESSAGES, field: value}
    with ends.client("cloud") as client, pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**asked)
    assert refused.value.param == field
    assert "must be" in str(refused.value)


def test_a_misspelt_field_is_a_bad_request_with_the_one_that_was_meant(ends: Ends) -> None:
    with ends.client("cloud") as client, pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model="cloud", messages=MESSAGES, extra_body={"max_token": 5}
        )
    assert "did you mean 'max_tokens'?" in str(refused.value)
