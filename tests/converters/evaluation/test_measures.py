"""The measures against what they mean, computed the long way."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.converters.evaluation.measures import MARGINS, compare, cosine, summarise


def logits(rows: int, vocab: int, seed: int, spread: float = 3.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, vocab)) * spread).astype(np.float32)


def test_a_model_is_at_no_distance_from_itself() -> None:
    same = logits(7, 50, 0)
    summary = summarise([compare(same, same, range(7))])
    assert summary.kl_mean == summary.kl_p99 == 0
    assert summary.agreement == 1
    assert summary.perplexity == summary.reference_perplexity


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), vocab=st.integers(2, 30), spread=st.floats(0.01, 40))
def test_divergence_and_loss_are_those_of_the_definitions(
    seed: int, vocab: int, spread: float
) -> None:
    reference, found = logits(4, vocab, seed, spread), logits(4, vocab, seed + 1, spread)
    following = np.random.default_rng(seed).integers(0, vocab, 4)
    measured = compare(reference, found, following)
    for row in range(4):
        p, q = (np.exp(np.float64(x[row]) - x[row].max()) for x in (reference, found))
        p, q = p / p.sum(), q / q.sum()
        kl = sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True) if a)
        assert measured.kl[row] == pytest.approx(max(kl, 0), rel=1e-6, abs=1e-9)
        assert measured.loss[row] == pytest.approx(-math.log(q[following[row]]), rel=1e-6, abs=1e-9)
    assert (measured.kl >= 0).all()


def test_perplexity_of_knowing_nothing_is_the_size_of_the_vocabulary() -> None:
    nothing = np.zeros((5, 64), np.float32)
    summary = summarise([compare(nothing, nothing, [1, 2, 3, 4])])
    assert summary.perplexity == pytest.approx(64)
    assert summary.positions == 5


def test_sequences_measured_apart_or_together_give_the_same() -> None:
    reference, found, following = logits(20, 40, 1), logits(20, 40, 2), list(range(20))
    whole = summarise([compare(reference, found, following)])
    parts = [
        compare(reference[cut], found[cut], following[cut]) for cut in (slice(0, 3), slice(3, 20))
    ]
    assert summarise(parts) == whole


def test_the_table_of_confidence_puts_every_position_in_one_bin() -> None:
    reference, found = logits(500, 40, 3), logits(500, 40, 3)
    found += np.random.default_rng(9).standard_normal(found.shape).astype(np.float32)
    table = summarise([compare(reference, found, range(40))]).confidence
    assert [bin.margin for bin in table] == list(MARGINS)
    assert sum(bin.share for bin in table) == pytest.approx(1)
    narrow, wide = table[0], table[4]
    assert narrow.agreement < wide.agreement


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="no position"):
        summarise([])


def test_the_cosine_of_a_turned_and_stretched_vector() -> None:
    right = np.array([[1, 0], [1, 1]], np.float32)
    found = np.array([[0, 3], [2, 2]], np.float32)
    np.testing.assert_allclose(cosine(right, found), [0, 1], atol=1e-12)
