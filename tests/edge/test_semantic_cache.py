"""Answers by meaning: shared only where all else is equal, numbers included, and bounded."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from handembedder import LetterEmbedder
from hypothesis import given
from hypothesis import strategies as st

from tidegate.api.embeddings import Embedded, Text
from tidegate.api.schema import Call, read_chat
from tidegate.api.texts import Counted, uncounted
from tidegate.edge.answer_cache import AnswerCache
from tidegate.edge.answer_memory import AnswerMemory, Recall
from tidegate.edge.semantic_cache import Question, SemanticCache, question
from tidegate.engine.events import Usage
from tidegate.errors import ConfigError

USAGE = Usage(prompt_tokens=3, completion_tokens=2)


def asked(*values: float, scope: bytes = b"s", message: str = "hello") -> Question:
    made = question(scope, message, np.array(values, np.float32))
    assert made is not None
    return made


def cache(
    similarity: float = 0.9, budget_bytes: int = 1 << 16
) -> tuple[SemanticCache, list[float]]:
    now = [0.0]
    made = SemanticCache(
        similarity=similarity, budget_bytes=budget_bytes, ttl_s=60, clock=lambda: now[0]
    )
    return made, now


def text_of(memory: SemanticCache, one: Question) -> str | None:
    found = memory.get(one)
    return None if found is None else found[0].text


def test_near_questions_share_an_answer_and_far_ones_do_not() -> None:
    memory, _ = cache()
    memory.put(asked(1, 0), "east", "stop", USAGE)
    found = memory.get(asked(1, 0.1))
    assert found is not None
    assert found[0].text == "east"
    assert found[1] == pytest.approx(1 / np.hypot(1, 0.1))
    assert text_of(memory, asked(1, 1)) is None


def test_the_nearest_of_several_answers() -> None:
    memory, _ = cache(0.5)
    memory.put(asked(1, 0), "east", "stop", USAGE)
    memory.put(asked(1, 1), "northeast", "stop", USAGE)
    assert text_of(memory, asked(1, 0.8)) == "northeast"
    assert text_of(memory, asked(1, 0.1)) == "east"


def test_other_numbers_or_another_context_are_another_question() -> None:
    memory, _ = cache()
    memory.put(asked(1, 0, message="lamp 1 at 7:30"), "done", "stop", USAGE)
    assert text_of(memory, asked(1, 0, message="at 7:30 lamp 1")) is None
    assert text_of(memory, asked(1, 0, message="lamp 2 at 7:30")) is None
    assert text_of(memory, asked(1, 0, scope=b"t", message="lamp 1 at 7:30")) is None
    assert text_of(memory, asked(1, 0, message="the lamp 1, at 7:30!")) == "done"


def test_answers_grow_stale() -> None:
    memory, now = cache()
    memory.put(asked(1, 0), "old", "stop", USAGE)
    now[0] = 61
    assert text_of(memory, asked(1, 0)) is None
    assert len(memory) == memory.nbytes == 0


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 900)), max_size=40))
def test_the_budget_holds_whatever_is_kept(answers: list[tuple[int, int]]) -> None:
    memory, _ = cache(budget_bytes=5000)
    for size, chars in answers:
        memory.put(asked(*([1.0] * size)), "x" * chars, "stop", USAGE)
        assert 0 <= memory.nbytes <= 5000
    while len(memory):
        memory._drop_first()
    assert memory.nbytes == 0


@pytest.mark.parametrize("bad", [0.0, -1.0, 1.1, float("nan")])
def test_a_threshold_out_of_range_is_refused(bad: float) -> None:
    with pytest.raises(ConfigError, match="semantic_cache"):
        cache(bad)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_an_embedding_without_direction_is_no_question(bad: float) -> None:
    assert question(b"", "hello", np.full(3, bad, np.float32)) is None


def chat(message: str, **fields: object) -> Call:
    messages = [{"role": "user", "content": message}]
    return read_chat({"messages": messages, "temperature": 0, "max_tokens": 9, **fields})


def remember(*steps: tuple[Call, str]) -> list[Recall]:
    """Look each call up and keep its answer, with prompts that are never identical."""

    async def run() -> list[Recall]:
        semantic = SemanticCache(similarity=0.95, budget_bytes=1 << 16, ttl_s=60, clock=lambda: 0.0)
        exact = AnswerCache(budget_bytes=1 << 16, ttl_s=60, clock=lambda: 0.0)
        memory = AnswerMemory(exact, semantic, LetterEmbedder(longest=30))
        found = []
        for number, (call, text) in enumerate(steps):
            recall = await memory.recall(call, "m", (number,), call.sampling)
            memory.keep(recall, text, "stop", USAGE)
            found.append(recall)
        return found

    return asyncio.run(run())


def test_a_call_is_answered_by_one_that_means_the_same_and_says_so() -> None:
    first, second = remember((chat("listen now"), "yes"), (chat("silent now"), "no"))
    assert first.hit is None
    assert second.hit is not None
    assert second.hit.text == "yes"
    assert second.why == "means the same as an earlier request: 1.000 alike"


@pytest.mark.parametrize(
    "other",
    [
        chat("silent now", max_tokens=8),
        chat("silent now", stop="x"),
        chat("silent now", temperature=1),
        chat("silent now", tidegate={"cache": False}),
        chat("silent now", tidegate={"route": "cloud"}),
        chat("x" * 31),
        chat("something else"),
        read_chat(
            {
                "messages": [
                    {"role": "system", "content": "be rude"},
                    {"role": "user", "content": "silent now"},
                ],
                "temperature": 0,
                "max_tokens": 9,
            }
        ),
    ],
    ids=["length", "stop", "chance", "opted out", "cloud", "too long", "far", "system"],
)
def test_a_call_that_differs_elsewhere_is_answered_anew(other: Call) -> None:
    _, second = remember((chat("listen now"), "yes"), (other, "no"))
    assert second.hit is None


def test_where_and_how_it_is_answered_makes_no_difference() -> None:
    stream = chat("silent now", stream=True, tidegate={"priority": "background"})
    _, second = remember((chat("listen now"), "yes"), (stream, "no"))
    assert second.hit is not None


class CountingEmbedder(LetterEmbedder):
    """Counts what it embeds."""

    count = 0

    async def embed(
        self,
        inputs: tuple[Text, ...],
        *,
        dimensions: int | None = None,
        timeout_s: float | None = None,
        counted: Counted = uncounted,
    ) -> Embedded:
        self.count += len(inputs)
        return await super().embed(inputs)


def test_who_only_asks_what_would_be_has_nothing_embedded_and_is_told_so() -> None:
    async def run() -> None:
        semantic = SemanticCache(similarity=0.95, budget_bytes=1 << 16, ttl_s=60, clock=lambda: 0.0)
        exact = AnswerCache(budget_bytes=1 << 16, ttl_s=60, clock=lambda: 0.0)
        embedder = CountingEmbedder(longest=30)
        memory = AnswerMemory(exact, semantic, embedder)
        call = chat("listen now")
        memory.keep(await memory.recall(call, "m", (1,), call.sampling), "yes", "stop", USAGE)
        assert embedder.count == 1
        same = await memory.recall(call, "m", (1,), call.sampling, to_answer=False)
        assert same.hit is not None
        other = await memory.recall(call, "m", (2,), call.sampling, to_answer=False)
        assert other.hit is None
        assert other.why == "none identical; similar questions were not looked for"
        assert embedder.count == 1

    asyncio.run(run())


class BusyEmbedder(LetterEmbedder):
    """Has thousands of texts to embed first."""

    async def embed(
        self,
        inputs: tuple[Text, ...],
        *,
        dimensions: int | None = None,
        timeout_s: float | None = None,
        counted: Counted = uncounted,
    ) -> Embedded:
        await asyncio.sleep(30)
        return await super().embed(inputs)


def test_a_busy_embedder_holds_up_no_chat() -> None:
    async def run() -> Recall:
        semantic = SemanticCache(similarity=0.95, budget_bytes=1 << 16, ttl_s=60, clock=lambda: 0.0)
        exact = AnswerCache(budget_bytes=1 << 16, ttl_s=60, clock=lambda: 0.0)
        memory = AnswerMemory(exact, semantic, BusyEmbedder(), patience_s=0.01)
        call = chat("listen now")
        async with asyncio.timeout(5):
            return await memory.recall(call, "m", (1,), call.sampling)

    found = asyncio.run(run())
    assert found.hit is None
    assert found.key is not None
    assert found.asked is None
