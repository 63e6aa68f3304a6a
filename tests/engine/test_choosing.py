"""Guessed tokens and masks: they change how many tokens a step gives, never which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tidegate.engine.choosing import Ask, Mask, choose
from tidegate.engine.executor import Logits, Tokens
from tidegate.engine.request import SamplingParams
from tidegate.engine.sampling import Draw
from tidegate.errors import ExecutionError

VOCAB = 40


def draw(temperature: float, position: int = 7) -> Draw:
    params = SamplingParams(max_tokens=8, temperature=temperature)
    return Draw(params=params, seed=3, position=position)


def random_logits(rows: int, seed: int) -> Logits:
    return np.random.default_rng(seed).normal(0, 2, (rows, VOCAB)).astype(np.float32)


def tokens_of(logits: Logits, ask: Ask) -> list[int]:
    (choice,) = choose(logits, [ask])
    assert choice.error is None
    return [one.token for one in choice.sampled]


def one_at_a_time(logits: Logits, temperature: float) -> list[int]:
    return [
        tokens_of(logits[i : i + 1], Ask(draw=draw(temperature, 7 + i)))[0]
        for i in range(len(logits))
    ]


@given(st.integers(0, 2**32), st.integers(0, 5), st.integers(0, 5), st.sampled_from([0.0, 1.0]))
def test_a_guess_gives_the_tokens_that_would_have_come_anyway(
    seed: int, right: int, wrong: int, temperature: float
) -> None:
    logits = random_logits(1 + right + wrong, seed)
    expected = one_at_a_time(logits, temperature)
    draft = [*expected[:right], *((token + 1) % VOCAB for token in expected[right:-1])]
    found = tokens_of(logits, Ask(draw=draw(temperature), draft=np.array(draft, np.int64)))
    assert found == expected[: right + 1]


@dataclass
class EvenThenOdd:
    """A guide that allows even tokens at even places of the answer and odd ones at odd places."""

    taken: list[int] = field(default_factory=list)

    def mask(self) -> Mask:
        word = 0x55555555 if len(self.taken) % 2 == 0 else 0xAAAAAAAA
        return np.full(2, word, np.uint32)

    def accept(self, token: int) -> None:
        assert token % 2 == len(self.taken) % 2
        self.taken.append(token)

    def accept_some(self, tokens: Sequence[int]) -> int:
        for place, token in enumerate(tokens):
            if token % 2 != len(self.taken) % 2:
                return place
            self.taken.append(token)
        return len(tokens)

    def forced(self) -> Tokens:
        return np.empty(0, np.int64)


@given(st.integers(0, 2**32), st.sampled_from([0.0, 1.0]))
def test_a_guide_masks_every_position_and_hears_of_every_token(
    seed: int, temperature: float
) -> None:
    logits = random_logits(4, seed)
    first = tokens_of(logits[:1], Ask(draw=draw(temperature), guide=EvenThenOdd()))
    guide = EvenThenOdd()
    draft = np.array([*first, 0, 0], np.int64)
    found = tokens_of(logits, Ask(draw=draw(temperature), draft=draft, guide=guide))
    assert found[0] == first[0]
    assert guide.taken == found
    assert len(found) == 2, "zero is even, so it is never the second"


class Timid(EvenThenOdd):
    """A guide that leaves it all to its masks."""

    def accept_some(self, tokens: Sequence[int]) -> int:
        return 0


@given(st.integers(0, 2**32), st.integers(0, 6))
def test_the_likeliest_token_that_is_allowed_needs_no_mask(seed: int, right: int) -> None:
    logits = random_logits(7, seed)
    expected: list[int] = []
    for place in range(len(logits)):
        guide = Timid(taken=list(expected))
        expected += tokens_of(logits[place : place + 1], Ask(draw=draw(0), guide=guide))
    draft = np.array([*expected[:right], *expected[right:-1][::-1]], np.int64)
    quick, slow = EvenThenOdd(), Timid()
    found = tokens_of(logits, Ask(draw=draw(0), draft=draft, guide=quick))
    assert found == tokens_of(logits, Ask(draw=draw(0), draft=draft, guide=slow))
    assert found == expected[: len(found)]
    assert quick.taken == slow.taken == found
    assert len(found) > right


class Broken:
    """A guide with a defect."""

    def mask(self) -> Mask:
        raise ZeroDivisionError("secret")

    def accept(self, token: int) -> None:
        raise AssertionError(token)

    def accept_some(self, tokens: Sequence[int]) -> int:
        raise ZeroDivisionError("secret")

    def forced(self) -> Tokens:
        raise AssertionError


def test_a_broken_guide_costs_its_own_row_only() -> None:
    logits = random_logits(3, 1)
    plain = Ask(draw=draw(0))
    first, second, third = choose(logits, [plain, Ask(draw=draw(0), guide=Broken()), plain])
    assert first.error is None
    assert third.error is None
    assert "ZeroDivisionError" in str(second.error)
    assert "secret" not in str(second.error)


def test_a_defect_in_choosing_costs_its_own_row_and_moves_the_guides_of_others() -> None:
    logits, guide = random_logits(3, 1), EvenThenOdd()
    biased = SamplingParams(max_tokens=8, temperature=0, logit_bias=((10_000, 1.0),))
    broken = Draw(params=biased, seed=3, position=7)
    asks = [Ask(draw=draw(0)), Ask(draw=broken), Ask(draw=draw(0), guide=guide)]
    first, second, third = choose(logits, asks)
    assert second.error is not None
    assert first == choose(logits[:1], asks[:1])[0]
    assert guide.taken == [one.token for one in third.sampled]


class AllowsOnce(EvenThenOdd):
    """A guide that has nothing to allow after its first token."""

    def mask(self) -> Mask:
        if self.taken:
            raise ExecutionError("nothing is allowed")
        return super().mask()

    def accept_some(self, tokens: Sequence[int]) -> int:
        return super().accept_some(tokens[: 1 - len(self.taken)])


def test_trouble_after_the_first_token_waits_for_the_next_step() -> None:
    logits = random_logits(2, 1)
    first = tokens_of(logits[:1], Ask(draw=draw(0), guide=EvenThenOdd()))
    draft = np.array(first, np.int64)
    assert tokens_of(logits, Ask(draw=draw(0), draft=draft, guide=AllowsOnce())) == first
    (choice,) = choose(logits, [Ask(draw=draw(0), draft=draft, guide=AllowsOnce(taken=[2]))])
    assert "nothing is allowed" in str(choice.error)
    logits[1] = np.nan
    held = np.array(tokens_of(logits[:1], Ask(draw=draw(0))), np.int64)
    assert tokens_of(logits, Ask(draw=draw(0), draft=held)) == held.tolist()
