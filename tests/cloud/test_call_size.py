"""How much a call comes to: the least, known without a tokenizer, is never above the most."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st
from toytext import toy_text

from tidegate.api.schema import Call, read_chat, read_completion
from tidegate.cloud.call_size import least_size, most_size

CONTEXT = 24


def completion(prompt: object, n: int = 1, max_tokens: int | None = None) -> Call:
    most = {} if max_tokens is None else {"max_tokens": max_tokens}
    return read_completion({"prompt": prompt, "n": n, **most})


def both(call: Call) -> tuple[int, int]:
    text = toy_text(context_tokens=CONTEXT)
    most = asyncio.run(most_size(call, "toy", text, CONTEXT))
    least = least_size(call, "toy", CONTEXT)
    assert (least.model, most.model) == ("toy", "toy")
    return least.tokens, most.tokens


ANSWERS = {"n": st.integers(1, 5), "max_tokens": st.none() | st.integers(1, 2 * CONTEXT)}


@given(length=st.integers(1, 2 * CONTEXT), **ANSWERS)
def test_the_least_is_no_more_than_the_most_whatever_the_prompt(
    length: int, n: int, max_tokens: int | None
) -> None:
    least, most = both(completion("x" * length, n, max_tokens))
    assert least <= most


@given(length=st.integers(1, 2 * CONTEXT), **ANSWERS)
def test_the_least_is_reached_by_some_prompt(length: int, n: int, max_tokens: int | None) -> None:
    least, _ = both(completion("x" * length, n, max_tokens))
    prompts = ([5] * tokens for tokens in range(1, CONTEXT + 1))
    assert least == min(both(completion(prompt, n, max_tokens))[1] for prompt in prompts)


@given(length=st.integers(1, CONTEXT - 1), max_tokens=ANSWERS["max_tokens"])
def test_of_one_answer_to_tokens_the_least_is_known_exactly(
    length: int, max_tokens: int | None
) -> None:
    least, most = both(completion([5] * length, 1, max_tokens))
    assert least == most


def test_without_max_tokens_a_call_comes_to_the_whole_context_at_least() -> None:
    call = read_chat({"messages": [{"role": "user", "content": "hi"}]})
    assert both(call) == (CONTEXT, CONTEXT)
