"""What `/status` says of energy."""

from __future__ import annotations

import json
from dataclasses import replace

from energyviews import bare_view

from tidegate.edge.energy.governor_view import EnergyView, PlanView
from tidegate.edge.energy.sensors.sample import BatteryState

BARE = replace(bare_view(), mode_for_s=12.34)


def test_what_nobody_measured_is_null_and_not_nought() -> None:
    said = json.loads(json.dumps(BARE.to_json()))
    measured = ("watts", "scope", "source", "celsius", "soft_c", "hard_c", "stalled_share")
    for name in (*measured, "battery", "plan"):
        assert said[name] is None
    assert said["totals_j"] == []


def test_battery_plan_and_totals_are_told_with_their_units() -> None:
    view = EnergyView(
        profile="ryzen-laptop",
        tool="cpufreq",
        mode="low",
        modes=("low", "high"),
        mode_reason="idle for 2.0 s",
        mode_for_s=1.0,
        costs="calibrated, package",
        held=2,
        running=1,
        watts=3.14159,
        scope="package",
        source="measured",
        stalled_share=0.123456,
        battery=BatteryState(share=0.51234, plugged=False, left_j=90_000.4, drawn_w=7.5),
        plan=PlanView(until="18:00", left_s=3600.2, reserve_j=30_000, allowed_w=1.25),
        totals={("package", "measured", "edge"): 12.3456, ("radio", "estimated", "cloud"): 0.5},
    )
    said = json.loads(json.dumps(view.to_json()))
    assert (said["watts"], said["stalled_share"]) == (3.142, 0.1235)
    assert said["battery"] == {"share": 0.5123, "plugged": False, "left_j": 90000, "drawn_w": 7.5}
    assert said["plan"] == {
        "until": "18:00",
        "left_s": 3600,
        "reserve_j": 30000,
        "allowed_w": 1.25,
    }
    assert said["totals_j"] == [
        {"scope": "package", "source": "measured", "route": "edge", "joules": 12.346},
        {"scope": "radio", "source": "estimated", "route": "cloud", "joules": 0.5},
    ]
