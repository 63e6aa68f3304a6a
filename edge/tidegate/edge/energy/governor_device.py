"""`Device`: all that a governor governs, each part behind the little that is asked of it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from tidegate.edge.energy.actuate import ModeSwitch
from tidegate.edge.energy.cost import CostModel, RadioCost
from tidegate.edge.energy.governor_budget import Budget
from tidegate.edge.energy.governor_cloud import CloudTimes
from tidegate.edge.energy.governor_heat import HeatWatch
from tidegate.edge.energy.ledger import TotalKey
from tidegate.edge.energy.sensors.sample import Panel, Sample
from tidegate.engine.events import EnergyUse
from tidegate.engine.request import RequestId
from tidegate.engine.steps import StepReport


class Costs(Protocol):
    """A cost model that learns; `tidegate.edge.energy.corrections.OnlineCosts` is one."""

    @property
    def costs(self) -> CostModel:
        """As it is known now."""

    def observe(self, report: StepReport, mode: int) -> None:
        """Learn from a step in a mode."""

    def passed(self, report: StepReport) -> None:
        """A step that teaches nothing, since it was in no one mode; only that it took its time."""

    def errors(self) -> Mapping[str, float | None]:
        """Median relative errors of prediction."""


class Ledger(Protocol):
    """Whose joules are whose; `tidegate.edge.energy.ledger.EnergyLedger` is one."""

    costs: CostModel
    """By which steps are weighed; replaced as costs are learnt."""
    working: Callable[[], bool]
    """Whether a request runs, of which a step may be under way; the governor says so."""

    def stepped(self, report: StepReport, mode: int) -> None:
        """Book a step."""

    def sent(self, request_id: RequestId, joules: float) -> None:
        """Book what the radio took for a request."""

    def settle(self, sample: Sample) -> None:
        """Share out what was drawn since the sample before."""

    def use_of(self, request_id: RequestId) -> EnergyUse | None:
        """What a request took so far."""

    def forget(self, request_id: RequestId) -> None:
        """It is over."""

    def totals(self) -> Mapping[TotalKey, float]:
        """Since the start."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Device:
    """What a governor governs, each part replaceable by a small real one in a test.

    Args:
        costs: of the model on this board.
        panel: of its sensors.
        ledger: of what was drawn.
        switch: of its power modes.
        cloud: None for a device without a link.
        heat: follows the temperature.
        budget: follows the battery and the clock on the wall.
        clock: monotonic seconds, the engine's.
        loaded: whether the model is in memory.
        link_up: whether the cloud can be reached; None without a link.
        radio: what sending takes over the network that is used now; reads files.
    """

    costs: Costs
    panel: Panel
    ledger: Ledger
    switch: ModeSwitch
    cloud: CloudTimes | None
    heat: HeatWatch
    budget: Budget
    clock: Callable[[], float] = time.monotonic
    loaded: Callable[[], bool] = lambda: True
    link_up: Callable[[], Awaitable[bool]] | None = None
    radio: Callable[[], RadioCost | None] | None = None
