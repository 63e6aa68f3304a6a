"""A step's numbers on their way to the device: one staging buffer, one copy, views of it there.

What a step of a given shape brings always lies at the same place, so a graph that was captured for
the shape finds it there. Rows are padded to the shape with requests of length 0 that have no
tokens or, when every row has one, a token in nobody's block. The engine's block `b` is the cache's
block `b + 1`, since block 0 is nobody's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from tidegate.engine.executor import Blocks, Row
from tidegate.kernels.paged_kv import StepTensors
from tidegate.kernels.scratch import Scratch

Tensor = torch.Tensor

_ALIGNED = 16
"""Bytes that every part begins at a multiple of, as vector loads like it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """What a step is padded to; equal shapes have equal addresses."""

    rows: int
    tokens: int
    width: int
    """Blocks of the longest row."""
    logits: int
    most_tokens: int
    """Of one row."""
    most_length: int
    """Of one row, cache and step together."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class DeviceStep:
    """A step on the device."""

    tensors: StepTensors
    wanted: Tensor
    """int64 [logits], the tokens whose logits are asked for; those of padding are token 0's."""
    fed: Tensor
    """int64 [rows], the place among the tokens chosen last that a row's last token is; -1 for those
    whose token is known."""
    last: Tensor
    """int64 [rows], each row's last token; 0 for padding without any."""


class StepBuffers:
    """Staging on the host and its twin on the device, large enough for every step."""

    def __init__(
        self, *, rows: int, tokens: int, logits: int, width: int, device: torch.device
    ) -> None:
        """Allocate both.

        Args:
            rows: of the largest step.
            tokens: of the largest step.
            logits: of the largest step.
            width: blocks of the longest request.
            device: where steps run; for CUDA the staging is pinned.
        """
        largest = StepShape(
            rows=rows, tokens=tokens, width=width, logits=logits, most_tokens=1, most_length=1
        )
        nbytes = _layout(largest)[1]
        on_gpu = device.type == "cuda"
        # Two, in turn: a step is written while the copy of the one before it may be under way.
        self._stagings = [
            torch.zeros(nbytes, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)
        ]
        self._known: list[tuple[StepShape | None, _Lines]] = [(None, []), (None, [])]
        """Of each staging: what it was filled for last, and whose blocks each line holds."""
        self._device = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        self._steps: dict[StepShape, DeviceStep] = {}

    @property
    def nbytes(self) -> int:
        """On the device."""
        return self._device.nbytes

    def addresses(self) -> tuple[int, ...]:
        """Where both lie, for tests that they stay there."""
        return tuple(one.data_ptr() for one in (*self._stagings, self._device))

    def fill(self, rows: Sequence[Row], shape: StepShape, block_tokens: int) -> Tensor:
        """Write the rows to the staging, padded to `shape`; the bytes that they take."""
        layout, used = _layout(shape)
        self._stagings.reverse()
        host = self._stagings[0].numpy()
        views: _Views = {
            name: host[start:end].view(dtype) for name, (start, end, dtype) in layout.items()
        }
        self._known.reverse()
        known, lines = self._known[0]
        if known != shape:  # everything lies elsewhere
            lines = [None] * shape.rows
            self._known[0] = shape, lines
        _fill(views, rows, shape, block_tokens, lines)
        return self._stagings[0][:used]

    def staging(self, shape: StepShape) -> Tensor:
        """The bytes of the staging that a step of this shape takes, for another to fill."""
        self._stagings.reverse()
        self._known = [(None, []), (None, [])]
        return self._stagings[0][: _layout(shape)[1]]

    def upload(self, shape: StepShape, *, keep: bool) -> DeviceStep:
        """Copy what was filled to the device.

        Args:
            shape: what the staging is filled for.
            keep: the shape will come again, so its views are made once and for all.
        """
        used = _layout(shape)[1]
        self._device[:used].copy_(self._stagings[0][:used], non_blocking=True)
        found = self._steps.get(shape) or self._views(shape)
        if keep:
            self._steps[shape] = found
        return found

    def _views(self, shape: StepShape) -> DeviceStep:
        parts = {
            name: self._device[start:end].view(_TORCH[dtype])
            for name, (start, end, dtype) in _layout(shape)[0].items()
        }
        tensors = StepTensors(
            tokens=parts["tokens"],
            positions=parts["positions"],
            starts=parts["starts"],
            lengths=parts["lengths"],
            blocks=parts["blocks"].view(shape.rows, shape.width),
            places=parts["places"],
            most_tokens=shape.most_tokens,
            most_length=shape.most_length,
        )
        return DeviceStep(
            tensors=tensors, wanted=parts["wanted"], fed=parts["fed"], last=parts["last"]
        )


