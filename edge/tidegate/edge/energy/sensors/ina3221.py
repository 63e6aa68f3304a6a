"""INA3221: volts and amperes of up to three rails a chip, through hwmon (Jetson).

    in<n>_label  in<n>_input (mV)  curr<n>_input (mA)        watts = V * A

Rails are found by label: the order of chips and the numbers of hwmon change between boots. Which
rail covers the whole is the profile's to say. Sources: Documentation/hwmon/ina3221.rst;
energy-and-devices 1.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tidegate.edge.energy.sensors.gauge import Gauged
from tidegate.edge.energy.sensors.reading import matches, read_number, read_text
from tidegate.errors import SensorError

GLOB: Final = "/sys/bus/i2c/drivers/ina3221*/*/hwmon/hwmon*"
WHOLE: Final[Mapping[str, str]] = {"VDD_IN": "module", "VIN": "board_dc"}
"""Labels of rails that are known to cover a whole, and what that is (Orin Nano and NX; Thor)."""
_CHANNELS: Final = (1, 2, 3)
"""Of one chip; the further inputs are sums of shunt voltages."""


class Ina3221:
    """Reads the rails of all chips.

    Args:
        sysroot: where the board's files are.
        pattern: of the chips' hwmon folders.
        rails: what each rail measures, and its label; empty: the whole as its label says, and all
            others under their labels.
    """

    name = "ina3221"

    def __init__(
        self, *, sysroot: Path, pattern: str = GLOB, rails: Mapping[str, str] | None = None
    ) -> None:
        self._sysroot = sysroot
        self._pattern = pattern
        self._rails = rails or {}
        self._channels: dict[str, tuple[Path, int]] = {}

    def read(self) -> Gauged:
        """See `Gauge.read`."""
        if self._channels:
            try:
                return self._read()
            except SensorError:
                # The chip may have come back under another number.
                self._channels = {}
        self._channels = self.labels()
        return self._read()

    def labels(self) -> dict[str, tuple[Path, int]]:
        """Folder and channel of each rail that has a label.

        Raises:
            SensorError: there is no chip.
        """
        folders = matches(self._sysroot, self._pattern)
        if not folders:
            raise SensorError(f"{self._pattern}: there is no such chip")
        found: dict[str, tuple[Path, int]] = {}
        for folder in folders:
            for channel in _CHANNELS:
                file = folder / f"in{channel}_label"
                if not file.exists():
                    continue
                label = read_text(file)
                if label and "NC" not in label.split("_"):
                    found.setdefault(label, (folder, channel))
        return found

    def _read(self) -> Gauged:
        watts: dict[str, float] = {}
        raw: list[int | str] = []
        faults: list[str] = []
        for rail, label in self._wanted().items():
            try:
                millivolts, milliamperes = self._channel(label)
            except SensorError as error:
                if rail == "total":
                    raise
                faults.append(f"{rail}: {error}")
                continue
            raw += [millivolts, milliamperes]
            watts[rail] = millivolts * milliamperes * 1e-6
        if not watts:
            raise SensorError(f"{self._pattern}: no rail can be read ({'; '.join(faults)})")
        return Gauged(rails=watts, raw=tuple(raw), faults=tuple(faults))

    def _wanted(self) -> Mapping[str, str]:
        if self._rails:
            return self._rails
        return {"total" if label in WHOLE else label: label for label in self._channels}

    def _channel(self, label: str) -> tuple[int, int]:
        if label not in self._channels:
            known = ", ".join(sorted(self._channels)) or "none"
            raise SensorError(f"{self._pattern}: no rail is labelled {label} (there are: {known})")
        folder, channel = self._channels[label]
        millivolts = read_number(folder / f"in{channel}_input")
        if millivolts < 0:
            raise SensorError(f"{folder}/in{channel}_input: {millivolts} mV cannot be negative")
        return millivolts, read_number(folder / f"curr{channel}_input")
