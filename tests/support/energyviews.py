"""What a device says of its energy: of one that knows everything, and of one that knows nothing."""

from __future__ import annotations

from tidegate.edge.energy.governor_view import EnergyView, PlanView
from tidegate.edge.energy.sensors.sample import BatteryState


def full_view() -> EnergyView:
    """Of a board with sensors, modes and a battery."""
    return EnergyView(
        profile="jetson-orin-nano-8gb-super",
        tool="nvpmodel",
        mode="15W",
        modes=("7W", "15W", "25W"),
        mode_reason="the knee is in time",
        mode_for_s=12.5,
        costs="calibrated, module",
        held=3,
        running=2,
        watts=9.25,
        scope="module",
        source="measured",
        rails={"VDD_CPU_GPU_CV": 5.5},
        celsius=61.5,
        soft_c=70.0,
        hard_c=95.0,
        battery=BatteryState(share=0.42, plugged=False, left_j=90_000.0, drawn_w=11.0),
        plan=PlanView(until="22:00", left_s=3600.0, reserve_j=40_000.0, allowed_w=8.0),
        debt_j=120.5,
        quiet=True,
        errors={"step": 0.04, "prompt": None},
        decisions=1234,
        decision_us={"median": 40.0, "p99": 150.0},
        switches=7,
        failed_switches=1,
        deferred=11,
        failures=2,
        faults=("psi: no such file",),
        totals={
            ("module", "measured", "edge"): 321.5,
            ("module", "measured", "idle"): 4000.25,
            ("radio", "estimated", "cloud"): 2.5,
        },
    )


def bare_view() -> EnergyView:
    """Of a machine without sensors, modes and battery."""
    return EnergyView(
        profile="generic-x86-64",
        tool="none",
        mode="as it is",
        modes=("as it is",),
        mode_reason="the only one",
        mode_for_s=0.0,
        costs="estimated, unknown",
        held=0,
        running=0,
    )