def feed(step: DeviceStep, chosen: Tensor, scratch: Scratch) -> None:
    """Put the tokens that were chosen last where a step wants them; nothing is allocated.

    Args:
        step: of which `fed` and `last` are read and `tokens` written.
        chosen: int32 [places], of which -1 could not be chosen: that row's answer has ended.
        scratch: of the executor.
    """
    rows, tokens = step.fed.shape, step.tensors.tokens
    at = torch.clamp(step.fed, min=0, out=scratch.take("fed places", rows, torch.int64))
    fed = torch.index_select(chosen, 0, at, out=scratch.take("fed", rows, torch.int32))
    known = scratch.take("known", rows, torch.int32)
    torch.index_select(tokens, 0, step.last, out=known)
    is_known = torch.lt(step.fed, 0, out=scratch.take("is known", rows, torch.bool))
    torch.where(is_known, known, fed.clamp_(min=0), out=fed)
    tokens.index_copy_(0, step.last, fed)


_Lines = list[Blocks | None]
_NOBODYS: Blocks = np.zeros(0, np.int32)

_TORCH = {np.int32: torch.int32, np.int64: torch.int64}
_Part = tuple[int, int, type[np.int32] | type[np.int64]]


@lru_cache(maxsize=1024)
def _layout(shape: StepShape) -> tuple[dict[str, _Part], int]:
    """First and last byte and type of each part, and the bytes of all."""
    counts: tuple[tuple[str, int, type[np.int32] | type[np.int64]], ...] = (
        ("places", shape.tokens, np.int64),
        ("wanted", shape.logits, np.int64),
        ("fed", shape.rows, np.int64),
        ("last", shape.rows, np.int64),
        ("tokens", shape.tokens, np.int32),
        ("positions", shape.tokens, np.int32),
        ("starts", shape.rows + 1, np.int32),
        ("lengths", shape.rows, np.int32),
        ("blocks", shape.rows * shape.width, np.int32),
    )
    parts, at = {}, 0
    for name, count, dtype in counts:
        end = at + count * np.dtype(dtype).itemsize
        parts[name] = (at, end, dtype)
        at = -(-end // _ALIGNED) * _ALIGNED
    return parts, at


_Views = dict[str, npt.NDArray[np.signedinteger]]


def _fill(
    views: _Views, rows: Sequence[Row], shape: StepShape, block_tokens: int, lines: _Lines
) -> None:
    counts = np.array([len(row.tokens) for row in rows])
    past = np.array([row.past for row in rows])
    total, count = int(counts.sum()), len(rows)
    ends = np.cumsum(counts)
    starts, lengths = views["starts"], views["lengths"]
    starts[0] = 0
    starts[1 : count + 1] = ends
    # Where all rows have one token, those of padding have one too.
    starts[count + 1 :] = np.arange(total + 1, total + 1 + shape.rows - count).clip(
        max=shape.tokens
    )
    lengths[:count] = past + counts
    lengths[count:] = 0
    np.concatenate([row.tokens for row in rows], out=views["tokens"][:total], casting="unsafe")
    views["tokens"][total:] = 0
    # The place of a token in its request: its place in the step, less where its request begins.
    positions = np.arange(total) + np.repeat(past - (ends - counts), counts)
    views["positions"][:total] = positions
    views["positions"][total:] = 0
    _fill_blocks(views, rows, shape, lines)
    table = views["blocks"].reshape(shape.rows, shape.width)
    owner = np.repeat(np.arange(count), counts)
    block = table[owner, positions // block_tokens].astype(np.int64)
    views["places"][:total] = block * block_tokens + positions % block_tokens
    views["places"][total:] = 0
    _fill_wanted(views["wanted"], rows, ends)
    views["fed"][:] = -1
    views["fed"][:count] = [-1 if row.fed is None else row.fed for row in rows]
    views["last"][:] = views["starts"][1:] - 1


def _fill_blocks(views: _Views, rows: Sequence[Row], shape: StepShape, lines: _Lines) -> None:
    """Write the table's lines, but for those that hold the same blocks already."""
    table = views["blocks"].reshape(shape.rows, shape.width)
    for place, row in enumerate(rows):
        blocks = row.blocks
        assert blocks is not None, "the engine places rows in blocks for a PagedGeometry"
        if lines[place] is not blocks:
            used = blocks[: shape.width]
            table[place, : len(used)] = used + 1
            table[place, len(used) :] = 0
            lines[place] = blocks
    for place in range(len(rows), shape.rows):
        if lines[place] is not _NOBODYS:
            table[place] = 0
            lines[place] = _NOBODYS


def _fill_wanted(
    wanted: npt.NDArray[np.signedinteger], rows: Sequence[Row], ends: npt.NDArray[np.int64]
) -> None:
    counts = np.array([row.logits for row in rows])
    total, before = int(counts.sum()), counts.cumsum() - counts
    # The first of a row's tokens that are wanted, and how far behind it each one is.
    wanted[:total] = np.repeat(ends - counts - before, counts) + np.arange(total)
    wanted[total:] = 0
