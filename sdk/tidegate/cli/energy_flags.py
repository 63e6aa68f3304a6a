"""Flags of `tidegate serve` for scheduling by energy, which begins with a board's profile."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tidegate.errors import ConfigError

if TYPE_CHECKING:
    from tidegate.edge.energy.profile import Profile
    from tidegate.edge.energy.settings import EnergySettings

_NEED_PROFILE: Final = (
    "energy_reserve",
    "energy_until",
    "energy_price",
    "quiet_hours",
    "calibration",
    "power_switching",
    "power_helper",
    "energy_decisions",
    "energy_sysroot",
)


def add_energy(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    group = parser.add_argument_group("energy", "scheduling by energy, heat and battery")
    group.add_argument(
        "--energy",
        choices=("auto", "on", "off"),
        default="auto",
        help="schedule by energy (default: where --profile names the board)",
    )
    group.add_argument(
        "--energy-reserve",
        metavar="PERCENT",
        help="of the battery to be left at --energy-until (default 20%%)",
    )
    group.add_argument(
        "--energy-until",
        metavar="HH:MM",
        help="local time that the battery is to last to; once it has come, plug in for the next",
    )
    group.add_argument(
        "--energy-price",
        type=float,
        metavar="JOULES",
        help="what a token of the cloud counts as (default 1)",
    )
    group.add_argument(
        "--quiet-hours",
        metavar="HH:MM-HH:MM",
        help="local times between which background work is not begun",
    )
    group.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="costs measured by tidegate profile calibrate; it need not exist",
    )
    group.add_argument(
        "--power-switching",
        choices=("auto", "all", "off"),
        help="take power modes up to the one that is there (default auto), all, or none",
    )
    group.add_argument(
        "--power-helper", type=Path, metavar="SOCKET", help="of tidegate-power-helper"
    )
    group.add_argument(
        "--energy-decisions",
        type=Path,
        metavar="FILE",
        help="write every decision with all that it depended on, as JSON lines; it grows",
    )
    group.add_argument(
        "--energy-sysroot",
        type=Path,
        metavar="DIR",
        help="where /sys and /proc are read and written, for trials on a copy (default /)",
    )


def read_energy(args: argparse.Namespace, profile: Profile | None) -> EnergySettings | None:
    """What the flags say; None: the clock alone schedules.

    Raises:
        ConfigError: a flag is wrong, or needs a profile.
    """
    from tidegate.edge.energy.settings import EnergySettings

    given = [name for name in _NEED_PROFILE if getattr(args, name) is not None]
    if args.energy == "off":
        if given:
            raise ConfigError("energy", "off", f"auto or on beside --{given[0].replace('_', '-')}")
        return None
    if profile is None:
        needed = ["energy", *given] if args.energy == "on" else given
        if needed:
            flag = f"--{needed[0].replace('_', '-')}"
            raise ConfigError("profile", None, f"set together with {flag}")
        return None
    return EnergySettings(
        profile=profile,
        calibration=args.calibration,
        sysroot=Path("/") if args.energy_sysroot is None else args.energy_sysroot,
        switching=args.power_switching or "auto",
        helper=args.power_helper,
        reserve_share=0.2 if args.energy_reserve is None else _share(args.energy_reserve),
        until=args.energy_until,
        quiet=None if args.quiet_hours is None else _hours(args.quiet_hours),
        joule_price=1.0 if args.energy_price is None else args.energy_price,
        decisions=args.energy_decisions,
    )


def _share(said: str) -> float:
    """Of `20%`, or of `20`."""
    try:
        return float(said.removesuffix("%")) / 100
    except ValueError:
        raise ConfigError("energy.reserve", said, "a percentage such as 20%") from None


def _hours(said: str) -> tuple[str, str]:
    start, dash, end = said.partition("-")
    if not dash:
        raise ConfigError("energy.quiet", said, "two local times as HH:MM-HH:MM")
    return start, end
