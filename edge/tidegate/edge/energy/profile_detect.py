"""Which board this is: whole device-tree tokens first, then the processor and its flags.

A substring would take an Orin Nano for its Super sibling, whose token begins with the same text, so
tokens are compared whole. `detect` is pure; `read_board` reads `sysroot`, which tests build.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tidegate.edge.energy.profile import Detect, Profile
from tidegate.errors import ConfigError

_COMPATIBLE: Final = (
    "proc/device-tree/compatible",
    "sys/firmware/devicetree/base/compatible",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Board:
    """What the system says of itself; empty or None where it does not."""

    arch: str
    dt_compatible: tuple[str, ...] = ()
    cpu_vendor: str | None = None
    cpu_family: int | None = None
    cpu_model: int | None = None
    cpu_name: str = ""
    flags: frozenset[str] = frozenset()
    chassis: int | None = None
    mem_mib: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Detection:
    """The profile found, why, and what else matched with a lower score."""

    profile: Profile
    reasons: tuple[str, ...]
    others: tuple[str, ...]


def read_board(sysroot: Path = Path("/"), arch: str | None = None) -> Board:
    """The facts of the machine below `sysroot`; `arch` stands in for this process's own."""
    cpu = _fields(sysroot / "proc/cpuinfo")
    memory = _fields(sysroot / "proc/meminfo").get("MemTotal", "").split()
    return Board(
        arch=arch or platform.machine(),
        dt_compatible=_tokens(sysroot),
        cpu_vendor=cpu.get("vendor_id"),
        cpu_family=_whole(cpu.get("cpu family")),
        cpu_model=_whole(cpu.get("model")),
        cpu_name=cpu.get("model name", ""),
        flags=frozenset(cpu.get("flags", cpu.get("Features", "")).split()),
        chassis=_whole(_text(sysroot / "sys/class/dmi/id/chassis_type")),
        mem_mib=int(memory[0]) // 1024 if memory and memory[0].isdecimal() else None,
    )


def detect(board: Board, profiles: Iterable[Profile]) -> Detection:
    """The profile whose groups all match, with the highest score.

    Raises:
        ConfigError: none matches, or two match equally well.
    """
    matches = [
        (one.detect.score, one, reasons)
        for one in profiles
        if one.detect is not None and (reasons := match(board, one.detect)) is not None
    ]
    if not matches:
        raise ConfigError("profile", "auto", f"named: no profile matches this board ({board.arch})")
    matches.sort(key=lambda one: (-one[0], one[1].id))
    best = [one for one in matches if one[0] == matches[0][0]]
    if len(best) > 1:
        ids = " and ".join(one[1].id for one in best)
        raise ConfigError("profile", "auto", f"named: {ids} match with the same detect.score")
    _, profile, reasons = best[0]
    others = tuple(one[1].id for one in matches[1:])
    return Detection(profile=profile, reasons=tuple(reasons), others=others)


def match(board: Board, wanted: Detect) -> list[str] | None:
    """Why `wanted` matches, one line for each of its groups; None where one does not."""
    tokens = [one for one in wanted.dt_compatible_any if one in board.dt_compatible]
    words = [one for one in wanted.cpu_word_any if one in board.cpu_name.split()]
    least, most = wanted.mem_mib or (0, 0)
    groups: list[tuple[object, bool, str]] = [
        (wanted.dt_compatible_any, bool(tokens), f"device tree has {', '.join(tokens)}"),
        (wanted.dt_soc, wanted.dt_soc in board.dt_compatible, f"device tree has {wanted.dt_soc}"),
        (wanted.arch, wanted.arch == board.arch, f"architecture is {board.arch}"),
        (wanted.cpu_vendor, wanted.cpu_vendor == board.cpu_vendor, f"CPU of {board.cpu_vendor}"),
        (wanted.cpu_family, wanted.cpu_family == board.cpu_family, f"family {board.cpu_family}"),
        (wanted.cpu_model_any, board.cpu_model in wanted.cpu_model_any, f"model {board.cpu_model}"),
        (wanted.cpu_word_any, bool(words), f"CPU is called {' '.join(words)}"),
        (wanted.flags_all, board.flags >= {*wanted.flags_all}, " ".join(wanted.flags_all)),
        (wanted.chassis_any, board.chassis in wanted.chassis_any, f"chassis {board.chassis}"),
        (wanted.mem_mib, least <= (board.mem_mib or -1) <= most, f"{board.mem_mib} MiB of memory"),
    ]
    given = [(holds, reason) for value, holds, reason in groups if value not in (None, ())]
    return [reason for _, reason in given] if all(holds for holds, _ in given) else None


def _tokens(sysroot: Path) -> tuple[str, ...]:
    """The root node's `compatible`: a list that ends each entry with a NUL byte."""
    for name in _COMPATIBLE:
        try:
            raw = (sysroot / name).read_bytes()
        except OSError:
            continue
        return tuple(one for one in raw.decode("utf-8", "replace").split("\0") if one)
    return ()


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _fields(file: Path) -> Mapping[str, str]:
    """The first `name: value` of each name."""
    found: dict[str, str] = {}
    for name, colon, value in (line.partition(":") for line in (_text(file) or "").splitlines()):
        if colon:
            found.setdefault(name.strip(), value.strip())
    return found


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.strip().isdecimal() else None
