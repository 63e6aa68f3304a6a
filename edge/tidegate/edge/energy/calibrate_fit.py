"""Fits the costs of one power mode to what runs took, and holds them against runs left out.

Least squares of relative errors with coefficients that are not negative; a point further off than
`_NEAR` counts by its distance and no longer by the square of it, so that a few disturbed ones do
not bend all others. Coefficients are few: every set of them that may be above zero is tried.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations
from typing import Final

import numpy as np
import numpy.typing as npt

from tidegate.edge.energy.calibrate_bench import Sample
from tidegate.edge.energy.cost import ModeCost
from tidegate.errors import ExecutionError

Numbers = npt.NDArray[np.float64]

_NEAR: Final = 0.05
_ROUNDS: Final = 20
OUTLIER: Final = 0.25
"""Relative error from which a point is named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """A prediction and what it was of. Seconds of a prompt, or of an answer's steps."""

    point: str
    predicted_s: float
    measured_s: float
    spread: float
    """Of its decoding steps, see `Sample`."""

    @property
    def error(self) -> float:
        """Relative; positive where it was predicted to take longer."""
        return self.predicted_s / self.measured_s - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """One mode: its seconds, how well they fit, and how well they predict."""

    cost: ModeCost
    """Its watts are 0."""
    prefill_r2: float
    decode_r2: float
    prefill: tuple[Checked, ...]
    """Of the points left out."""
    decode: tuple[Checked, ...]
    whole: tuple[Checked, ...]
    """Of the points left out: prompts and steps together, beside medians of runs as they were."""
    outliers: tuple[str, ...]
    """Of the fitted points, a line each."""

    @property
    def prefill_error(self) -> float:
        """Median relative error at points left out."""
        return statistics.median([abs(one.error) for one in self.prefill])

    @property
    def decode_error(self) -> float:
        """See `prefill_error`."""
        return statistics.median([abs(one.error) for one in self.decode])

    @property
    def whole_error(self) -> float:
        """Of whole requests as they ran, with whatever held them up; see `prefill_error`."""
        return statistics.median([abs(one.error) for one in self.whole])


def fit_mode(
    name: str, fitted: Sequence[Sample], held: Sequence[Sample], *, part_tokens: int
) -> Fit:
    """The costs that `fitted` show, held against `held`.

    A prompt is computed in parts of at most `part_tokens`.

    Raises:
        ExecutionError: there are too few samples to tell coefficients apart, or no coefficients
            explain them.
    """
    if len(fitted) < 3 or not held:
        raise ExecutionError(
            f"calibration of {name}: {len(fitted)} points were complete: at least 3, and one to"
            " compare with, are needed; give it more time"
        )
    columns = np.array([_step_columns(one) for one in fitted])
    steps_s = np.array([one.step_s for one in fitted])
    step_s, row_s, context_s = least_squares(columns, steps_s, needed={0})
    if row_s > step_s:  # a further row never takes longer than a step of one
        joined = np.column_stack([columns[:, 0] + columns[:, 1], columns[:, 2]])
        step_s, context_s = least_squares(joined, steps_s, needed={0})
        row_s = step_s
    rows_s = np.array([_rows_s(one, row_s, context_s) for one in fitted])
    took_s = np.array([one.prefill_s for one in fitted])
    start_s, token_s, pair_s, beside_s = least_squares(
        np.array([_prompt_columns(one) for one in fitted]),
        np.maximum(took_s - rows_s, took_s / 2),
        needed={1},
    )
    cost = ModeCost(
        name=name,
        prefill_start_s=start_s,
        part_tokens=part_tokens,
        prefill_token_s=token_s,
        prefill_context_s=pair_s,
        step_s=step_s,
        row_s=row_s,
        beside_s=beside_s,
        context_token_s=context_s,
        prefill_w=0.0,
        decode_w=0.0,
        idle_w=0.0,
    )
    prompts = [_checked_prompt(cost, one) for one in fitted]
    answers = [_checked_answer(cost, one) for one in fitted]
    return Fit(
        cost=cost,
        prefill_r2=_r2(prompts),
        decode_r2=_r2(answers),
        prefill=tuple(_checked_prompt(cost, one) for one in held),
        decode=tuple(_checked_answer(cost, one) for one in held),
        whole=tuple(_checked_whole(cost, one) for one in held),
        outliers=(*_outliers("prompt", prompts), *_outliers("answer", answers)),
    )


