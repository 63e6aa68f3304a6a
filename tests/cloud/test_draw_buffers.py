"""Draws on their way to the device: the reference chooses from them what the engine chooses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.cloud.draw_buffers import DrawBuffers, Uniforms, edits_of
from tidegate.engine.history import History
from tidegate.engine.request import SamplingParams
from tidegate.engine.sampling import Draw, sample, uniform
from tidegate.kernels.sampling import reference

VOCAB = 70
BUFFERS = DrawBuffers(rows=6, vocab=VOCAB, device=torch.device("cpu"))

PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.just(9),
    temperature=st.sampled_from([0.0, 0.3, 1.0]),
    top_k=st.none() | st.integers(1, 80),
    top_p=st.sampled_from([1.0, 0.9, 0.4]),
    min_p=st.sampled_from([0.0, 0.1]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.2]),
    repetition_penalty=st.sampled_from([1.0, 1.4]),
    logit_bias=st.sampled_from([(), ((3, 2.5), (9, -100.0))]),
)


@st.composite
def draws(draw: st.DrawFn) -> Draw:
    params = draw(PARAMS)
    ids = draw(st.lists(st.integers(0, VOCAB - 1), unique=True, max_size=9))
    history = History(ids=np.array(ids, np.int64), generated=np.arange(len(ids), dtype=np.int32))
    mask = draw(st.none() | st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=3))
    return Draw(
        params=params,
        seed=draw(st.integers(0, 2**64 - 1)),
        position=draw(st.integers(0, 2000)),
        allowed=None if mask is None else np.array(mask, np.uint32),
        history=history if params.penalises else None,
        ends=draw(st.sampled_from([(), (5, 9)])),
        ends_from=draw(st.sampled_from([0, 10**6])),
    )


@settings(deadline=None)
@given(wanted=st.lists(st.none() | draws(), min_size=1, max_size=6), seed=st.integers(0, 999))
def test_the_reference_chooses_what_the_engine_does(wanted: list[Draw | None], seed: int) -> None:
    logits = np.random.default_rng(seed).standard_normal((6, VOCAB)).astype(np.float32) * 3
    _, asks = BUFFERS.load(wanted, 6)
    found = reference.sample(torch.from_numpy(logits), asks).tolist()
    for row, draw in enumerate(wanted):
        if draw is None:
            assert found[row] == logits[row].argmax()
            continue
        # Below its minimum length an end is barred; the engine brings none above it.
        fitting = draw if draw.position < draw.ends_from else replace(draw, ends=())
        (one,) = sample(logits[row : row + 1], [fitting])
        assert found[row] == (-1 if one is None else one.token)


@given(seed=st.integers(0, 2**64 - 1), positions=st.lists(st.integers(0, 300), max_size=9))
def test_numbers_made_ahead_are_those_of_their_positions(seed: int, positions: list[int]) -> None:
    made = Uniforms(most_seeds=1)
    for position in positions:
        assert made.at(seed, position) == uniform(seed, position)
        assert made.at(seed ^ 1, position) == uniform(seed ^ 1, position)


def test_every_token_is_edited_once() -> None:
    params = SamplingParams(max_tokens=1, logit_bias=((3, 1.0), (7, 2.0)), presence_penalty=1.0)
    history = History(ids=np.array([7, 4]), generated=np.array([2, 0], np.int32))
    draw = Draw(params=params, seed=0, position=1, history=history, ends=(4, 8), ends_from=5)
    edits = edits_of(draw)
    assert edits is not None
    assert edits[:, 0].tolist() == [3, 4, 7, 8]
    assert edits[:, 1].copy().view(np.float32).tolist() == [1.0, 0.0, 2.0, 0.0]
    assert edits[:, 2].tolist() == [-1, 0, 2, -1]
    assert edits[:, 3].tolist() == [0, 1, 0, 1]
