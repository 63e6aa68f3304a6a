"""Likelihoods: log softmax of what the model said, whatever was done to it before choosing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.engine.logprobs import LEAST, score
from tidegate.engine.request import SamplingParams
from tidegate.engine.sampling import sample
from tidegate.engine.shaping import Draw


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(0, 20), st.floats(0.1, 50))
def test_they_are_the_log_softmax_and_its_largest(
    seed: int, vocab: int, top: int, spread: float
) -> None:
    logits = (np.random.default_rng(seed).normal(0, spread, vocab)).astype(np.float32)
    token = seed % vocab
    logprob, likeliest = score(logits, token, top)
    peak = max(logits.tolist())
    total = peak + math.log(math.fsum(math.exp(one - peak) for one in logits.tolist()))
    expected = [min(0.0, one - total) for one in logits.tolist()]
    assert logprob == pytest.approx(expected[token], abs=1e-4)
    order = sorted(range(vocab), key=lambda one: (-float(logits[one]), one))[:top]
    assert [one for one, _ in likeliest] == order
    assert [value for _, value in likeliest] == pytest.approx(
        [expected[one] for one in order], abs=1e-4
    )


def test_what_is_impossible_is_told_as_a_number_that_json_can_say() -> None:
    logits = np.array([0.0, -np.inf, -np.inf], np.float32)
    assert score(logits, 1, 2) == (LEAST, ((0, 0.0), (1, LEAST)))


def test_they_are_the_models_own_whatever_the_request_does_to_choose() -> None:
    logits = np.random.default_rng(1).normal(0, 2, (2, 50)).astype(np.float32)
    plain = SamplingParams(max_tokens=1, temperature=0, logprobs=3)
    bent = SamplingParams(max_tokens=1, temperature=0.3, logprobs=3, logit_bias=((7, 100.0),))
    one, other = sample(
        np.stack([logits[0], logits[0]]),
        [Draw(params=plain, seed=1, position=0), Draw(params=bent, seed=1, position=0)],
    )
    assert one is not None
    assert other is not None
    assert other.token == 7
    assert one.top == other.top
    assert one.top[0] == (one.token, one.logprob)
    assert other.logprob == score(logits[0], 7, 0)[0]


def test_nobody_who_did_not_ask_gets_any() -> None:
    how = SamplingParams(max_tokens=1, temperature=0)
    (one,) = sample(np.zeros((1, 5), np.float32), [Draw(params=how, seed=1, position=0)])
    assert one is not None
    assert (one.logprob, one.top) == (None, ())