def least_squares(columns: Numbers, seconds: Numbers, *, needed: Collection[int]) -> list[float]:
    """Coefficients of `columns` (points, coefficients) whose relative errors are least.

    None is negative, and those `needed` are above 0.

    Raises:
        ExecutionError: `seconds` are no such times, or no coefficients explain them.
    """
    if not (np.all(np.isfinite(seconds)) and np.all(seconds > 0)):
        raise ExecutionError(f"calibration failed: not all of {len(seconds)} times are above 0 s")
    width = columns.shape[1]
    others = [one for one in range(width) if one not in needed]
    best, least = [0.0] * width, np.inf
    for extra in chain.from_iterable(combinations(others, n) for n in range(len(others) + 1)):
        chosen = sorted((*needed, *extra))
        found = _reweighted(columns[:, chosen] / seconds[:, None])
        if np.any(found < 0) or any(found[chosen.index(one)] <= 0 for one in needed):
            continue
        loss = _loss(columns[:, chosen] @ found / seconds - 1)
        if loss < least * (1 - 1e-9):
            best, least = [0.0] * width, loss
            for place, value in zip(chosen, found, strict=True):
                best[place] = float(value)
    if np.isinf(least):
        raise ExecutionError(f"calibration failed: no costs explain the {len(seconds)} times")
    return best


def _reweighted(shares: Numbers) -> Numbers:
    """Least squares of `shares @ x = 1`, with less weight for what is far off."""
    scale = np.linalg.norm(shares, axis=0)
    scale[scale == 0] = 1.0
    weights = np.ones(len(shares))
    found = np.zeros(shares.shape[1])
    for _ in range(_ROUNDS):
        root = np.sqrt(weights)
        found = np.linalg.lstsq(shares / scale * root[:, None], root, rcond=None)[0] / scale
        off = np.abs(shares @ found - 1)
        weights = np.minimum(1.0, _NEAR / np.maximum(off, 1e-12))
    return found


def _loss(errors: Numbers) -> float:
    """Huber's: squares up to `_NEAR`, distances beyond."""
    off = np.abs(errors)
    return float(np.sum(np.where(off < _NEAR, off**2 / 2, _NEAR * (off - _NEAR / 2))))


def _prompt_columns(sample: Sample) -> tuple[float, float, float, float]:
    tokens = sum(part.tokens for part in sample.parts)
    pairs = sum(part.tokens * (part.past_tokens + part.tokens / 2) for part in sample.parts)
    return len(sample.parts), tokens, pairs, sum(part.beside > 0 for part in sample.parts)


def _step_columns(sample: Sample) -> tuple[float, float, float]:
    return 1.0, sample.point.rows - 1.0, sample.context_tokens


def _rows_s(sample: Sample, row_s: float, context_s: float) -> float:
    """What further rows that decode beside a prompt, and contexts, add to its steps."""
    return sum(
        max(0, part.beside - 1) * row_s + part.context_tokens * context_s for part in sample.parts
    )


def _checked_prompt(cost: ModeCost, sample: Sample) -> Checked:
    start, tokens, pairs, mixed = _prompt_columns(sample)
    predicted_s = cost.prefill_start_s * start + cost.beside_s * mixed
    predicted_s += cost.prefill_token_s * tokens + cost.prefill_context_s * pairs
    predicted_s += _rows_s(sample, cost.row_s, cost.context_token_s)
    return Checked(
        point=str(sample.point),
        predicted_s=predicted_s,
        measured_s=sample.prefill_s,
        spread=sample.spread,
    )


def _checked_answer(cost: ModeCost, sample: Sample) -> Checked:
    steps_s = cost.batch_step_s(sample.point.rows, sample.context_tokens)
    return Checked(
        point=str(sample.point),
        predicted_s=sample.point.output_tokens * steps_s,
        measured_s=sample.decode_s,
        spread=sample.spread,
    )


def _checked_whole(cost: ModeCost, sample: Sample) -> Checked:
    step_s = cost.batch_step_s(sample.point.rows, sample.context_tokens)
    prompt = _checked_prompt(cost, sample)
    return replace(
        prompt,
        predicted_s=prompt.predicted_s + sample.steps * step_s,
        measured_s=sample.whole_s,
    )


def _r2(checked: Sequence[Checked]) -> float:
    """Share of the variance that predictions explain; 0 where they explain none."""
    measured = np.array([one.measured_s for one in checked])
    left = sum((one.predicted_s - one.measured_s) ** 2 for one in checked)
    whole = float(np.sum((measured - measured.mean()) ** 2))
    return max(0.0, 1 - left / whole) if whole else float(left == 0)


def _outliers(what: str, checked: Sequence[Checked]) -> list[str]:
    return [
        f"{what} of {one.point}: {one.error:+.0%}, its runs spread by {one.spread:.0%}"
        for one in checked
        if abs(one.error) > OUTLIER
    ]
