"""The PMIC of a Raspberry Pi 5, through `vcgencmd pmic_read_adc`: volts and amperes by rail.

       VDD_CORE_A current(7)=10.87674000A
       VDD_CORE_V volt(15)=0.89745940V

Volts and amperes are paired by the rail's name, for their numbers differ. The sum of all rails
misses what hangs on 5 V (USB, HATs, NVMe). Source: the README of jfikar/RPi5-power.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Final

from tidegate.edge.energy.sensors.gauge import Gauged
from tidegate.errors import SensorError

SUM: Final = "PMIC_SUM"
"""What profiles call the sum of the rails."""
_PLACES: Final = ("usr/bin/vcgencmd", "opt/vc/bin/vcgencmd")
_TIMEOUT_S: Final = 1.0
"""It takes some 10 ms; the firmware may hang."""
_LINE: Final = re.compile(
    r"\s*(\w+)_([AV])\s+(?:current|volt)\(\d+\)=([0-9]{1,6}(?:\.[0-9]{1,12})?)[AV]\s*", re.ASCII
)
_NEEDED: Final = "VDD_CORE"


class RpiPmic:
    """Reads the rails and their sum."""

    name = "rpi_pmic"

    def __init__(self, *, sysroot: Path, timeout_s: float = _TIMEOUT_S) -> None:
        self._places = tuple(sysroot / one for one in _PLACES)
        self._timeout_s = timeout_s
        self._known: frozenset[str] = frozenset()

    def read(self) -> Gauged:
        """See `Gauge.read`."""
        volts, amperes, raw = _rails(self._text())
        both = frozenset(volts.keys() & amperes.keys())
        if _NEEDED not in both:
            raise SensorError(f"pmic_read_adc: {_NEEDED} is missing")
        missing = sorted(self._known - both)
        if missing:
            raise SensorError(f"pmic_read_adc: {', '.join(missing)} is missing from the sum")
        grown, self._known = bool(self._known) and both != self._known, both
        if grown:
            raise SensorError("pmic_read_adc: further rails came into the sum")
        watts = {rail: volts[rail] * amperes[rail] for rail in sorted(both)}
        faults = tuple(
            f"{rail} has amperes and no volts" for rail in sorted(amperes.keys() - volts.keys())
        )
        return Gauged(rails={**watts, "total": sum(watts.values())}, raw=raw, faults=faults)

    def _text(self) -> str:
        program = next((one for one in self._places if one.is_file()), None)
        if program is None:
            raise SensorError(f"{self._places[0]}: there is no such program")
        try:
            ran = subprocess.run(
                [program, "pmic_read_adc"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=self._timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise SensorError(f"{program}: no answer in {self._timeout_s:g} s") from error
        except OSError as error:
            raise SensorError(f"{program}: {error.strerror or 'cannot be run'}") from error
        if ran.returncode:
            told = (ran.stderr or ran.stdout).decode("utf-8", "replace").split("\n")[0].strip()
            mend = (
                "; its service must be in the group video, and its unit allow /dev/vcio"
                if "vcio" in told
                else ""
            )
            raise SensorError(f"{program}: status {ran.returncode}: {told[:80]}{mend}")
        return ran.stdout.decode("utf-8", "replace")


def _rails(text: str) -> tuple[dict[str, float], dict[str, float], tuple[int | str, ...]]:
    """Volts and amperes by rail, and the numbers as they stood there."""
    volts: dict[str, float] = {}
    amperes: dict[str, float] = {}
    raw: list[int | str] = []
    for line in text.splitlines():
        found = _LINE.fullmatch(line)
        if found is None:
            continue
        rail, unit, number = found.groups()
        raw.append(number)
        (volts if unit == "V" else amperes)[rail] = float(number)
    return volts, amperes, tuple(raw)
