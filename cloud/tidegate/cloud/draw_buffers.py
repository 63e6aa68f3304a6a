"""What the rows of a step want of their tokens, on its way to the device, as `SamplingAsks`.

The same plan as `step_buffers`: one place for everything, so that a recorded step finds it there;
only what is used is copied. Uniform numbers are those of `tidegate.engine.sampling.uniform`, made
some positions ahead, since making one costs as much as making many.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from tidegate.engine.sampling import Draw
from tidegate.kernels.sampling.asks import NUMBERS, Column, Depth, SamplingAsks

Tensor = torch.Tensor

MOST_EDITS: Final = 2048
"""Different tokens that one draw may bias, penalise or bar; more go to the host. A prompt of some
thousand tokens has as many."""
_AHEAD: Final = 64
_WORD: Final = 2**64 - 1
_MOST_TOP_K: Final = 2**31 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class AskShape:
    """What of the asks a recording bakes in."""

    rows: int
    depth: Depth
    edits: bool
    masks: bool


class Uniforms:
    """Numbers in [0, 1) by seed and position."""

    def __init__(self, *, most_seeds: int) -> None:
        """Remember what was made ahead for the latest `most_seeds` seeds."""
        self._most_seeds = most_seeds
        self._made: OrderedDict[int, tuple[int, list[float]]] = OrderedDict()

    def at(self, seed: int, position: int) -> float:
        """What `tidegate.engine.sampling.uniform` gives."""
        first, numbers = self._made.get(seed, (0, []))
        if not 0 <= position - first < len(numbers):
            first, numbers = position, _uniforms(seed, position)
            self._made[seed] = (first, numbers)
            if len(self._made) > self._most_seeds:
                self._made.popitem(last=False)
        return numbers[position - first]


def _uniforms(seed: int, position: int) -> list[float]:
    """Those of `_AHEAD` positions; each has a block of four words, of which it takes the first."""
    counter = [position & _WORD, 0, 0, 0]
    raw = np.random.Philox(key=seed & _WORD, counter=counter).random_raw(4 * _AHEAD)
    return [(word >> 11) * 2.0**-53 for word in raw[::4].tolist()]


class DrawBuffers:
    """Staging on the host and its twin on the device, large enough for every step."""

    def __init__(self, *, rows: int, vocab: int, device: torch.device) -> None:
        """Allocate both for `rows` logits."""
        words = -(-vocab // 32)
        shapes = {
            "numbers": ((rows, NUMBERS), torch.float64),
            "integers": ((rows, 2), torch.int32),
            "starts": ((rows + 1,), torch.int32),
            "edits": ((rows * MOST_EDITS, 4), torch.int32),
            "masks": ((rows, words), torch.int32),
        }
        pinned = device.type == "cuda"
        # Two, in turn: a step is written while the copy of the one before it may be under way.
        self._stagings = [
            {
                name: torch.zeros(shape, dtype=dtype, pin_memory=pinned)
                for name, (shape, dtype) in shapes.items()
            }
            for _ in range(2)
        ]
        self._staging = self._stagings[0]
        self._host = {name: one.numpy() for name, one in self._staging.items()}
        self._device = {
            name: torch.zeros(shape, dtype=dtype, device=device)
            for name, (shape, dtype) in shapes.items()
        }
        self._uniforms = Uniforms(most_seeds=2 * rows)

    @property
    def nbytes(self) -> int:
        """On the device."""
        return sum(one.nbytes for one in self._device.values())

    def addresses(self) -> tuple[int, ...]:
        """Where all lies, for tests that it stays there."""
        groups = (*self._stagings, self._device)
        return tuple(one.data_ptr() for group in groups for one in group.values())

    def load(self, draws: Sequence[Draw | None], rows: int) -> tuple[AskShape, SamplingAsks]:
        """Bring the draws to the device, padded to `rows`; who has none is greedy."""
        self._stagings.reverse()
        self._staging = self._stagings[0]
        self._host = {name: one.numpy() for name, one in self._staging.items()}
        used = {"numbers": rows, "integers": rows}
        self._fill_numbers(draws, rows)
        edits = [edits_of(draw) for draw in draws]
        if any(one is not None for one in edits):
            used |= {"starts": rows + 1, "edits": self._fill_edits(edits, rows)}
        masked = self._fill_masks(draws)
        if masked:
            used["masks"] = masked
        for name, count in used.items():
            self._device[name][:count].copy_(self._staging[name][:count], non_blocking=True)
        shape = AskShape(rows=rows, depth=depth_of(draws), edits="edits" in used, masks=masked > 0)
        return shape, self._asks(shape)

    def _asks(self, shape: AskShape) -> SamplingAsks:
        device, rows = self._device, shape.rows
        return SamplingAsks(
            numbers=device["numbers"][:rows],
            integers=device["integers"][:rows],
            depth=shape.depth,
            starts=device["starts"][: rows + 1] if shape.edits else None,
            edits=device["edits"] if shape.edits else None,
            masks=device["masks"][:rows] if shape.masks else None,
        )

    def _fill_numbers(self, draws: Sequence[Draw | None], rows: int) -> None:
        numbers, integers = self._host["numbers"], self._host["integers"]
        lines = [self._numbers(draw) for draw in draws]
        numbers[:rows] = _GREEDY
        if any(line is not _GREEDY for line in lines):
            numbers[: len(draws)] = lines
        integers[:rows] = 0
        integers[: len(draws), 0] = [_top_k(draw) for draw in draws]

    def _numbers(self, draw: Draw | None) -> list[float]:
        """A line of `SamplingAsks.numbers`."""
        if draw is None or (draw.params.temperature == 0 and not draw.params.penalises):
            return _GREEDY
        params, warm = draw.params, draw.params.temperature > 0
        # In the order of `Column`.
        return [
            params.temperature,
            params.min_p if warm else 0.0,
            params.top_p if warm else 1.0,
            self._uniforms.at(draw.seed, draw.position) if warm else 0.0,
            params.repetition_penalty,
            params.frequency_penalty,
            params.presence_penalty,
            0.0,
        ]

    def _fill_masks(self, draws: Sequence[Draw | None]) -> int:
        """Write the rows' masks; the rows up to the last that has one."""
        last = 0
        for place, draw in enumerate(draws):
            if draw is not None and draw.allowed is not None:
                self._host["masks"][place] = draw.allowed.view(np.int32)
                self._host["integers"][place, 1] = 1
                last = place + 1
        return last

    def _fill_edits(self, edits: Sequence[npt.NDArray[np.int32] | None], rows: int) -> int:
        """Write all rows' edits, one behind the other; how many there are."""
        starts, table, end = self._host["starts"], self._host["edits"], 0
        for place in range(rows):
            starts[place] = end
            mine = edits[place] if place < len(edits) else None
            if mine is not None:
                table[end : end + len(mine)] = mine
                end += len(mine)
        starts[rows] = end
        return end


