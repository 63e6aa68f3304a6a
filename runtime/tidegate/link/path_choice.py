"""Which of its two paths a device uses: the broker first, HTTP while the broker is of no use.

Pure: events and a clock in, a choice out. The broker is of no use when it cannot be reached, and
when nothing has come through it for longer than an advert is valid: then the gateways have lost it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tidegate.errors import ConfigError

Use = Literal["broker", "http", "none"]
PATIENCE_S = 5.0
"""Without the broker before HTTP is tried; who never knew a gateway waits a minute for one."""
FOREVER_S = 3600.0
_RETAINED_S = 5.0
"""What comes sooner after a connection may be old: the broker kept it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PathTiming:
    """When a device changes its path, in seconds.

    Raises:
        ConfigError: a time is out of range.
    """

    patience_s: float = PATIENCE_S
    """Without the broker before HTTP is tried."""
    steady_s: float = 5.0
    """The broker must have stood for so long before a device goes back to it."""
    linger_s: float = 2.0
    """HTTP stays open after going back: what is on its way there still arrives."""
    fresh_s: float = 65.0
    """Nothing from any gateway for so long: an advert is valid for 60 s, and comes every 20."""

    def __post_init__(self) -> None:
        for name in ("patience_s", "steady_s", "linger_s", "fresh_s"):
            value = getattr(self, name)
            if not 0 <= value <= FOREVER_S:
                raise ConfigError(f"link.http.{name}", value, f"0 to {FOREVER_S:g} s")


class PathChoice:
    """State of the two paths; times are monotonic seconds."""

    def __init__(self, timing: PathTiming, *, now_s: float) -> None:
        self.use: Use = "none"
        self._timing = timing
        self._http_up = False
        self._broker_since_s: float | None = None
        self._broker_lost_s = now_s
        self._heard_s = now_s
        self._returned_s: float | None = None

    def broker_up(self, now_s: float) -> None:
        self._broker_since_s = self._heard_s = now_s

    def broker_down(self, now_s: float) -> None:
        if self._broker_since_s is not None:
            self._broker_since_s, self._broker_lost_s = None, now_s

    def broker_heard(self, now_s: float, *, retained: bool) -> None:
        """A message came through it."""
        since_s = self._broker_since_s
        if since_s is not None and (not retained or now_s >= since_s + _RETAINED_S):
            self._heard_s = now_s

    def http_up(self) -> None:
        self._http_up = True

    def http_down(self) -> None:
        self._http_up = False

    def poll(self, now_s: float) -> Use:
        """The path to use from now on."""
        before, self.use = self.use, self._choose(now_s)
        if before == "http" and self.use == "broker":
            self._returned_s = now_s
        return self.use

    def wants_http(self, now_s: float) -> bool:
        """Whether to keep a connection over HTTP, or to try to get one; after `poll`."""
        if self.use == "http":
            return True
        if self._returned_s is not None and now_s < self._returned_s + self._timing.linger_s:
            return True
        return now_s >= self._bad_from_s() and not self._good(now_s)

    def next_wakeup_s(self, now_s: float) -> float:
        """When something may change without an event."""
        due = [self._bad_from_s(), now_s + FOREVER_S]
        if self._broker_since_s is not None:
            due.append(self._broker_since_s + self._timing.steady_s)
        if self._returned_s is not None:
            due.append(self._returned_s + self._timing.linger_s)
        return min(at_s for at_s in due if at_s > now_s)

    def _choose(self, now_s: float) -> Use:
        since_s = self._broker_since_s
        good = self._good(now_s)
        if self.use == "http" and self._http_up:
            steady = since_s is not None and now_s >= since_s + self._timing.steady_s
            return "broker" if good and steady else "http"
        if good:
            return "broker"
        if self._http_up:
            return "http"
        return "none" if since_s is None else "broker"

    def _good(self, now_s: float) -> bool:
        return self._broker_since_s is not None and now_s < self._heard_s + self._timing.fresh_s

    def _bad_from_s(self) -> float:
        """From when on the broker has been of no use for long enough, if nothing changes."""
        if self._broker_since_s is None:
            return self._broker_lost_s + self._timing.patience_s
        return self._heard_s + self._timing.fresh_s
