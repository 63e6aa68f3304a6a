"""`OnlineCosts`: costs that follow what steps really take on this device, now.

Other programs, heat and clocks make the same work slower for a while, and costs that nobody
measured here may be wrong by far. One factor for decoding and one for prompts, each of two parts
in logarithms: one that all power modes share, since what slows one slows the others, and a smaller
one of each mode. Every observation moves them by a share of its error, and of no more than half a
doubling: a single outlier moves them by a few per cent, and they approach without overshooting.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from tidegate.edge.energy.cost import CostModel, ModeCost
from tidegate.engine.request import RequestId
from tidegate.engine.steps import StepReport, StepShare

_GAIN: Final = 0.1
"""Of an error that an observation corrects: a lasting change is followed within about 20 steps."""
_LARGEST: Final = math.log(1.5)
"""Error that counts; with the gain, one observation moves a prediction by 4 % at most."""
_SHARED: Final = 0.8
"""Of a correction that holds for all power modes."""
_FIRST: Final = 5
"""Observations whose median replaces costs that were only estimated."""
_BOUND: Final[Mapping[str, float]] = {
    "measured": math.log(8),
    "calibrated": math.log(8),
    "estimated": math.log(256),
}
"""How far corrections may go: eight times what was fitted here, and nearly anywhere from a guess.
Fourteen busy programs on two cores made steps take about seven times as long."""
_OWN_BOUND: Final[Mapping[str, float]] = {
    "measured": math.log(1.5),
    "calibrated": math.log(1.5),
    "estimated": math.log(4),
}
"""How far a mode may go from the others."""
_CHANGE: Final = math.log(1.01)
"""Of a factor before a new cost model is made of it."""
_KEPT: Final = 256
"""Errors that the median is of, and prompts that are followed at once."""
_TYPICAL_CONTEXT: Final = 512


def predicted_s(mode: ModeCost, report: StepReport) -> tuple[float, float]:
    """Seconds of a step that its prompts and its decoding rows take, by the costs.

    Each part of a prompt is started, and those of one step together. Rows that decode beside a
    prompt take `beside_s` in place of `step_s`; who guesses well has several tokens of one step,
    each of which is predicted to take one.
    """
    decoding = [one for one in report.shares if not one.is_prompt]
    prompts = [one for one in report.shares if one.is_prompt]
    prompt_s = sum([_prompt_s(mode, one, len(prompts)) for one in prompts])
    if not decoding:
        return prompt_s, 0.0
    rows = len(decoding)
    tokens = sum([one.sampled_tokens for one in decoding]) / rows
    context = sum([one.past_tokens + one.computed_tokens for one in decoding])
    step_s = mode.batch_step_s(rows, context)
    if prompts:
        step_s -= mode.step_s - mode.beside_s
    return prompt_s, tokens * step_s


def _prompt_s(mode: ModeCost, share: StepShare, prompts: int) -> float:
    """Of one of so many prompts in a step."""
    return mode.prefill_start_s / prompts + mode.chunk_s(share.computed_tokens, share.past_tokens)


class Periods:
    """Seconds that each step took out of its requests' time: with what the engine does around it.

    From one step's end to the next one's, where some request was in both, so that nothing waited.
    """

    def __init__(self) -> None:
        self._ended_s = 0.0
        self._ids: frozenset[RequestId] = frozenset()

    def of(self, report: StepReport) -> float:
        """Of the step after the one that was asked about before."""
        ids = frozenset([one.request_id for one in report.shares])
        went_on = not ids.isdisjoint(self._ids)
        seconds = report.ended_s - self._ended_s if went_on else report.elapsed_s
        self._ended_s, self._ids = report.ended_s, ids
        return max(seconds, report.elapsed_s)


class OnlineCosts:
    """See the module. On the engine's event loop."""

    def __init__(self, costs: CostModel) -> None:
        """Begin with `costs`."""
        self._base = self._made = costs
        self._decode, self._prompt = _Drift(costs), _Drift(costs)
        self._made_of = self._factors()
        self._periods = Periods()
        self._prompts: dict[RequestId, tuple[float, float]] = {}
        """Of those that are being computed: seconds predicted and taken so far."""

    @property
    def costs(self) -> CostModel:
        """What work costs now; the same object until something has changed by a per cent."""
        factors = self._factors()
        moved = max([abs(a - b) for a, b in zip(factors, self._made_of, strict=True)])
        if moved > _CHANGE:
            self._made, self._made_of = self._make(), factors
        return self._made

    def observe(self, report: StepReport, mode: int) -> None:
        """Learn from a step that ran in `mode`."""
        seconds = self._periods.of(report)
        prompt_s, decode_s = predicted_s(self._base.modes[mode], report)
        prompt_s *= self._prompt.factor(mode)
        decode_s *= self._decode.factor(mode)
        if not any(one.sampled_tokens or one.is_prompt for one in report.shares):
            return  # it failed
        if decode_s and not prompt_s:
            self._decode.learn(mode, seconds / decode_s)
        elif prompt_s:
            self._follow(report, mode, seconds, of_prompts=prompt_s / (prompt_s + decode_s))

    def passed(self, report: StepReport) -> None:
        """A step that was in no one mode: the next one's time begins where it ended."""
        self._periods.of(report)

    def errors(self) -> Mapping[str, float | None]:
        """Median relative errors of the predictions as they were when steps and prompts began.

        `step` is of the seconds of a step that only decodes, `prompt` of those of a whole prompt;
        None before `_FIRST` were seen.
        """
        return {"step": self._decode.error(), "prompt": self._prompt.error()}

    def _follow(self, report: StepReport, mode: int, seconds: float, *, of_prompts: float) -> None:
        """Share what prompts took of a step among them, and learn from those that are complete."""
        factor = self._prompt.factor(mode)
        cost = self._base.modes[mode]
        prompts = [one for one in report.shares if one.is_prompt]
        parts = [(one, factor * _prompt_s(cost, one, len(prompts))) for one in prompts]
        whole_s = sum([part_s for _, part_s in parts])
        for one, part_s in parts:
            before_s, took_s = self._prompts.pop(one.request_id, (0.0, 0.0))
            before_s += part_s
            took_s += seconds * of_prompts * part_s / whole_s
            if one.sampled_tokens:
                self._prompt.learn(mode, took_s / before_s)
            else:
                self._prompts[one.request_id] = before_s, took_s
        while len(self._prompts) > _KEPT:  # of requests that left
            del self._prompts[next(iter(self._prompts))]

    def _factors(self) -> tuple[float, ...]:
        return *self._decode.logs(), *self._prompt.logs()

    def _make(self) -> CostModel:
        """The corrected model. A mode never becomes faster than one that is faster by the costs."""
        base = self._base.modes
        steps_s = [one.batch_step_s(1, _TYPICAL_CONTEXT) for one in base]
        decode = _in_order(steps_s, self._decode)
        prompt = _in_order([one.prefill_s(_TYPICAL_CONTEXT) for one in base], self._prompt)
        modes = tuple(
            replace(
                one,
                step_s=one.step_s * by,
                row_s=one.row_s * by,
                beside_s=one.beside_s * by,
                context_token_s=one.context_token_s * by,
                prefill_start_s=one.prefill_start_s * prompt_by,
                prefill_token_s=one.prefill_token_s * prompt_by,
                prefill_context_s=one.prefill_context_s * prompt_by,
            )
            for one, by, prompt_by in zip(base, decode, prompt, strict=True)
        )
        return replace(self._base, modes=modes)