_GREEDY: Final = [
    1.0 if column in (Column.TOP_P, Column.REPETITION) else 0.0 for column in range(NUMBERS)
]


def _top_k(draw: Draw | None) -> int:
    if draw is None or draw.params.temperature == 0:
        return 0
    return min(draw.params.top_k or 0, _MOST_TOP_K)


def depth_of(draws: Sequence[Draw | None]) -> Depth:
    """The most that any of the draws needs."""
    deepest = Depth.GREEDY
    for draw in draws:
        if draw is None or draw.params.temperature == 0:
            continue
        cuts = (draw.params.top_k is not None) + (draw.params.top_p < 1)
        deepest = max(deepest, (Depth.DRAW, Depth.CUT, Depth.CUT_TWICE)[cuts])
    return deepest


def edits_of(draw: Draw | None) -> npt.NDArray[np.int32] | None:
    """What a draw changes of single tokens, int32 [E, 4] as `SamplingAsks` has it, or None.

    Columns: token, bias (the bits of a float32), how often the answer holds it (-1: neither it nor
    the prompt does, or nothing is penalised), and whether it may not be chosen.
    """
    if draw is None or (not draw.params.logit_bias and not draw.params.penalises and not draw.ends):
        return None
    barred = draw.ends if draw.position < draw.ends_from else ()
    biases, history = draw.params.logit_bias, draw.history
    counted = history is not None and draw.params.penalises
    ids = [np.array([token for token, _ in biases], np.int64), np.array(barred, np.int64)]
    if history is not None and counted:
        ids.append(history.ids)
    tokens = np.unique(np.concatenate(ids))
    edits = np.zeros((len(tokens), 4), np.int32)
    edits[:, 0], edits[:, 2] = tokens, -1
    places = np.searchsorted(tokens, ids[0])
    edits[places, 1] = np.array([bias for _, bias in biases], np.float32).view(np.int32)
    edits[np.searchsorted(tokens, ids[1]), 3] = 1
    if history is not None and counted:
        edits[np.searchsorted(tokens, history.ids), 2] = history.generated
    return edits
