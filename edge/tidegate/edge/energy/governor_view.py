"""`EnergyView`: what a device does with its energy at one moment, for `/status` and `/metrics`.

What nobody measures is None, never 0. Joules are told apart by scope, by how they are known and by
route; sums across these mean nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tidegate.edge.energy.sensors.sample import BatteryState, Kind

Totals = Mapping[tuple[str, str, str], float]
"""Joules by (scope, source, route), route being edge, cloud or idle."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanView:
    """What the owner wants of the battery, as it is followed now."""

    until: str
    """Local time, `HH:MM`."""
    left_s: float
    reserve_j: float
    allowed_w: float
    """Of work, above idling."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EnergyView:
    """The state of energy, in numbers."""

    profile: str
    tool: str
    """What switches power modes: `nvpmodel`, `cpufreq`, `own` or `none`."""
    mode: str
    modes: tuple[str, ...]
    """Slowest first."""
    mode_reason: str
    mode_for_s: float
    """Since it was taken."""
    costs: str
    """How times and watts were obtained: measured, calibrated or estimated; and of what scope."""
    held: int
    """Requests that wait for their place on purpose or for a row."""
    running: int
    watts: float | None = None
    """Mean of the last second or so; None before the first sample."""
    scope: str | None = None
    source: Kind | None = None
    rails: Mapping[str, float] = field(default_factory=dict)
    celsius: float | None = None
    soft_c: float | None = None
    hard_c: float | None = None
    stalled_share: float | None = None
    """Of the last ten seconds in which something waited for the processor."""
    battery: BatteryState | None = None
    plan: PlanView | None = None
    """None without a target time, and while power comes from outside."""
    debt_j: float = 0.0
    """Joules drawn beyond the plan."""
    quiet: bool = False
    """Background work is not begun now."""
    errors: Mapping[str, float | None] = field(default_factory=dict)
    """Median relative error of predicted times, by what is predicted; None: too few seen."""
    decisions: int = 0
    decision_us: Mapping[str, float] = field(default_factory=dict)
    """Microseconds of the last thousand or so: `median` and `p99` of PACE alone by the clock, with
    `cpu_` before it by the processor's time, which other programs do not lengthen; with `whole_`
    the state that it is asked about and what is done with the answer are in it."""
    switches: int = 0
    """Power modes that were taken."""
    failed_switches: int = 0
    deferred: int = 0
    """Requests that were made to wait."""
    failures: int = 0
    """Of the scheduling itself, after each of which the clock alone chose the route."""
    faults: tuple[str, ...] = ()
    """What should be readable and is not, a line each."""
    totals: Totals = field(default_factory=dict)

    def to_json(self) -> Mapping[str, object]:
        """For `/status`."""
        battery, plan = self.battery, self.plan
        return {
            "profile": self.profile,
            "tool": self.tool,
            "mode": self.mode,
            "modes": list(self.modes),
            "mode_reason": self.mode_reason,
            "mode_for_s": round(self.mode_for_s, 1),
            "costs": self.costs,
            "held": self.held,
            "running": self.running,
            "watts": _rounded(self.watts, 3),
            "scope": self.scope,
            "source": self.source,
            "rails_w": {name: round(watts, 3) for name, watts in self.rails.items()},
            "celsius": _rounded(self.celsius, 1),
            "soft_c": self.soft_c,
            "hard_c": self.hard_c,
            "stalled_share": _rounded(self.stalled_share, 4),
            "battery": None
            if battery is None
            else {
                "share": round(battery.share, 4),
                "plugged": battery.plugged,
                "left_j": _rounded(battery.left_j, 0),
                "drawn_w": _rounded(battery.drawn_w, 3),
            },
            "plan": None
            if plan is None
            else {
                "until": plan.until,
                "left_s": round(plan.left_s),
                "reserve_j": round(plan.reserve_j),
                "allowed_w": round(plan.allowed_w, 3),
            },
            "debt_j": round(self.debt_j, 1),
            "quiet": self.quiet,
            "prediction_errors": {name: _rounded(one, 4) for name, one in self.errors.items()},
            "decisions": self.decisions,
            "decision_us": {name: round(one) for name, one in self.decision_us.items()},
            "switches": self.switches,
            "failed_switches": self.failed_switches,
            "deferred": self.deferred,
            "failures": self.failures,
            "faults": list(self.faults),
            "totals_j": [
                {"scope": scope, "source": source, "route": route, "joules": round(joules, 3)}
                for (scope, source, route), joules in sorted(self.totals.items())
            ],
        }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
