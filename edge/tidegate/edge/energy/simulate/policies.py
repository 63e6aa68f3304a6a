"""What PACE is measured against: the policies people run today, on the same board and jobs.

Each is a few lines on purpose. All of them keep to privacy and to what the device can do at all,
and start requests as rows become free; what differs is the order, the mode and what leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tidegate.edge.energy.cost import CloudCost, CostModel, RadioCost
from tidegate.edge.energy.pace import Pace
from tidegate.edge.energy.pace_state import Decision, PaceState, Waiting, Weights
from tidegate.edge.energy.simulate.run import Policy


@dataclass(frozen=True, kw_only=True, slots=True)
class Simple:
    """Requests in one order, one mode while it works, and a rule for what leaves.

    Args:
        costs: of the board.
        busy: the mode while something waits or runs.
        idle: the mode while nothing does; None: the same.
        leaves: which of those that may are sent to the cloud now.
        by_deadline: earliest deadline first, else in order of arrival.
    """

    costs: CostModel
    busy: int
    idle: int | None = None
    leaves: Callable[[PaceState, Waiting, int], bool] = lambda state, one, place: False
    by_deadline: bool = False

    def decide(self, state: PaceState) -> Decision:
        """See `Policy`."""
        queue: Sequence[Waiting] = state.waiting
        if self.by_deadline:
            queue = sorted(queue, key=lambda one: (one.deadline_s, one.arrived_s))
        offload = [
            one.id
            for place, one in enumerate(queue)
            if one.may_leave and state.link_up and self.leaves(state, one, place)
        ]
        gone = set(offload)
        room = max(0, self.costs.rows - len(state.running))
        start = [one.id for one in queue if one.id not in gone and one.may_stay][:room]
        working = bool(start or state.running)
        mode = self.busy if working or self.idle is None else self.idle
        if state.fastest is not None:
            mode = min(mode, state.fastest)
        return Decision(mode=mode, start=tuple(start), offload=tuple(offload), reason="fixed")


def _always(state: PaceState, one: Waiting, place: int) -> bool:
    return True


def _over(length: int) -> Callable[[PaceState, Waiting, int], bool]:
    """Overflow as it is usually meant: what does not fit a short line leaves."""
    return lambda state, one, place: len(state.running) + place >= length


@dataclass(frozen=True, kw_only=True, slots=True)
class ByBattery:
    """The thresholds of a phone: half empty, save; nearly empty, send away what may leave."""

    costs: CostModel
    default: int

    def decide(self, state: PaceState) -> Decision:
        """See `Policy`."""
        share = state.battery_share
        busy = self.default if share > 0.5 else 0
        leaves = _always if share <= 0.2 else _over(self.costs.rows)
        return Simple(costs=self.costs, busy=busy, leaves=leaves).decide(state)


def policies(
    costs: CostModel,
    *,
    default_mode: int,
    radio: RadioCost,
    cloud: CloudCost | None,
    weights: Weights | None = None,
    battery: bool = False,
) -> dict[str, Policy]:
    """Every policy of the comparison by its name, PACE first.

    Args:
        costs: what they believe of the board.
        default_mode: the mode that the board is delivered in.
        radio: of the board.
        cloud: None where there is none: the policies that need one are left out.
        weights: PACE's.
        battery: whether the board runs on one.
    """
    weights = weights or Weights()
    pace = Pace(costs=costs, weights=weights, radio=radio, cloud=cloud)
    found: dict[str, Policy] = {
        "pace": pace,
        "local": Simple(costs=costs, busy=default_mode),
        "edf": Simple(costs=costs, busy=default_mode, by_deadline=True),
        "race": Simple(costs=costs, busy=costs.fastest, idle=costs.idlest),
        "powersave": Simple(costs=costs, busy=0),
    }
    if cloud is not None:
        found["cloud"] = Simple(costs=costs, busy=default_mode, leaves=_always)
        found["overflow"] = Simple(costs=costs, busy=default_mode, leaves=_over(costs.rows))
        found["pace-no-offload"] = replace(pace, cloud=None)
    if battery:
        found["battery"] = ByBattery(costs=costs, default=default_mode)
    found["pace-no-hold"] = replace(pace, weights=replace(weights, hold_share=0.0))
    found["pace-no-idle"] = replace(pace, weights=replace(weights, idle_after_s=1e9))
    found["pace-no-knee"] = _Racing(pace=pace)
    found["pace-no-heat"] = _Blind(pace=pace, heat=True)
    found["pace-no-debt"] = _Blind(pace=pace, debt=True)
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class _Racing:
    """PACE in the fastest mode."""

    pace: Pace

    def decide(self, state: PaceState) -> Decision:
        decision = self.pace.decide(state)
        working = bool(decision.start or state.running)
        fastest = self.pace.costs.fastest if state.fastest is None else state.fastest
        return replace(decision, mode=fastest) if working else decision


@dataclass(frozen=True, kw_only=True, slots=True)
class _Blind:
    """PACE without one of its queues."""

    pace: Pace
    heat: bool = False
    debt: bool = False

    def decide(self, state: PaceState) -> Decision:
        if self.heat:
            state = replace(state, rest_k=-math.inf)
        if self.debt:
            state = replace(state, energy_debt_j=0.0)
        return self.pace.decide(state)
