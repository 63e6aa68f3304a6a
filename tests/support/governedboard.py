"""A small board under a governor on virtual time.

Power modes, sensors that a script sets, an engine that takes as long as the board's costs say, and
callers who go where they are placed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Literal, TypeVar

from energyboard import BOARD
from virtualtime import virtual_now_s

from tidegate.edge.energy.cost import CloudCost, CostModel
from tidegate.edge.energy.governor import Governor, Recorder
from tidegate.edge.energy.governor_budget import Budget
from tidegate.edge.energy.governor_cloud import CloudTimes
from tidegate.edge.energy.governor_device import Device
from tidegate.edge.energy.governor_heat import HeatWatch
from tidegate.edge.energy.governor_line import Placement
from tidegate.edge.energy.governor_requests import Ask
from tidegate.edge.energy.heat import HeatPole
from tidegate.edge.energy.ledger import EnergyLedger, TotalKey
from tidegate.edge.energy.profile_files import read_library
from tidegate.edge.energy.sensors.sample import BatteryState, Sample
from tidegate.edge.energy.settings import EnergySettings
from tidegate.engine.events import EnergyUse
from tidegate.engine.request import RequestId
from tidegate.engine.steps import StepReport, StepShare
from tidegate.errors import ActuationError

T = TypeVar("T")

MIDNIGHT = datetime(2026, 3, 1, tzinfo=UTC)
POLES = (HeatPole(r_kw=1.0, tau_s=5.0), HeatPole(r_kw=2.0, tau_s=120.0))


@dataclass(kw_only=True)
class World:
    """What a script changes while the governor runs."""

    celsius: float | None = 45.0
    soft_c: float | None = 70.0
    hard_c: float | None = 85.0
    battery: BatteryState | None = None
    link_up: bool = True
    refused: frozenset[str] = frozenset()
    """Modes that the tool refuses to take."""
    mode: str = "fast"
    taken: list[tuple[float, str]] = field(default_factory=list)
    """When which mode was taken."""
    broken: bool = False
    """The panel raises, against its contract."""
    hangs: bool = False
    """The panel does not answer."""
    midnight: datetime = MIDNIGHT
    work_j: float = 0.0

    def wall(self) -> datetime:
        """The time of day; the loop's time counts from midnight."""
        return self.midnight + timedelta(seconds=virtual_now_s())


