"""KV memory in slots: one buffer [slots, K, C, H] per layer for keys and one for values.

A runtime that works in place needs the rows of a batch side by side, so requests name a slot and
`SlotBuffers` decides which row of the buffers it is. `gather` moves rows when it has to.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from tidegate.engine.executor import Row
from tidegate.model.architecture import Architecture


class SlotBuffers:
    """Float32 keys and values of every layer; allocated and touched at once."""

    def __init__(self, arch: Architecture, *, slots: int, slot_tokens: int) -> None:
        """Allocate `slots` rows of `slot_tokens` tokens."""
        shape = (slots, arch.kv_heads, slot_tokens, arch.head_size)
        # np.full touches the pages: memory that is not there shows now and not in a request.
        self.keys = [np.full(shape, 0, np.float32) for _ in range(arch.layers)]
        self.values = [np.full(shape, 0, np.float32) for _ in range(arch.layers)]

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copy the first `tokens` tokens of a slot; from a slot to itself it does nothing."""
        if source == target:
            return
        for buffer in (*self.keys, *self.values):
            buffer[target, :, :tokens] = buffer[source, :, :tokens]


def batches(rows: Sequence[Row], slots: Sequence[int]) -> list[list[int]]:
    """Group rows into runs: single-token rows of neighbouring slots together, others alone.

    Args:
        rows: of one step.
        slots: the buffer row of each.

    Returns:
        Indices into `rows`, each run in order of its slots.
    """
    singles = sorted(
        (i for i, row in enumerate(rows) if len(row.tokens) == 1), key=slots.__getitem__
    )
    runs = [[i] for i, row in enumerate(rows) if len(row.tokens) > 1]
    if singles:
        runs.append([singles[0]])
    for before, after in pairwise(singles):
        if slots[after] == slots[before] + 1:
            runs[-1].append(after)
        else:
            runs.append([after])
    return runs
