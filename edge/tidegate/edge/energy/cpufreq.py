"""`CpufreqSwitch`: power modes by the highest frequency of the cores, 0.6 and 0.8 of it, and full.

`full` is what the owner allowed when the daemon began, not what the processor can do. Where the
driver takes a preference (EPP), a slower mode prefers saving as well; `performance` as governor
pins that preference, and so gives way to `powersave` meanwhile, which on these drivers goes with
the load like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tidegate.edge.energy.power_board import policy_folders
from tidegate.edge.energy.power_writes import PowerWrites
from tidegate.errors import ActuationError

FULL: Final = "full"
SHARES: Final = {"0.6": 0.6, "0.8": 0.8, FULL: 1.0}
"""Of the highest frequency, slowest first. The modes of the simulator's boards have these names."""
_SAVING: Final = "balance_power"
_NEAR: Final = 0.02
"""Drivers round what is asked for to steps of their own; less than half of what modes lie apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """Cores of one clock, as they were found."""

    number: int
    folder: Path
    least_khz: int
    full_khz: int
    """That the owner allows."""
    steps_khz: tuple[int, ...]
    """What there is, ascending; empty where the driver takes anything."""
    governor: str
    epp: str | None
    saves: bool
    """The preference `balance_power` is there."""

    def khz(self, mode: str) -> int:
        """The highest frequency in `mode`: the next step at or above its share."""
        wanted = max(self.least_khz, round(SHARES[mode] * self.full_khz))
        above = (step for step in self.steps_khz if wanted <= step <= self.full_khz)
        return next(above, self.full_khz if self.steps_khz else wanted)


class CpufreqSwitch:
    """`ModeSwitch` over cpufreq's files."""

    tool = "cpufreq"

    def __init__(self, writes: PowerWrites, sysroot: Path) -> None:
        """Read what the cores can do, and whether it may be written.

        Args:
            writes: does the switching; closed with this.
            sysroot: where /sys is.

        Raises:
            ActuationError: there is no cpufreq, nothing slower than what there is, or no right.
        """
        self._writes = writes
        self._policies = [_policy(number, one) for number, one in policy_folders(sysroot).items()]
        if not self._policies:
            raise ActuationError("the kernel has no cpufreq here, as in most virtual machines")
        different: dict[tuple[int, ...], str] = {}
        for mode in reversed(SHARES):
            different.setdefault(tuple(one.khz(mode) for one in self._policies), mode)
        self.modes = tuple(reversed(different.values()))
        if len(self.modes) < 2:
            raise ActuationError("the cores have no frequency below the highest allowed one")
        # What is there, written again: whether it may be shows now and not when it is needed.
        for one in self._policies:
            writes.ask(f"freq {one.number} {one.full_khz}")

    def current(self) -> str | None:
        """See `ModeSwitch.current`."""
        found = [_number(one.folder / "scaling_max_freq") for one in self._policies]
        for mode in self.modes:
            wanted = [one.khz(mode) for one in self._policies]
            if all(_near(a, b) for a, b in zip(found, wanted, strict=True)):
                return mode
        return None

    def switch(self, mode: str) -> None:
        """See `ModeSwitch.switch`."""
        assert mode in self.modes, "costs and switch have the same modes"
        for one in self._policies:
            self._prefer(one, saving=mode != FULL)
            self._writes.ask(f"freq {one.number} {one.khz(mode)}")
        found = self.current()
        if found != mode:
            what = found or "none of ours"
            raise ActuationError(f"the power mode is {what} after {mode} was asked for")

    def close(self) -> None:
        """See `ModeSwitch.close`."""
        self._writes.close()

    def _prefer(self, policy: Policy, *, saving: bool) -> None:
        if policy.epp is None or not policy.saves:
            return
        pinned = policy.governor == "performance"
        if pinned:
            governor = "powersave" if saving else policy.governor
            self._writes.ask(f"governor {policy.number} {governor}")
        # Under `performance` the driver sets the preference, and takes no other.
        if saving or not pinned:
            self._writes.ask(f"epp {policy.number} {_SAVING if saving else policy.epp}")


def _policy(number: int, folder: Path) -> Policy:
    least, most = (_number(folder / f"cpuinfo_{end}_freq") for end in ("min", "max"))
    full = min(_number(folder / "scaling_max_freq"), most)
    if not 0 < least <= full:
        raise ActuationError(f"{folder}: frequencies from {least} to {full} kHz: must be in order")
    listed = folder / "scaling_available_frequencies"
    steps = [_whole(listed, word) for word in _words(listed)]
    preferences = _words(folder / "energy_performance_available_preferences")
    epp = _words(folder / "energy_performance_preference")
    return Policy(
        number=number,
        folder=folder,
        least_khz=least,
        full_khz=full,
        steps_khz=tuple(sorted(step for step in steps if least <= step)),
        governor=(_words(folder / "scaling_governor") or ("unknown",))[0],
        epp=epp[0] if epp and epp[0] in preferences else None,
        saves=_SAVING in preferences,
    )


def _number(file: Path) -> int:
    return _whole(file, " ".join(_words(file)))


def _whole(file: Path, said: str) -> int:
    if not said.isdecimal() or len(said) > 9:
        raise ActuationError(f"{file}: {said[:40]!r}: must be one frequency in kHz")
    return int(said)


def _words(file: Path) -> tuple[str, ...]:
    """Of a file; none where it is not there."""
    try:
        return tuple(file.read_text(encoding="ascii").split())
    except (OSError, UnicodeDecodeError):
        return ()


def _near(a: int, b: int) -> bool:
    return abs(a - b) <= _NEAR * b
