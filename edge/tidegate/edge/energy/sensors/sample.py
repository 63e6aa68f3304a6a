"""`Sample`: all that a board says of itself at one moment, and the protocols of who reads it.

Measured and estimated joules are never mixed: `kind` says which they are, and a panel that has to
change from one to the other, or from one sensor to the next, starts a new `count` at 0 joules.
`drawn_between` subtracts two samples where that means anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

Kind = Literal["measured", "estimated"]
"""Read off a sensor, or computed from what the daemon did and what such work costs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatteryState:
    """The battery at one moment. What its driver does not say is None."""

    share: float
    """Of a full battery, 0 to 1."""
    plugged: bool
    """Power comes from outside, whether the battery is being charged or not."""
    full_j: float | None = None
    left_j: float | None = None
    drawn_w: float | None = None
    """Out of the battery; negative while it is charged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One look at everything."""

    at_s: float
    """Monotonic."""
    joules: float
    """Of the rail `total` since this count began; never less than in a sample of it before."""
    watts: float
    """Mean since the sample before."""
    scope: str
    """What the joules cover: a rail, the package, the module, the board or the wall."""
    kind: Kind
    rails: Mapping[str, float] = field(default_factory=dict)
    """Watts of what is measured besides, by name."""
    celsius: float | None = None
    """Of the zone that is nearest to its limit."""
    soft_c: float | None = None
    hard_c: float | None = None
    battery: BatteryState | None = None
    stalled_share: float | None = None
    """Of the last ten seconds in which something waited for the processor (PSI)."""
    faults: tuple[str, ...] = ()
    """What should be readable and is not, and why; a line each."""
    count: int = 0
    """Which count the joules are of. A new one begins when another source has to be taken, and
    when one was away: what was drawn meanwhile is in none."""


def drawn_between(before: Sample, after: Sample) -> float | None:
    """Joules from one sample to a later one; None where they are of different counts."""
    same = (before.count, before.kind, before.scope) == (after.count, after.kind, after.scope)
    return after.joules - before.joules if same else None


class PowerSource(Protocol):
    """One way to know joules. Every method may raise `SensorError`; a later call may succeed."""

    name: str
    """Of the back end, as profiles call it."""
    scope: str
    kind: Kind
    faults: tuple[str, ...]
    """Of what it should also read and cannot, as of the last reading; a line each."""

    def energy_j(self) -> float:
        """Joules of the rail `total` since the source was opened; never less than before."""

    def watts(self) -> Mapping[str, float]:
        """Watts by rail, `total` among them: of this moment, or the mean since the last call."""


class Panel(Protocol):
    """Everything that can be read on a board."""

    def sample(self) -> Sample:
        """Look at all of it. Never raises: what cannot be read is left out and named in `faults`.

        Takes up to some milliseconds on boards whose rails are behind I2C: not for an event loop.
        """

    def worked(self, *, seconds: float, joules: float) -> None:
        """Tell it what was worked, and what that took above idling as far as costs say.

        Estimates are made of it, and a sensor that stands still meanwhile is known to be stuck.
        Quick, and safe beside a `sample` in another thread; `EnergyLedger` calls it.
        """
