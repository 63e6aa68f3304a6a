"""`asks_of`: what the rows of a step want as tensors, row by row: the twin of `DrawBuffers`.

Biases, the tokens so far and barred ends are merged into one edit per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from tidegate.engine.sampling import Draw, uniform
from tidegate.kernels.sampling.asks import NUMBERS, Column, Depth, SamplingAsks

Edits = npt.NDArray[np.int32]


def asks_of(draws: Sequence[Draw], vocab: int) -> SamplingAsks:
    """The tensors, on the host; see `SamplingAsks` for their layout."""
    numbers, integers = np.zeros((len(draws), NUMBERS)), np.zeros((len(draws), 2), np.int32)
    edits = [_edits(draw) for draw in draws]
    for row, draw in enumerate(draws):
        numbers[row], integers[row] = _numbers(draw), _integers(draw)
    masks = None
    if any(draw.allowed is not None for draw in draws):
        masks = np.full((len(draws), -(-vocab // 32)), -1, np.int32)
        for row, draw in enumerate(draws):
            if draw.allowed is not None:
                masks[row] = draw.allowed.view(np.int32)
    starts = np.cumsum([0, *(len(one) for one in edits)], dtype=np.int32)
    edited = bool(starts[-1])
    return SamplingAsks(
        numbers=torch.from_numpy(numbers),
        integers=torch.from_numpy(integers),
        depth=max((_depth(draw) for draw in draws), default=Depth.GREEDY),
        starts=torch.from_numpy(starts) if edited else None,
        edits=torch.from_numpy(np.concatenate(edits)) if edited else None,
        masks=None if masks is None else torch.from_numpy(masks),
    )


def _numbers(draw: Draw) -> list[float]:
    params, numbers = draw.params, [0.0] * NUMBERS
    numbers[Column.TEMPERATURE] = params.temperature
    numbers[Column.MIN_P] = params.min_p
    numbers[Column.TOP_P] = params.top_p
    numbers[Column.UNIFORM] = uniform(draw.seed, draw.position) if params.temperature else 0.0
    numbers[Column.REPETITION] = params.repetition_penalty
    numbers[Column.FREQUENCY] = params.frequency_penalty
    numbers[Column.PRESENCE] = params.presence_penalty
    return numbers


def _integers(draw: Draw) -> tuple[int, int]:
    top_k = min(draw.params.top_k or 0, 2**31 - 1)
    return top_k, int(draw.allowed is not None)


def _depth(draw: Draw) -> Depth:
    params = draw.params
    if params.temperature == 0:
        return Depth.GREEDY
    cuts = int(params.top_k is not None) + int(params.top_p < 1)
    return (Depth.DRAW, Depth.CUT, Depth.CUT_TWICE)[cuts]


def _barred(draw: Draw) -> tuple[int, ...]:
    return draw.ends if draw.position < draw.ends_from else ()


def _edits(draw: Draw) -> Edits:
    """int32 [E, 4], one row per token that is changed; see `SamplingAsks`."""
    biased = np.array([token for token, _ in draw.params.logit_bias], np.int64)
    had, counts = np.empty(0, np.int64), np.empty(0, np.int32)
    if draw.params.penalises:
        assert draw.history is not None, "who penalises brings the tokens so far"
        had, counts = draw.history.ids, draw.history.generated
    barred = np.array(_barred(draw), np.int64)
    ids = np.unique(np.concatenate((biased, had, barred)))
    edits = np.zeros((len(ids), 4), np.int32)
    edits[:, 0], edits[:, 2] = ids, -1
    biases = np.array([bias for _, bias in draw.params.logit_bias], np.float32)
    edits[np.searchsorted(ids, biased), 1] = biases.view(np.int32)
    edits[np.searchsorted(ids, had), 2] = counts
    edits[np.searchsorted(ids, barred), 3] = 1
    return edits
