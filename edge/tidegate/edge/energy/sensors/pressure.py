"""PSI: the share of time in which something waited for the processor (`/proc/pressure/cpu`).

    some avg10=1.23 avg60=0.80 avg300=0.21 total=9876543

Kernels of boards are often built without it, so that its absence is no fault.
Source: Documentation/accounting/psi.rst.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from tidegate.edge.energy.sensors.reading import read_text
from tidegate.errors import SensorError

_FILE: Final = "proc/pressure/cpu"
_SOME: Final = re.compile(r"^some avg10=([0-9]{1,3}(?:\.[0-9]{1,6})?) ", re.ASCII | re.MULTILINE)


def stalled_share(sysroot: Path) -> float | None:
    """Of the last ten seconds, 0 to 1; None where the kernel does not tell.

    Raises:
        SensorError: the file is there, and is not as the kernel writes it.
    """
    file = sysroot / _FILE
    if not file.exists():
        return None
    found = _SOME.search(read_text(file))
    if found is None or float(found.group(1)) > 100:
        raise SensorError(f"{file}: no `some avg10=` from 0 to 100")
    return float(found.group(1)) / 100
