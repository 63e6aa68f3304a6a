"""Prompts that are too long: what goes, what stays, and what the caller is told."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toyengine import PAGED, serving, toy_engine
from toyexecutor import ToyExecutor
from toytext import TEMPLATE, toy_text, toy_tokenizer

from tidegate.api.answers import extension
from tidegate.api.backend import Routed
from tidegate.api.context_policy import Fitted, droppable, fit_call
from tidegate.api.engine_backend import EngineBackend, encode_call
from tidegate.api.schema import (
    Call,
    ContextPolicy,
    Message,
    read_chat,
    read_completion,
)
from tidegate.engine.events import Finished
from tidegate.engine.text import TextModel
from tidegate.errors import RequestError
from tidegate.model.chat_template import ChatTemplate

POLICIES: tuple[ContextPolicy, ...] = ("truncate_oldest", "truncate_middle")
CONTEXT = 128
ROLES = TEMPLATE.replace('("user", "assistant")', '("user", "assistant", "system")')


def text_of(context_tokens: int) -> TextModel:
    """The toy's text side, with system messages."""
    return TextModel(
        toy_tokenizer(),
        eos_ids=frozenset({0}),
        context_tokens=context_tokens,
        template=ChatTemplate(ROLES),
    )


TEXT = text_of(CONTEXT)


def chat(roles_and_words: Sequence[tuple[str, str]], **fields: object) -> Call:
    messages = [{"role": role, "content": words} for role, words in roles_and_words]
    return read_chat({"messages": messages, **fields})


def fitted(call: Call, policy: ContextPolicy, text: TextModel = TEXT) -> Fitted:
    encode = partial(encode_call, text)
    return asyncio.run(fit_call(call, encode, text, policy=policy, context_tokens=CONTEXT))


def talk(turns: int, words: str = "the tide is at the gate") -> list[tuple[str, str]]:
    """A system message, then turns of a question and its answer, the last one unanswered."""
    said = [("system", "be brief")]
    for turn in range(turns):
        said += [("user", f"{turn} {words}"), ("assistant", f"{turn} {words}")]
    return said[:-1]


def contents(found: Fitted) -> list[str]:
    return [message.content for message in found.call.messages]


def test_what_fits_is_left_alone() -> None:
    call = chat(talk(2), max_tokens=8)
    for policy in ("error", *POLICIES):
        found = fitted(call, policy)
        assert (found.call, found.dropped_messages, found.dropped_tokens) == (call, 0, 0)
        assert found.prompt == asyncio.run(encode_call(TEXT, call))


def test_the_oldest_turns_go_and_no_more_than_needed() -> None:
    call = chat(talk(12), max_tokens=8)
    found = fitted(call, "truncate_oldest")
    kept = contents(found)
    assert kept[0] == "be brief"
    assert kept[-1].startswith("11 ")
    assert found.dropped_messages == len(call.messages) - len(kept) > 0
    assert kept == ["be brief", *(m.content for m in call.messages[-len(kept) + 1 :])]
    assert len(found.prompt) <= CONTEXT - 8
    one_more = call.messages[-len(kept) - 1 :]
    longer = chat([("system", "be brief"), *((m.role, m.content) for m in one_more)])
    assert len(asyncio.run(encode_call(text_of(4096), longer))) > CONTEXT - 8


def test_the_middle_goes_and_the_first_and_last_turns_stay() -> None:
    kept = contents(fitted(chat(talk(12), max_tokens=8), "truncate_middle"))
    assert kept[:3] == ["be brief", *("0 the tide is at the gate" for _ in range(2))]
    assert kept[-1].startswith("11 ")
    places = [int(one.split()[0]) for one in kept[1:]]
    assert places == sorted(places)
    assert 1 not in places


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), st.just("x")),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from(POLICIES),
)
def test_system_messages_and_the_last_turn_are_never_dropped(
    said: list[tuple[Any, str]], policy: ContextPolicy
) -> None:
    messages = [Message(role=role, content=words) for role, words in said]
    gone = {index for turn in droppable(messages, policy) for index in turn}
    assert not any(messages[index].role == "system" for index in gone)
    users = [index for index, one in enumerate(messages) if one.role == "user"]
    if users:
        assert not any(index >= users[-1] for index in gone)
    if policy == "truncate_middle" and users:
        first = next(index for index, one in enumerate(messages) if one.role != "system")
        assert first not in gone
    for index in gone:
        if messages[index].role in ("assistant", "tool") and index and index - 1 not in gone:
            earlier = [one.role for one in messages[:index] if one.role != "system"]
            assert not earlier or messages[index - 1].role == "system", "turns go whole"


