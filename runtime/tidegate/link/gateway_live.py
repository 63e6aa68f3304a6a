"""Live requests at the gateway: which there are, which of them run, and who may have another.

A place is a run of the handler. A request that waits to be fetched holds memory but no place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from tidegate.errors import ConfigError
from tidegate.link.effects import RunId, Stop
from tidegate.link.envelope import GatewayAttempt, RequestId
from tidegate.link.gateway_session import GatewaySession
from tidegate.link.gateway_store import RequestKey

_WAITING_PER_PLACE = 4
"""Live requests, running or waiting to be fetched, per place to run one: bounds memory."""
MAX_LIVE_BYTES = 256 * 1024 * 1024
"""Of all answers in memory together; in the store there may be more."""


@dataclass(frozen=True, slots=True)
class LiveKey:
    """How a live request is found before anything is decrypted."""

    handle: str
    request_id: RequestId


@dataclass(slots=True)
class Live:
    """A request with a session. `row` is its name in the store."""

    row: RequestKey
    keys: GatewayAttempt = field(repr=False)
    session: GatewaySession
    answer_bytes: int
    run: RunId | None = None
    """None when no handler runs for it (any more)."""


class LiveTable:
    """Every live request of a gateway, and the runs of the handler.

    Raises:
        ConfigError: `max_requests` is below 1.
    """

    def __init__(self, max_requests: int) -> None:
        if max_requests < 1:
            raise ConfigError("link.max_requests", max_requests, "1 or more")
        self._max_requests = max_requests
        self._live: dict[LiveKey, Live] = {}
        self._runs: dict[RunId, LiveKey] = {}
        self._last_run = 0

    @property
    def load(self) -> float:
        """Share of the allowed requests that are running, 0 to 1."""
        return len(self._runs) / self._max_requests

    def full(self, handle: str) -> bool:
        """No place is left, or too many answers wait for devices that have gone quiet.

        One device gets half of the places at most, so that it cannot lock the others out.
        """
        share = max(1, self._max_requests // 2)
        its_own = [live for key, live in self._live.items() if key.handle == handle]
        return (
            len(self._runs) >= self._max_requests
            or len(self._live) >= self._max_requests * _WAITING_PER_PLACE
            or sum(live.run is not None for live in its_own) >= share
            or len(its_own) >= share * _WAITING_PER_PLACE
            or self.room_bytes == 0
        )

    @property
    def room_bytes(self) -> int:
        """What the answers in memory may still grow by."""
        held_bytes = sum(live.answer_bytes for live in self._live.values())
        return max(0, MAX_LIVE_BYTES - held_bytes)

    def __iter__(self) -> Iterator[tuple[LiveKey, Live]]:
        """All of them as they are now; they may be dropped meanwhile."""
        return iter(list(self._live.items()))

    def find(self, key: LiveKey) -> Live | None:
        return self._live.get(key)

    def of_run(self, run: RunId) -> tuple[LiveKey, Live] | None:
        """Whose run it is; None when that request is over."""
        key = self._runs.get(run)
        return None if key is None else (key, self._live[key])

    def add(self, key: LiveKey, live: Live) -> None:
        self._live[key] = live

    def start_run(self, key: LiveKey) -> RunId:
        """A new run of the handler for `key`."""
        self._last_run += 1
        run = RunId(self._last_run)
        self._live[key].run = run
        self._runs[run] = key
        return run

    def end_run(self, live: Live) -> list[Stop]:
        """Stop its handler, if one runs."""
        if live.run is None:
            return []
        run, live.run = live.run, None
        del self._runs[run]
        return [Stop(run)]

    def drop(self, key: LiveKey) -> list[Stop]:
        """Forget a request and stop its handler."""
        return self.end_run(self._live.pop(key))
