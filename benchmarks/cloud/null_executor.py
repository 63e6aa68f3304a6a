"""`NullExecutor`: an executor that returns at once, so that what is left is everybody else's work.

Its logits name one word of the demo model's tokenizer for each row, another at every position, so
that a step gives text and guessing ahead finds nothing to repeat.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tidegate.engine.executor import (
    ExecutorLimits,
    ExecutorStep,
    PagedGeometry,
    Row,
    StepResult,
)

_MIX = 2_654_435_761
"""Knuth's multiplier: neighbours become strangers."""


class NullExecutor:
    """See `tidegate.engine.executor.Executor`.

    Args:
        words: token ids that it may say.
        vocab: of the tokenizer.
        rows: requests of one step.
        context_tokens: of one request.
    """

    def __init__(self, words: Sequence[int], *, vocab: int, rows: int, context_tokens: int) -> None:
        self._words = np.array(words, np.int64)
        self.limits = ExecutorLimits(
            context_tokens=context_tokens,
            step_tokens=rows * 8 + 512,
            step_rows=rows,
            step_logits=rows * 8,
            vocab=vocab,
        )
        blocks = rows * -(-context_tokens // 16)
        self.kv = PagedGeometry(block_tokens=16, blocks=blocks, bytes_per_token=1)
        self._logits = np.zeros((self.limits.step_logits, vocab), np.float32)
        self._lit = np.zeros(self.limits.step_logits, np.int64)

    def execute(self, step: ExecutorStep) -> StepResult:
        """See `Executor.execute`."""
        places = np.array([place for row in step.rows for place in _places(row)], np.int64)
        lit = self._words[places * _MIX % (1 << 32) % len(self._words)]
        lines = np.arange(len(places))
        self._logits[lines, self._lit[: len(places)]] = 0.0
        self._logits[lines, lit] = 1.0
        self._lit[: len(places)] = lit
        return StepResult(logits=self._logits[: len(places)])

    def close(self) -> None:
        """See `Executor.close`."""


def _places(row: Row) -> list[int]:
    """A number for each of the row's logits, its own for every request and position."""
    assert row.blocks is not None
    end = row.past + len(row.tokens)
    return [int(row.blocks[0]) * 65_537 + place for place in range(end - row.logits, end)]
