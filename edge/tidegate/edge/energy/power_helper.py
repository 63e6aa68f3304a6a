"""Writes clocks and power modes as root for a daemon that is not: one file, no other imports.

It obeys lines of ASCII on a Unix socket, one client at a time, and answers each with `ok VALUE`,
what was read back, or `error WHY`:

    freq POLICY KHZ | governor POLICY NAME | epp POLICY NAME | nvpmodel ID | hello | restore

A client names numbers and words, never a path. A policy is one that was there at the start, a
frequency lies within what the processor can do, a name is one that the kernel lists, and the id of
a power mode is one that needs no reboot. When the client goes, or the helper ends, everything is as
it was found.

    tidegate-power-helper --socket /run/tidegate-power/socket --group tidegate
    python -I power_helper.py --socket ...
"""

from __future__ import annotations

import argparse
import grp
import os
import pwd
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

_CPUFREQ = "sys/devices/system/cpu/cpufreq"
_NVPMODEL, _CONF, _STATUS = "usr/sbin/nvpmodel", "etc/nvpmodel.conf", "var/lib/nvpmodel/status"
_NVPMODEL_S = 10.0
"""That `nvpmodel` may take; a switch takes about a second."""
_MOST_FILE = 1 << 20
_MOST_LINE = 64
_BURST, _PER_S = 200, 50.0
"""Requests: a switch is three for each policy, of which there are a dozen at most."""

_FILES = {
    "freq": "scaling_max_freq",
    "governor": "scaling_governor",
    "epp": "energy_performance_preference",
}
_LISTS = {
    "governor": "scaling_available_governors",
    "epp": "energy_performance_available_preferences",
}
_ORDER = ("governor", "epp", "freq")
"""A governor may decide what preferences there are."""


