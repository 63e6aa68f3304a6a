"""What PACE is asked and what it answers: settings, the state of the device, a decision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from tidegate.edge.energy.cost import ModeCost
from tidegate.errors import ConfigError

NEVER: Final = math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """What PACE trades, all in joules: its settings.

    Raises:
        ConfigError: one is negative or not finite.
    """

    energy: float = 1.0
    """V: how much joules, price and lateness count beside the two virtual queues."""
    money: float = 1.0
    """Times the cloud's price."""
    late_j_per_s: float = 50.0
    """What a second of lateness at the 90th percentile counts as."""
    debt_j: float = 100.0
    """Of Z that make a joule of the device count once more."""
    heat_j_per_kk: float = 5.0
    """Per kelvin of warming and kelvin above the soft limit."""
    dwell_s: float = 10.0
    """In a mode before a slower one may follow; a faster one may at once, for a deadline."""
    hold_share: float = 0.5
    """Of the slack that work which may wait is held for, to be batched or to ride along."""
    longest_hold_s: float = 3600.0
    """That anything is held for, whatever its slack."""
    margin_s: float = 0.5
    """That a deadline is met by, as far as predictions go."""
    idle_after_s: float = 2.0
    """With nothing to do before the idlest mode is taken, at least the break-even time."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ConfigError(f"pace.{name}", value, "0 or more, and finite")
        if not self.debt_j:
            raise ConfigError("pace.debt_j", self.debt_j, "more than 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """A request that has not begun, as far as it is known."""

    id: str
    prompt_tokens: int
    output_mean: float
    output_p90: float
    """Predicted tokens of the answer; joules go by the mean, deadlines by the ninth decile."""
    output_most: float
    """That it will hardly exceed: the fastest mode is taken in time for so many."""
    arrived_s: float
    deadline_s: float = NEVER
    may_leave: bool = False
    """Privacy and capability allow the cloud."""
    may_stay: bool = True
    """The device can run it at all."""
    may_wait: bool = False
    """Background work: deferred to share steps with others, or past quiet hours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """A request that has begun on the device."""

    prefill_tokens: float
    """Still to be computed."""
    output_mean: float
    output_p90: float
    output_most: float
    """Still to be generated, at least a token."""
    context_tokens: float
    deadline_s: float = NEVER
    may_wait: bool = False
    """Background work."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PaceState:
    """All that a decision depends on, besides costs and weights."""

    now_s: float
    mode: int
    mode_since_s: float
    waiting: Sequence[Waiting]
    running: Sequence[Running]
    idle_since_s: float = 0.0
    """Since when nothing runs; the value does not matter while something does."""
    link_up: bool = True
    radio_warm: bool = False
    """A tail is running, which one more transfer prolongs rather than adds to."""
    loaded: bool = True
    quiet_until_s: float = 0.0
    """Work that may wait is not begun before, unless its deadline says otherwise."""
    energy_debt_j: float = 0.0
    """Z: joules drawn beyond the battery's plan."""
    battery_share: float = 1.0
    """Of a full battery; PACE goes by the debt, other policies by this."""
    rest_k: float = -math.inf
    """Kelvin above the soft limit after the prediction's reach if nothing were drawn; mostly
    negative. What a mode adds is `warming_kw` times its watts, so that a decision does not depend
    on what is drawn while it is made. Y of a mode is what is above 0 then."""
    warming_kw: float = 0.0
    """Kelvin that a watt adds within the prediction's reach."""
    stalled_share: float = 0.0
    """Of the time of answers, lately, in which they stood still for the prompts of others."""
    fastest: int | None = None
    """Index of the fastest mode that is live now, by heat or by a cap; None: any."""


def heat_of(state: PaceState, mode: ModeCost) -> float:
    """Y: kelvin above the soft limit that the board comes to in `mode`."""
    return max(0.0, state.rest_k + state.warming_kw * mode.decode_w) if state.warming_kw else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """Why a request goes where it goes: what either way costs, in the unit of `Weights`."""

    id: str
    route: str
    local_j: float
    cloud_j: float
    """Infinite where the way is closed."""
    late_local_s: float
    late_cloud_s: float
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What to do now. Requests that are named nowhere go on waiting."""

    mode: int
    start: tuple[str, ...] = ()
    """To begin on the device, in this order."""
    offload: tuple[str, ...] = ()
    wake_s: float = NEVER
    """When to ask again if nothing happens before."""
    reason: str = ""
    terms: tuple[Terms, ...] = field(default=(), repr=False)
