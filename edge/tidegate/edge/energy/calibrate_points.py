"""Which runs a calibration makes: prompts, answers and rows that costs are fitted to, or held to.

Lengths of prompts are spaced evenly in logarithms, so that what a prompt takes to start, each token
and each pair of tokens all show; those that are held out lie between and are run beside other
numbers of rows. Long prompts are left out where they would take longer than there is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tidegate.errors import ConfigError

SHORTEST: Final = 8
_LENGTHS: Final = 7
"""Of prompts that are fitted: more than twice the three coefficients of a prompt."""
OUTPUT_TOKENS: Final = 24
"""Of each row at a point that is fitted."""
_HELD_OUTPUTS: Final = (16, 32, 40)


@dataclass(frozen=True, kw_only=True, slots=True)
class GridPoint:
    """`rows` requests of the same size, each begun when the one before has its first token."""

    prompt_tokens: int
    output_tokens: int
    rows: int

    def __str__(self) -> str:
        return f"{self.prompt_tokens} + {self.output_tokens} x {self.rows}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Design:
    """All runs of a round."""

    fitted: tuple[GridPoint, ...]
    held: tuple[GridPoint, ...]
    """Not fitted: what predictions are compared with."""

    @property
    def points(self) -> tuple[GridPoint, ...]:
        """Both."""
        return self.fitted + self.held

    def round_s(self, token_s: float, step_s: float) -> float:
        """About how long a round takes, if prompts take `token_s` a token."""
        tokens = sum(one.prompt_tokens * one.rows for one in self.points)
        steps = sum((one.output_tokens + one.rows) for one in self.points)
        return tokens * token_s + steps * step_s


def design(*, longest_prompt: int, rows: int) -> Design:
    """The points up to prompts of `longest_prompt` tokens and `rows` rows.

    Raises:
        ConfigError: the prompt is too short to tell its coefficients apart.
    """
    if longest_prompt < 8 * SHORTEST:
        allowed = f"at least {8 * SHORTEST} tokens for prompts"
        raise ConfigError("calibrate.context", longest_prompt, allowed)
    ratio = longest_prompt / SHORTEST
    marks = [SHORTEST * ratio ** (k / (2 * _LENGTHS - 2)) for k in range(2 * _LENGTHS - 1)]
    lengths = [round(mark) for mark in marks]
    middle = (1 + rows) // 2
    fitted = [_point(n, OUTPUT_TOKENS, b) for n in lengths[::2] for b in sorted({1, rows})]
    fitted += [_point(n, OUTPUT_TOKENS, middle) for n in lengths[::4] if 1 < middle < rows]
    held = [
        _point(n, _HELD_OUTPUTS[k % len(_HELD_OUTPUTS)], 1 + k % rows)
        for k, n in enumerate(lengths[1::2])
    ]
    held += [_point(n, OUTPUT_TOKENS, 1) for k, n in enumerate(lengths[1::2]) if k % rows]
    return Design(fitted=tuple(dict.fromkeys(fitted)), held=tuple(dict.fromkeys(held)))


def longest_prompt(context_tokens: int, rows: int) -> int:
    """Of a context: what the answers, which begin one after the other, leave of it."""
    most = max(OUTPUT_TOKENS, *_HELD_OUTPUTS)
    return context_tokens - most - 16 * rows


def _point(prompt_tokens: int, output_tokens: int, rows: int) -> GridPoint:
    return GridPoint(prompt_tokens=prompt_tokens, output_tokens=output_tokens, rows=rows)