class ScriptedPanel:
    """Sensors that say what the world is."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._last = (0.0, 0.0)
        self.samples = 0

    def sample(self) -> Sample:
        self.samples += 1
        world, now_s = self._world, virtual_now_s()
        if world.broken:
            raise RuntimeError("a panel that breaks its promise")
        joules = BOARD.idle_w * now_s + world.work_j
        then_s, before_j = self._last
        watts = (joules - before_j) / (now_s - then_s) if now_s > then_s else BOARD.idle_w
        self._last = now_s, joules
        battery = world.battery
        if battery is not None and not battery.plugged and battery.drawn_w is None:
            battery = replace(battery, drawn_w=watts)
        return Sample(
            at_s=now_s,
            joules=joules,
            watts=watts,
            scope="board",
            kind="measured",
            celsius=world.celsius,
            soft_c=world.soft_c,
            hard_c=world.hard_c,
            battery=battery,
        )

    def worked(self, *, seconds: float, joules: float) -> None:
        """Nothing is estimated here."""


class OneLedger:
    """Gives everything drawn above idling to whoever ran; enough for one request at a time."""

    def __init__(self, costs: CostModel) -> None:
        self.costs = costs
        self.working: Callable[[], bool] = bool
        self._of: dict[str, float] = {}
        self._totals: dict[TotalKey, float] = {}
        self._scopes: dict[str, tuple[str, str]] = {}
        self.forgotten: list[str] = []

    def stepped(self, report: StepReport, mode: int) -> None:
        watts = self.costs.modes[mode].decode_w - self.costs.idle_w
        for one in report.shares:
            self._add(
                one.request_id, watts * report.elapsed_s / len(report.shares), "board", "edge"
            )

    def sent(self, request_id: str, joules: float) -> None:
        self._add(request_id, joules, "radio", "cloud")

    def _add(
        self, request_id: str, joules: float, scope: str, route: Literal["edge", "cloud"]
    ) -> None:
        self._of[request_id] = self._of.get(request_id, 0.0) + joules
        self._scopes[request_id] = scope, route
        key: TotalKey = (scope, "estimated", route)
        self._totals[key] = self._totals.get(key, 0.0) + joules

    def settle(self, sample: Sample) -> None:
        """All was booked with the steps."""

    def use_of(self, request_id: str) -> EnergyUse | None:
        if request_id not in self._of:
            return None
        scope, _ = self._scopes[request_id]
        return EnergyUse(joules=self._of[request_id], scope=scope, source="estimated")

    def forget(self, request_id: str) -> None:
        self._of.pop(request_id, None)
        self.forgotten.append(request_id)

    def totals(self) -> Mapping[TotalKey, float]:
        return dict(self._totals)


class KnownCosts:
    """Costs that learn nothing."""

    def __init__(self, costs: CostModel) -> None:
        self.costs = costs
        self.observed = self.skipped = 0

    def observe(self, report: StepReport, mode: int) -> None:
        """They are exact."""
        self.observed += 1

    def passed(self, report: StepReport) -> None:
        """As above."""
        self.skipped += 1

    def errors(self) -> Mapping[str, float | None]:
        return {"step": 0.0, "prompt": None}


class WorldSwitch:
    """Power modes of the world; a refused one stays as it is."""

    tool = "own"

    def __init__(self, world: World, modes: tuple[str, ...]) -> None:
        self._world, self.modes = world, modes

    def current(self) -> str | None:
        return self._world.mode

    def switch(self, mode: str) -> None:
        if mode in self._world.refused:
            raise ActuationError(f"{mode} is refused")
        self._world.mode = mode
        self._world.taken.append((virtual_now_s(), mode))

    def close(self) -> None:
        """The world has nothing to restore."""


async def inline(work: Callable[[], T]) -> T:
    """A thread that takes no time."""
    return work()


def at_once(work: Callable[[], T]) -> Awaitable[T]:
    """See `inline`."""
    return inline(work)


@dataclass(kw_only=True)
class _Row:
    ask: Ask
    answer_tokens: int
    done: asyncio.Event
    computed: int = 0
    given: int = 0


class ToyBoard:
    """The whole thing. `ask` is a caller; steps take what the costs say in the world's mode."""

    def __init__(
        self,
        world: World,
        *,
        settings: EnergySettings,
        costs: CostModel = BOARD,
        cloud: CloudCost | None = None,
        record: Recorder | None = None,
        poles: tuple[HeatPole, ...] = POLES,
        capacity_j: float | None = 100_000.0,
        most_hold_s: float = 60.0,
        books: bool = False,
    ) -> None:
        """`books`: by the daemon's own ledger instead of `OneLedger`."""
        self.world, self.costs = world, costs
        self.ledger, self.panel = OneLedger(costs), ScriptedPanel(world)
        times = None if cloud is None else CloudTimes(cost=cloud)
        self.device = Device(
            costs=KnownCosts(costs),
            panel=self.panel,
            ledger=EnergyLedger(costs, self.panel, virtual_now_s) if books else self.ledger,
            switch=WorldSwitch(world, tuple(mode.name for mode in costs.modes)),
            cloud=times,
            heat=HeatWatch(poles),
            budget=Budget(settings=settings, capacity_j=capacity_j, wall=world.wall),
            clock=virtual_now_s,
            link_up=self._link if cloud is not None else None,
        )
        self.governor = Governor(
            settings,
            self.device,
            record=record,
            sensing=self._sensing,
            switching=at_once,
            most_hold_s=most_hold_s,
        )
        self.placed: dict[str, Placement | None] = {}
        self.ended_s: dict[str, float] = {}
        self._rows: dict[str, _Row] = {}
        self._work = asyncio.Event()

    @property
    def held(self) -> int:
        """Requests in line."""
        return len(self.governor.requests.held)

    async def _link(self) -> bool:
        return self.world.link_up

    def _sensing(self, work: Callable[[], T]) -> Awaitable[T]:
        return self._sensed(work)

    async def _sensed(self, work: Callable[[], T]) -> T:
        while self.world.hangs:
            await asyncio.sleep(0.1)
        return work()

    async def ask(self, ask: Ask, answer_tokens: int) -> EnergyUse | None:
        """A caller: placed, answered here or there, gone."""
        governor = self.governor
        try:
            self.placed[ask.id] = placement = await governor.place(ask)
            if placement is not None and placement.place == "cloud":
                governor.depart(ask.id)
                await asyncio.sleep(1.0)
                self.ended_s[ask.id] = virtual_now_s()
                governor.requests.learn(ask, answer_tokens)
                return governor.accounts.ended_away(ask, answer_tokens, took_s=1.0, decode_s=0.5)
            governor.begin(ask)
            row = _Row(ask=ask, answer_tokens=answer_tokens, done=asyncio.Event())
            self._rows[ask.id] = row
            self._work.set()
            await row.done.wait()
            self.ended_s[ask.id] = virtual_now_s()
            governor.requests.learn(ask, answer_tokens)
            return await governor.accounts.ended_here(ask.id)
        finally:
            self._rows.pop(ask.id, None)
            governor.end(ask.id)

    async def engine(self) -> None:
        """Steps for as long as there are rows: a prompt alone, then a token of each row."""
        names = [mode.name for mode in self.costs.modes]
        while True:
            if not self._rows:
                self._work.clear()
                await self._work.wait()
            mode = self.costs.modes[names.index(self.world.mode)]
            rows = list(self._rows.values())
            fresh = next((row for row in rows if row.computed < row.ask.prompt_tokens), None)
            if fresh is not None:
                took_s = mode.prefill_s(fresh.ask.prompt_tokens)
                shares: tuple[StepShare, ...] = (
                    _share(fresh, fresh.ask.prompt_tokens, sampled=1, prompt=True),
                )
                fresh.computed = fresh.ask.prompt_tokens
                fresh.given = 1
            else:
                context = sum(row.ask.prompt_tokens + row.given for row in rows)
                took_s = mode.batch_step_s(len(rows), context)
                shares = tuple(_share(row, 1, sampled=1, prompt=False) for row in rows)
                for row in rows:
                    row.given += 1
            await asyncio.sleep(took_s)
            self.world.work_j += (mode.decode_w - self.costs.idle_w) * took_s
            report = StepReport(ended_s=virtual_now_s(), elapsed_s=took_s, shares=shares)
            self.governor.accounts.stepped(report)
            for row in rows:
                if row.given >= row.answer_tokens:
                    self._rows.pop(row.ask.id, None)
                    row.done.set()


