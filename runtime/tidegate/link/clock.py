"""How wrong a clock may be, and what is said when it is wronger than that.

Every start and end that is checked in the link is checked here, so that ten minutes are tolerated
everywhere and a clock that is far off is called that, by the peer's signed time.
"""

from __future__ import annotations

from datetime import UTC, datetime

from tidegate.errors import IdentityError

CLOCK_SKEW_S = 600
"""A device without a battery behind its clock is a few minutes off until it has asked the network;
ten minutes cost nothing, since replays are refused by what is stored and not by time."""


def is_within(nbf_s: float, naf_s: float, now_s: float) -> bool:
    """Whether `now_s` is in a period, give or take what a clock may be off."""
    return nbf_s - CLOCK_SKEW_S <= now_s < naf_s + CLOCK_SKEW_S


def check_period(what: str, nbf_s: float, naf_s: float, now_s: float) -> None:
    """Check that `now_s` is in a period that a peer has signed.

    Args:
        what: begins the message.
        nbf_s: its start, Unix seconds.
        naf_s: its end.
        now_s: this machine's clock.

    Raises:
        IdentityError: it is not; says by how much.
    """
    if is_within(nbf_s, naf_s, now_s):
        return
    if now_s < nbf_s:
        by = describe_s(nbf_s - now_s)
        raise IdentityError(
            f"{what}: not valid yet: this machine's clock ({utc(now_s)}) is {by} behind the signed"
            f" time {utc(nbf_s)}; set the clock"
        )
    by = describe_s(now_s - naf_s)
    raise IdentityError(
        f"{what}: not valid any more: it ended {by} ago ({utc(naf_s)}), or this machine's clock"
        f" ({utc(now_s)}) is as far ahead"
    )


def check_clock(what: str, signed_s: float, now_s: float) -> None:
    """Check this machine's clock against the time a peer has just signed.

    Raises:
        IdentityError: they differ by more than a clock may be off.
    """
    off_s = now_s - signed_s
    if abs(off_s) <= CLOCK_SKEW_S:
        return
    way = "ahead of" if off_s > 0 else "behind"
    raise IdentityError(
        f"{what}: this machine's clock ({utc(now_s)}) is {describe_s(abs(off_s))} {way} the signed"
        f" time {utc(signed_s)}; set the clock"
    )


def utc(unix_s: float) -> str:
    """A time as people read it; a number that is no time as it is."""
    try:
        return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return f"{unix_s:g} s"


def describe_s(duration_s: float) -> str:
    """A duration in its two largest units: `3 d 4 h`, `12 min 5 s`."""
    left = int(duration_s)
    parts = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, length)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"
