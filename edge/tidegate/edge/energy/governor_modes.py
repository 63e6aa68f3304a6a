"""Taking power modes: one at a time, in a thread, and what is read back is what counts.

A mode that was refused is not asked for again for a while; the costs then stay those of the mode
that the board is really in. What others do to the board is seen at the next reading.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Protocol, TypeVar

from tidegate.edge.energy.actuate import ModeSwitch
from tidegate.engine.one_thread import OneThread
from tidegate.errors import ActuationError, describe_defect

_log = logging.getLogger(__name__)

T = TypeVar("T")

_AGAIN_S: Final = 30.0
"""Before a mode that was refused is asked for again."""
_SETTLES_S: Final = 15.0
"""That a change is waited for in the end: longer than any tool takes that is not stuck."""


class InThread(Protocol):
    """Runs what may block beside the event loop."""

    def __call__(self, work: Callable[[], T]) -> Awaitable[T]:
        """Its result."""


class BoardThread:
    """One thread of its own, one piece after the other; it does not keep the process alive."""

    def __init__(self, name: str) -> None:
        """Take no thread before the first piece."""
        self._one: OneThread[Any] = OneThread(name)

    def __call__(self, work: Callable[[], T]) -> Awaitable[T]:
        """See `InThread`."""
        return self._one.submit(work)


class ModeKeeper:
    """The power mode that the board is in, as an index into the cost model's modes."""

    def __init__(
        self,
        switch: ModeSwitch,
        names: Sequence[str],
        *,
        clock: Callable[[], float],
        in_thread: InThread,
        changed: Callable[[], None],
    ) -> None:
        """Keep the mode of one board; `changed` is called whenever it is another one."""
        assert tuple(switch.modes) == tuple(names), "costs and switch have the same modes"
        self.names = tuple(names)
        self.tool = switch.tool
        self.mode = len(self.names) - 1
        self.since_s = clock()
        self.reason = "as it was found"
        self.switches = self.failures = 0
        self.fault: str | None = None
        """Why the last mode could not be taken or read; None once one could."""
        self._switch, self._clock = switch, clock
        self._in_thread, self._changed = in_thread, changed
        self._known = False
        self._task: asyncio.Task[None] | None = None
        self._not_before_s: dict[int, float] = {}

    @property
    def name(self) -> str:
        """Of the mode."""
        return self.names[self.mode]

    @property
    def switching(self) -> bool:
        """Whether a change is under way."""
        return self._task is not None and not self._task.done()

    async def read(self) -> None:
        """Look which mode the board is in; one that is none of ours counts as the fastest."""
        if self.switching:
            return
        before = self.mode, self._known
        await self._read()
        if (self.mode, self._known) != before:
            if self._known and before[1]:
                _log.info("energy: power mode %s was set by someone else", self.name)
                self.reason = "set by someone else"
            self.since_s = self._clock()
            self._changed()

    def want(self, mode: int, reason: str) -> bool:
        """Go to a mode, unless it is there, another change is under way, or it was just refused.

        Returns:
            whether a change begins.
        """
        if self.switching or (mode == self.mode and self._known):
            return False
        if self._clock() < self._not_before_s.get(mode, 0.0):
            return False
        self._task = asyncio.get_running_loop().create_task(self._go(mode, reason))
        return True

    async def settled(self) -> None:
        """Wait for the change that is under way, if there is one, and not without end."""
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=_SETTLES_S)

    async def _go(self, mode: int, reason: str) -> None:
        name, before = self.names[mode], self.name if self._known else "an unknown one"
        try:
            await self._in_thread(lambda: self._switch.switch(name))
        except Exception as error:  # the boundary of a tool: none of its defects ends the daemon
            self.failures += 1
            self._not_before_s[mode] = self._clock() + _AGAIN_S
            self.fault = f"power mode {name} was not taken: {_told(error)}"
            _log.warning("energy: %s", self.fault)
            old = self.mode
            await self._read()
            if self.mode != old:
                self.since_s = self._clock()
        else:
            self.mode, self._known, self.fault = mode, True, None
            self.since_s, self.reason = self._clock(), reason
            self._not_before_s.pop(mode, None)
            self.switches += 1
            _log.info("energy: power mode %s -> %s: %s", before, name, reason)
        finally:
            self._task = None
            self._changed()

    async def _read(self) -> None:
        try:
            name = await self._in_thread(self._switch.current)
        except Exception as error:  # as above
            self._known = False
            fault = f"the power mode cannot be read: {_told(error)}"
            if fault != self.fault:
                self.fault = fault
                _log.warning("energy: %s", fault)
            return
        self._known = name in self.names
        self.mode = self.names.index(name) if name in self.names else len(self.names) - 1


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, ActuationError) else describe_defect(error)
