"""Watts of a power mode, read off the board's sensors: idle, on prompts, on answers.

Each is the mean of a window in which nothing else is done. Only what a sensor measured counts: a
panel that estimates would give back what it was told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from tidegate.edge.energy.calibrate_bench import Bench
from tidegate.edge.energy.cost import ModeCost
from tidegate.edge.energy.sensors.sample import Panel, Sample, drawn_between

_SHORT_PROMPT: Final = 16
_LONG_ANSWER: Final = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredWatts:
    """Of one mode, all in `scope`."""

    scope: str
    idle_w: float
    prefill_w: float
    decode_w: float

    def on(self, cost: ModeCost) -> ModeCost:
        """The mode with its watts; work never takes less than idling does."""
        return replace(
            cost,
            idle_w=self.idle_w,
            prefill_w=max(self.idle_w, self.prefill_w),
            decode_w=max(self.idle_w, self.decode_w),
        )


async def measure_watts(
    bench: Bench,
    panel: Panel,
    *,
    longest_prompt: int,
    seconds: float,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> MeasuredWatts | str:
    """The watts of the mode that the board is in, or why there are none.

    Args:
        bench: what is run.
        panel: of the board's sensors.
        longest_prompt: that the context has room for.
        seconds: of each of three windows.
        sleep: what idling is.
    """
    answer = min(_LONG_ANSWER, max(1, bench.limits.context_tokens - _SHORT_PROMPT))
    windows: tuple[Callable[[], Awaitable[None]], ...] = (
        lambda: sleep(seconds),
        lambda: bench.keep_busy(longest_prompt // 2, 1, seconds),
        lambda: bench.keep_busy(_SHORT_PROMPT, answer, seconds),
    )
    found, scope = list[float](), ""
    for window in windows:
        before, after = await look_at(panel, window)
        watts = _watts(before, after)
        if isinstance(watts, str):
            return watts
        found.append(watts)
        scope = after.scope
    idle_w, prefill_w, decode_w = found
    return MeasuredWatts(scope=scope, idle_w=idle_w, prefill_w=prefill_w, decode_w=decode_w)


async def look_at(
    panel: Panel, window: Callable[[], Awaitable[None]], *, every_s: float = 0.2
) -> tuple[Sample, Sample]:
    """Samples before and after a window, and one every so often within it.

    Sensors of watts are summed from reading to reading: with two of them, both taken while nothing
    runs, what ran in between would not be seen. One that was not read for long counts from its
    second reading on, so there are two before the window.
    """

    async def look_on() -> None:
        while True:
            await asyncio.to_thread(panel.sample)
            await asyncio.sleep(every_s)

    await asyncio.to_thread(panel.sample)
    await asyncio.sleep(every_s)
    before = await asyncio.to_thread(panel.sample)
    looking = asyncio.create_task(look_on())
    try:
        await window()
    finally:
        looking.cancel()
        with suppress(asyncio.CancelledError):
            await looking
    return before, await asyncio.to_thread(panel.sample)


def _watts(before: Sample, after: Sample) -> float | str:
    if after.kind != "measured":
        return "no sensor: " + ("; ".join(after.faults) or "the board has none that can be read")
    joules, seconds = drawn_between(before, after), after.at_s - before.at_s
    if joules is None or seconds <= 0:
        return "the sensor was lost while it was measured"
    return joules / seconds
