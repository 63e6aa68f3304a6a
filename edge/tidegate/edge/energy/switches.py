"""`open_switch`: the power modes that a board really has, by the tool that its profile names.

What cannot be used is said, with how to mend it, and the next is taken: the profile's tool, the
daemon's own threads, and last the one mode that the board is in.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from tidegate.edge.energy.actuate import ModeSwitch, OneMode
from tidegate.edge.energy.cpufreq import CpufreqSwitch
from tidegate.edge.energy.nvpmodel import NvpmodelSwitch
from tidegate.edge.energy.power_writes import HelperWrites, OwnWrites, PowerWrites
from tidegate.edge.energy.profile import Profile
from tidegate.edge.energy.settings import Switching
from tidegate.errors import ActuationError

_log = logging.getLogger(__name__)


def open_switch(
    profile: Profile,
    *,
    switching: Switching,
    helper: Path | None,
    sysroot: Path,
    own: ModeSwitch | None = None,
) -> ModeSwitch:
    """What takes power modes on this board; it has several, unless nothing can be switched.

    Args:
        profile: of the board: its tool, and the names of its modes.
        switching: `off` leaves the board as it is; see `Switching`.
        helper: socket of the root helper; None to write as this process.
        sysroot: where the board's files are.
        own: the daemon's own modes, see `own_modes`; None if it has none.
    """
    if switching == "off":
        return OneMode()
    now = None
    if profile.power.tool != "none":
        try:
            found = open_tool(profile, helper=helper, sysroot=sysroot, faster=switching == "all")
            if len(found.modes) > 1:
                return found
            now = found.modes[0]
            found.close()
            why = only_one(now)
        except ActuationError as error:
            why = str(error)
        _log.warning("%s does not switch power modes: %s", profile.power.tool, why)
    if own is not None:
        _log.info("power modes are the daemon's own: %s", ", ".join(own.modes))
        return own
    return OneMode() if now is None else OneMode(now)


def only_one(mode: str) -> str:
    """Why a tool that can be used switches nothing."""
    return (
        f"only {mode} can be taken without a reboot and is not above it"
        " (--power-switching all takes faster ones)"
    )


def open_tool(
    profile: Profile, *, helper: Path | None, sysroot: Path, faster: bool = False
) -> ModeSwitch:
    """The tool that the profile names, with the modes that can be taken, at least one.

    Args:
        profile: of the board.
        helper: socket of the root helper; None to write as this process.
        sysroot: where the board's files are.
        faster: see `NvpmodelSwitch`.

    Raises:
        ActuationError: it cannot be used here; says why, and how to mend it.
    """
    writes = _writes(helper, sysroot)
    try:
        if profile.power.tool == "nvpmodel":
            names = [mode.name for mode in profile.power.mode]
            return NvpmodelSwitch(names, writes, sysroot, faster=faster)
        return CpufreqSwitch(writes, sysroot)
    except ActuationError:
        writes.close()
        raise


def _writes(helper: Path | None, sysroot: Path) -> PowerWrites:
    if helper is not None:
        return HelperWrites(helper)
    if sysroot == Path("/") and os.geteuid() != 0:
        raise ActuationError(
            "this process is not root's: run tidegate-power-helper, and serve with --power-helper"
        )
    return OwnWrites(sysroot)
