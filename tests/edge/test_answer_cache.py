"""The answer cache: identical requests only, within its bytes and its time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tidegate.edge.answer_cache import AnswerCache, answer_key
from tidegate.engine.events import Usage
from tidegate.engine.request import Constraint, SamplingParams

GREEDY = SamplingParams(max_tokens=10, temperature=0)
SHAPES: tuple[dict[str, Any], ...] = (
    {"presence_penalty": 1.0},
    {"frequency_penalty": 1.0},
    {"repetition_penalty": 1.1},
    {"logit_bias": ((3, 1.0),)},
    {"logit_bias": ((3, 2.0),)},
    {"stop_token_ids": (3,)},
    {"min_tokens": 2},
    {"ignore_eos": True},
)
USAGE = Usage(prompt_tokens=3, completion_tokens=2)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_an_identical_request_gets_the_same_answer_until_it_is_stale() -> None:
    clock = Clock()
    cache = AnswerCache(budget_bytes=10_000, ttl_s=60, clock=clock)
    key = answer_key("m", (1, 2, 3), GREEDY)
    assert key is not None
    cache.put(key, "on", "stop", USAGE)
    clock.now_s = 60
    hit = cache.get(key)
    assert hit is not None
    assert (hit.text, hit.reason, hit.usage) == ("on", "stop", USAGE)
    clock.now_s = 60.1
    assert cache.get(key) is None
    assert cache.nbytes == 0


def test_who_only_looks_keeps_no_answer_longer_and_lets_none_go() -> None:
    clock = Clock()
    cache = AnswerCache(budget_bytes=2 * 410, ttl_s=60, clock=clock)
    cache.put(b"first", "on", "stop", USAGE)
    cache.put(b"second", "off", "stop", USAGE)
    looked = cache.peek(b"first")
    assert looked is not None
    assert looked.text == "on"
    assert cache.peek(b"third") is None
    cache.put(b"third", "up", "stop", USAGE)
    assert cache.peek(b"first") is None, "it is still the least recently used"
    clock.now_s = 60.1
    assert cache.peek(b"second") is None
    assert len(cache) == 2


def test_only_repeatable_requests_have_a_key_and_every_setting_is_in_it() -> None:
    drawn = SamplingParams(max_tokens=10, temperature=1.0)
    assert answer_key("m", (1,), drawn) is None
    keys = {
        answer_key("m", (1,), GREEDY),
        answer_key("other", (1,), GREEDY),
        answer_key("m", (2,), GREEDY),
        answer_key("m", (1,), replace(GREEDY, max_tokens=11)),
        answer_key("m", (1,), replace(GREEDY, stop=("x",))),
        answer_key("m", (1,), replace(drawn, seed=1)),
        answer_key("m", (1,), replace(drawn, seed=2)),
        answer_key("m", (1,), replace(drawn, seed=1, min_p=0.1)),
        *(answer_key("m", (1,), replace(GREEDY, **one)) for one in SHAPES),
    }
    assert len(keys) == 8 + len(SHAPES)


def test_an_answer_with_likelihoods_has_no_key_since_only_texts_are_kept() -> None:
    assert answer_key("m", (1,), replace(GREEDY, logprobs=0)) is None


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 900), st.booleans()), max_size=60))
def test_it_never_holds_more_than_its_budget(steps: list[tuple[int, int, bool]]) -> None:
    cache = AnswerCache(budget_bytes=3000, ttl_s=60, clock=Clock())
    for name, length, read in steps:
        if read:
            cache.get(bytes([name]))
        else:
            cache.put(bytes([name]), "é" * length, "stop", USAGE)
        assert 0 <= cache.nbytes <= 3000
        assert (cache.nbytes == 0) == (len(cache) == 0)


def test_an_answer_of_one_shape_is_no_answer_of_another() -> None:
    shapes = [
        None,
        Constraint(kind="json_object"),
        Constraint(kind="regex", source="a"),
        Constraint(kind="grammar", source="a"),
        Constraint(kind="regex", source="a", begun="a"),
    ]
    assert len({answer_key("m", (1,), GREEDY, shape) for shape in shapes}) == len(shapes)
