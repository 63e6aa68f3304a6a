"""`NvpmodelSwitch`: power modes of a Jetson by name, as nvpmodel takes them without a reboot.

Ids differ between modules, so names are looked up in the board's nvpmodel.conf. After a refusal
that nobody sees, nvpmodel goes on in the old mode: each switch is read back.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tidegate.edge.energy.power_board import live_modes, nvpmodel_id, nvpmodel_modes
from tidegate.edge.energy.power_kept import Refused
from tidegate.edge.energy.power_writes import PowerWrites
from tidegate.errors import ActuationError


class NvpmodelSwitch:
    """`ModeSwitch` over nvpmodel."""

    tool = "nvpmodel"

    def __init__(
        self, names: Sequence[str], writes: PowerWrites, sysroot: Path, *, faster: bool = False
    ) -> None:
        """Look up which modes can be taken.

        Args:
            names: of the profile's modes, slowest first.
            writes: does the switching; closed with this.
            sysroot: where nvpmodel and its files are.
            faster: take modes above the one that is there, which is the owner's choice, as well.

        Raises:
            ActuationError: nvpmodel cannot be asked, its conf cannot be read, none of the names is
                a mode that can be changed to without a reboot, or the owner's choice is none.
        """
        self._writes, self._sysroot = writes, sysroot
        self._ids = _live(names, sysroot, faster=faster)
        self.modes = tuple(self._ids)

    def current(self) -> str | None:
        """See `ModeSwitch.current`."""
        try:
            found = nvpmodel_id(self._sysroot)
        except Refused as why:
            raise ActuationError(f"the power mode cannot be read: {why}") from why
        return next((name for name, number in self._ids.items() if number == found), None)

    def switch(self, mode: str) -> None:
        """See `ModeSwitch.switch`."""
        assert mode in self._ids, "costs and switch have the same modes"
        self._writes.ask(f"nvpmodel {self._ids[mode]}")
        found = self.current()
        if found != mode:
            raise ActuationError(f"the power mode is {found} after {mode} was asked for")

    def close(self) -> None:
        """See `ModeSwitch.close`."""
        self._writes.close()


def _live(names: Sequence[str], sysroot: Path, *, faster: bool) -> dict[str, int]:
    """Ids of the named modes that need no reboot, in the order of the names."""
    try:
        modes = nvpmodel_modes(sysroot)
        now = nvpmodel_id(sysroot)
        live = live_modes(modes, now)
    except Refused as why:
        allowed = "check `nvpmodel -q` and /etc/nvpmodel.conf, or serve with --power-switching off"
        raise ActuationError(f"power modes cannot be told: {why}; {allowed}") from why
    ids = {mode.name: number for number, mode in live.items()}
    found = {name: ids[name] for name in names if name in ids}
    if not found:
        there, wanted = ", ".join(ids), ", ".join(names) or "none"
        raise ActuationError(
            f"without a reboot there are the power modes {there}; the profile has {wanted}: give"
            " it them in /etc/tidegate/profile.d"
        )
    if faster:
        return found
    chosen = live[now].name
    if chosen not in found:
        raise ActuationError(
            f"the owner's power mode {chosen} is none of the profile's ({', '.join(found)}): give"
            " it to them in /etc/tidegate/profile.d, or serve with --power-switching all"
        )
    return {name: found[name] for name in list(found)[: list(found).index(chosen) + 1]}