@pytest.mark.parametrize("policy", POLICIES)
def test_what_may_not_be_dropped_and_is_too_long_is_refused_with_what_is_left(
    policy: ContextPolicy,
) -> None:
    said = [*talk(4), ("assistant", "yes"), ("user", "the tide " * 70)]
    with pytest.raises(RequestError, match=r"messages that may not be dropped are ") as refused:
        fitted(chat(said), policy)
    assert refused.value.status == 413
    assert "must be less than 128" in str(refused.value)


def test_a_last_turn_that_leaves_little_room_is_answered_all_the_same() -> None:
    said = [*talk(4), ("assistant", "yes"), ("user", "the tide is at the gate " * 17)]
    found = fitted(chat(said, max_tokens=60), "truncate_oldest")
    assert CONTEXT - 60 < len(found.prompt) < CONTEXT
    assert found.dropped_messages == len(said) - 2


def test_the_answer_has_a_quarter_of_the_context_when_no_limit_was_given() -> None:
    found = fitted(chat(talk(12)), "truncate_oldest")
    assert CONTEXT - 32 - 20 < len(found.prompt) <= CONTEXT - 32


LONG_IDS = list(range(3, 203))


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ("truncate_oldest", LONG_IDS[-118:]),
        ("truncate_middle", [*LONG_IDS[:59], *LONG_IDS[-59:]]),
    ],
)
def test_a_raw_prompt_loses_its_front_or_its_middle(policy: ContextPolicy, kept: list[int]) -> None:
    found = fitted(read_completion({"prompt": LONG_IDS, "max_tokens": 10}), policy)
    assert list(found.prompt) == kept
    assert found.dropped_tokens == 82
    assert found.call.prompt == found.prompt, "ids stay with the model they belong to"


def test_a_raw_texts_first_special_token_stays() -> None:
    text = TextModel(toy_tokenizer(), eos_ids=frozenset(), context_tokens=CONTEXT, bos_id=1)
    prompt = "<|user|>" + "the tide is at the gate " * 40
    whole = toy_text(context_tokens=4096).encode_prompt(prompt)
    for policy in POLICIES:
        call = read_completion({"prompt": prompt, "max_tokens": 10})
        found = fitted(call, policy, text)
        assert len(found.prompt) == 118
        assert found.prompt[0] == 1
        assert found.prompt[-40:] == whole[-40:]
        assert found.dropped_tokens == len(whole) - 118
    assert found.prompt[:50] == whole[:50]


def test_an_answer_says_what_was_left_out() -> None:
    async def run(call: Call) -> tuple[Routed, Finished]:
        engine = toy_engine(ToyExecutor(PAGED, context_tokens=CONTEXT), eos=False)
        backend = EngineBackend(engine, route="edge", created_s=0)
        async with serving(engine):
            routed, *_, end = [event async for event in backend.answer(call)]
        assert isinstance(routed, Routed)
        assert isinstance(end, Finished)
        return routed, end

    said = [("user", "the tide is at the gate"), ("assistant", "yes")] * 12
    asked = {"max_tokens": 10, "tidegate": {"context_policy": "truncate_oldest"}}
    routed, end = asyncio.run(run(chat([*said, ("user", "is it high?")], **asked)))
    assert routed.dropped_messages > 0
    assert end.usage.completion_tokens == 10
    assert extension(routed)["dropped_messages"] == routed.dropped_messages
    assert "dropped_tokens" not in extension(routed)
    with pytest.raises(RequestError) as refused:
        asyncio.run(run(chat([*said, ("user", "is it high?")], max_tokens=10)))
    assert refused.value.status == 413
