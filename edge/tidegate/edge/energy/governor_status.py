"""What a governor tells of itself, put together from its parts."""

from __future__ import annotations

from tidegate.edge.energy.governor_device import Device
from tidegate.edge.energy.governor_modes import ModeKeeper
from tidegate.edge.energy.governor_requests import Requests
from tidegate.edge.energy.governor_view import EnergyView
from tidegate.edge.energy.governor_words import UNKNOWN
from tidegate.edge.energy.sensors.sample import Sample


def view_of(
    device: Device,
    profile: str,
    modes: ModeKeeper,
    sample: Sample | None,
    requests: Requests,
    *,
    decisions: int,
    deferred: int,
    failures: int,
) -> EnergyView:
    """For `/status` and `/metrics`."""
    now_s, costs, budget = device.clock(), device.costs.costs, device.budget
    known = sample is not None and sample.scope != UNKNOWN
    own = [one for one in (modes.fault, budget.fault) if one is not None]
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
        battery=None if sample is None else sample.battery,
        plan=budget.view(now_s),
        debt_j=budget.debt.joules,
        quiet=budget.quiet_until_s(now_s) > now_s,
        errors=device.costs.errors(),
        decisions=decisions,
        switches=modes.switches,
        failed_switches=modes.failures,
        deferred=deferred,
        failures=failures,
        faults=(*own, *(() if sample is None else sample.faults)),
        totals={
            (scope, source, route): joules
            for (scope, source, route), joules in device.ledger.totals().items()
        },
    )
