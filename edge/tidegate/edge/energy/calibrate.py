"""`calibrate`: measures one model on this device and fits what its work costs, mode by mode.

Every round runs all points in all power modes, in an order of its own, so that a disturbance of
some seconds meets all of them alike; rounds go on until time is up. Points left out of the fit ran
in the same rounds. What would take much longer than was asked for is refused before it begins.
"""

from __future__ import annotations

import asyncio
import math
import random
import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from tidegate.edge.energy.actuate import ModeSwitch
from tidegate.edge.energy.calibrate_bench import Bench, Ran, Sample, quiet, settled
from tidegate.edge.energy.calibrate_fit import Fit, fit_mode
from tidegate.edge.energy.calibrate_points import (
    SHORTEST,
    Design,
    GridPoint,
    design,
    longest_prompt,
)
from tidegate.edge.energy.calibrate_watts import MeasuredWatts, measure_watts
from tidegate.edge.energy.profile import FittedMode
from tidegate.edge.energy.sensors.sample import Panel
from tidegate.errors import ConfigError

LEAST_ROUNDS: Final = 5
"""However little time there is: a low fifth of fewer is the least."""
MOST_ROUNDS: Final = 100
_WATTS_SHARE: Final = 0.3
"""Of the time, for watts, where a sensor measures them."""
_LONGEST_WINDOW_S: Final = 20.0
_GRACE_S: Final = 60.0
"""That the fewest rounds may take however little time was given."""
_WARM: Final = GridPoint(prompt_tokens=32, output_tokens=8, rows=1)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibrated:
    """What came out, by mode from the slowest to the fastest."""

    modes: tuple[str, ...]
    fits: tuple[Fit, ...]
    """Their costs have watts where those were measured."""
    scope: str | None
    """Of the watts; None: they are unknown."""
    watts_why: str
    rounds: int
    longest_prompt: int
    wanted_prompt: int
    """That the context has room for; the longest is shorter where time was short."""
    spread: float
    """Of decoding steps, in the median: how much longer the upper fifth of them took than the low
    one that counts. Much where other programs were busy."""
    switch_s: float | None
    """Median of the changes of mode; None: there is but one mode."""

    def fitted_modes(self, source: str) -> tuple[FittedMode, ...]:
        """As a calibration file has them; every number is of `source`."""
        return tuple(self._fitted(one, source) for one in self.fits)

    def _fitted(self, fit: Fit, source: str) -> FittedMode:
        cost, known = fit.cost, self.scope is not None
        return FittedMode(
            name=cost.name,
            prefill_start_s=cost.prefill_start_s,
            part_tokens=cost.part_tokens,
            prefill_token_s=cost.prefill_token_s,
            prefill_context_s=cost.prefill_context_s,
            step_s=cost.step_s,
            row_s=cost.row_s,
            beside_s=cost.beside_s,
            context_token_s=cost.context_token_s,
            prefill_w=cost.prefill_w if known else None,
            decode_w=cost.decode_w if known else None,
            idle_w=cost.idle_w if known else None,
            prefill_r2=fit.prefill_r2,
            decode_r2=fit.decode_r2,
            prefill_error=fit.prefill_error,
            decode_error=fit.decode_error,
            src={"*": source},
        )


