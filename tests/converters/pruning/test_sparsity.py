"""Which weights become zero: exactly as many as asked for, and always the lowest."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tidegate.converters.pruning.sparsity import Sparsity, lowest, lowest_of_four
from tidegate.errors import ConfigError

SCORES = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 12)),
    # Few values, so that many are equal.
    elements=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
)


@given(SCORES, st.floats(0, 0.99))
def test_every_row_loses_exactly_its_share_and_nothing_above_what_it_keeps(
    scores: np.ndarray, share: float
) -> None:
    mask = lowest(scores, share)
    assert (mask.sum(axis=1) == int(share * scores.shape[1])).all()
    for row, gone in zip(scores, mask, strict=True):
        assert row[gone].max(initial=-np.inf) <= row[~gone].min(initial=np.inf)


@given(SCORES.map(lambda scores: np.repeat(scores, 4, axis=1)))
def test_two_of_every_four_go_and_never_one_above_a_kept_one(scores: np.ndarray) -> None:
    scores = scores + np.tile(np.array([0, 0.25, 0.125, 0], np.float32), scores.shape[1] // 4)
    fours, gone = scores.reshape(-1, 4), lowest_of_four(scores).reshape(-1, 4)
    assert (gone.sum(axis=1) == 2).all()
    for four, mask in zip(fours, gone, strict=True):
        assert four[mask].max() <= four[~mask].min()


def test_the_first_of_equal_scores_go() -> None:
    assert lowest(np.ones((1, 6), np.float32), 0.5).tolist() == [[True] * 3 + [False] * 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.0}, r"sparsity = 0\.0: must be above 0 and below 1"),
        ({"sparsity": 1.0}, "sparsity"),
        ({"pattern": "4:8"}, r"pattern = '4:8': must be none or 2:4"),
        ({"sparsity": 0.6, "pattern": "2:4"}, r"sparsity = 0\.6: must be 0\.5 with pattern 2:4"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sparsity(**options)  # type: ignore[arg-type]
