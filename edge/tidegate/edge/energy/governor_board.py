"""`BoardWatch`: samples of the board, and what follows from each: joules, heat, debt.

A sample may take milliseconds, so it is taken in a thread; all else happens on the event loop. One
is taken at a time: who needs a newer one joins the one that is on its way, or the next. A sensor
that never answers is not waited for: it counts as one that cannot be read until it answers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from tidegate.edge.energy.governor_device import Device
from tidegate.edge.energy.governor_heat import Outlook
from tidegate.edge.energy.governor_modes import InThread
from tidegate.edge.energy.governor_words import UNKNOWN
from tidegate.edge.energy.sensors.sample import Sample

_log = logging.getLogger(__name__)

_LAST_LOOK_S: Final = 0.5
"""That an answer's end waits for the sample which its joules are told from."""
_HANGS_S: Final = 5.0
"""After which a sample that has not come is one that does not come."""


class BoardWatch:
    """What is known of the board from its sensors."""

    def __init__(
        self,
        device: Device,
        *,
        in_thread: InThread,
        idling: Callable[[], bool],
        changed: Callable[[], None],
    ) -> None:
        """Nothing is read yet.

        Args:
            device: whose panel, ledger, heat and budget these are.
            in_thread: where samples are taken.
            idling: whether nothing has run for a while and the mode is the idlest.
            changed: called when a sample means something else for decisions than the one before.
        """
        self._device, self._in_thread = device, in_thread
        self._idling, self._changed = idling, changed
        self.sample: Sample | None = None
        self.outlook = Outlook()
        self._sampling: asyncio.Task[None] | None = None
        self._hangs = False
        self._faults: frozenset[str] = frozenset()

    async def look(self) -> None:
        """Take a sample, or wait for the one that is on its way; raises what that raised."""
        if self._sampling is None or self._sampling.done():
            self._hangs = False
            self._sampling = asyncio.get_running_loop().create_task(self._look())
            self._sampling.add_done_callback(_seen)
        elif self._hangs:
            self._take_nothing()
            return
        sampling = self._sampling
        done, _ = await asyncio.wait({sampling}, timeout=_HANGS_S)
        if done:
            sampling.result()
        else:
            self._hangs = True
            self._take_nothing()

    async def look_after(self, at_s: float) -> None:
        """Have a sample that is not older than `at_s`, if one comes within half a second."""
        if self._hangs:
            return
        try:
            async with asyncio.timeout(_LAST_LOOK_S):
                for _ in range(2):  # the one on its way may have begun before
                    if self.sample is not None and self.sample.at_s >= at_s:
                        return
                    await self.look()
        except TimeoutError:
            _log.debug("energy: no sample within %g s", _LAST_LOOK_S)

    async def see_network(self) -> None:
        """Find out what sending takes now: another network may be in use."""
        cloud, radio = self._device.cloud, self._device.radio
        if cloud is None or radio is None or self._hangs:
            return
        try:
            async with asyncio.timeout(_HANGS_S):
                cloud.radio = await self._in_thread(radio)
        except TimeoutError:
            _log.debug("energy: the network in use is not known within %g s", _HANGS_S)

    async def _look(self) -> None:
        self._take(await self._in_thread(self._device.panel.sample))

    def _take(self, sample: Sample) -> None:
        self._hangs = False
        self._device.ledger.settle(sample)
        self._follow(sample)

    def _take_nothing(self) -> None:
        """Go on as if nothing could be read, which is what a sample that hangs amounts to."""
        fault = f"sensors: no answer for {_HANGS_S:g} s: nothing is known of the board"
        now_s = self._device.clock()
        self._follow(
            Sample(
                at_s=now_s,
                joules=0.0,
                watts=0.0,
                scope=UNKNOWN,
                kind="estimated",
                faults=(fault,),
            )
        )

    def _follow(self, sample: Sample) -> None:
        device = self._device
        before = _signs(self.outlook, self.sample)
        costs = device.costs.costs
        device.budget.see(
            sample.battery,
            now_s=device.clock(),
            idle_w=costs.idle_w,
            idling=self._idling(),
        )
        self.outlook = device.heat.see(sample, costs)
        self.sample = sample
        self._tell(sample)
        if _signs(self.outlook, sample) != before:
            self._changed()

    def _tell(self, sample: Sample) -> None:
        """Log what can no longer be read, or can again: once each."""
        faults = frozenset(sample.faults)
        for fault in sorted(faults - self._faults):
            _log.warning("energy: %s", fault)
        for fault in sorted(self._faults - faults):
            _log.info("energy: no longer: %s", fault)
        self._faults = faults


def _seen(sampling: asyncio.Task[None]) -> None:
    """Nobody may be waiting any more for what a sample raises that took too long."""
    if not sampling.cancelled():
        sampling.exception()


def _signs(outlook: Outlook, sample: Sample | None) -> tuple[object, ...]:
    """What makes a decision another one at once; the rest is soon enough at the next."""
    battery = None if sample is None else sample.battery
    plugged = None if battery is None else battery.plugged
    hot = outlook.rest_k > 0
    return plugged, outlook.fastest, hot
