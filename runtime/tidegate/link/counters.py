"""What a link end has seen, as numbers. Nothing here names a peer, a topic or a byte of content."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

CounterName = Literal[
    "sent",
    "opened",
    "dropped",
    "duplicates",
    "resends",
    "rewinds",
    "adverts",
    "adverts_rejected",
    "refused",
    "completed",
    "failed",
    "cancelled",
    "expired",
    "publish_failures",
    "store_failures",
    "overflowed",
    "answers_dropped",
    "moves",
    "out_of_turn",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkCounters:
    """A snapshot; every field only ever grows while the process lives."""

    sent: int = 0
    """Messages handed to the transport."""
    opened: int = 0
    """Messages that authenticated."""
    dropped: int = 0
    """Messages that did not: damaged, forged, for an unknown request, or too large."""
    duplicates: int = 0
    """Messages that authenticated and said nothing new."""
    resends: int = 0
    """Requests sealed again under a new attempt."""
    rewinds: int = 0
    """Times a stream was sent again from an earlier chunk."""
    adverts: int = 0
    """Gateway adverts accepted."""
    adverts_rejected: int = 0
    """Adverts with a wrong signature, an older version or outside their validity."""
    refused: int = 0
    """Requests refused for lack of room."""
    completed: int = 0
    """Requests that ended with a whole answer."""
    failed: int = 0
    """Requests that ended with an error."""
    cancelled: int = 0
    """Requests that the device gave up."""
    expired: int = 0
    """Generations stopped because their device had vanished (gateway)."""
    publish_failures: int = 0
    """Messages the transport could not take; the protocol sends them again."""
    store_failures: int = 0
    """Writes the disk refused; what depended on them was not sent."""
    overflowed: int = 0
    """Messages the transport threw away: too large, or more than were taken off in time."""
    answers_dropped: int = 0
    """Whole answers that nobody had read when their room was needed (device)."""
    moves: int = 0
    """Requests taken to another gateway: theirs went silent or had no room."""
    out_of_turn: int = 0
    """Events that a session's state has no transition for; they changed nothing."""


class Tally:
    """The mutable side of `LinkCounters`."""

    def __init__(self) -> None:
        self._counts = {field.name: 0 for field in fields(LinkCounters)}

    def add(self, name: CounterName, count: int = 1) -> None:
        self._counts[name] += count

    def snapshot(self, *, overflowed: int = 0) -> LinkCounters:
        """All counts; `overflowed` is the transport's own."""
        return LinkCounters(**{**self._counts, "overflowed": overflowed})
