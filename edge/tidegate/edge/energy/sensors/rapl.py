"""RAPL through powercap: counters of the joules of processor packages (x86).

Only packages are counted: the platform domain and the cores and memory inside a package overlap it.
A domain of one name is counted once, though newer processors show it twice (by MSR and by MMIO).
Counters are of microjoules and wrap at `max_energy_range_uj`.

Sources: Documentation/power/powercap; energy-and-devices 1.1. Only root may read the counters since
CVE-2020-8694, because fine-grained readings tell what is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tidegate.edge.energy.sensors.reading import matches, read_number, read_text
from tidegate.edge.energy.sensors.sample import Kind
from tidegate.errors import SensorError

GLOB: Final = "/sys/class/powercap/intel-rapl*"
MEND: Final = (
    "to let the service read it, put `z /sys/class/powercap/intel-rapl*/energy_uj 0440 root "
    "tidegate` into /etc/tmpfiles.d/tidegate-rapl.conf and run `systemd-tmpfiles --create`"
)
_STUCK_S: Final = 2.0
"""A package always draws power and its counter is renewed every millisecond (Intel SDM 16.10)."""
_RENEWAL_S: Final = 0.01
"""By which a counter may be ahead of the clock, with much to spare."""


@dataclass(kw_only=True, slots=True)
class _Domain:
    file: Path
    range_uj: int
    last_uj: int | None = None


class RaplSource:
    """Joules of all packages together.

    Args:
        sysroot: where the machine's files are.
        pattern: of the powercap zones.
        scope: that the profile gives it.
        limit_w: above which a reading cannot be true.
        clock: monotonic seconds.
    """

    name = "rapl"
    kind: Kind = "measured"

    def __init__(
        self,
        *,
        sysroot: Path,
        limit_w: float,
        clock: Callable[[], float],
        pattern: str = GLOB,
        scope: str = "package",
    ) -> None:
        self.scope = scope
        self.faults: tuple[str, ...] = ()
        self._sysroot = sysroot
        self._pattern = pattern
        self._limit_w = limit_w
        self._clock = clock
        self._domains: list[_Domain] = []
        self._at_s: float | None = None
        self._counters: tuple[int | None, ...] = ()
        self._moved_s = 0.0
        self._joules = 0.0
        self._watts = 0.0

    def energy_j(self) -> float:
        """See `PowerSource.energy_j`; the first call after a failure begins anew."""
        try:
            if not self._domains:
                self._domains = self._find()
            now_s = self._clock()
            drawn_uj = sum([self._step(one) for one in self._domains])
            self._check_moving(now_s)
            self._book(now_s, drawn_uj / 1e6)
        except SensorError:
            # Looked for again the next time, and whatever was drawn until then is not counted.
            self._domains, self._at_s = [], None
            raise
        return self._joules

    def watts(self) -> Mapping[str, float]:
        """See `PowerSource.watts`: the mean between the last two readings of the counters."""
        return {"total": self._watts}

    def _book(self, now_s: float, drawn_j: float) -> None:
        """Take what the counters moved by since the last reading, if it can be true."""
        if self._at_s is None:
            self._at_s = now_s
            return
        elapsed_s = now_s - self._at_s
        if drawn_j > self._limit_w * (elapsed_s + _RENEWAL_S):
            told = f"{drawn_j:.0f} J in {elapsed_s:.3f} s are more than {self._limit_w:.0f} W"
            raise SensorError(f"{self._pattern}: {told}, or the counter was set back")
        if elapsed_s * self._limit_w > sum(one.range_uj for one in self._domains) / 1e6:
            told = f"not read for {elapsed_s:.0f} s, in which it may have wrapped"
            raise SensorError(f"{self._pattern}: {told}")
        self._joules += drawn_j
        if elapsed_s > 0:
            self._watts = drawn_j / elapsed_s
        self._at_s = now_s

    def _check_moving(self, now_s: float) -> None:
        """Counters that stood still go on being refused until one of them moves."""
        counters = tuple(one.last_uj for one in self._domains)
        if counters != self._counters:
            self._counters, self._moved_s = counters, now_s
        elif now_s - self._moved_s >= _STUCK_S:
            raise SensorError(f"{self._pattern}: the counters stand still")

    def _step(self, domain: _Domain) -> int:
        """Microjoules since the last reading of one counter, over a wrap if there was one."""
        now_uj, before_uj = read_number(domain.file, MEND), domain.last_uj
        if now_uj < 0:
            raise SensorError(f"{domain.file}: {now_uj} uJ cannot be negative")
        domain.last_uj = now_uj
        if before_uj is None:
            return 0
        if now_uj >= before_uj:
            return now_uj - before_uj
        if domain.range_uj <= max(before_uj, now_uj):
            raise SensorError(f"{domain.file}: went back from {before_uj} to {now_uj} uJ")
        return now_uj - before_uj + domain.range_uj

    def _find(self) -> list[_Domain]:
        """The packages, each once; of twins the one that can be read, that of MSR first."""
        zones = sorted(matches(self._sysroot, self._pattern), key=lambda one: "-mmio" in one.name)
        found: dict[str, _Domain] = {}
        denied: dict[str, SensorError] = {}
        for zone in zones:
            if not (zone / "name").exists():
                continue
            name = read_text(zone / "name")
            if not name.startswith("package-") or name in found:
                continue
            file = zone / "energy_uj"
            try:
                read_number(file, MEND)
                range_uj = read_number(zone / "max_energy_range_uj")
                if range_uj <= 0:
                    raise SensorError(f"{zone}/max_energy_range_uj: {range_uj} uJ cannot be")
            except SensorError as error:
                denied.setdefault(name, error)
                continue
            found[name] = _Domain(file=file, range_uj=range_uj)
        for name, refusal in denied.items():
            if name not in found:
                raise refusal
        if not found:
            raise SensorError(f"{self._pattern}: there is no package")
        return list(found.values())
