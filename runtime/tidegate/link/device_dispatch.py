"""Which of a device's requests go out now, and to which gateway.

Of those that wait the most urgent goes first, then the oldest; a window bounds how many are under
way. A gateway that says it has no room, or nothing at all, is left for another one.
"""

from __future__ import annotations

from collections.abc import Collection

from tidegate.errors import CapacityError
from tidegate.link.counters import Tally
from tidegate.link.device_live import Keeper, Live
from tidegate.link.device_sealing import DeviceSealer
from tidegate.link.device_states import State
from tidegate.link.effects import Publish
from tidegate.link.gateway_directory import GatewayDirectory
from tidegate.link.messages import Bundle, Status
from tidegate.link.prekeys import Advert
from tidegate.link.timing import Timing

_SILENT_SENDS_BEFORE_MOVING = 2
_BULK_PRIORITY = 2
"""From this priority on, requests leave a quarter of the window to the others."""


class Dispatcher:
    """Sends requests, each under an attempt that is written down first."""

    def __init__(
        self,
        *,
        gateways: GatewayDirectory,
        keep: Keeper,
        seal: DeviceSealer,
        timing: Timing,
        tally: Tally,
    ) -> None:
        self._gateways = gateways
        self._keep = keep
        self._seal = seal
        self._timing = timing
        self._tally = tally

    def send_due(self, now_s: float, requests: Collection[Live], *, online: bool) -> list[Publish]:
        """Send what is due and has its turn; what cannot go now is put off."""
        if not any(live.session.due_to_send(now_s) for live in requests):
            return []
        published: list[Publish] = []
        waiting = 0
        under_way = sum(live.session.state is not State.QUEUED for live in requests)
        # Sorting is stable: of the same priority the first that was submitted goes first.
        for live in sorted(requests, key=lambda live: live.row.priority):
            queued = live.session.state is State.QUEUED
            has_turn = not queued or under_way + waiting < self._window(live.row.priority)
            # Places are counted as if those before it had theirs, whether they are due or not.
            waiting += queued
            if live.session.due_to_send(now_s):
                published += self._send(now_s, live, online=online, has_turn=has_turn)
        return published

    def take_advert(
        self, now_s: float, topic: str, payload: bytes, requests: Collection[Live]
    ) -> bool:
        """A gateway announced itself: what waits for it may go. False when it is no news."""
        sign = self._gateways.receive(now_s, topic, payload)
        if sign is None:
            return False
        if sign.was_dead:
            nudge_queued(now_s, requests)
        for live in requests:
            if live.gateway_id == sign.gateway_id:
                live.session.gateway_lives(now_s)
        return True

    def goes_elsewhere(self, now_s: float, live: Live, attempt: int, bundle: Bundle) -> bool:
        """A gateway without room is no reason to fail while another one may have some."""
        refused = bundle.status is Status.FAILED and bundle.code == CapacityError.code
        newest = attempt == live.session.next_attempt - 1
        if not refused or not newest or live.session.have or bundle.payloads:
            return False
        live.refused_by.add(live.sent[attempt].gateway_id)
        if self._choose(now_s, live, before=None) is None:
            return False
        live.session.nudge(now_s)
        return True

    def _send(self, now_s: float, live: Live, *, online: bool, has_turn: bool) -> list[Publish]:
        session = live.session
        if live.gateway_id is not None and session.silent_sends >= _SILENT_SENDS_BEFORE_MOVING:
            self._gateways.went_silent(now_s, live.gateway_id)
        advert = None
        if online:
            advert = self._choose(now_s, live, before=live.gateway_id)
        if advert is None:
            # Whoever had no room before may have some when nobody else is left.
            live.refused_by.clear()
            session.postpone(now_s)
            return []
        if not has_turn:
            session.wait_turn(now_s)
            return []
        if session.next_attempt > 0:
            self._tally.add("resends")
        if live.gateway_id not in (None, advert.gateway_id):
            self._tally.add("moves")
        live.gateway_id = advert.gateway_id
        attempt = live.session.send(now_s)
        request_id = live.row.request_id
        if not self._keep.save(live):
            return []
        if not self._keep.wrote(lambda outbox: outbox.use_attempt(request_id, attempt)):
            return []
        return self._seal.request(now_s, live, attempt, advert)

    def _choose(self, now_s: float, live: Live, *, before: str | None) -> Advert | None:
        return self._gateways.choose(
            now_s, live.row.model, before=before, avoid=live.refused_by, only=live.only
        )

    def _window(self, priority: int) -> int:
        """Requests under way beyond which one of `priority` waits."""
        window = self._timing.window
        return window if priority < _BULK_PRIORITY else window - window // 4


def nudge_queued(now_s: float, requests: Collection[Live]) -> None:
    """What has never been sent may have a gateway or a place now."""
    for live in requests:
        if live.session.state is State.QUEUED:
            live.session.nudge(now_s)
