"""`Governor`: asks PACE whenever something changes, and does what it says.

Decisions are PACE's alone, from a state put together here; what is measured comes in by samples and
step reports, what is decided goes out as placements of requests and as power modes. Decisions of
one turn of the event loop are one. Whatever fails in here is logged, those who may not wait are
given back to the router's clock, and the next request is tried again a while later.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Final

from tidegate.edge.energy.governor_accounts import Accounts
from tidegate.edge.energy.governor_board import BoardWatch
from tidegate.edge.energy.governor_device import Device
from tidegate.edge.energy.governor_line import Line, Placement
from tidegate.edge.energy.governor_modes import BoardThread, InThread, ModeKeeper
from tidegate.edge.energy.governor_requests import Ask, Requests
from tidegate.edge.energy.governor_status import Counts, view_of
from tidegate.edge.energy.governor_view import EnergyView
from tidegate.edge.energy.governor_words import explained, why_away, why_held, why_here, why_mode
from tidegate.edge.energy.pace import Pace
from tidegate.edge.energy.pace_state import NEVER, Decision, PaceState, Waiting
from tidegate.edge.energy.settings import EnergySettings
from tidegate.engine.request import RequestId
from tidegate.errors import describe_defect

_log = logging.getLogger(__name__)

Recorder = Callable[[Pace, PaceState, Decision], None]

_BROKEN_S: Final = 30.0
"""That the clock alone routes after a failure of the governor."""
_READ_BACK_S: Final = 60.0
"""Between two looks at whether someone else took a power mode, or another network is used, and
between two decisions while nothing but background work is held."""
_LINK_S: Final = 1.0
"""Between two looks at whether the cloud can be reached."""
_LOOKING: Final = "looking at the board"
_LINKING: Final = "looking for the cloud"
_DECIDING: Final = f"deciding, for {_BROKEN_S:g} s the clock alone routes"
_LOOK_S: Final = 2.0
"""Between two decisions while something runs or waits and nothing else happens."""


class Governor:
    """Schedules one daemon by energy. `run` is the owner's to keep going."""

    def __init__(
        self,
        settings: EnergySettings,
        device: Device,
        *,
        record: Recorder | None = None,
        sensing: InThread | None = None,
        switching: InThread | None = None,
        busy_every_s: float = 0.25,
        idle_every_s: float = 1.0,
        most_hold_s: float = 60.0,
    ) -> None:
        """Nothing is read or switched before `run`.

        Args:
            settings: what the owner wants.
            device: what is governed.
            record: is given every decision with all that it depended on.
            sensing: where samples are taken; None: a thread of its own.
            switching: where modes are taken; None: another.
            busy_every_s: between two samples while something runs or waits.
            idle_every_s: between two samples else.
            most_hold_s: after which what is no background work begins although PACE does not say
                so while a row is free; ten times as long in any case. So long after its own bound,
                and quiet hours, background work begins.
        """
        self._settings, self._device, self._record = settings, device, record
        self._busy_every_s, self._idle_every_s = busy_every_s, idle_every_s
        self.requests = Requests()
        longest_s = settings.weights.longest_hold_s
        self._line = Line(self.requests, device, longest_hold_s=longest_s, most_hold_s=most_hold_s)
        costs = device.costs.costs
        self.modes = ModeKeeper(
            device.switch,
            [mode.name for mode in costs.modes],
            clock=device.clock,
            in_thread=switching or BoardThread("power modes"),
            changed=self._poke,
        )
        self.board = BoardWatch(
            device,
            in_thread=sensing or BoardThread("energy sensors"),
            idling=self._idling,
            changed=self._poke,
        )
        self.accounts = Accounts(
            device, self.requests, self.modes, self.board, failed=self._failed, changed=self._poke
        )
        self._counts = Counts()
        self._link_up = False  # until it was looked for
        self._idle_since_s = device.clock()
        self._poked = self._ended = False
        self._timer: asyncio.TimerHandle | None = None
        self._broken_until_s = 0.0
        self._decided_s = -math.inf
        self._last_failure: dict[str, str] = {}

    # What the daemon calls.

    async def run(self) -> None:
        """Look at the board and at the link until cancelled; without that nobody is held."""
        self._ended = False
        try:
            await self.modes.read()
            await self.board.see_network()
            self._poke()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._look_on())
                tasks.create_task(self._watch_modes())
                if self._device.link_up is not None:
                    tasks.create_task(self._watch_link(self._device.link_up))
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._ended = True
            self._line.give_back(background=True)
            await self.modes.settled()  # the board's mode is put back after this

    async def place(self, ask: Ask) -> Placement | None:
        """Wait for the place of a request; None: the governor cannot say, the clock is to decide.

        Cancelling takes the request out at once. Whoever is placed calls `end` in the end.
        """
        now_s = self._device.clock()
        if self._ended or now_s < self._broken_until_s:
            return None
        self._line.enter(ask, now_s)
        self._poke()
        try:
            return await self._line.placed(ask)
        except BaseException:
            self.end(ask.id)
            raise
        finally:
            self._line.left(ask.id)

    def close_line(self) -> None:
        """Hold nobody from now on, for a daemon that stops: those who wait are told so at once."""
        self._broken_until_s = NEVER
        self._line.give_back(background=True)

    def begin(self, ask: Ask) -> None:
        """A request runs on the device, whoever decided so."""
        self.requests.begin(ask)

    def computed(self, request_id: str) -> None:
        """The engine is done with a request: its row is free, however slowly its end is read."""
        self._drop(request_id, self.requests.computed)

    def depart(self, request_id: str) -> None:
        """A request is no longer here: it goes to the cloud, or its end is told."""
        self._drop(request_id, self.requests.leave)

    def end(self, request_id: str) -> None:
        """A request is over, well or not; may be told more than once."""
        self._drop(request_id, self.requests.leave)
        self._device.ledger.forget(RequestId(request_id))

    def see_link(self, up: bool) -> None:
        """The cloud can be reached, or not."""
        if up != self._link_up:
            self._link_up = up
            _log.info("energy: the cloud is %s", "in reach" if up else "out of reach")
            self._poke()

    def held_before(self, *, may_wait: bool) -> int:
        """Requests that wait for their place, as one more counts them.

        Work that may wait keeps nobody else out of the line, however long it is held.
        """
        held = self.requests.held.values()
        return sum(may_wait or not one.ask.may_wait for one in held)

    def explain(self, ask: Ask) -> Mapping[str, object] | None:
        """What PACE would do with a request that came now, and its terms; nothing is done."""
        if self._device.clock() < self._broken_until_s:
            return None
        pace, state = self._pace(), self._state()
        new = self.requests.seen(ask, state.now_s)
        state = replace(state, waiting=[*state.waiting, new])
        return explained(ask, pace, state, pace.decide(state, explain=True))

    def view(self) -> EnergyView:
        """For `/status` and `/metrics`."""
        profile, sample = self._settings.profile.id, self.board.sample
        return view_of(self._device, profile, self.modes, sample, self.requests, self._counts)

    # Looking.

    async def _look_on(self) -> None:
        """Samples, and a decision now and then while there is work."""
        while True:
            try:
                await self.board.look()
                self._last_failure.pop(_LOOKING, None)
            except Exception as error:  # the boundary of a look
                self._failed(_LOOKING, error)
            # Background work that is held keeps nothing awake: PACE said when to look again.
            busy = bool(self.requests.begun or self.held_before(may_wait=False))
            if busy or self.requests.held:
                rested_s = self._device.clock() - self._decided_s
                if rested_s >= (_LOOK_S if busy else _READ_BACK_S):
                    self._poke()
            await asyncio.sleep(self._busy_every_s if busy else self._idle_every_s)

    async def _watch_modes(self) -> None:
        while True:
            await asyncio.sleep(_READ_BACK_S)
            await self.modes.read()
            await self.board.see_network()

    async def _watch_link(self, link_up: Callable[[], Awaitable[bool]]) -> None:
        while True:
            try:
                self.see_link(await link_up())
                self._last_failure.pop(_LINKING, None)
            except Exception as error:  # the boundary of a look
                self._failed(_LINKING, error)
            await asyncio.sleep(_LINK_S)

    def _idling(self) -> bool:
        costs = self._device.costs.costs
        rested_s = self._device.clock() - self._idle_since_s
        return not self.requests.begun and rested_s > _LINK_S and self.modes.mode == costs.idlest

    # Deciding.

    def _poke(self) -> None:
        """Decide once, in the next turn of the loop."""
        if not self._poked:
            self._poked = True
            asyncio.get_running_loop().call_soon(self._decide)

    def _decide(self) -> None:
        self._poked = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._ended:
            return
        broken_s = self._broken_until_s - self._device.clock()
        if broken_s > 0:
            if broken_s < NEVER:
                self._wake_in(broken_s)
            return
        try:
            began = time.thread_time()
            pace, state = self._pace(), self._state()
            asked, asked_s = time.thread_time(), time.perf_counter()
            decision = pace.decide(state)
            told, told_s = time.thread_time(), time.perf_counter()
            self._counts.decisions += 1
            self._decided_s = state.now_s
            if self._record is not None:
                self._record(pace, state, decision)
            self._apply(pace, state, decision)
            took = told_s - asked_s, told - asked, time.thread_time() - began
            self._counts.took_s.append(took)
            self._last_failure.pop(_DECIDING, None)
        except Exception as error:  # the boundary of a decision
            self._broken_until_s = self._device.clock() + _BROKEN_S
            self._failed(_DECIDING, error)
            self._line.give_back(background=False)
            self._wake_in(_BROKEN_S)

    def _pace(self) -> Pace:
        device = self._device
        cloud = device.cloud
        return Pace(
            costs=device.costs.costs,
            weights=self._settings.weights,
            radio=None if cloud is None else cloud.radio,
            cloud=None if cloud is None else cloud.cost,
        )

    def _state(self) -> PaceState:
        device, outlook, budget = self._device, self.board.outlook, self._device.budget
        now_s = device.clock()
        return PaceState(
            now_s=now_s,
            mode=self.modes.mode,
            mode_since_s=self.modes.since_s,
            waiting=self.requests.waiting(),
            running=self.requests.running(),
            idle_since_s=self._idle_since_s,
            link_up=self._link_up,
            radio_warm=device.cloud is not None and device.cloud.warm(now_s),
            loaded=device.loaded(),
            quiet_until_s=budget.quiet_until_s(now_s),
            energy_debt_j=budget.debt.joules,
            battery_share=budget.share(),
            rest_k=outlook.rest_k,
            warming_kw=outlook.warming_kw,
            stalled_share=self.requests.stalled_share,
            fastest=outlook.fastest,
        )

    def _apply(self, pace: Pace, state: PaceState, decision: Decision) -> None:
        waiting = {one.id: one for one in state.waiting}
        why = why_mode(decision, pace.costs)
        self.modes.want(decision.mode, why)
        for request_id in decision.start:
            reason = why_here(waiting[request_id], decision, state, pace.costs)
            self.requests.begin(self.requests.held[request_id].ask)
            self._line.say(request_id, Placement(place="edge", reason=reason))
        for request_id in decision.offload:
            assert pace.cloud is not None, "nothing leaves without a cloud"
            reason = why_away(waiting[request_id], state, pace.costs, pace.cloud, pace.radio)
            self.depart(request_id)
            self._line.say(request_id, Placement(place="cloud", reason=reason))
        if decision.start:
            old, new = len(state.running), len(self.requests.begun)
            rows = pace.costs.rows
            _log.info("energy: batch %d -> %d of %d rows: %s", old, new, rows, why)
        self._tell_held(pace, state, waiting)
        if decision.wake_s < NEVER:
            self._wake_in(decision.wake_s - self._device.clock())

    def _wake_in(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(max(0.0, seconds), self._poke)

    def _tell_held(self, pace: Pace, state: PaceState, waiting: Mapping[str, Waiting]) -> None:
        """Say of each request once that it waits, and why."""
        for request_id in self._line.newly_held():
            self._counts.deferred += 1
            why = why_held(waiting[request_id], state, pace.costs)
            _log.info("energy: request %s is held: %s", request_id, why)

    def _drop(self, request_id: str, leave: Callable[[str], None]) -> None:
        ran = request_id in self.requests.begun
        known = ran or request_id in self.requests.held
        leave(request_id)
        if known:
            self._poke()
        if ran and not self.requests.begun:
            self._idle_since_s = self._device.clock()

    def _failed(self, what: str, error: Exception) -> None:
        """Count it, and say it once while it stays the same and nothing went well in between."""
        self._counts.failures += 1
        told = describe_defect(error)
        if told != self._last_failure.get(what):
            self._last_failure[what] = told
            _log.error("energy: failed in %s: %s", what, told)