class _Drift:
    """The factor of one kind of work, by mode."""

    def __init__(self, costs: CostModel) -> None:
        self._shared = 0.0
        self._own = [0.0] * len(costs.modes)
        self._bound, self._own_bound = _BOUND[costs.source], _OWN_BOUND[costs.source]
        self._first: list[float] | None = [] if costs.source == "estimated" else None
        """Until there are `_FIRST`."""
        self._errors: deque[float] = deque(maxlen=_KEPT)

    def logs(self) -> list[float]:
        """The logarithm of each mode's factor."""
        return [max(-self._bound, min(self._bound, self._shared + own)) for own in self._own]

    def factor(self, mode: int) -> float:
        """What a mode's seconds are to be multiplied by."""
        return math.exp(self.logs()[mode])

    def learn(self, mode: int, ratio: float) -> None:
        """Something took `ratio` times what was predicted with the factor."""
        if not 0 < ratio < math.inf:
            return  # a clock that stood still says nothing
        self._errors.append(abs(1 / ratio - 1))
        error = math.log(ratio)
        if self._first is not None:
            self._first.append(error + self._shared)
            self._shared = statistics.median(self._first)
            if len(self._first) >= _FIRST:
                self._first = None
        else:
            moved = _GAIN * max(-_LARGEST, min(_LARGEST, error))
            own = self._own[mode] + (1 - _SHARED) * moved
            self._own[mode] = max(-self._own_bound, min(self._own_bound, own))
            self._shared += _SHARED * moved
        self._shared = max(-self._bound, min(self._bound, self._shared))

    def error(self) -> float | None:
        """The median relative error of predictions; None: too few were seen."""
        return statistics.median(self._errors) if len(self._errors) >= _FIRST else None


def _in_order(seconds: Sequence[float], drift: _Drift) -> list[float]:
    """Factors by which modes keep the order that their seconds have."""
    factors = [math.exp(log) for log in drift.logs()]
    for mode in range(len(factors) - 2, -1, -1):
        if seconds[mode] >= seconds[mode + 1]:
            least = factors[mode + 1] * seconds[mode + 1] / seconds[mode]
            factors[mode] = max(factors[mode], least)
    return factors
