"""The clock on the wall, and when it will next show a time: over a clock that is set, and DST."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta, tzinfo

Wall = Callable[[], datetime]
"""The local time, with its zone."""


class _MachineZone(tzinfo):
    """Of the machine at every moment, where `datetime.astimezone` only knows today's offset."""

    def utcoffset(self, dt: datetime | None) -> timedelta | None:
        """What the machine adds at `dt`."""
        return None if dt is None else dt.replace(tzinfo=None).astimezone().utcoffset()

    def dst(self, dt: datetime | None) -> timedelta | None:
        """Not told apart."""
        return None

    def tzname(self, dt: datetime | None) -> str | None:
        """As the machine calls it."""
        return None if dt is None else dt.replace(tzinfo=None).astimezone().tzname()

    def fromutc(self, dt: datetime) -> datetime:
        """The machine's time, with the second of two equal hours marked as such."""
        local = datetime.fromtimestamp(dt.replace(tzinfo=UTC).timestamp())
        return local.replace(tzinfo=self)


_ZONE = _MachineZone()


def local_time() -> datetime:
    """Of the machine's zone."""
    return datetime.now(_ZONE)


def next_time(clock: str, now: datetime) -> datetime:
    """The next moment after `now` at which it is `clock`, `HH:MM`, in the zone of `now`."""
    hour, minute = (int(part) for part in clock.split(":"))
    today = now.replace(hour=hour, minute=minute, second=0, microsecond=0, fold=0)
    return today if seconds_between(now, today) > 0 else today + timedelta(days=1)


def seconds_between(then: datetime, now: datetime) -> float:
    """That really pass: times of one zone are else subtracted as they are written."""
    return now.timestamp() - then.timestamp()


def quiet_for_s(quiet: tuple[str, str] | None, now: datetime) -> float:
    """Seconds until quiet hours end; 0 outside them."""
    if quiet is None:
        return 0.0
    begin, end = (next_time(clock, now) for clock in quiet)
    # Within them exactly if they end before they begin again.
    return seconds_between(now, end) if seconds_between(end, begin) > 0 else 0.0
