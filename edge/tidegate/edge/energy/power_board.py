"""What may be written of a board's clocks and power modes, and what was there before.

Root runs it, so it imports Python's own and nothing else. `PowerBoard.obey` takes lines of ASCII: a
policy is one that was there at the start, a frequency lies within what the processor can do and is
not above the one that was found, a name is one that the kernel lists, and the id of a power mode is
one that needs no reboot.

What was found is in a file before anything else is written, so that whoever begins after a kill
restores it (`Kept`).
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tidegate.edge.energy.power_kept import KINDS, Found, Kept, Refused

_CPUFREQ = "sys/devices/system/cpu/cpufreq"
_NVPMODEL, _CONF, _STATUS = "usr/sbin/nvpmodel", "etc/nvpmodel.conf", "var/lib/nvpmodel/status"
_NVPMODEL_S = 10.0
"""That `nvpmodel` may take; a switch takes about a second."""
_MOST_FILE = 1 << 20

_FILES = {
    "freq": "scaling_max_freq",
    "governor": "scaling_governor",
    "epp": "energy_performance_preference",
}
_LISTS = {
    "governor": "scaling_available_governors",
    "epp": "energy_performance_available_preferences",
}


@dataclass(frozen=True)
class NvMode:
    """A mode of nvpmodel.conf."""

    id: int
    name: str
    parts: frozenset[str]
    """What is switched on of cores and GPU; two modes of the same change without a reboot."""


def read_nvpmodel_conf(text: str) -> dict[int, NvMode]:
    """The modes of an nvpmodel.conf by id; raises `Refused`."""
    found: dict[int, tuple[str, set[str]]] = {}
    inside: set[str] | None = None
    for line in text.splitlines():
        words = line.split("#")[0].split()
        if words[:1] == ["<"]:
            inside = None
            facts = dict(word.split("=", 1) for word in words if "=" in word)
            if words[1:2] == ["POWER_MODEL"]:
                if not facts.get("ID", "").isdecimal() or not facts.get("NAME"):
                    raise Refused(f"nvpmodel.conf: {line.strip()!r} has no id or no name")
                inside, number = set(), int(facts["ID"])
                if number in found or any(name == facts["NAME"] for name, _ in found.values()):
                    raise Refused(f"nvpmodel.conf: {line.strip()!r} is there twice")
                found[number] = facts["NAME"], inside
        elif inside is not None and len(words) == 3 and _needs_reboot(words[0]):
            inside.add(" ".join(words))
    if not found:
        raise Refused("nvpmodel.conf: has no POWER_MODEL")
    return {
        number: NvMode(number, name, frozenset(parts)) for number, (name, parts) in found.items()
    }


def _needs_reboot(parameter: str) -> bool:
    """Whether another value of it does: which cores are on, and which parts of the GPU."""
    return parameter == "CPU_ONLINE" or parameter.endswith("POWER_GATING")


def nvpmodel_modes(root: Path) -> dict[int, NvMode]:
    """Of the board below `root`; raises `Refused`."""
    return read_nvpmodel_conf(_read(root / _CONF))


def nvpmodel_id(root: Path) -> int:
    """The id of the mode that the board is in; raises `Refused`."""
    try:
        told = _nvpmodel(root, "-q")
    except Refused:
        # Asking takes rights on some releases, this file does not.
        held = re.search(r"pmode:0*(\d+)", _read(root / _STATUS))
        if held is None:
            raise
        return int(held[1])
    found = re.search(r"NV Power Mode:[^\n]*\n\s*(\d+)\s*$", told, re.MULTILINE)
    if found is None:
        raise Refused(f"nvpmodel -q said {told[-80:]!r} and no id")
    return int(found[1])


def live_modes(modes: dict[int, NvMode], current: int) -> dict[int, NvMode]:
    """Those that can be changed to from `current` without a reboot."""
    if current not in modes:
        raise Refused(f"nvpmodel -q said {current}, which nvpmodel.conf has not")
    return {number: mode for number, mode in modes.items() if mode.parts == modes[current].parts}


def _nvpmodel(root: Path, *arguments: str) -> str:
    """Run it. It gets no input, so that a question whether to reboot is answered with nothing."""
    try:
        done = subprocess.run(
            [root / _NVPMODEL, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_NVPMODEL_S,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Refused(f"nvpmodel {' '.join(arguments)}: {type(error).__name__}") from error
    text = done.stdout.decode("utf-8", "replace")
    if done.returncode != 0:
        said = (text + done.stderr.decode("utf-8", "replace")).strip()[-200:]
        raise Refused(f"nvpmodel {' '.join(arguments)}: ended with {done.returncode}: {said!r}")
    return text


def _read(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return opened.read(_MOST_FILE).decode("utf-8", "replace")
    except OSError as error:
        raise Refused(f"{file.name}: cannot be read: {error.strerror}") from error


def policy_folders(root: Path) -> dict[int, Path]:
    """The folder of each cpufreq policy, by number."""
    found = (root / _CPUFREQ).glob("policy*")
    numbers = ((re.fullmatch(r"policy(\d{1,4})", one.name), one) for one in found)
    return {int(number[1]): one for number, one in sorted(numbers, key=str) if number}


@dataclass
class PowerBoard:
    """What may be written on one machine, and what was there before."""

    root: Path
    kept: Kept
    policies: dict[int, Path] = field(init=False)
    _before: Found = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.policies = policy_folders(self.root)

    def obey(self, line: str) -> str:
        """Do what a line says; the answer without its newline. Never raises."""
        try:
            return f"ok {self._do(line.split(' '))}"
        except Refused as why:
            return f"error {' '.join(str(why).split())}"

    def recover(self) -> tuple[str, ...]:
        """Restore what a process that was killed has left; what could not be, in words."""
        try:
            self._before = self.kept.read()
        except Refused as why:
            return (str(why),)
        return self.restore()

    def restore(self) -> tuple[str, ...]:
        """Write back what was found; what could not be, in words, and is tried again next time."""
        failed = []
        for what, number in sorted(self._before, key=lambda one: (KINDS.index(one[0]), one[1])):
            try:
                self._put_back(what, number, self._before[what, number])
                del self._before[what, number]
            except Refused as why:
                failed.append(str(why))
        try:
            self.kept.write(self._before)
        except Refused as why:
            failed.append(str(why))
        return tuple(failed)

    def _put_back(self, what: str, number: int, value: str) -> None:
        if what == "nvpmodel":
            self._nvpmodel(int(value) if value.isdecimal() else -1)
            return
        found = self._write(what, number, value)
        if found != value:
            raise Refused(f"policy {number}: {what} is {found!r} after {value!r} was put back")

    def _do(self, words: list[str]) -> str:
        match words:
            case ["hello"]:
                return f"{len(self.policies)}"
            case ["restore"]:
                failed = self.restore()
                if failed:
                    raise Refused("; ".join(failed))
                return "restored"
            case ["nvpmodel", number] if re.fullmatch(r"\d{1,3}", number):
                return self._nvpmodel(int(number))
            case ["freq" | "governor" | "epp" as what, number, value] if re.fullmatch(
                r"\d{1,4}", number
            ):
                return self._write(what, int(number), value)
        raise Refused("no such request")

    def _note(self, found: Mapping[tuple[str, int], str]) -> None:
        """Keep what is there before it is written over for the first time."""
        new = {key: value for key, value in found.items() if key not in self._before}
        if new:
            # In the file first: a kill may come at any line.
            self.kept.write({**self._before, **new})
            self._before.update(new)

    def _write(self, what: str, number: int, value: str) -> str:
        """Write one file of a policy and read it back."""
        if number not in self.policies:
            raise Refused(f"policy {number}: there is none")
        self._check(number, what, value)
        file = self.policies[number] / _FILES[what]
        self._note({(what, number): _read(file).strip()})
        try:
            # Neither made nor followed: sysfs has the file, or there is nothing to write.
            opened = os.open(file, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.write(opened, value.encode("ascii"))
            finally:
                os.close(opened)
        except OSError as error:
            raise Refused(f"policy {number}: {what} {value}: {error.strerror}") from error
        found = _read(file).strip()
        if what != "freq" and found != value:
            raise Refused(f"policy {number}: {what} is {found!r} after {value!r} was written")
        return found

    def _check(self, number: int, what: str, value: str) -> None:
        folder = self.policies[number]
        if what == "freq":
            least, most = self._allowed_khz(number)
            if not re.fullmatch(r"[1-9]\d{0,8}", value) or not least <= int(value) <= most:
                raise Refused(f"freq {value}: must be from {least} to {most}")
            return
        names = _read(folder / _LISTS[what]).split()
        if value not in names:
            raise Refused(f"{what} {value}: must be one of {', '.join(names)}")

    def _allowed_khz(self, number: int) -> tuple[int, int]:
        """From what the processor can do to what was found, which is the owner's to raise."""
        folder = self.policies[number]
        least, most = (_khz(folder / f"cpuinfo_{end}_freq") for end in ("min", "max"))
        before = self._before.get(("freq", number))
        found = _khz(folder / _FILES["freq"]) if before is None else _whole("freq", before)
        return least, min(most, found)

    def _nvpmodel(self, wanted: int) -> str:
        """Take a mode that needs no reboot, and ask which one is there."""
        current = nvpmodel_id(self.root)
        live = live_modes(nvpmodel_modes(self.root), current)
        if wanted not in live:
            ids = ", ".join(map(str, sorted(live)))
            raise Refused(f"nvpmodel {wanted}: must be one of {ids}: others need a reboot")
        if wanted != current:
            # A mode sets clocks of its own, so that the owner's are noted as well.
            clocks = {
                ("freq", number): _read(folder / _FILES["freq"]).strip()
                for number, folder in self.policies.items()
            }
            self._note({("nvpmodel", 0): str(current), **clocks})
            _nvpmodel(self.root, "-m", str(wanted))
            found = nvpmodel_id(self.root)
            if found != wanted:
                raise Refused(f"nvpmodel: mode {found} is there after {wanted} was asked for")
        return str(wanted)


def _khz(file: Path) -> int:
    return _whole(file.name, _read(file).strip())


def _whole(name: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text):
        raise Refused(f"{name}: {text[:40]!r} is no frequency")
    return int(text)
