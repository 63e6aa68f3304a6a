"""Any hwmon chip that gives watts itself: `power<n>_input` or `power<n>_average`, in microwatts.

A rail is named by its `power<n>_label`, or else by its chip's `name`, with `_<n>` behind it from
the second channel on. Source: Documentation/hwmon/sysfs-interface.rst.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tidegate.edge.energy.sensors.gauge import Gauged
from tidegate.edge.energy.sensors.reading import matches, read_number, read_text, read_text_if
from tidegate.errors import SensorError

GLOB: Final = "/sys/class/hwmon/hwmon*"
METER: Final = "power_meter"
"""Name of the chip that stands for an ACPI power meter, which covers the whole platform."""
_KINDS: Final = ("input", "average")


class HwmonPower:
    """Reads rails by name.

    Args:
        sysroot: where the machine's files are.
        pattern: of the chips' folders.
        rails: what each rail measures, and its name.
    """

    name = "hwmon"

    def __init__(self, *, sysroot: Path, rails: Mapping[str, str], pattern: str = GLOB) -> None:
        self._sysroot = sysroot
        self._pattern = pattern
        self._rails = rails

    def read(self) -> Gauged:
        """See `Gauge.read`. Looked for each time: another chip may have taken a known number."""
        files = self.files()
        watts: dict[str, float] = {}
        raw: list[int | str] = []
        faults: list[str] = []
        for rail, name in self._rails.items():
            try:
                if name not in files:
                    known = ", ".join(sorted(files)) or "none"
                    told = f"{self._pattern}: no rail is called {name} (there are: {known})"
                    raise SensorError(told)
                microwatts = read_number(files[name])
            except SensorError as error:
                if rail == "total":
                    raise
                faults.append(f"{rail}: {error}")
                continue
            raw.append(microwatts)
            watts[rail] = microwatts / 1e6
        if not watts:
            raise SensorError(f"{self._pattern}: no rail can be read ({'; '.join(faults)})")
        return Gauged(rails=watts, raw=tuple(raw), faults=tuple(faults))

    def files(self) -> dict[str, Path]:
        """The file of each rail, by its name."""
        found: dict[str, Path] = {}
        for folder in matches(self._sysroot, self._pattern):
            chip = read_text_if(folder / "name")
            for kind in _KINDS:
                for file in matches(folder, f"power*_{kind}"):
                    channel = file.name.removeprefix("power").removesuffix(f"_{kind}")
                    label = folder / f"power{channel}_label"
                    tail = "" if channel == "1" else f"_{channel}"
                    name = read_text(label) if label.exists() else f"{chip}{tail}"
                    found.setdefault(name, file)
        return found
