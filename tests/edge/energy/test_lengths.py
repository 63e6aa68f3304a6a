"""Predicted lengths: exact quantiles of the last answers, and of what is left of one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tidegate.edge.energy.lengths import AnswerLengths

lengths = st.lists(st.integers(1, 600), min_size=1, max_size=400)


@given(seen=lengths, quantile=st.floats(0, 1), given_=st.integers(0, 700))
def test_quantiles_are_those_of_the_last_answers_that_were_longer(
    seen: list[int], quantile: float, given_: int
) -> None:
    known = AnswerLengths(prior=(64,))
    for one in seen:
        known.observe(one)
    longer = sorted(one for one in [64, *seen][-256:] if one > given_)
    left = known.left(quantile, given_)
    if longer:
        place = min(len(longer) - 1, int(quantile * len(longer)))
        assert left == max(1.0, longer[place] - given_)
        mean = sum(longer) / len(longer) - given_
        assert abs(known.mean_left(given_) - max(1.0, mean)) < 1e-6
    else:
        assert left >= 1.0
    assert known.left(quantile, given_, most=given_ + 3) <= 3.0 or left <= 1.0


def test_the_oldest_answer_is_forgotten() -> None:
    known = AnswerLengths(prior=(1,))
    for _ in range(256):
        known.observe(100)
    assert known.left(0.0) == 100.0
