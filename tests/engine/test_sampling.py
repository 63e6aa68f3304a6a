"""The sampler against its obvious twin, and the promises about ties, seeds and neighbours."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.engine.request import SamplingParams
from tidegate.engine.sampling import Draw, sample, uniform

PINNED = (0.011546754286331562, 0.7414215300187215)


def draw(
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 1,
    position: int = 0,
) -> Draw:
    params = SamplingParams(
        max_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    return Draw(params=params, seed=seed, position=position)


def chosen(logits: npt.NDArray[np.float32], how: list[Draw]) -> list[int | None]:
    """The tokens that `sample` chooses."""
    return [None if one is None else one.token for one in sample(logits, how)]


def rows(*values: list[float]) -> npt.NDArray[np.float32]:
    return np.array(values, dtype=np.float32)


def naive(logits: npt.NDArray[np.float32], how: Draw) -> int:
    """The definition, by sorting everything in plain Python."""
    params = how.params
    if params.temperature == 0:
        return max(range(len(logits)), key=lambda one: (logits[one], -one))
    peak = float(logits.max())
    weights = {
        one: float(np.exp((float(logit) - peak) / params.temperature))
        for one, logit in enumerate(logits)
    }
    weights = {one: weight for one, weight in weights.items() if weight >= params.min_p}
    kept = sorted(weights, key=lambda one: (-weights[one], one))[: params.top_k]
    if params.top_p < 1:
        goal, reached, nucleus = params.top_p * sum(weights[one] for one in kept), 0.0, []
        for one in kept:
            nucleus.append(one)
            reached += weights[one]
            if reached >= goal:
                break
        kept = nucleus
    kept.sort()
    target = uniform(how.seed, how.position) * sum(weights[one] for one in kept)
    reached = 0.0
    for one in kept:
        reached += weights[one]
        if reached > target:
            return one
    return kept[-1]


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    vocab=st.integers(1, 40),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.none() | st.integers(1, 50),
    top_p=st.sampled_from([0.0, 0.2, 0.5, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)
def test_it_chooses_what_the_plain_definition_chooses(
    seed: int, vocab: int, temperature: float, top_k: int | None, top_p: float, min_p: float
) -> None:
    # Few distinct values, so that ties are common.
    logits = np.random.default_rng(seed).integers(-3, 4, (3, vocab)).astype(np.float32)
    how = [
        draw(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            position=position,
        )
        for position in range(3)
    ]
    assert chosen(logits, how) == [naive(row, one) for row, one in zip(logits, how, strict=True)]


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
def test_a_wide_vocabulary_gives_the_same_nucleus_as_a_full_sort(spread: float) -> None:
    logits = (np.random.default_rng(3).standard_normal((1, 20_000)) * spread).astype(np.float32)
    for position in range(6):
        how = draw(top_p=0.95, position=position)
        assert chosen(logits, [how]) == [naive(logits[0], how)]


@pytest.mark.parametrize("min_p", [1e-9, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("top_p", [0.7, 1.0])
def test_a_wide_vocabulary_gives_the_same_tokens_as_weighing_all(
    min_p: float, top_p: float
) -> None:
    logits = np.random.default_rng(3).standard_normal((1, 20_000)).astype(np.float32)
    logits[0, ::1000] += 4
    for position in range(6):
        how = draw(min_p=min_p, top_p=top_p, temperature=0.8, position=position)
        assert chosen(logits, [how]) == [naive(logits[0], how)]


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    assert chosen(rows([1, 5, 5, 2]), [draw(temperature=0)]) == [1]


def test_top_k_keeps_the_lowest_ids_of_equals() -> None:
    seen = {chosen(rows([2, 2, 2, 2]), [draw(top_k=2, position=n)])[0] for n in range(64)}
    assert seen == {0, 1}


def test_top_p_zero_is_greedy() -> None:
    assert chosen(rows([0, 3, 1]), [draw(top_p=0.0, position=n) for n in (0,)]) == [1]


def test_excluded_tokens_are_never_chosen() -> None:
    logits = rows([-np.inf, 0.0, -np.inf, 0.0])
    for how in (draw(), draw(top_k=4), draw(top_p=0.999)):
        for position in range(50):
            one = draw(top_k=how.params.top_k, top_p=how.params.top_p, position=position)
            assert chosen(logits, [one])[0] in (1, 3)


def test_rows_that_are_not_numbers_give_none_and_others_their_token() -> None:
    logits = rows([0, np.nan, 1], [0, 1, 2], [np.inf, 0, 0], [-np.inf, -np.inf, -np.inf])
    assert chosen(logits, [draw(temperature=0)] * 4) == [None, 2, None, None]


def test_a_row_is_drawn_alike_alone_and_among_others() -> None:
    logits = np.random.default_rng(1).standard_normal((5, 100)).astype(np.float32)
    how = [draw(position=n, seed=n, top_k=None if n % 2 else 10) for n in range(5)]
    together = chosen(logits, how)
    assert together == [chosen(logits[n : n + 1], how[n : n + 1])[0] for n in range(5)]


def test_frequencies_follow_the_probabilities() -> None:
    shares = np.array([0.5, 0.3, 0.15, 0.05])
    logits = np.log(shares).astype(np.float32)[None]
    drawn = [chosen(logits, [draw(seed=9, position=n)])[0] for n in range(4000)]
    counts = np.bincount(np.array(drawn, dtype=np.int64), minlength=4)
    chi_squared = float((((counts - 4000 * shares) ** 2) / (4000 * shares)).sum())
    assert chi_squared < 16.3  # 0.1 % of the chi-squared distribution with 3 degrees of freedom


def test_the_same_seed_and_position_draw_the_same_number_in_every_version() -> None:
    assert uniform(0, 0) == pytest.approx(PINNED[0], abs=0)
    assert uniform(2**63, 5) == pytest.approx(PINNED[1], abs=0)
    assert uniform(-1, 3) == uniform(2**64 - 1, 3)
    assert (
        0 <= min(uniform(7, n) for n in range(1000)) < max(uniform(7, n) for n in range(1000)) < 1
    )


@settings(deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.7, 1.0]),
    st.sampled_from([None, 1, 5, 100]),
    st.sampled_from([1.0, 0.8, 0.3]),
    st.sampled_from([0.0, 0.1]),
    st.sets(st.integers(0, 99), min_size=1),
)
def test_a_mask_is_minus_infinity_for_all_others(
    seed: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    min_p: float,
    allowed: set[int],
) -> None:
    """Only what a mask allows is looked at; the plain way gives the same tokens."""
    logits = np.random.default_rng(seed).normal(0, 2, (1, 100)).astype(np.float32)
    bits = np.isin(np.arange(128), sorted(allowed))
    mask = np.packbits(bits, bitorder="little").view(np.uint32)
    params = SamplingParams(
        max_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, logprobs=2
    )
    plain = np.where(bits[:100], logits, np.float32(-np.inf))
    for position in range(4):
        draw = Draw(params=params, seed=seed, position=position)
        (found,) = sample(logits, [replace(draw, allowed=mask)])
        (expected,) = sample(plain, [draw])
        assert found is not None
        assert expected is not None
        assert found.token == expected.token
