"""Prompt lookup: the same guesses as a plain scan of the text, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tidegate.engine.drafts import NOTHING, Draft, Ended, Wish
from tidegate.engine.drafts_lookup import (
    CATCH_UP_TOKENS,
    LONGEST,
    SHORTEST,
    GramIndex,
    LookupDrafter,
    repeated,
)


def scan(text: list[int], most: int) -> tuple[int, tuple[int, ...]] | None:
    """The obvious twin: (tokens of the longest suffix that occurred before, what followed)."""
    for grams in range(LONGEST, SHORTEST - 1, -1):
        for end in range(len(text) - 1, grams - 1, -1):
            if text[end - grams : end] == text[-grams:]:
                longer = list(text)
                for place in range(most):
                    longer.append(longer[end + place])
                return grams, tuple(longer[len(text) :])
    return None


def suffix_of(text: Sequence[int]) -> list[int]:
    index = GramIndex()
    index.extend(text)
    return index.suffix


def wish(text: list[int], *, most: int = 8, key: int = 0) -> Wish:
    return Wish(key=key, tokens=np.array(text, np.int64), most=most)


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 12), st.integers(1, 7))
def test_an_index_that_grows_finds_what_a_scan_finds(
    text: list[int], most: int, stride: int
) -> None:
    index = GramIndex()
    for begin in range(0, len(text), stride):
        index.extend(text[begin : begin + stride])
        expected = scan(text[: begin + stride], most)
        found = index.find(index.suffix)
        if found is not None:
            guess = repeated(index.following(found.follows, most), wish([], most=most))
            assert (found.grams, guess) == expected
        else:
            assert expected is None


def test_the_latest_of_the_longest_occurrences_is_what_counts() -> None:
    (draft,) = LookupDrafter(most_requests=1).propose([wish([1, 2, 3, 9, 1, 2, 3, 8, 7, 1, 2, 3])])
    assert draft == Draft(kind="lookup 3 varied", tokens=(8, 7, 1, 2, 3, 8, 7, 1), likely=0.2)


def test_a_text_that_repeats_is_guessed_beyond_its_end() -> None:
    (draft,) = LookupDrafter(most_requests=1).propose([wish([4, 5, 4, 5, 4], most=5)])
    assert draft.tokens == (5, 4, 5, 4, 5)


def test_nothing_is_guessed_for_new_text_or_when_nothing_is_wished() -> None:
    drafter = LookupDrafter(most_requests=2)
    assert drafter.propose([wish([1, 2, 3, 4]), wish([1, 1, 1], most=0, key=1)]) == [NOTHING] * 2


def test_a_long_prompt_is_indexed_a_part_at_a_time() -> None:
    drafter = LookupDrafter(most_requests=1)
    text = [7, 8] * CATCH_UP_TOKENS
    assert drafter.propose([wish(text)]) == [NOTHING]
    assert drafter.propose([wish(text)])[0].tokens == (7, 8, 7, 8, 7, 8, 7, 8)


def test_the_index_forgets_what_is_long_past_and_stays_bounded() -> None:
    index = GramIndex(most_grams=100)
    index.extend([1, 2, 3])
    for start in range(10, 2000, 10):
        index.extend(range(start, start + 10))
        assert len(index._young) + len(index._old) <= 2 * (100 + 10 * LONGEST)
        assert len(index._text) <= 2 * 100
        found = index.find(suffix_of(range(start, start + 5)))
        assert found is not None
        assert index.following(found.follows, 3) == [start + 5, start + 6, start + 7]
    assert index.length == 3 + 1990
    assert index.find(suffix_of([1, 2])) is None


def ended(text: list[int], *, prompt_tokens: int, key: int = 9, shared: bool = True) -> Ended:
    tokens = np.array(text, np.int64)
    return Ended(key=key, tokens=tokens, prompt_tokens=prompt_tokens, shared=shared)


def test_an_answer_to_another_request_is_a_guess_from_the_end_of_its_prompt_on() -> None:
    drafter = LookupDrafter(most_requests=2)
    drafter.remember(ended([50, 51, 52, 1, 2, 3, 60, 61, 62, 63], prompt_tokens=6))
    drafter.remember(ended([70, 71, 72, 73, 74], prompt_tokens=1))
    (draft,) = drafter.propose([wish([99, 98, 1, 2, 3])])
    assert draft == Draft(kind="answers 3 once", tokens=(60, 61, 62, 63), likely=0.5)
    assert drafter.propose([wish([40, 41, 50, 51, 52], key=1)]) == [NOTHING], "no part of a prompt"


def test_own_text_counts_unless_more_agrees_elsewhere() -> None:
    drafter = LookupDrafter(most_requests=2)
    drafter.remember(ended([0, 1, 2, 3, 4, 70, 71], prompt_tokens=1))
    (own,) = drafter.propose([wish([2, 3, 4, 80, 9, 2, 3, 4], most=1)])
    assert own.tokens == (80,)
    (other,) = drafter.propose([wish([3, 4, 80, 9, 1, 2, 3, 4], most=1, key=1)])
    assert other.tokens == (70,)


def test_answers_are_kept_apart_from_requests_that_do_not_share() -> None:
    drafter = LookupDrafter(most_requests=2)
    drafter.remember(ended([1, 2, 3, 60], prompt_tokens=3, shared=False))
    assert drafter.propose([wish([9, 1, 2, 3])]) == [NOTHING]
    drafter.remember(ended([1, 2, 3, 60], prompt_tokens=3))
    closed = LookupDrafter(most_requests=2, share=False)
    closed.remember(ended([1, 2, 3, 60], prompt_tokens=3))
    assert closed.propose([wish([9, 1, 2, 3])]) == [NOTHING]
    alone = Wish(key=1, tokens=np.array([9, 1, 2, 3], np.int64), most=4, shared=False)
    assert drafter.propose([alone]) == [NOTHING]


def test_the_request_met_least_recently_is_forgotten() -> None:
    drafter = LookupDrafter(most_requests=2)
    for key in (0, 1, 0, 2):
        drafter.propose([wish([1, 2], most=0, key=key)])
    assert list(drafter._indexes) == [0, 2]
