"""Sensor files of boards as their kernels write them, under a folder, and what reads them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from toyexecutor import VirtualClock

from tidegate.edge.energy.cost import CostModel, ModeCost
from tidegate.edge.energy.profile import Profile
from tidegate.edge.energy.profile_files import read_library
from tidegate.edge.energy.sensors.panel import BoardPanel, open_panel

ORIN_NANO: Final = {"VDD_IN": (5.0, 1.2), "VDD_CPU_GPU_CV": (5.0, 0.3), "VDD_SOC": (5.0, 0.25)}
"""Volts and amperes by label; nearly what an idle one shows."""

PMIC: Final[tuple[tuple[str, float, float], ...]] = (
    ("3V7_WL_SW", 3.7, 0.08),
    ("3V3_SYS", 3.31, 0.07),
    ("1V8_SYS", 1.8, 0.17),
    ("DDR_VDD2", 1.1, 0.02),
    ("DDR_VDDQ", 0.61, 0.0),
    ("1V1_SYS", 1.1, 0.18),
    ("0V8_SW", 0.8, 0.33),
    ("VDD_CORE", 0.72, 0.9),
    ("3V3_DAC", 3.31, 0.001),
    ("3V3_ADC", 3.31, 0.001),
    ("0V8_AON", 0.8, 0.004),
    ("HDMI", 5.1, 0.012),
)
"""Rail, volts and amperes, in the order of `vcgencmd pmic_read_adc`."""

COSTS: Final = CostModel(
    modes=(
        ModeCost(
            name="only",
            prefill_token_s=0.001,
            step_s=0.02,
            row_s=0.004,
            context_token_s=1e-5,
            prefill_w=10.0,
            decode_w=8.0,
            idle_w=2.0,
        ),
    ),
    rows=4,
    scope="module",
    source="estimated",
)
UNKNOWN: Final = CostModel(
    modes=(
        ModeCost(
            name="only", prefill_token_s=0.001, step_s=0.02, prefill_w=0, decode_w=0, idle_w=0
        ),
    ),
    rows=4,
    scope="unknown",
    source="estimated",
)
"""Costs of time only."""


def profile(name: str) -> Profile:
    """One of ours."""
    return read_library(Path("/nowhere"), Path("/nowhere/calibration")).profile(name)


def every_profile() -> tuple[Profile, ...]:
    """All that are no mere base."""
    return tuple(read_library(Path("/nowhere"), Path("/nowhere/calibration")).every())


def panel_of(
    board: Profile, sysroot: Path, clock: VirtualClock, costs: CostModel = COSTS
) -> BoardPanel:
    """A panel over a tree."""
    return open_panel(board, sysroot=sysroot, clock=clock, costs=costs)


def put(folder: Path, files: Mapping[str, object]) -> Path:
    """Files of a folder and what they hold."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        # Whole at once, as the kernel's: a sample may be under way in another thread.
        half = folder / f".{name}"
        half.write_text(f"{value}\n", encoding="utf-8")
        half.replace(folder / name)
    return folder


def put_rapl(
    sysroot: Path,
    joules: float,
    *,
    zone: str = "intel-rapl:0",
    name: str = "package-0",
    range_j: float = 262143.328850,
) -> Path:
    """A powercap zone."""
    files = {
        "name": name,
        "energy_uj": round(joules * 1e6),
        "max_energy_range_uj": round(range_j * 1e6),
    }
    return put(sysroot / "sys/class/powercap" / zone, files)


def put_ina3221(
    sysroot: Path,
    rails: Mapping[str, tuple[float, float]],
    *,
    device: str = "1-0040",
    number: int = 3,
) -> Path:
    """A chip with up to three rails of volts and amperes."""
    folder = sysroot / f"sys/bus/i2c/drivers/ina3221/{device}/hwmon/hwmon{number}"
    files: dict[str, object] = {"name": "ina3221", "in7_label": "sum of shunt voltages"}
    for channel, (label, (volts, amperes)) in enumerate(rails.items(), 1):
        files[f"in{channel}_label"] = label
        files[f"in{channel}_input"] = round(volts * 1000)
        files[f"curr{channel}_input"] = round(amperes * 1000)
    return put(folder, files)


