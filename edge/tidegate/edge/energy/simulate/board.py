"""The simulated board: what runs, at which power, how warm it is, what the battery has left.

Between two events everything is linear or exponential in time, so `advance` is exact for any step.
A prompt is computed alone; then all rows share steps, as `tidegate.edge.energy.cost` has it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

from tidegate.edge.energy.cost import CostModel
from tidegate.edge.energy.heat import Heat
from tidegate.edge.energy.simulate.jobs import Job

_STALLS_S: Final = 120.0
_SAME_TOKEN: Final = 1e-6
"""Of a token: rows whose ends are nearer to each other end together."""
_EMPTY_J: Final = 1e-6


@dataclass(kw_only=True, slots=True, eq=False)
class Row:
    """A request that runs on the board."""

    job: Job
    prefill_left: float = 1.0
    """Share of its prompt still to be computed."""
    given: float = 0.0
    """Tokens generated."""
    context_tokens: float = 0.0
    """That its steps are charged for: the mean over its answer."""


@dataclass(kw_only=True, slots=True)
class Meter:
    """Joules by what they went into, and seconds by where the temperature was."""

    work_j: float = 0.0
    """Above the idlest mode, while something ran."""
    parked_j: float = 0.0
    """Above the idlest mode, while nothing ran in a faster one."""
    switch_j: float = 0.0
    radio_j: float = 0.0
    idle_j: float = 0.0
    """What the idlest mode takes all the time."""
    cloud_j: float = 0.0
    price: float = 0.0
    soft_s: float = 0.0
    hard_s: float = 0.0
    switches: int = 0

    @property
    def device_j(self) -> float:
        """Marginal: what the device took above doing nothing at all."""
        return self.work_j + self.parked_j + self.switch_j + self.radio_j

    @property
    def system_j(self) -> float:
        """With the service's share."""
        return self.device_j + self.cloud_j


@dataclass(kw_only=True, eq=False)
class Board:
    """See the module. The owner calls `advance` up to each event and then changes what runs."""

    costs: CostModel
    mode: int
    heat: Heat | None = None
    soft_c: float = math.inf
    hard_c: float = math.inf
    battery_j: float = math.inf
    now_s: float = 0.0
    mode_since_s: float = 0.0
    switching_until_s: float = 0.0
    idle_since_s: float = 0.0
    rows: list[Row] = field(default_factory=list)
    meter: Meter = field(default_factory=Meter)
    stalled_share: float = 0.0
    """Of the last minutes of answers, in which they stood still for another's prompt."""

    def watts(self) -> float:
        """Drawn now."""
        mode = self.costs.modes[self.mode]
        if not self.rows or self.now_s < self.switching_until_s:
            return mode.idle_w
        return mode.prefill_w if self._prefilling() is not None else mode.decode_w

    def switch(self, mode: int) -> None:
        """Begin another power mode; nothing runs until it is there."""
        self.mode = mode
        self.mode_since_s = self.now_s
        self.switching_until_s = self.now_s + self.costs.switch_s
        self.meter.switch_j += self.costs.switch_j
        self.battery_j -= self.costs.switch_j
        self.meter.switches += 1

    def start(self, job: Job) -> None:
        """Begin to answer."""
        context = job.prompt_tokens + job.output_tokens / 2
        self.rows.append(Row(job=job, context_tokens=context))

    def next_change_s(self) -> float:
        """When a prompt is computed, a row has its last token, or a mode has come."""
        if self.now_s < self.switching_until_s:
            return self.switching_until_s
        if not self.rows:
            return math.inf
        mode = self.costs.modes[self.mode]
        first = self._prefilling()
        if first is not None:
            return self.now_s + first.prefill_left * mode.prefill_s(first.job.prompt_tokens)
        left = min([row.job.output_tokens - row.given for row in self.rows])
        return self.now_s + left * self._step_s()

    def empty_at_s(self) -> float:
        """When the battery is, at the power that is drawn now."""
        watts = self.watts()
        return self.now_s + max(0.0, self.battery_j) / watts if watts else math.inf

    def advance(self, to_s: float) -> list[Row]:
        """Go on to `to_s`, at most to `next_change_s`; returns the rows that ended there."""
        due = to_s >= self.next_change_s()
        seconds = max(0.0, to_s - self.now_s)
        self._count(self.watts(), seconds)
        ended: list[Row] = []
        if self.rows and self.now_s >= self.switching_until_s:
            ended = self._progress(seconds, due=due)
        self.now_s += seconds
        if ended:
            self.rows = [row for row in self.rows if row not in ended]
            if not self.rows:
                self.idle_since_s = to_s
        return ended

    def _progress(self, seconds: float, *, due: bool) -> list[Row]:
        """Go on for `seconds`; what is `due` is done, whatever rounding has left of it.

        Late in a trace the last digits of a time are longer than what is left may take.
        """
        mode = self.costs.modes[self.mode]
        first = self._prefilling()
        begun = sum([row.prefill_left <= 0 for row in self.rows])
        if begun:
            keeps = math.exp(-seconds / _STALLS_S)
            now = 0.0 if first is None else 1.0
            self.stalled_share = keeps * self.stalled_share + (1 - keeps) * now
        if first is not None:
            first.prefill_left -= seconds / mode.prefill_s(first.job.prompt_tokens)
            if due:
                first.prefill_left = 0.0
            first.prefill_left = max(0.0, first.prefill_left)
            return []
        steps = seconds / self._step_s()
        left = []
        for row in self.rows:
            row.given += steps
            left.append(row.job.output_tokens - row.given)
        most = min(left) + _SAME_TOKEN if due else 0.0
        return [row for row, tokens in zip(self.rows, left, strict=True) if tokens <= most]

    def _prefilling(self) -> Row | None:
        for row in self.rows:
            if row.prefill_left > 0:
                return row
        return None

    def _step_s(self) -> float:
        context = sum([row.context_tokens for row in self.rows])
        return self.costs.modes[self.mode].batch_step_s(len(self.rows), context)

    def _count(self, watts: float, seconds: float) -> None:
        meter, idle_w = self.meter, self.costs.idle_w
        meter.idle_j += idle_w * seconds
        above_j = (watts - idle_w) * seconds
        if self.rows and self.now_s >= self.switching_until_s:
            meter.work_j += above_j
        else:
            meter.parked_j += above_j
        if self.battery_j < math.inf:
            self.battery_j -= watts * seconds
            if self.battery_j < _EMPTY_J:
                self.battery_j = 0.0
        if self.heat is not None:
            before_c = self.heat.now_c
            self.heat = self.heat.after(watts, seconds)
            hottest = max(before_c, self.heat.now_c)  # between changes it only rises or only falls
            if hottest > self.soft_c:
                meter.soft_s += seconds
            if hottest > self.hard_c:
                meter.hard_s += seconds
