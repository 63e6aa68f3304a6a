"""Random wishes for tokens, with everything that a request may ask for; and logits with ties."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from tidegate.engine.history import History
from tidegate.engine.request import SamplingParams
from tidegate.engine.sampling import Draw

Logits = npt.NDArray[np.float32]


def some_logits(draws: np.random.Generator, rows: int, vocab: int) -> Logits:
    """Flat and sharp rows; a third of them with few different values."""
    spread = draws.choice([0.5, 3.0, 8.0], (rows, 1))
    logits: Logits = (draws.standard_normal((rows, vocab)) * spread).astype(np.float32)
    logits[::3] = np.round(logits[::3] * 2) / 2
    return logits


def some_draw(draws: np.random.Generator, vocab: int) -> Draw:
    """One row's wish; every part of it is there about every other time."""
    params = SamplingParams(
        max_tokens=8,
        temperature=float(draws.choice([0, 0.3, 1, 2])),
        top_k=None if draws.random() < 0.4 else int(draws.choice([1, 5, 40, vocab // 2, 10**6])),
        top_p=float(draws.choice([1, 1, 0.9, 0.5, 0.99, 0])),
        min_p=float(draws.choice([0, 0, 0.05, 0.3, 1])),
    )
    draw = Draw(params=params, seed=int(draws.integers(1000)), position=int(draws.integers(100)))
    if draws.random() < 0.4:
        draw = _penalised(draws, draw, vocab)
    if draws.random() < 0.3:
        draw = _biased(draws, draw, vocab)
    if draws.random() < 0.3:
        words = [draws.integers(0, 2**32, -(-vocab // 32), np.uint32) for _ in range(2)]
        draw = replace(draw, allowed=words[0] & words[1])
    if draws.random() < 0.3:
        ends = tuple(int(one) for one in draws.choice(vocab, 3, replace=False))
        draw = replace(draw, ends=ends, ends_from=50)
    return draw


def _penalised(draws: np.random.Generator, draw: Draw, vocab: int) -> Draw:
    ids = draws.choice(vocab, int(draws.integers(1, 60)), replace=False).astype(np.int64)
    history = History(ids=ids, generated=draws.integers(0, 4, len(ids)).astype(np.int32))
    params = replace(
        draw.params,
        repetition_penalty=float(draws.uniform(0.8, 1.5)),
        frequency_penalty=float(draws.uniform(-1, 1)),
        presence_penalty=float(draws.uniform(-1, 1)),
    )
    return replace(draw, params=params, history=history)


def _biased(draws: np.random.Generator, draw: Draw, vocab: int) -> Draw:
    ids = sorted(int(one) for one in draws.choice(vocab, 20, replace=False))
    bias = tuple((token, float(draws.uniform(-5, 5))) for token in ids)
    return replace(draw, params=replace(draw.params, logit_bias=bias))