def _share(row: _Row, computed: int, *, sampled: int, prompt: bool) -> StepShare:
    return StepShare(
        request_id=RequestId(row.ask.id),
        computed_tokens=computed,
        past_tokens=0 if prompt else row.ask.prompt_tokens + row.given - 1,
        is_prompt=prompt,
        sampled_tokens=sampled,
    )


def asked(name: str, **changed: object) -> Ask:
    """A chat of 50 tokens that may take 200, but for what is said."""
    fields: dict[str, object] = {
        "id": name,
        "kind": "chat",
        "prompt_tokens": 50,
        "most_tokens": 200,
    }
    return Ask(**(fields | changed))  # type: ignore[arg-type]


async def beside(board: ToyBoard, script: Awaitable[None]) -> None:
    """A script while the board's governor and engine run."""
    with going(board.governor.run(), board.engine()):
        await asyncio.sleep(0.01)
        await script


def energy_settings(**wanted: object) -> EnergySettings:
    """Settings of a laptop's profile."""
    plain = EnergySettings(profile=read_library().profile("ryzen-laptop"))
    return replace(plain, **wanted)  # type: ignore[arg-type]


@contextmanager
def going(*parts: Awaitable[None]) -> Iterator[None]:
    """Parts that run beside a block, which is in a running loop."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
