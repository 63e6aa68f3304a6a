"""The part of `tidegate doctor` about energy: what can be read, what can be switched, what to mend.

It changes nothing: clocks are at most written as they are, to see whether they may be.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tidegate.errors import ActuationError, ConfigError, TidegateError

if TYPE_CHECKING:
    from tidegate.edge.energy.cost import CostModel
    from tidegate.edge.energy.profile import Profile
    from tidegate.edge.energy.sensors.sample import BatteryState, Sample

_LOOK_S: Final = 0.3
"""Between two looks, over which watts are a mean."""
_UNKNOWN: Final = "unknown"
"""Scope of joules that are neither measured nor estimated."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    energy = parser.add_argument_group("energy", "as `tidegate serve` would use the board")
    energy.add_argument(
        "--profile", default="auto", metavar="ID", help="of the board (default: auto, this one's)"
    )
    energy.add_argument(
        "--power-helper", type=Path, metavar="SOCKET", help="of tidegate-power-helper"
    )
    energy.add_argument(
        "--sysroot", type=Path, default=Path("/"), help="where the board's files are (default /)"
    )


def energy_facts(args: argparse.Namespace) -> Mapping[str, object]:
    """All that is found; what cannot be used is said and fails nothing.

    Raises:
        ConfigError: the flags name a folder that is not there, or files and a helper of two boards.
    """
    if not args.sysroot.is_dir():
        raise ConfigError("sysroot", str(args.sysroot), "a folder that is there")
    if args.power_helper is not None and args.sysroot != Path("/"):
        allowed = "absent beside --sysroot: the helper writes the real board's files"
        raise ConfigError("power.helper", str(args.power_helper), allowed)
    try:
        profile = _profile(args.profile, args.sysroot)
    except TidegateError as error:
        return {"problem": str(error)}
    return {
        "profile": profile.id,
        **sensor_facts(profile, args.sysroot),
        **switch_facts(profile, args.power_helper, args.sysroot),
    }


def _profile(wanted: str, sysroot: Path) -> Profile:
    from tidegate.edge.energy.profile_detect import detect, read_board
    from tidegate.edge.energy.profile_files import read_library

    library = read_library()
    if wanted != "auto":
        return library.profile(wanted)
    return detect(read_board(sysroot), library.every()).profile


def sensor_facts(profile: Profile, sysroot: Path) -> Mapping[str, object]:
    """What can be read, once; the watts are a mean over a moment."""
    from tidegate.edge.energy.sensors.panel import open_panel

    panel = open_panel(profile, sysroot=sysroot, clock=time.monotonic, costs=_nothing_known())
    time.sleep(_LOOK_S)
    sample = panel.sample()
    measured, stalled = sample.kind == "measured", sample.stalled_share
    return {
        "joules": f"measured: {sample.scope}" if measured else _not_measured(profile),
        "watts": round(sample.watts, 2) if measured else None,
        **{f"{name}_w": round(watts, 2) for name, watts in sorted(sample.rails.items())},
        "temperature": _temperature(sample),
        "battery": _battery(sample.battery),
        "processor_is_waited_for": None
        if stalled is None
        else f"{100 * stalled:.0f} % of the time",
        "cannot_be_read": list(sample.faults),
    }


def _nothing_known() -> CostModel:
    """Costs that estimate no joules, so that only what is measured is shown."""
    from tidegate.edge.energy.cost import CostModel, ModeCost

    mode = ModeCost(
        name="as it is", prefill_token_s=1.0, step_s=1.0, prefill_w=0.0, decode_w=0.0, idle_w=0.0
    )
    return CostModel(modes=(mode,), rows=1, scope=_UNKNOWN, source="estimated")


def _not_measured(profile: Profile) -> str:
    if any(point.active_w is not None for point in profile.energy.point):
        return "not measured; estimated from the profile's runs, or from a calibration"
    return "not measured, and neither the profile nor a calibration has watts to estimate them from"


def _temperature(sample: Sample) -> str | None:
    if sample.celsius is None:
        return None
    limits = [
        f"{name} limit {value:.0f} C"
        for name, value in (("soft", sample.soft_c), ("hard", sample.hard_c))
        if value is not None
    ]
    return ", ".join([f"{sample.celsius:.1f} C", *limits])


def _battery(battery: BatteryState | None) -> str | None:
    if battery is None:
        return None
    power = "power comes from outside" if battery.plugged else "discharging"
    drawn = "" if battery.drawn_w is None else f", {battery.drawn_w:.1f} W out of it"
    return f"{100 * battery.share:.0f} %, {power}{drawn}"


def switch_facts(profile: Profile, helper: Path | None, sysroot: Path) -> Mapping[str, object]:
    """Which power modes can be taken, or why none can and what to do."""
    from tidegate.edge.energy.switches import only_one, open_tool

    tool = profile.power.tool
    if tool == "none":
        return {"power_tool": None, "power_modes": "only what the daemon does itself: threads"}
    try:
        switch = open_tool(profile, helper=helper, sysroot=sysroot)
    except ActuationError as error:
        return {"power_tool": tool, "power_modes": None, "power_problem": str(error)}
    try:
        now = switch.current()
    except ActuationError as error:
        return {"power_tool": tool, "power_modes": switch.modes, "power_problem": str(error)}
    finally:
        switch.close()
    found = {"power_tool": tool, "power_modes": switch.modes, "power_mode": now}
    if len(switch.modes) < 2:
        found["power_problem"] = only_one(switch.modes[0])
    return found
