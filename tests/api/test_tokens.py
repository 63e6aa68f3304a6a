"""`/tokenize` and `/detokenize` over a toy engine: what they tell, and what they refuse."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from echobackend import EchoBackend
from httpengine import with_engine
from hypothesis import given, settings
from hypothesis import strategies as st
from toyengine import toy_engine
from toytext import EOS, toy_text

from tidegate.api.backend import ModelCard
from tidegate.api.http import create_app
from tidegate.api.tokens import (
    MOST_TOKENS,
    detokenized,
    read_detokenize,
    read_tokenize,
    tokenized,
)
from tidegate.engine.engine import Engine
from tidegate.errors import RequestError

CARD = ModelCard(id="toy", created_s=0, context_tokens=128)
HELLO = [{"role": "user", "content": "hello"}]


def told(**fields: object) -> dict[str, Any]:
    return tokenized(read_tokenize(fields), toy_text(), CARD)


def spelt(tokens: list[int]) -> object:
    return detokenized(read_detokenize({"tokens": tokens}), toy_text())["prompt"]


def test_a_prompts_tokens_are_counted_and_told() -> None:
    answer = told(prompt="hello world")
    assert answer["count"] == len(answer["tokens"]) > 0
    assert answer["max_model_len"] == 128
    assert answer["token_strs"] is None
    assert tuple(answer["tokens"]) == toy_text().encode_prompt("hello world")


def test_an_empty_prompt_has_no_tokens() -> None:
    assert told(prompt="")["count"] == 0
    assert spelt([]) == ""


def test_tokens_are_spelt_as_the_vocabulary_has_them_when_asked() -> None:
    answer = told(prompt="hello world", return_token_strs=True)
    assert "".join(answer["token_strs"]).replace("Ġ", " ") == "hello world"


def test_a_chats_tokens_are_those_that_its_answer_is_computed_from() -> None:
    ready, bare = told(messages=HELLO), told(messages=HELLO, add_generation_prompt=False)
    assert tuple(ready["tokens"]) == toy_text().encode_chat(HELLO)
    assert spelt(ready["tokens"]).endswith("<|assistant|>")  # type: ignore[attr-defined]
    assert ready["tokens"][: bare["count"]] == bare["tokens"]
    assert ready["count"] == bare["count"] + 1


def test_tools_are_counted_with_their_chat() -> None:
    tool = {"type": "function", "function": {"name": "lamp", "description": "x" * 50}}
    assert told(messages=HELLO, tools=[tool])["count"] > told(messages=HELLO)["count"] + 50


def test_a_text_beyond_the_context_is_counted_all_the_same() -> None:
    assert told(prompt="tide " * 200)["count"] > 128
    assert told(messages=[{"role": "user", "content": "tide " * 200}])["count"] > 128


@given(st.text(max_size=40))
@settings(deadline=None)
def test_what_was_tokenized_is_spelt_again_as_it_was(text: str) -> None:
    assert spelt(told(prompt=text)["tokens"]) == text


def test_special_tokens_are_spelt() -> None:
    assert spelt([EOS]) == "<|end|>"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "prompt: is absent, and so are messages"),
        ({"prompt": "x", "messages": HELLO}, "prompt: is there, and messages too: must be one"),
        ({"prompt": 3}, "prompt: is a number: must be a string"),
        ({"prompt": "x", "tools": [{}]}, "tools[0].type: null: must be 'function'"),
        ({"prompt": "x", "add_generation_prompt": True}, "add_generation_prompt: is there: must"),
        ({"messages": HELLO, "add_special_tokens": True}, "add_special_tokens: true: must be fal"),
        ({"messages": []}, "messages: is a list of 0"),
        ({"prompt": "x", "promt": 1}, "promt: is an unknown field: did you mean 'prompt'?"),
        ({"prompt": "x", "return_token_strs": 1}, "return_token_strs: 1: must be true or false"),
        ({"prompt": "x" * 3000}, "prompt: 3000 characters: must be at most 2048"),
        ({"messages": [{"role": "system", "content": "x"}]}, "the chat template refuses them"),
    ],
)
def test_a_wrong_text_is_refused_by_name(fields: dict[str, object], said: str) -> None:
    with pytest.raises(RequestError) as refused:
        told(**fields)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("tokens", "said", "status"),
    [
        (None, "tokens: is absent", 400),
        ("1", "tokens: is a string: must be a list of token ids", 400),
        ([1, -1], "tokens[1]: -1: must be a token id from 0", 400),
        ([True], "tokens[0]: true: must be", 400),
        ([5, 1 << 30], "tokens[1]: 1073741824: must be one of the model's tokens", 400),
        ([0] * (MOST_TOKENS + 1), f"tokens: holds {MOST_TOKENS + 1}: must be at most", 413),
    ],
)
def test_wrong_tokens_are_refused_by_place(tokens: object, said: str, status: int) -> None:
    with pytest.raises(RequestError) as refused:
        detokenized(read_detokenize({"tokens": tokens}), toy_text())
    assert said in str(refused.value)
    assert refused.value.status == status


def test_both_are_served_under_vllms_paths_and_beside_openais() -> None:
    async def test(client: httpx.AsyncClient, engine: Engine) -> None:
        for root in ("", "/v1"):
            answer = await client.post(f"{root}/tokenize", json={"prompt": "hello"})
            tokens = answer.json()["tokens"]
            assert tokens == list(engine.text.encode_prompt("hello"))
            answer = await client.post(
                f"{root}/detokenize", json={"model": engine.model_id, "tokens": tokens}
            )
            assert answer.json() == {"prompt": "hello"}
        wrong = await client.post("/tokenize", json={"model": "moon", "prompt": "hello"})
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (404, "model_not_found")
        assert engine.model_id in wrong.json()["error"]["message"]

    with_engine(test, toy_engine())


def test_without_a_tokenizer_the_answer_says_so() -> None:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(EchoBackend()))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/tokenize", json={"prompt": "x"})

    response = asyncio.run(ask())
    assert response.status_code == 404
    assert "no model with a tokenizer" in response.json()["error"]["message"]
