"""What a transport has carried and why it could not, as numbers; no name, no topic, no content."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass, fields
from typing import Literal

from tidegate.errors import LinkError

Cause = Literal["unknown_host", "unreachable", "tls", "timeout", "refused"]
TrafficName = Literal[
    "reconnects",
    "connections_lost",
    "connect_unknown_host",
    "connect_unreachable",
    "connect_tls",
    "connect_timeout",
    "connect_refused",
    "received_bytes",
    "sent_bytes",
    "overflowed",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """A snapshot of one transport; every field only ever grows while the process lives.

    The fields have the names that `counters.LinkCounters` has for them.
    """

    reconnects: int = 0
    connections_lost: int = 0
    connect_unknown_host: int = 0
    connect_unreachable: int = 0
    connect_tls: int = 0
    connect_timeout: int = 0
    connect_refused: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0
    overflowed: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        """Both together: of a link with two paths."""
        names = [field.name for field in fields(self)]
        return Traffic(**{name: getattr(self, name) + getattr(other, name) for name in names})


NO_TRAFFIC = Traffic()


class TrafficTally:
    """The mutable side of `Traffic`, of one way to one peer or to many."""

    def __init__(self) -> None:
        self._counts = {field.name: 0 for field in fields(Traffic)}
        self._stood: set[str] = set()

    def add(self, name: TrafficName, count: int = 1) -> None:
        self._counts[name] += count

    def connected(self, where: str = "") -> None:
        """A connection stands; to `where` it may have stood before."""
        if where in self._stood:
            self.add("reconnects")
        self._stood.add(where)

    def failed(self, error: BaseException) -> None:
        """A connection was not established."""
        self._counts[f"connect_{cause_of(error)}"] += 1

    def snapshot(self, *, overflowed: int = 0) -> Traffic:
        """All of it; `overflowed` messages were dropped by the queue."""
        return Traffic(**self._counts) + Traffic(overflowed=overflowed)


def cause_of(error: BaseException) -> Cause:
    """Why a connection was not established, from the error and those that it came from."""
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)
    if any(isinstance(one, socket.gaierror) for one in chain):
        return "unknown_host"
    if any(isinstance(one, ssl.SSLError) for one in chain) or "TLS" in str(error):
        return "tls"
    if any(isinstance(one, TimeoutError) for one in chain):
        return "timeout"
    if isinstance(error, LinkError) or str(error).startswith("refused"):
        return "refused"
    return "unreachable"
