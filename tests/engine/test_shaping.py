"""Bias, penalties and masks against their plain definition, and the history that they look at."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.engine.choosing import Ask, choose
from tidegate.engine.executor import Logits
from tidegate.engine.history import History, TokenCounter
from tidegate.engine.request import SamplingParams
from tidegate.engine.sampling import sample
from tidegate.engine.shaping import Draw, shaped

VOCAB = 24
GREEDY = SamplingParams(max_tokens=9, temperature=0)
tokens = st.lists(st.integers(0, VOCAB - 1), max_size=30)
penalties = st.sampled_from([-2.0, 0.0, 0.0, 0.7, 2.0])
params = st.builds(
    SamplingParams,
    max_tokens=st.just(9),
    temperature=st.sampled_from([0.0, 1.0]),
    presence_penalty=penalties,
    frequency_penalty=penalties,
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.3]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=4).map(
        lambda bias: tuple(sorted(bias.items()))
    ),
)


def random_logits(seed: int, rows: int = 1) -> Logits:
    return np.random.default_rng(seed).normal(0, 2, (rows, VOCAB)).astype(np.float32)


def bits(allowed: set[int]) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    words = np.zeros(-(-VOCAB // 32), np.uint32)
    for token in allowed:
        words[token // 32] |= np.uint32(1 << token % 32)
    return words


def drawn(
    how: SamplingParams,
    prompt: list[int],
    answer: list[int],
    *,
    allowed: set[int] | None = None,
    ends: tuple[int, ...] = (),
    ends_from: int = 0,
) -> Draw:
    """A draw made as the engine makes it, token by token."""
    counter = TokenCounter(np.array(prompt, np.int64))
    for token in answer:
        counter.add(token)
    return Draw(
        params=how,
        seed=5,
        position=len(prompt) + len(answer),
        allowed=None if allowed is None else bits(allowed),
        history=counter.history() if how.penalises else None,
        ends=ends,
        ends_from=ends_from,
    )


def naive(
    logits: Logits, how: SamplingParams, prompt: list[int], answer: list[int], allowed: set[int]
) -> list[float]:
    """The definition, token by token, in plain Python."""
    biases, counts, found = dict(how.logit_bias), Counter(answer), []
    for token, logit in enumerate(logits.tolist()):
        value = float(np.float32(logit) + np.float32(biases.get(token, 0.0)))
        if token in prompt or token in answer:
            factor = how.repetition_penalty
            value = value / factor if value > 0 else value * factor
        value -= how.frequency_penalty * counts[token]
        value -= how.presence_penalty * (counts[token] > 0)
        found.append(value if token in allowed else -np.inf)
    return found


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), params, tokens, tokens, st.none() | st.sets(st.integers(0, 23)))
def test_logits_become_what_the_plain_definition_says(
    seed: int, how: SamplingParams, prompt: list[int], answer: list[int], allowed: set[int] | None
) -> None:
    logits = random_logits(seed)[0]
    before = logits.copy()
    found = shaped(logits, drawn(how, prompt, answer, allowed=allowed))
    everything = set(range(VOCAB)) if allowed is None else allowed
    expected = naive(logits, how, prompt, answer, everything)
    np.testing.assert_allclose(found, np.array(expected, np.float32), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(logits, before)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), params, tokens, tokens)
def test_a_row_is_chosen_alike_alone_and_between_plain_ones(
    seed: int, how: SamplingParams, prompt: list[int], answer: list[int]
) -> None:
    logits = random_logits(seed, 3)
    plain = Draw(params=SamplingParams(max_tokens=1, temperature=0), seed=1, position=3)
    one = drawn(how, prompt, answer)
    together = sample(logits, [plain, one, plain])
    assert together[1] == sample(logits[1:2], [one])[0]
    assert together[0] == sample(logits[:1], [plain])[0]


@settings(max_examples=200, deadline=None)
@given(tokens, tokens, tokens)
def test_a_history_counts_what_came_after_it_and_does_not_change(
    prompt: list[int], answer: list[int], later: list[int]
) -> None:
    counter = TokenCounter(np.array(prompt, np.int64))
    for token in answer:
        counter.add(token)
    history = counter.history()
    for token in later:
        counter.add(token)
    assert counts_of(history) == {**dict.fromkeys(prompt, 0), **Counter(answer)}
    followed = history
    for token in later:
        followed = followed.after(token)
    assert counts_of(followed) == counts_of(counter.history())
    assert counts_of(history) == {**dict.fromkeys(prompt, 0), **Counter(answer)}


def counts_of(history: History) -> dict[int, int]:
    counts = dict(zip(history.ids.tolist(), history.generated.tolist(), strict=True))
    assert len(counts) == len(history.ids), "each token once"
    return counts


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), params, tokens, st.integers(0, 4))
def test_guessed_tokens_are_counted_as_if_they_had_come_one_by_one(
    seed: int, how: SamplingParams, prompt: list[int], right: int
) -> None:
    logits, answer = random_logits(seed, 5), list[int]()
    for row in logits:
        one = sample(row[None], [drawn(how, prompt, answer)])[0]
        assert one is not None
        answer.append(one.token)
    draft = np.array([*answer[:right], *((t + 1) % VOCAB for t in answer[right:4])], np.int64)
    (choice,) = choose(logits, [Ask(draw=drawn(how, prompt, []), draft=draft)])
    assert [one.token for one in choice.sampled] == answer[: right + 1]


def test_an_answer_cannot_end_before_its_least_length() -> None:
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, [3, 4]] = 9, 8
    how = SamplingParams(max_tokens=9, min_tokens=2, temperature=0)
    first = drawn(how, [1], [], ends=(3, 4), ends_from=3)
    assert chosen(logits, first) not in (3, 4)
    second = first.after(0)
    assert chosen(logits, second) not in (3, 4)
    assert chosen(logits, second.after(0)) == 3


def test_a_grammar_that_allows_only_an_end_wins_over_the_least_length() -> None:
    logits = np.zeros((1, VOCAB), np.float32)
    how = SamplingParams(max_tokens=9, min_tokens=2, temperature=0)
    draw = drawn(how, [1], [], ends=(3,), ends_from=3)
    assert chosen(logits, replace(draw, allowed=bits({3}))) == 3
    assert chosen(logits, replace(draw, allowed=bits({3, 7}))) == 7


def test_a_mask_that_allows_nothing_gives_no_token() -> None:
    draw = drawn(SamplingParams(max_tokens=1), [1], [], allowed=set())
    assert sample(np.zeros((1, VOCAB), np.float32), [draw]) == [None]


def chosen(logits: Logits, draw: Draw) -> int:
    (one,) = sample(logits, [draw])
    assert one is not None
    return one.token


@pytest.mark.parametrize("bias", [-100.0, 100.0])
def test_a_bias_of_a_hundred_bans_or_forces(bias: float) -> None:
    logits = random_logits(4)
    best = int(logits[0].argmax())
    how = SamplingParams(max_tokens=1, logit_bias=((best, bias),))
    found = {chosen(logits, Draw(params=how, seed=1, position=position)) for position in range(50)}
    assert found == {best} if bias > 0 else best not in found


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_a_penalty_makes_a_repeated_token_lose(name: str) -> None:
    logits = np.full((1, VOCAB), 0.9, np.float32)
    logits[0, 6] = 1.0
    changed: dict[str, Any] = {name: 1.5}
    how = replace(GREEDY, **changed)
    assert chosen(logits, drawn(how, [], [])) == 6
    assert chosen(logits, drawn(how, [], [6])) == 0
    in_prompt = 0 if name == "repetition_penalty" else 6
    assert chosen(logits, drawn(how, [6], [])) == in_prompt
