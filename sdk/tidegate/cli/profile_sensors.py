"""`tidegate profile sensors`: what a board says of its power, heat and battery, and what it cannot.

The panel is the daemon's. No model runs, so that what no sensor measures is left open here.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from tidegate.errors import ConfigError

if TYPE_CHECKING:
    from tidegate.edge.energy.profile import Profile
    from tidegate.edge.energy.sensors.sample import Sample

_MOST_S = 3600.0


def add_parser(
    kinds: argparse._SubParsersAction[argparse.ArgumentParser],
    parents: Sequence[argparse.ArgumentParser],
) -> None:
    """Declare it among the kinds of `tidegate profile`."""
    sensors = kinds.add_parser("sensors", parents=parents, help="what this board's sensors say")
    sensors.add_argument(
        "profile", nargs="?", default="auto", help="its id, or auto for this machine's (default)"
    )
    sensors.add_argument(
        "--seconds", type=float, default=1.0, help="that watts are the mean of (default 1)"
    )


def show_sensors(args: argparse.Namespace, profile: Profile) -> None:
    """Look twice and print what lies between.

    Raises:
        ConfigError: the time between is out of range.
    """
    from tidegate.edge.energy.cost import CostModel, ModeCost
    from tidegate.edge.energy.sensors.panel import open_panel

    if not 0 < args.seconds <= _MOST_S or not math.isfinite(args.seconds):
        allowed = f"more than 0 and at most {_MOST_S:g}"
        raise ConfigError("seconds", args.seconds, allowed)
    idle = ModeCost(name="none", prefill_token_s=1, step_s=1, prefill_w=0, decode_w=0, idle_w=0)
    costs = CostModel(modes=(idle,), rows=1, scope="unknown", source="estimated")
    panel = open_panel(profile, sysroot=args.sysroot, clock=time.monotonic, costs=costs)
    time.sleep(args.seconds)
    sample = panel.sample()
    if args.json:
        row: dict[str, object] = {"profile": profile.id, **asdict(sample)}
        if sample.kind == "estimated":
            row |= {"joules": None, "watts": None}
        print(json.dumps(row, indent=2))
        return
    print(profile.id)
    for line in _lines(sample):
        print(f"  {line}")


def _lines(sample: Sample) -> list[str]:
    """What is known, and what is not."""
    if sample.kind == "measured":
        lines = [f"power: {sample.watts:.2f} W ({sample.scope}, measured)"]
    else:
        lines = ["power: no sensor measures it; the daemon estimates it from the costs it knows"]
    lines += [f"rail {name}: {watts:.2f} W" for name, watts in sample.rails.items()]
    if sample.celsius is not None:
        limits = [
            f"{kind} limit {limit_c:g} C"
            for kind, limit_c in (("soft", sample.soft_c), ("hard", sample.hard_c))
            if limit_c is not None
        ]
        lines.append(f"heat: {sample.celsius:.1f} C ({', '.join(limits) or 'no limit is known'})")
    if sample.battery is not None:
        battery = sample.battery
        drawn = "" if battery.drawn_w is None else f", {battery.drawn_w:.2f} W out of it"
        plugged = "plugged in" if battery.plugged else "not plugged in"
        lines.append(f"battery: {battery.share:.0%}, {plugged}{drawn}")
    if sample.stalled_share is not None:
        lines.append(f"pressure: {sample.stalled_share:.1%} of 10 s stalled for the processor")
    return lines + [f"cannot be read: {fault}" for fault in sample.faults]
