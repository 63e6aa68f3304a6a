"""What a governor tells of itself, put together from its parts."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from tidegate.edge.energy.governor_device import Device
from tidegate.edge.energy.governor_modes import ModeKeeper
from tidegate.edge.energy.governor_requests import Requests
from tidegate.edge.energy.governor_view import EnergyView
from tidegate.edge.energy.governor_words import UNKNOWN
from tidegate.edge.energy.sensors.sample import Sample


@dataclass(kw_only=True, slots=True)
class Counts:
    """What a governor counts of itself."""

    decisions: int = 0
    deferred: int = 0
    failures: int = 0
    took_s: deque[tuple[float, float, float]] = field(default_factory=lambda: deque(maxlen=1024))
    """Of the last decisions: PACE's seconds by the clock and of the processor, and those of the
    processor with all around it."""


def view_of(
    device: Device,
    profile: str,
    modes: ModeKeeper,
    sample: Sample | None,
    requests: Requests,
    counts: Counts,
) -> EnergyView:
    """For `/status` and `/metrics`.

    Args:
        device: that is governed.
        profile: id of its profile.
        modes: of its power.
        sample: the last one.
        requests: that wait and run.
        counts: of the governor.
    """
    now_s, costs, budget = device.clock(), device.costs.costs, device.budget
    known = sample is not None and sample.scope != UNKNOWN
    told = (modes.fault, budget.fault, device.heat.fault)
    own = [one for one in told if one is not None]
    return EnergyView(
        profile=profile,
        tool=modes.tool,
        mode=modes.name,
        modes=modes.names,
        mode_reason=modes.reason,
        mode_for_s=max(0.0, now_s - modes.since_s),
        costs=f"{costs.source}, {costs.scope}",
        held=len(requests.held),
        running=len(requests.begun),
        watts=sample.watts if known and sample is not None else None,
        scope=sample.scope if known and sample is not None else None,
        source=sample.kind if known and sample is not None else None,
        rails={} if sample is None else sample.rails,
        celsius=None if sample is None else sample.celsius,
        soft_c=None if sample is None else sample.soft_c,
        hard_c=None if sample is None else sample.hard_c,
        stalled_share=None if sample is None else sample.stalled_share,
        battery=None if sample is None else sample.battery,
        plan=budget.view(now_s),
        debt_j=budget.debt.joules,
        quiet=budget.quiet_until_s(now_s) > now_s,
        errors=device.costs.errors(),
        decisions=counts.decisions,
        decision_us=_microseconds(counts.took_s),
        switches=modes.switches,
        failed_switches=modes.failures,
        deferred=counts.deferred,
        failures=counts.failures,
        faults=(*own, *(() if sample is None else sample.faults)),
        totals={
            (scope, source, route): joules
            for (scope, source, route), joules in device.ledger.totals().items()
        },
    )


def _microseconds(took_s: Collection[tuple[float, float, float]]) -> dict[str, float]:
    if not took_s:
        return {}
    wall, busy, whole = (sorted(one) for one in zip(*took_s, strict=True))
    half, last = len(wall) // 2, len(wall) * 99 // 100
    told = {"median": wall[half], "p99": wall[last], "cpu_median": busy[half]}
    told |= {"cpu_p99": busy[last], "whole_cpu_median": whole[half], "whole_cpu_p99": whole[last]}
    return {name: 1e6 * seconds for name, seconds in told.items()}