@dataclass(kw_only=True)
class Calibration:
    """One calibration.

    Args:
        bench: with the model.
        switch: of the power modes; its owner closes it.
        panel: of the sensors; None: watts are not measured.
        modes: of the switch, to be measured.
        minutes: to go on for. `LEAST_ROUNDS` rounds are run in any case; where they take more
            than this and more than a minute, nothing is run.
        report: told of the progress, in per cent.
        sleep: what idling is.
    """

    bench: Bench
    switch: ModeSwitch
    panel: Panel | None
    modes: tuple[str, ...]
    minutes: float
    report: Progress
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    _runs: dict[tuple[str, GridPoint], list[Ran]] = field(default_factory=dict)
    _switched_s: list[float] = field(default_factory=list)

    async def run(self) -> Calibrated:
        """Measure and fit.

        Raises:
            ConfigError: a mode is unknown, the context is too short, or so are `minutes`.
            ActuationError: a mode could not be taken.
            ExecutionError: a request failed, or too little was complete.
        """
        _check_modes(self.modes, self.switch)
        limits = self.bench.limits
        wanted = longest_prompt(limits.context_tokens, limits.step_rows)
        design(longest_prompt=wanted, rows=limits.step_rows)  # refuses before anything runs
        began_s = self.bench.clock()
        longest, plan = await self._plan(wanted)
        rounds = await self._rounds(plan, began_s, self._share)
        samples = {mode: self._samples(mode, plan) for mode in self.modes}
        fits = [self._fit(mode, plan, found) for mode, found in samples.items()]
        watts = await self._watts(longest, began_s)
        measured = [one for one in watts if isinstance(one, MeasuredWatts)]
        if len(measured) == len(fits) and len({one.scope for one in measured}) == 1:
            fits = [
                replace(fit, cost=one.on(fit.cost)) for fit, one in zip(fits, measured, strict=True)
            ]
            scope, why = measured[0].scope, f"watts ({measured[0].scope}) were measured"
        else:
            told = next((one for one in watts if isinstance(one, str)), "no sensor measures them")
            scope, why = None, f"watts are unknown: {told}"
        self.report("calibrating", 100, 100)
        return Calibrated(
            modes=self.modes,
            fits=tuple(fits),
            scope=scope,
            watts_why=why,
            rounds=rounds,
            longest_prompt=longest,
            wanted_prompt=wanted,
            spread=statistics.median(
                [one.spread for found in samples.values() for one in found.values()]
            ),
            switch_s=statistics.median(self._switched_s) if self._switched_s else None,
        )

    async def _plan(self, wanted: int) -> tuple[int, Design]:
        """The longest prompt for which the rounds fit into the time, and the points up to it."""
        await self._take(self.modes[0])
        for _ in range(3):
            warm = await self.bench.run(_WARM)
        token_s = sum(part.seconds for part in warm.parts) / _WARM.prompt_tokens
        step_s = quiet(warm.steps_s) if warm.steps_s else token_s
        longest, given_s = wanted, 60 * self.minutes * self._share
        while True:
            plan = design(longest_prompt=longest, rows=self.bench.limits.step_rows)
            shortest = longest < 16 * SHORTEST
            needed_s = self._needed_s(plan, token_s, step_s)
            if needed_s <= given_s or shortest:
                # Pairs of a long prompt's tokens make each of them longer.
                alone = GridPoint(prompt_tokens=longest, output_tokens=1, rows=1)
                ran = await self.bench.run(alone)
                long_s = sum(part.seconds for part in ran.parts) / longest
                needed_s = self._needed_s(plan, max(token_s, long_s), step_s)
            if needed_s <= given_s or shortest:
                break
            longest //= 2
        self._check_time(needed_s, given_s)
        return longest, plan

    def _check_time(self, needed_s: float, given_s: float) -> None:
        if needed_s > max(_GRACE_S, given_s):
            least = math.ceil(needed_s / self._share / 60)
            modes = f"{len(self.modes)} power mode{'s' if len(self.modes) > 1 else ''}"
            allowed = f"at least {least}, which {LEAST_ROUNDS} rounds in {modes} take about"
            raise ConfigError("minutes", self.minutes, allowed)

    def _needed_s(self, plan: Design, token_s: float, step_s: float) -> float:
        """About what the fewest rounds take."""
        return LEAST_ROUNDS * len(self.modes) * plan.round_s(token_s, step_s)

    @property
    def _share(self) -> float:
        """Of the time, for rounds."""
        return 1.0 if self.panel is None else 1 - _WATTS_SHARE

    async def _rounds(self, plan: Design, began_s: float, share: float) -> int:
        draw = random.Random(0)
        for done in range(MOST_ROUNDS):
            spent = (self.bench.clock() - began_s) / (60 * self.minutes)
            if done >= LEAST_ROUNDS and spent >= share:
                return done
            for mode in draw.sample(self.modes, len(self.modes)):
                await self._take(mode)
                for point in draw.sample(plan.points, len(plan.points)):
                    self._runs.setdefault((mode, point), []).append(await self.bench.run(point))
                    spent = (self.bench.clock() - began_s) / (60 * self.minutes)
                    self.report("calibrating", min(99, int(100 * spent)), 100)
        return MOST_ROUNDS

    async def _take(self, mode: str) -> None:
        """Take a mode, and let what follows it settle."""
        if len(self.switch.modes) > 1:
            began_s = self.bench.clock()
            await asyncio.to_thread(self.switch.switch, mode)
            self._switched_s.append(self.bench.clock() - began_s)
        await self.bench.run(_WARM)

    def _samples(self, mode: str, plan: Design) -> dict[GridPoint, Sample]:
        found = ((point, settled(point, self._runs[mode, point])) for point in plan.points)
        return {point: one for point, one in found if one is not None}

    def _fit(self, mode: str, plan: Design, samples: Mapping[GridPoint, Sample]) -> Fit:
        fitted = [samples[point] for point in plan.fitted if point in samples]
        held = [samples[point] for point in plan.held if point in samples]
        return fit_mode(mode, fitted, held, part_tokens=self.bench.limits.step_tokens)

    async def _watts(self, longest: int, began_s: float) -> list[MeasuredWatts | str]:
        if self.panel is None:
            return []
        left_s = 60 * self.minutes - (self.bench.clock() - began_s)
        window_s = left_s / (3 * len(self.modes))
        found = list[MeasuredWatts | str]()
        for mode in self.modes:
            await self._take(mode)
            found.append(
                await measure_watts(
                    self.bench,
                    self.panel,
                    longest_prompt=longest,
                    seconds=max(2.0, min(_LONGEST_WINDOW_S, window_s)),
                    sleep=self.sleep,
                )
            )
            if isinstance(found[-1], str):
                break
        return found


def _check_modes(modes: Sequence[str], switch: ModeSwitch) -> None:
    for mode in modes:
        if mode not in switch.modes:
            allowed = f"of {', '.join(switch.modes)}, which can be taken while the daemon runs"
            raise ConfigError("modes", mode, allowed)
    if not modes:
        raise ConfigError("modes", "", f"some of {', '.join(switch.modes)}")
