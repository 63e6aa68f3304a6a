"""`EnergySettings`: what the owner of a device wants of its energy."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from tidegate.edge.energy.pace_state import Weights
from tidegate.edge.energy.profile import Profile
from tidegate.errors import ConfigError

Switching = Literal["auto", "all", "off"]
"""`auto` takes a Jetson's modes up to the one that the owner chose, `all` faster ones as well."""

_CLOCK = re.compile(r"([01]\d|2[0-3]):([0-5]\d)")


@dataclass(frozen=True, kw_only=True, slots=True)
class EnergySettings:
    """How the daemon schedules by energy.

    Args:
        profile: of the board: sensors, modes, limits of heat.
        calibration: file with the costs measured on this device; it need not exist.
        sysroot: where the board's files are; another one for tests.
        switching: take power modes, or leave the board as it is; see `Switching`.
        helper: socket of the root helper that writes clocks; None: write them directly.
        reserve_share: of a full battery, to be left at `until`.
        until: local time that the battery shall last to, `HH:MM`; None: there is no plan.
        quiet: local times between which work that may wait is not begun; None: at no time.
        joule_price: what the owner counts one generated token of the cloud as, in joules.
        weights: of the scheduler.
        decisions: a file that gets every decision with all that it depended on; for trials, since
            it grows.

    Raises:
        ConfigError: one is out of range.
    """

    profile: Profile
    calibration: Path | None = None
    sysroot: Path = Path("/")
    switching: Switching = "auto"
    helper: Path | None = None
    reserve_share: float = 0.2
    until: str | None = None
    quiet: tuple[str, str] | None = None
    joule_price: float = 1.0
    weights: Weights = field(default_factory=Weights)
    decisions: Path | None = None

    def __post_init__(self) -> None:
        if not self.sysroot.is_dir():
            raise ConfigError("energy.sysroot", str(self.sysroot), "a folder that is there")
        if self.helper is not None and self.sysroot != Path("/"):
            allowed = "absent beside --energy-sysroot: the helper writes the real board's files"
            raise ConfigError("power.helper", str(self.helper), allowed)
        if self.switching not in get_args(Switching):
            allowed = f"one of {', '.join(get_args(Switching))}"
            raise ConfigError("energy.switching", self.switching, allowed)
        if not 0 <= self.reserve_share < 1:
            raise ConfigError("energy.reserve", self.reserve_share, "from 0 to below 1")
        if not 0 <= self.joule_price < math.inf:
            raise ConfigError("energy.price", self.joule_price, "0 or more, and finite")
        for name, clock in (("until", self.until), *(("quiet", one) for one in self.quiet or ())):
            if clock is not None and _CLOCK.fullmatch(clock) is None:
                raise ConfigError(f"energy.{name}", clock, "a local time as HH:MM")
        if self.quiet is not None and self.quiet[0] == self.quiet[1]:
            raise ConfigError("energy.quiet", "-".join(self.quiet), "two different times")
