"""Files by which a board's power modes are switched, below a folder: cpufreq's, and nvpmodel's.

`nvpmodel` is a small program that behaves as the real one is known to: it asks before a mode that
needs a reboot, ends well when it is answered nothing, and is then in the old mode.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PROGRAM: Final = (
    f"#!{sys.executable} -IS\n"
    + """
import pathlib, re, sys, time
root = pathlib.Path(__file__).resolve().parents[2]
behaves = (root / "behaves").read_text() if (root / "behaves").exists() else ""
status = root / "var/lib/nvpmodel/status"
modes, number = {}, None
for line in (root / "etc/nvpmodel.conf").read_text().splitlines():
    found = re.match(r"< POWER_MODEL ID=(\\d+) NAME=(\\S+) >", line)
    if found:
        number = int(found[1])
        modes[number] = [found[2], set()]
    elif number is not None and re.match("CPU_ONLINE|TPC_POWER_GATING", line):
        modes[number][1].add(line)
now = int(status.read_text().split(":")[1])
if behaves == "hangs":
    time.sleep(600)
if behaves == "fails":
    sys.exit("NVPM ERROR: failed to read the power mode")
if sys.argv[1] == "-q":
    if behaves == "garbage":
        print("NVPM WARN: fan mode is not set!")
    else:
        print(f"NV Power Mode: {modes[now][0]}\\n{now}")
elif sys.argv[1] == "-m":
    wanted = int(sys.argv[2])
    if modes[wanted][1] != modes[now][1]:
        print("NVPM WARN: Reboot required for changing to this power mode: ", wanted)
        print("NVPM WARN: DO YOU WANT TO REBOOT NOW? enter YES/yes to confirm:")
        if sys.stdin.readline().strip() in ("YES", "yes"):
            (root / "rebooted").write_text("")
    elif behaves != "ignores":
        status.write_text(f"pmode:{wanted:04d}")
        if (root / "clocks").exists():
            clock = pathlib.Path((root / "clocks").read_text())
            clock.write_text((clock.parent / "cpuinfo_max_freq").read_text())
"""
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Jetson:
    """Modes of one module: name and cores by id, and the id of the one it is delivered in."""

    modes: Mapping[int, tuple[str, int]]
    default: int


JETSONS: Final[Mapping[str, Jetson]] = {
    "jetson-orin-nano-8gb": Jetson(modes={0: ("15W", 6), 1: ("7W", 4)}, default=0),
    "jetson-orin-nano-8gb-super": Jetson(
        modes={0: ("15W", 6), 1: ("25W", 6), 2: ("MAXN_SUPER", 6), 3: ("7W", 4)}, default=1
    ),
    "jetson-orin-nx-16gb": Jetson(
        modes={0: ("MAXN", 8), 1: ("10W", 4), 2: ("15W", 4), 3: ("25W", 8)}, default=2
    ),
    "jetson-orin-nx-16gb-super": Jetson(
        modes={
            0: ("MAXN_SUPER", 8),
            1: ("10W", 4),
            2: ("15W", 4),
            3: ("25W", 8),
            4: ("40W", 8),
        },
        default=4,
    ),
    "jetson-agx-orin-64gb": Jetson(
        modes={0: ("MAXN", 12), 1: ("MODE_15W", 4), 2: ("MODE_30W", 8), 3: ("MODE_50W", 12)},
        default=2,
    ),
    "jetson-agx-thor": Jetson(modes={0: ("MAXN", 14), 1: ("120W", 14)}, default=1),
}
"""As the reference lists them (energy-and-devices, 1.3); Thor's cores are of its product page."""


def write_jetson(root: Path, board: Jetson) -> Path:
    """nvpmodel, its conf and its state below `root`."""
    cores = max(count for _, count in board.modes.values())
    lines = ["< PARAM TYPE=FILE NAME=CPU_ONLINE >"]
    lines += [f"CORE_{core} /sys/devices/system/cpu/cpu{core}/online" for core in range(cores)]
    for number, (name, online) in board.modes.items():
        lines.append(f"< POWER_MODEL ID={number} NAME={name} >")
        lines += [f"CPU_ONLINE CORE_{core} {int(core < online)}" for core in range(cores)]
        mask = 252 if online == cores else 254
        lines += [f"TPC_POWER_GATING TPC_PG_MASK {mask}", f"GPU MAX_FREQ {300 + number}000000"]
    lines.append(f"< PM_CONFIG DEFAULT={board.default} >")
    for file, text in (
        ("etc/nvpmodel.conf", "# clocks\n" + "\n".join(lines) + "\n"),
        ("var/lib/nvpmodel/status", f"pmode:{board.default:04d}"),
        ("usr/sbin/nvpmodel", PROGRAM),
    ):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text, encoding="utf-8")
    (root / "usr/sbin/nvpmodel").chmod(0o755)
    return root


def write_cpufreq(
    root: Path,
    policies: int = 1,
    *,
    khz: tuple[int, int] = (400_000, 3_400_000),
    steps: Sequence[int] = (),
    governor: str = "powersave",
    governors: str = "performance powersave",
    epp: str | None = "balance_performance",
) -> Path:
    """Folders of cpufreq below `root`, as intel_pstate has them unless told otherwise."""
    for number in range(policies):
        folder = root / f"sys/devices/system/cpu/cpufreq/policy{number}"
        folder.mkdir(parents=True, exist_ok=True)
        files = {
            "cpuinfo_min_freq": khz[0],
            "cpuinfo_max_freq": khz[1],
            "scaling_max_freq": khz[1],
            "scaling_governor": governor,
            "scaling_available_governors": governors,
        }
        if steps:
            files["scaling_available_frequencies"] = " ".join(map(str, steps))
        if epp is not None:
            files["energy_performance_preference"] = epp
            files["energy_performance_available_preferences"] = (
                "default performance balance_performance balance_power power"
            )
        for name, value in files.items():
            (folder / name).write_text(f"{value}\n", encoding="ascii")
    return root


def cpufreq_of(root: Path, name: str) -> list[str]:
    """What the file `name` of every policy says."""
    folders = sorted((root / "sys/devices/system/cpu/cpufreq").iterdir())
    return [(folder / name).read_text(encoding="ascii").strip() for folder in folders]
