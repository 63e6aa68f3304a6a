"""A ledger with what it needs: a panel that listens, a meter, a clock that is set by hand."""

from __future__ import annotations

from sensortrees import COSTS
from toyexecutor import VirtualClock

from tidegate.edge.energy.cost import CostModel
from tidegate.edge.energy.ledger import EnergyLedger
from tidegate.edge.energy.sensors.sample import Kind, Sample
from tidegate.engine.request import RequestId
from tidegate.engine.steps import StepReport, StepShare


class Heard:
    """A panel that keeps what it is told, for the ledger reads no sample itself."""

    def __init__(self) -> None:
        self.seconds = self.joules = 0.0

    def sample(self) -> Sample:
        raise AssertionError("sampling is not for the event loop")

    def worked(self, *, seconds: float, joules: float) -> None:
        self.seconds += seconds
        self.joules += joules


class Meter:
    """Samples of a board that draws what it is set to."""

    def __init__(self, clock: VirtualClock, scope: str = "module") -> None:
        self.clock = clock
        self.scope = scope
        self.kind: Kind = "measured"
        self.joules = 0.0
        self.count = 0

    def draw(self, watts: float, seconds: float) -> Sample:
        """Let time pass at some watts, and look."""
        self.clock.advance(seconds)
        self.joules += watts * seconds
        return self.look(watts)

    def look(self, watts: float = 0.0) -> Sample:
        return Sample(
            at_s=self.clock.now_s,
            joules=self.joules,
            watts=watts,
            scope=self.scope,
            kind=self.kind,
            count=self.count,
        )


def prompt(request: RequestId, tokens: int) -> StepShare:
    return StepShare(
        request_id=request, computed_tokens=tokens, past_tokens=0, is_prompt=True, sampled_tokens=0
    )


def token(request: RequestId, past: int = 100) -> StepShare:
    return StepShare(
        request_id=request, computed_tokens=1, past_tokens=past, is_prompt=False, sampled_tokens=1
    )


def report(clock: VirtualClock, elapsed_s: float, *shares: StepShare) -> StepReport:
    """A step that ended just now."""
    return StepReport(ended_s=clock.now_s, elapsed_s=elapsed_s, shares=shares)


class Board:
    """A ledger with what it needs, idling at 2 W as was seen for ten seconds."""

    def __init__(self, costs: CostModel = COSTS, scope: str = "module") -> None:
        self.clock = VirtualClock()
        self.panel = Heard()
        self.meter = Meter(self.clock, scope)
        self.ledger = EnergyLedger(costs, self.panel, self.clock)
        self.ledger.settle(self.meter.draw(2.0, 1.0))
        for _ in range(10):
            self.ledger.settle(self.meter.draw(2.0, 1.0))

    def step(self, watts: float, elapsed_s: float, *shares: StepShare) -> None:
        """A step at some watts, without a look at the meter."""
        self.clock.advance(elapsed_s)
        self.meter.joules += watts * elapsed_s
        self.ledger.stepped(report(self.clock, elapsed_s, *shares), 0)

    def look(self) -> None:
        self.ledger.settle(self.meter.look())