def renumber(chip: Path, number: int) -> Path:
    """The same chip under another number of hwmon, as after a boot or a reload."""
    moved = chip.with_name(f"hwmon{number}")
    shutil.move(chip, moved)
    return moved


def pmic_text(rails: Iterable[tuple[str, float, float]] = PMIC) -> str:
    """What `vcgencmd pmic_read_adc` prints."""
    rails = list(rails)
    amperes = [
        f"{name:>12}_A current({n})={ampere:.8f}A" for n, (name, _, ampere) in enumerate(rails)
    ]
    volts = [f"{name:>12}_V volt({n})={volt:.8f}V" for n, (name, volt, _) in enumerate(rails, 8)]
    more = ["     EXT5V_V volt(24)=5.14850000V", "      BATT_V volt(25)=0.00000000V"]
    return "\n".join([*amperes, *volts, *more]) + "\n"


def put_vcgencmd(sysroot: Path, script: str) -> Path:
    """A program in the place of the real one."""
    program = sysroot / "usr/bin/vcgencmd"
    program.parent.mkdir(parents=True, exist_ok=True)
    # Another file each time: one that is being run cannot be written.
    program.unlink(missing_ok=True)
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(0o755)
    return program


def put_pmic(sysroot: Path, rails: Iterable[tuple[str, float, float]] = PMIC) -> Path:
    """The Raspberry Pi 5's program, with what it prints."""
    return put_vcgencmd(sysroot, f"cat <<'TEXT'\n{pmic_text(rails)}TEXT")


def put_battery(sysroot: Path, *, name: str = "BAT0", **files: object) -> Path:
    """A battery of 50 Wh, half full and giving 12.5 W, unless `files` say otherwise."""
    usual: dict[str, object] = {
        "type": "Battery",
        "present": 1,
        "status": "Discharging",
        "energy_full": 50_000_000,
        "energy_now": 25_000_000,
        "power_now": 12_500_000,
        "voltage_now": 11_400_000,
    }
    kept = {key: value for key, value in {**usual, **files}.items() if value is not None}
    return put(sysroot / "sys/class/power_supply" / name, kept)


def put_mains(sysroot: Path, *, online: bool) -> Path:
    """A power supply from outside."""
    return put(sysroot / "sys/class/power_supply/AC", {"type": "Mains", "online": int(online)})


def put_zone(sysroot: Path, number: int, kind: str, celsius: float, **files: object) -> Path:
    """A thermal zone."""
    folder = sysroot / f"sys/class/thermal/thermal_zone{number}"
    return put(folder, {"type": kind, "temp": round(celsius * 1000), **files})


def put_pressure(sysroot: Path, share: float) -> Path:
    """What waits for the processor."""
    lines = [
        f"{kind} avg10={100 * share:.2f} avg60=0.00 avg300=0.00 total=1"
        for kind in ("some", "full")
    ]
    return put(sysroot / "proc/pressure", {"cpu": "\n".join(lines)})


def put_power(sysroot: Path, board: Profile, watts: float, *, moment_s: float = 0.0) -> None:
    """Let each sensor that a profile names show `watts`, in counters drawn for `moment_s`."""
    for sensor in board.sensor.power:
        rails = {
            label: (5.0, watts / 5 if key == "total" else watts / 20)
            for key, label in sensor.rails.items()
        }
        match sensor.backend:
            case "rapl":
                put_rapl(sysroot, 1000.0 + watts * moment_s)
            case "ina3221":
                put_ina3221(sysroot, dict(list(rails.items())[:3]))
                put_ina3221(sysroot, dict(list(rails.items())[3:]), device="1-0041", number=4)
            case "rpi_pmic":
                others = [one for one in PMIC if one[0] != "VDD_CORE"]
                rest = sum(volts * amperes for _, volts, amperes in others)
                put_pmic(sysroot, [*others, ("VDD_CORE", 1.0, watts - rest)])
            case "power_supply":
                put_battery(sysroot, power_now=round(watts * 1e6))
            case _:
                pass
