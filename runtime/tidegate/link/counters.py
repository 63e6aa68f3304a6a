"""What a link end has seen, as numbers. Nothing here names a peer, a topic or a byte of content."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal, get_args

from tidegate.link.traffic import NO_TRAFFIC, Traffic

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
    "answers_dropped",
    "moves",
    "out_of_turn",
]
"""Those that a core counts; the transport counts the rest, see `traffic`."""


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
    reconnects: int = 0
    """Connections that stood again after the first one, on any path."""
    connections_lost: int = 0
    """Connections that stood and ended without our wish."""
    connect_unknown_host: int = 0
    """Connections not made: the host's name has no address."""
    connect_unreachable: int = 0
    """Connections not made: nobody listens, no route, or cut off before they stood."""
    connect_tls: int = 0
    """Connections not made: TLS failed, or a certificate is not accepted."""
    connect_timeout: int = 0
    """Connections not made: no answer in time."""
    connect_refused: int = 0
    """Connections not made: the peer refused us, or we refused the broker after a look at it."""
    received_bytes: int = 0
    """Of payloads that arrived, dropped ones too, without headers."""
    sent_bytes: int = 0
    """Of payloads that the transport took, without headers."""


class Tally:
    """The mutable side of `LinkCounters`."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(get_args(CounterName), 0)

    def add(self, name: CounterName, count: int = 1) -> None:
        self._counts[name] += count

    def snapshot(self, traffic: Traffic = NO_TRAFFIC) -> LinkCounters:
        """All counts, with what the transport counted."""
        return LinkCounters(**self._counts, **asdict(traffic))
