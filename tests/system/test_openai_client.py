"""The official OpenAI client, unchanged, against a device daemon and a cloud service."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import httpx
import openai
import pytest
from openai.types.chat import (
    ChatCompletionChunk,
    ChatCompletionMessageParam,
    ChatCompletionToolParam,
)
from openai.types.shared_params import ResponseFormatJSONSchema
from openaiends import Ends, end_model
from pydantic import BaseModel, ConfigDict, Field

pytestmark = pytest.mark.system

LAMP_SCHEMA: dict[str, object] = {
    "type": "object",
    "properties": {
        "room": {"enum": ["hall", "attic"]},
        "level": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["room", "level"],
    "additionalProperties": False,
}
LAMP_FORMAT: ResponseFormatJSONSchema = {
    "type": "json_schema",
    "json_schema": {"name": "lamp", "strict": True, "schema": LAMP_SCHEMA},
}
SET_LAMP: ChatCompletionToolParam = {
    "type": "function",
    "function": {"name": "set_lamp", "parameters": LAMP_SCHEMA},
}


class Lamp(BaseModel):
    """What `LAMP_SCHEMA` says, as programs have it."""

    model_config = ConfigDict(extra="forbid")

    room: Literal["hall", "attic"]
    level: int = Field(ge=0, le=9)


MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "which lamp is on?"}]


@pytest.mark.parametrize("end", ["device", "cloud"])
def test_the_openai_client_chats(ends: Ends, end: str) -> None:
    with ends.client(end) as client:
        model = client.models.list().data[0].id
        answer = client.chat.completions.create(
            model=model, messages=MESSAGES, max_tokens=12, temperature=0
        )
    assert answer.model == model == ("edge" if end == "device" else "cloud")
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 12


@pytest.mark.parametrize("end", ["device", "cloud"])
def test_the_openai_client_streams_what_it_also_gets_whole(ends: Ends, end: str) -> None:
    with ends.client(end) as client:
        model = client.models.list().data[0].id
        whole = client.chat.completions.create(
            model=model, messages=MESSAGES, max_tokens=24, temperature=1, seed=11
        )
        stream = client.chat.completions.create(
            model=model,
            messages=MESSAGES,
            max_tokens=24,
            temperature=1,
            seed=11,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
    said = "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)
    assert said == whole.choices[0].message.content
    # How many tokens were guessed depends on how fast the machine was.
    used, expected = chunks[-1].usage, whole.usage
    assert used is not None
    assert expected is not None
    assert (used.prompt_tokens, used.completion_tokens, used.total_tokens) == (
        expected.prompt_tokens,
        expected.completion_tokens,
        expected.total_tokens,
    )
    reasons = [one.choices[0].finish_reason for one in chunks if one.choices]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert set(reasons[:-1]) == {None}


@pytest.mark.parametrize("end", ["device", "cloud"])
def test_the_openai_client_completes_a_raw_prompt(ends: Ends, end: str) -> None:
    with ends.client(end) as client:
        model = client.models.list().data[0].id
        answer = client.completions.create(
            model=model, prompt="a lamp", max_tokens=8, temperature=0
        )
    assert answer.choices[0].text


SEVERAL: dict[str, Any] = {
    "messages": MESSAGES,
    "max_tokens": 12,
    "temperature": 1,
    "seed": 7,
    "n": 3,
    "logprobs": True,
    "top_logprobs": 2,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
}


def chosen(chunks: list[ChatCompletionChunk], index: int) -> tuple[str, list[str]]:
    """The text of one choice of a stream, and its tokens as the likelihoods name them."""
    mine = [one.choices[0] for one in chunks if one.choices and one.choices[0].index == index]
    told = [one.logprobs.content or [] for one in mine if one.logprobs is not None]
    return (
        "".join(one.delta.content or "" for one in mine),
        [token.token for content in told for token in content],
    )


@pytest.mark.parametrize("end", ["device", "cloud"])
def test_the_openai_client_gets_several_choices_with_likelihoods(ends: Ends, end: str) -> None:
    with ends.client(end) as client:
        whole = client.chat.completions.create(model=end_model(end), **SEVERAL)
        chunks = list(client.chat.completions.create(model=end_model(end), stream=True, **SEVERAL))
        alone = client.chat.completions.create(model=end_model(end), **(SEVERAL | {"n": 1}))
    assert [one.index for one in whole.choices] == [0, 1, 2]
    assert whole.choices[0].message.content == alone.choices[0].message.content
    assert whole.usage is not None
    assert alone.usage is not None
    assert whole.usage.prompt_tokens == alone.usage.prompt_tokens
    for one in whole.choices:
        assert one.logprobs is not None
        content = one.logprobs.content or []
        assert content
        assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in content)
        text, tokens = chosen(chunks, one.index)
        assert text == one.message.content
        assert tokens == [token.token for token in content]


@pytest.mark.parametrize("end", ["device", "cloud"])
def test_the_awaiting_openai_client_gets_the_same(ends: Ends, end: str) -> None:
    async def run() -> None:
        with ends.client(end) as told:
            expected = told.chat.completions.create(model=end_model(end), **SEVERAL)
        async with openai.AsyncOpenAI(
            base_url=ends.client(end).base_url, api_key=ends.key, max_retries=0, timeout=30
        ) as client:
            whole = await client.chat.completions.create(model=end_model(end), **SEVERAL)
            stream = await client.chat.completions.create(
                model=end_model(end), stream=True, **SEVERAL
            )
            chunks = [one async for one in stream]
        assert [one.message.content for one in whole.choices] == [
            one.message.content for one in expected.choices
        ]
        for one in whole.choices:
            assert chosen(chunks, one.index)[0] == one.message.content

    asyncio.run(run())


@pytest.mark.parametrize("end", ["device", "cloud"])
def test_the_openai_client_bans_and_forces_tokens(ends: Ends, end: str) -> None:
    with ends.client(end) as client:
        asked: dict[str, Any] = {"prompt": "a lamp", "max_tokens": 6, "temperature": 0}
        free = client.completions.create(model=end_model(end), logprobs=1, **asked)
        forced = client.completions.create(
            model=end_model(end), logit_bias={"40": 100}, logprobs=0, **asked
        )
        told = list(
            client.completions.create(
                model=end_model(end), logit_bias={"40": 100}, logprobs=0, stream=True, **asked
            )
        )
    assert free.choices[0].logprobs is not None
    assert forced.choices[0].logprobs is not None
    tokens = forced.choices[0].logprobs.tokens
    assert tokens is not None
    assert len(tokens) == 6
    assert len(set(tokens)) == 1
    assert free.choices[0].logprobs.tokens != tokens
    assert "".join(one.choices[0].text for one in told) == forced.choices[0].text


def test_the_openai_client_is_told_what_is_wrong_with_a_sampling_field(ends: Ends) -> None:
    wrong: list[tuple[str, object]] = [
        ("n", 17),
        ("top_logprobs", 3),
        ("presence_penalty", 3),
        ("logit_bias", {"999999999": 1}),
    ]
    with ends.client("device") as client:
        for field, value in wrong:
            asked: dict[str, Any] = {"model": "edge", "messages": MESSAGES, field: value}
            with pytest.raises(openai.BadRequestError) as refused:
                client.chat.completions.create(**asked)
            assert refused.value.param == field
            assert "must" in str(refused.value)


def test_a_wrong_key_is_an_authentication_error(ends: Ends) -> None:
    with ends.client("cloud", key="tg-wrong") as client:
        with pytest.raises(openai.AuthenticationError) as refused:
            client.chat.completions.create(model="cloud", messages=MESSAGES)
        assert refused.value.code == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_openai_errors_keep_their_class_and_name_the_field(ends: Ends) -> None:
    with ends.client("device") as client:
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="gpt-9", messages=MESSAGES)
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.BadRequestError) as wrong:
            client.chat.completions.create(model="edge", messages=MESSAGES, temperature=7)
        assert wrong.value.param == "temperature"


def test_probes_and_scrapers_of_a_cloud_with_keys_bring_none(ends: Ends) -> None:
    for path in ("/health", "/ready", "/metrics"):
        assert httpx.get(f"{ends.cloud.url}{path}", timeout=10).status_code == 200
    assert httpx.get(f"{ends.cloud.url}/v1/models", timeout=10).status_code == 401
    assert httpx.get(f"{ends.cloud.url}/status", timeout=10).status_code == 401


@pytest.mark.parametrize("end", ["device", "cloud"])
def test_the_openai_client_gets_json_that_its_schema_describes(ends: Ends, end: str) -> None:
    with ends.client(end) as client:
        model = client.models.list().data[0].id
        for seed in range(3):
            whole = client.chat.completions.create(
                model=model, messages=MESSAGES, seed=seed, response_format=LAMP_FORMAT
            )
            assert whole.choices[0].finish_reason == "stop"
            Lamp.model_validate_json(whole.choices[0].message.content or "")
        stream = client.chat.completions.create(
            model=model, messages=MESSAGES, seed=2, response_format=LAMP_FORMAT, stream=True
        )
        said = "".join(one.choices[0].delta.content or "" for one in stream if one.choices)
    assert said == whole.choices[0].message.content


@pytest.mark.parametrize("end", ["device", "cloud"])
def test_the_openai_client_parses_an_answer_into_its_own_class(ends: Ends, end: str) -> None:
    with ends.client(end) as client:
        model = client.models.list().data[0].id
        answer = client.chat.completions.parse(model=model, messages=MESSAGES, response_format=Lamp)
    assert isinstance(answer.choices[0].message.parsed, Lamp)


@pytest.mark.parametrize("end", ["device", "cloud"])
def test_the_openai_client_gets_a_call_and_answers_it(ends: Ends, end: str) -> None:
    with ends.client(end) as client:
        model = client.models.list().data[0].id
        whole = client.chat.completions.create(
            model=model, messages=MESSAGES, seed=3, tools=[SET_LAMP], tool_choice="required",
            parallel_tool_calls=False,
        )  # fmt: skip
        choice = whole.choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.tool_calls is not None
        (call,) = choice.message.tool_calls
        assert call.type == "function"
        assert call.function.name == "set_lamp"
        Lamp.model_validate_json(call.function.arguments)
        after: list[ChatCompletionMessageParam] = [
            *MESSAGES,
            {
                "role": "assistant",
                "tool_calls": [
                    {
                        "id": call.id,
                        "type": "function",
                        "function": {
                            "name": call.function.name,
                            "arguments": call.function.arguments,
                        },
                    }
                ],
            },
            {"role": "tool", "tool_call_id": call.id, "content": "done"},
        ]
        answer = client.chat.completions.create(
            model=model, messages=after, tools=[SET_LAMP], max_tokens=8
        )
    assert answer.choices[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize("end", ["device", "cloud"])
def test_the_openai_client_puts_a_streamed_call_together(ends: Ends, end: str) -> None:
    with ends.client(end) as client:
        model = client.models.list().data[0].id
        with client.chat.completions.stream(
            model=model, messages=MESSAGES, seed=3, tools=[SET_LAMP], tool_choice="required",
            parallel_tool_calls=False,
        ) as stream:  # fmt: skip
            pieces = [one for one in stream if one.type == "tool_calls.function.arguments.delta"]
            final = stream.get_final_completion()
    assert len(pieces) > 3
    calls = final.choices[0].message.tool_calls
    assert calls is not None
    (call,) = calls
    assert "".join(one.arguments_delta for one in pieces) == call.function.arguments
    Lamp.model_validate_json(call.function.arguments)
    assert final.choices[0].finish_reason == "tool_calls"


def test_a_schema_that_cannot_be_kept_is_a_bad_request_that_says_where(ends: Ends) -> None:
    odd: ResponseFormatJSONSchema = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {"type": "array", "uniqueItems": True}},
    }
    with ends.client("device") as client:
        with pytest.raises(openai.BadRequestError) as wrong:
            client.chat.completions.create(model="edge", messages=MESSAGES, response_format=odd)
        assert wrong.value.param == "response_format.json_schema.schema.uniqueItems"
