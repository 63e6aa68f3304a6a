"""Steps over KV in slots, and the memory: per layer [slots, K, C, H] of keys and of values.

H is what a layer's attention operator keeps of a head, which may be more than the model's.

An operator that works in place needs the rows of a batch side by side. Requests come and go in
any slot, so which row of the buffers a slot is stays hidden in here: `side_by_side` swaps rows
when it has to, which is once per request that begins or ends and not once per step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tidegate.edge.executors.settings import check_row_logits, check_totals
from tidegate.engine.executor import ExecutorLimits, ExecutorStep, Row, SlotGeometry
from tidegate.errors import ExecutionError


class SlotBuffers:
    """Keys and values of every layer, allocated and touched at once."""

    def __init__(
        self,
        *,
        kv_heads: int,
        head_sizes: Sequence[int],
        slots: int,
        slot_tokens: int,
        kind: npt.DTypeLike = np.float32,
    ) -> None:
        """Allocate `slots` rows of `slot_tokens` tokens, of heads as large as each layer has."""
        self.keys: list[npt.NDArray[np.generic]]
        self.values: list[npt.NDArray[np.generic]]
        # np.full touches the pages: memory that is not there shows now and not in a request.
        self.keys, self.values = (
            [np.full((slots, kv_heads, slot_tokens, size), 0, kind) for size in head_sizes]
            for _ in range(2)
        )
        self._rows = list(range(slots))
        self._tokens = [0] * slots

    def row(self, slot: int) -> int:
        """The buffer row that is `slot` now."""
        return self._rows[slot]

    def will_hold(self, slot: int, tokens: int) -> None:
        """Note that up to `tokens` tokens of `slot` are about to be written."""
        # Never lowered: a request may be rewound and find its later tokens still valid.
        self._tokens[slot] = max(self._tokens[slot], tokens)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` tokens of a slot; from a slot to itself it does nothing."""
        if source == target:
            return
        self.will_hold(target, tokens)
        for buffer in (*self.keys, *self.values):
            buffer[self._rows[target], :, :tokens] = buffer[self._rows[source], :, :tokens]

    def side_by_side(self, slots: Sequence[int]) -> int:
        """Bring slots into neighbouring rows, in any order, with the fewest swaps.

        Returns:
            The first of those rows.
        """
        rows, count = {self._rows[slot] for slot in slots}, len(slots)
        if max(rows) - min(rows) + 1 == count:
            return min(rows)
        starts = range(len(self._rows) - count + 1)
        first = max(starts, key=lambda start: len(rows.intersection(range(start, start + count))))
        window = set(range(first, first + count))
        for outside, inside in zip(sorted(rows - window), sorted(window - rows), strict=True):
            self._swap(self._rows.index(outside), self._rows.index(inside))
        return first

    @property
    def layout(self) -> str:
        """Type and shape of a token in every buffer, in the order that `read` has them."""
        return ", ".join(f"{one.dtype} {one.shape[1]}x{one.shape[3]}" for one in self._buffers())

    def nbytes(self, tokens: int) -> int:
        """Bytes of that many tokens of one slot."""
        shapes = ((*one.shape, one.itemsize) for one in self._buffers())
        return tokens * sum(int(heads * size * item) for _, heads, _, size, item in shapes)

    def read(self, slot: int, first: int, tokens: int) -> bytes:
        """A copy of `tokens` tokens of a slot, from token `first` on."""
        row, span = self._rows[slot], slice(first, first + tokens)
        return b"".join(buffer[row, :, span].tobytes() for buffer in self._buffers())

    def write(self, slot: int, first: int, tokens: int, data: bytes) -> None:
        """Undo `read`: `data` has the bytes of as many tokens."""
        self.will_hold(slot, first + tokens)
        row, span, begin = self._rows[slot], slice(first, first + tokens), 0
        for buffer in self._buffers():
            part = buffer[row, :, span]
            part[...] = np.frombuffer(data, part.dtype, part.size, begin).reshape(part.shape)
            begin += part.nbytes

    def _buffers(self) -> Sequence[npt.NDArray[np.generic]]:
        return *self.keys, *self.values

    def _swap(self, one: int, other: int) -> None:
        tokens = max(self._tokens[one], self._tokens[other])
        here, there = self._rows[one], self._rows[other]
        for buffer in (*self.keys, *self.values):
            buffer[[here, there], :, :tokens] = buffer[[there, here], :, :tokens]
        self._rows[one], self._rows[other] = there, here


def batches(rows: Sequence[Row]) -> list[list[int]]:
    """Which rows, by index, run together: all that bring one token; any other alone."""
    singles = [i for i, row in enumerate(rows) if len(row.tokens) == 1]
    chunks = [[i] for i, row in enumerate(rows) if len(row.tokens) > 1]
    return [*chunks, singles] if singles else chunks


def checked_slots(step: ExecutorStep, limits: ExecutorLimits, kv: SlotGeometry) -> list[int]:
    """The slot of every row of a step that may run.

    Raises:
        ExecutionError: a copy or a row is out of bounds, a slot appears twice, or there are too
            many tokens; the message names which.
    """
    for copy in step.copies:
        if not all(0 <= slot < kv.slots for slot in copy[:2]) or not 0 <= copy[2] <= kv.slot_tokens:
            raise ExecutionError(
                f"copy {copy}: must be within {kv.slots} slots of {kv.slot_tokens} tokens"
            )
    slots = [_checked_slot(row, limits, kv) for row in step.rows]
    if len(set(slots)) < len(slots):
        raise ExecutionError(f"slots {slots}: one appears twice in a step")
    check_totals(step, limits)
    return slots


def _checked_slot(row: Row, limits: ExecutorLimits, kv: SlotGeometry) -> int:
    slot = row.slot
    if slot is None or not 0 <= slot < kv.slots:
        raise ExecutionError(f"row in slot {slot}: must be from 0 to {kv.slots - 1}")
    if row.tokens.ndim != 1 or row.tokens.dtype.kind not in "iu":
        shape, kind = row.tokens.shape, row.tokens.dtype
        raise ExecutionError(f"row in slot {slot}: tokens {kind} {shape}: must be a list of ids")
    count = len(row.tokens)
    if count == 0 or row.past < 0 or row.past + count > kv.slot_tokens:
        raise ExecutionError(
            f"row in slot {slot}: {count} tokens at {row.past}: must be within {kv.slot_tokens}"
        )
    check_row_logits(f"in slot {slot}", row)
    # A packed embedding would answer zeros for a token that it does not have.
    for token in (int(row.tokens.min()), int(row.tokens.max())):
        if not 0 <= token < limits.vocab:
            raise ExecutionError(f"row in slot {slot}: token {token}: must be below {limits.vocab}")
    return slot
