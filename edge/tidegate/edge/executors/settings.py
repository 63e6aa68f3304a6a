"""Checks that every executor makes: of its settings, and of a step before it runs."""

from __future__ import annotations

from typing import Final

from tidegate.engine.executor import ExecutorLimits, ExecutorStep, Row
from tidegate.errors import ConfigError, ExecutionError

STEP_LOGITS: Final = 16
"""Logits of one step where fewer rows than this run: what is left is for verifying guesses. A step
of up to about eight tokens costs what one of one does, so more would seldom pay."""


def check_counts(settings: object, *, always: tuple[str, ...], optional: tuple[str, ...]) -> None:
    """Raise `ConfigError` naming the first count that is below 1.

    Args:
        settings: has the named attributes, whole numbers.
        always: names of counts that are there.
        optional: names of counts that may be None.
    """
    for name in always:
        value: int = getattr(settings, name)
        if value < 1:
            raise ConfigError(name, value, "at least 1")
    for name in optional:
        wanted: int | None = getattr(settings, name)
        if wanted is not None and wanted < 1:
            raise ConfigError(name, wanted, "at least 1, or absent")


def check_row_logits(where: int | str, row: Row) -> None:
    """Raise `ExecutionError` if `row` asks for more logits than it has tokens; `where` names it."""
    if not 0 <= row.logits <= len(row.tokens):
        raise ExecutionError(
            f"row {where}: {row.logits} logits: must be from 0 to its {len(row.tokens)} tokens"
        )


def check_totals(step: ExecutorStep, limits: ExecutorLimits) -> None:
    """Raise `ExecutionError` if all rows together bring or want more than a step may hold."""
    tokens = sum(len(row.tokens) for row in step.rows)
    if tokens > limits.step_tokens:
        raise ExecutionError(f"{tokens} tokens in a step: at most {limits.step_tokens}")
    logits = sum(row.logits for row in step.rows)
    if logits > limits.step_logits:
        raise ExecutionError(f"{logits} logits in a step: at most {limits.step_logits}")
