"""What the governor knows of every request that waits or runs, as PACE's state needs it.

Lengths of answers are predicted by class (chat or completion, with which priority), because those
of one class are alike. Steps are booked as the engine reports them; nothing here reads a clock.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from tidegate.edge.energy.lengths import AnswerLengths
from tidegate.edge.energy.pace_state import NEVER, Running, Waiting
from tidegate.engine.steps import StepReport

_STALLS_S: Final = 60.0
"""Of answers, over which it is told for how much of them they stood still; as the simulator's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """A request that passed the router's filters.

    Args:
        id: of the request.
        kind: class by which its length is predicted.
        prompt_tokens: to compute.
        most_tokens: that its answer may have.
        deadline_s: on the governor's clock.
        may_leave: privacy and capability allow the cloud, whether it can be reached now or not.
        may_stay: the device can run it.
        may_wait: background work.
        exact: the answer has just `most_tokens`, because nothing ends it before.
    """

    id: str
    kind: str
    prompt_tokens: int
    most_tokens: int
    deadline_s: float = NEVER
    may_leave: bool = False
    may_stay: bool = True
    may_wait: bool = False
    exact: bool = False


@dataclass(kw_only=True, slots=True)
class _Held:
    ask: Ask
    arrived_s: float
    seen: Waiting
    learnt: int
    """Answers of its class when it was `seen`."""


@dataclass(kw_only=True, slots=True)
class _Begun:
    ask: Ask
    prefill_tokens: float
    given: int = 0
    last_step_s: float = -math.inf


@dataclass(kw_only=True)
class Requests:
    """Those that wait for their place and those that run here, by id."""

    held: dict[str, _Held] = field(default_factory=dict)
    begun: dict[str, _Begun] = field(default_factory=dict)
    stalled_share: float = 0.0
    """Of the time of answers, lately, in which they stood still for the prompts of others."""
    _lengths: defaultdict[str, AnswerLengths] = field(
        default_factory=lambda: defaultdict(AnswerLengths)
    )
    _learnt: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Answers by class: what was predicted before the last one is old."""
    _last_step_s: dict[str, float] = field(default_factory=dict)
    """Of those that are computed and not yet told."""

    def hold(self, ask: Ask, now_s: float) -> None:
        """A request has come."""
        assert ask.id not in self.held, "an id is used once"
        seen = self.seen(ask, now_s)
        self.held[ask.id] = _Held(
            ask=ask, arrived_s=now_s, seen=seen, learnt=self._learnt[ask.kind]
        )

    def begin(self, ask: Ask) -> None:
        """It runs here from now on, whether it was held or not."""
        self.held.pop(ask.id, None)
        if ask.id not in self.begun:
            self.begun[ask.id] = _Begun(ask=ask, prefill_tokens=ask.prompt_tokens)

    def computed(self, request_id: str) -> None:
        """The engine is done with it, though nobody may have read its end yet."""
        begun = self.begun.pop(request_id, None)
        if begun is not None:
            self._last_step_s[request_id] = begun.last_step_s

    def leave(self, request_id: str) -> None:
        """It went to the cloud, or its caller is gone, or it has ended."""
        self.held.pop(request_id, None)
        self.begun.pop(request_id, None)
        self._last_step_s.pop(request_id, None)

    def learn(self, ask: Ask, answer_tokens: int) -> None:
        """An answer came to its end."""
        if not ask.exact:
            self._learnt[ask.kind] += 1
            self._lengths[ask.kind].observe(answer_tokens)

    def stepped(self, report: StepReport, step_s: float) -> bool:
        """Book a step; `step_s` is what one without any prompt would have taken.

        Returns:
            whether a prompt is complete, so that the next may begin.
        """
        complete = False
        for share in report.shares:
            begun = self.begun.get(share.request_id)
            if begun is None:
                continue
            before = begun.prefill_tokens
            done = share.past_tokens + share.computed_tokens
            begun.prefill_tokens = max(0, begun.ask.prompt_tokens + begun.given - done)
            begun.given += share.sampled_tokens
            if not share.is_prompt or share.sampled_tokens:
                begun.prefill_tokens = 0
            complete = complete or (before > 0 and not begun.prefill_tokens)
            begun.last_step_s = report.ended_s
        if report.decoding_rows and report.elapsed_s > 0:
            stood_s = report.elapsed_s - step_s if report.prompt_tokens else 0.0
            stood = min(1.0, max(0.0, stood_s / report.elapsed_s))
            keeps = math.exp(-report.elapsed_s / _STALLS_S)
            self.stalled_share = keeps * self.stalled_share + (1 - keeps) * stood
        return complete

    def last_step_s(self, request_id: str) -> float:
        """When its last step ended; minus infinity before the first."""
        begun = self.begun.get(request_id)
        if begun is not None:
            return begun.last_step_s
        return self._last_step_s.get(request_id, -math.inf)

    def waiting(self) -> list[Waiting]:
        """As PACE sees them."""
        seen = []
        for held in self.held.values():
            learnt = self._learnt[held.ask.kind]
            if held.learnt != learnt:  # three quantiles each: not at every decision
                held.seen, held.learnt = self.seen(held.ask, held.arrived_s), learnt
            seen.append(held.seen)
        return seen

    def seen(self, ask: Ask, arrived_s: float) -> Waiting:
        """One of them as PACE sees it."""
        mean, p90, most = self._left(ask, 0)
        return Waiting(
            id=ask.id,
            prompt_tokens=ask.prompt_tokens,
            output_mean=mean,
            output_p90=p90,
            output_most=most,
            arrived_s=arrived_s,
            deadline_s=ask.deadline_s,
            may_leave=ask.may_leave,
            may_stay=ask.may_stay,
            may_wait=ask.may_wait,
        )

    def running(self) -> list[Running]:
        """As PACE sees them."""
        return list(self._running())

    def _running(self) -> Iterator[Running]:
        for begun in self.begun.values():
            ask = begun.ask
            mean, p90, most = self._left(ask, begun.given)
            yield Running(
                prefill_tokens=begun.prefill_tokens,
                output_mean=mean,
                output_p90=p90,
                output_most=most,
                context_tokens=ask.prompt_tokens + begun.given,
                deadline_s=ask.deadline_s,
                may_wait=ask.may_wait,
            )

    def _left(self, ask: Ask, given: int) -> tuple[float, float, float]:
        """Tokens still to come: the mean, the ninth decile, and the most."""
        if ask.exact:
            left = max(1.0, float(ask.most_tokens - given))
            return left, left, left
        lengths = self._lengths[ask.kind]
        mean = lengths.mean_left(given, ask.most_tokens)
        p90 = lengths.left(0.9, given, ask.most_tokens)
        return mean, p90, lengths.left(1.0, given, ask.most_tokens)