class Refused(Exception):  # noqa: N818 - an answer, not a failure
    """Why something is not done, in words for the client."""


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
    policies: dict[int, Path] = field(init=False)
    _before: dict[tuple[str, int], str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.policies = policy_folders(self.root)

    def obey(self, line: str) -> str:
        """Do what a line says; the answer without its newline. Never raises."""
        try:
            return f"ok {self._do(line.split(' '))}"
        except Refused as why:
            return f"error {' '.join(str(why).split())}"

    def restore(self) -> tuple[str, ...]:
        """Write back what was found, governors first; what could not be, in words."""
        failed = []
        rank = (*_ORDER, "nvpmodel")
        for (what, number), value in sorted(
            self._before.items(), key=lambda one: rank.index(one[0][0])
        ):
            try:
                self._nvpmodel(int(value)) if what == "nvpmodel" else self._write(
                    what, number, value
                )
            except Refused as why:
                failed.append(str(why))
        self._before.clear()
        return tuple(failed)

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

    def _write(self, what: str, number: int, value: str) -> str:
        """Write one file of a policy and read it back."""
        if number not in self.policies:
            raise Refused(f"policy {number}: there is none")
        folder = self.policies[number]
        self._check(folder, what, value)
        file = folder / _FILES[what]
        # Noted first: a signal may end this at any line.
        self._before.setdefault((what, number), _read(file).strip())
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

    def _check(self, folder: Path, what: str, value: str) -> None:
        if what == "freq":
            least, most = (_khz(folder / f"cpuinfo_{end}_freq") for end in ("min", "max"))
            if not re.fullmatch(r"[1-9]\d{0,8}", value) or not least <= int(value) <= most:
                raise Refused(f"freq {value}: must be from {least} to {most}")
            return
        names = _read(folder / _LISTS[what]).split()
        if value not in names:
            raise Refused(f"{what} {value}: must be one of {', '.join(names)}")

    def _nvpmodel(self, wanted: int) -> str:
        """Take a mode that needs no reboot, and ask which one is there."""
        current = nvpmodel_id(self.root)
        live = live_modes(nvpmodel_modes(self.root), current)
        if wanted not in live:
            ids = ", ".join(map(str, sorted(live)))
            raise Refused(f"nvpmodel {wanted}: must be one of {ids}: others need a reboot")
        if wanted != current:
            self._before.setdefault(("nvpmodel", 0), str(current))
            _nvpmodel(self.root, "-m", str(wanted))
            found = nvpmodel_id(self.root)
            if found != wanted:
                raise Refused(f"nvpmodel: mode {found} is there after {wanted} was asked for")
        return str(wanted)


def _khz(file: Path) -> int:
    text = _read(file).strip()
    if not re.fullmatch(r"\d{1,9}", text):
        raise Refused(f"{file.name}: {text[:40]!r} is no frequency")
    return int(text)


class Allowance:
    """So many requests at once, and so many a second in the long run."""

    def __init__(self, now_s: float) -> None:
        self._left, self._at_s = float(_BURST), now_s

    def take(self, now_s: float) -> bool:
        """Whether one more request may be done."""
        self._left = min(float(_BURST), self._left + (now_s - self._at_s) * _PER_S)
        self._at_s = now_s
        if self._left < 1:
            return False
        self._left -= 1
        return True


def allowed(uid: int, gid: int, group: int) -> bool:
    """Whether a process of these ids may ask: root's, or of the group."""
    if uid == 0 or gid == group:
        return True
    try:
        return pwd.getpwuid(uid).pw_name in grp.getgrgid(group).gr_mem
    except KeyError:
        return False


def serve(listener: socket.socket, board: PowerBoard, group: int) -> None:
    """One client after another, until a signal ends it; everything is restored between them."""
    allowance = Allowance(time.monotonic())
    while True:
        client, _ = listener.accept()
        with client:
            size = struct.calcsize("3i")
            peer = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
            _, uid, gid = struct.unpack("3i", peer)
            try:
                if allowed(uid, gid, group):
                    _talk(client, board, allowance)
                else:
                    _log(f"a process of user {uid} was refused")
                    client.settimeout(1.0)
                    client.recv(_MOST_LINE)  # so that it hears why, and not of a broken pipe
                    client.sendall(b"error not allowed: not of the group\n")
            except OSError as error:
                _log(f"a client was lost: {error.strerror}")
        for why in board.restore():
            _log(f"not restored: {why}")


def _talk(client: socket.socket, board: PowerBoard, allowance: Allowance) -> None:
    """Answer a client's lines until it goes or sends what is none."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 5, 0))
    held = b""
    while data := client.recv(4096):
        held += data
        *lines, held = held.split(b"\n")
        for line in lines:
            if len(line) > _MOST_LINE or not line.isascii() or not line.decode().isprintable():
                client.sendall(b"error not a line of this protocol\n")
                return
            text = line.decode("ascii")
            answer = "error too many requests"
            if allowance.take(time.monotonic()):
                answer = board.obey(text)
                _log(f"{text}: {answer}")
            client.sendall(answer.encode("ascii", "replace") + b"\n")
        if len(held) > _MOST_LINE:
            client.sendall(b"error not a line of this protocol\n")
            return


def listen(path: Path, group: int) -> socket.socket:
    """A socket that root and the group can reach; one that a dead helper left is replaced."""
    if path.is_socket():
        path.unlink()
    listener = socket.socket(socket.AF_UNIX)
    before = os.umask(0o117)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    if path.stat().st_gid != group:
        os.chown(path, -1, group)
    listener.listen(4)
    return listener


def _log(text: str) -> None:
    print(f"tidegate-power-helper: {text}", file=sys.stderr, flush=True)


def _end(*_: object) -> None:
    raise SystemExit(0)


def main(words: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT, then restore."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--group", required=True, help="whose processes may ask")
    parser.add_argument("--sysroot", type=Path, default=Path("/"), help="another root, for tests")
    args = parser.parse_args(words)
    try:
        group = int(args.group) if args.group.isdecimal() else grp.getgrnam(args.group).gr_gid
    except KeyError:
        parser.error(f"group {args.group!r} is not there: make it, or name another")
    board = PowerBoard(args.sysroot)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    try:
        with listen(args.socket, group) as listener:
            _log(f"listening on {args.socket}, {len(board.policies)} policies of clocks")
            serve(listener, board, group)
    except OSError as error:
        parser.error(f"{args.socket}: {error.strerror}")
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        for why in board.restore():
            _log(f"not restored: {why}")
        args.socket.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
